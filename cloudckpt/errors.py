"""Every error that cloudckpt raises, grouped by what the caller does next.

```
CloudCkptError
├── OptionsError (ValueError)                       fix the call
│   └── StateMismatchError                          the state and the checkpoint differ in names or shapes
├── CheckpointNotFoundError (FileNotFoundError)     start fresh, or fix the step
├── ConflictError                                   someone else's commit stands
│   ├── CheckpointExistsError (FileExistsError)
│   ├── PinnedError                                 unpin it first, if it is to go
│   └── FencedError                                 a newer job writes here: stop this one
├── StorageError                                    the store refused, or could not be reached
│   ├── AccessDeniedError (PermissionError)
│   │   └── CredentialsExpiredError                 refreshed once, then raised
│   ├── TransientError                              worth another try; only ever seen below the retry layer
│   │   └── ThrottledError                          the store asks for fewer requests
│   ├── RetryExhaustedError                         tried until the attempt cap or the deadline
│   ├── CommitUnknownError                          the write may have landed; nothing was deleted
│   ├── ObjectNotFoundError (FileNotFoundError)     no object under that key
│   │   └── BucketNotFoundError                     never taken for "no checkpoint"
│   ├── ObjectExistsError (FileExistsError)         a create met an object of somebody else's
│   └── CreateNotEnforcedError                      the store ignores create-only writes
├── IntegrityError                                  bytes are wrong: restore an older step
│   ├── ChecksumError
│   ├── MissingShardError
│   └── ManifestError
│       └── FormatVersionError                      a newer cloudckpt wrote it: upgrade
├── RestoreFailedError                              an object did not take its state: load one that fits
├── UnsupportedValueError (TypeError)               a value that the codec refuses
├── SourceError (ValueError)                        what is to be imported is damaged, or of a kind that is not read
├── RankLostError                                   other ranks died, hang or never came: restart the job
├── StalledError                                    a transfer of this rank stands still
└── SaveFailedError                                 nothing was committed
    └── EarlierSaveFailedError                      an earlier one; the one that was asked for is under way
```

Each keeps its facts as attributes, so that a handler never reads the message, and each pickles, because
errors cross process borders in `torch.distributed` gathers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = [
    "AccessDeniedError",
    "BucketNotFoundError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "ChecksumError",
    "CloudCkptError",
    "CommitUnknownError",
    "ConflictError",
    "CreateNotEnforcedError",
    "CredentialsExpiredError",
    "EarlierSaveFailedError",
    "FencedError",
    "FormatVersionError",
    "IntegrityError",
    "ManifestError",
    "MissingShardError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "OptionsError",
    "PinnedError",
    "RankLostError",
    "RestoreFailedError",
    "RetryExhaustedError",
    "SaveFailedError",
    "SourceError",
    "StalledError",
    "StateMismatchError",
    "StorageError",
    "ThrottledError",
    "TransientError",
    "UnsupportedValueError",
    "is_outage",
    "is_transient",
    "tells_outcome",
    "text_of",
]


class CloudCkptError(Exception):
    """The root of all errors of this library."""


class OptionsError(CloudCkptError, ValueError):
    """The call is wrong; nothing was read, written or changed."""


class StateMismatchError(OptionsError):
    """The state to restore into and the checkpoint differ; no tensor of the state was touched.

    Attributes:
        missing: names that the state has and the checkpoint lacks.
        unexpected: names that the checkpoint has and the state lacks.
        mismatched: name → (shape in the state, shape in the checkpoint).
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched or {})


class CheckpointNotFoundError(CloudCkptError, FileNotFoundError):
    """No committed checkpoint is there under that step or URL."""


class ConflictError(CloudCkptError):
    """Somebody else's commit stands; ours was not made."""


class CheckpointExistsError(ConflictError, FileExistsError):
    """The step or URL already holds a committed checkpoint; it was not changed."""


class PinnedError(ConflictError):
    """The checkpoint is pinned, and stays until it is unpinned; it was not changed.

    Attributes:
        note: why it is pinned, as who did it says.
    """

    def __init__(self, message: str, *, note: str = "") -> None:
        super().__init__(message)
        self.note = note


class FencedError(ConflictError):
    """A newer job has claimed the root; this one must not commit any more."""


class StorageError(CloudCkptError):
    """The store refused an operation, or could not be reached.

    Attributes:
        op: the verb (`put`, `create`, `get`, `read`, `head`, `list`, `delete`), or "".
        key: the object's key below the store's root, or "".
        attempts: requests made for this operation.
        elapsed_s: seconds spent on it, waits included.
        left_keys: of a `delete`, the keys that are still there; none if that is not known.
        may_have_landed: of a write, whether it may have taken effect although it failed: false if it was never sent,
            or was refused.
        is_other_object: whether what was read has not the size of the object that was meant: so damaged is the object,
            or the answer.
        is_full: whether the store has no room for it, or a quota is used up.
    """

    may_have_landed: bool = True
    is_other_object: bool = False
    is_full: bool = False

    def __init__(self, message: str, *, op: str = "", key: str = "", attempts: int = 1, elapsed_s: float = 0.0) -> None:
        super().__init__(message)
        self.op = op
        self.key = key
        self.attempts = attempts
        self.elapsed_s = elapsed_s
        self.left_keys: tuple[str, ...] = ()


class AccessDeniedError(StorageError, PermissionError):
    """The credentials do not allow the operation; asking again does not help."""

    may_have_landed = False


class CredentialsExpiredError(AccessDeniedError):
    """The credentials were valid once; the retry layer refreshes them and asks again, once."""


class TransientError(StorageError):
    """A fault that a later attempt may not meet: throttling, a reset, a time-out, a short body.

    The effect of a write that failed so is unknown: it may have landed.
    """


class ThrottledError(TransientError):
    """The store asks for fewer requests: the next one follows after a longer pause, and this one does not count.

    Attributes:
        retry_after_s: seconds that the reply asks to wait; 0 if it does not say.
    """

    def __init__(self, message: str, *, op: str = "", key: str = "", attempts: int = 1, elapsed_s: float = 0.0) -> None:
        super().__init__(message, op=op, key=key, attempts=attempts, elapsed_s=elapsed_s)
        self.retry_after_s = 0.0


class RetryExhaustedError(StorageError):
    """Every attempt met a transient fault, until the attempt cap or the deadline."""


class CommitUnknownError(StorageError):
    """A create may or may not have landed and cannot be read back; nothing was deleted.

    Attributes:
        is_taken: whether the store's only answer was that the key is taken; unknown is just whose object it is.
    """

    is_taken: bool = False


class ObjectNotFoundError(StorageError, FileNotFoundError):
    """No object has that key."""

    may_have_landed = False


class BucketNotFoundError(ObjectNotFoundError):
    """The bucket itself is missing; cloudckpt never creates one."""


class ObjectExistsError(StorageError, FileExistsError):
    """A create met an existing object, which was left as it is."""


class CreateNotEnforcedError(StorageError):
    """The store overwrote an object that it was told only to create."""


class IntegrityError(CloudCkptError):
    """Bytes on the store are not what a commit recorded.

    Attributes:
        key: the object that is wrong, below the URL that was opened; where a value is, its name or "".
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class ChecksumError(IntegrityError):
    """An object's bytes do not have the recorded digest or length.

    Attributes:
        blocks: numbers of the blocks that differ in what was read of a shard; none where its length is what is wrong.
    """

    blocks: tuple[int, ...] = ()


class MissingShardError(IntegrityError):
    """A committed checkpoint lacks an object that its manifest or index names."""


class ManifestError(IntegrityError):
    """A manifest or index cannot be decoded, or contradicts its own key or limits."""


class FormatVersionError(ManifestError):
    """A newer version of the format; the bytes may be right, and this library cannot tell."""


class RestoreFailedError(CloudCkptError):
    """An object did not take the state that was read for it, after others had; the message says what was changed.

    Or what a restore had left for later did not come whole.

    Attributes:
        name: of the object in the state.
        changed: names of the entries of the state that are restored; the object itself may be in part.
    """

    def __init__(self, message: str, *, name: str = "", changed: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.name = name
        self.changed = tuple(changed)


class UnsupportedValueError(CloudCkptError, TypeError):
    """A value that the format cannot hold; nothing was written.

    Attributes:
        key: where the value stands in the state.
        type_name: its type.
    """

    def __init__(self, message: str, *, key: str = "", type_name: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.type_name = type_name


class SaveFailedError(CloudCkptError):
    """A save failed on at least one rank, and nothing was committed.

    Attributes:
        failures: rank → the error met there.
    """

    def __init__(self, message: str, *, failures: Mapping[int, BaseException] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class EarlierSaveFailedError(SaveFailedError):
    """A save before this one failed in the background and nobody was told; the one that was asked for is under way.

    What the earlier one failed with is the cause of this.

    Attributes:
        step: the step that was not saved.
        handle: the `SaveHandle` of the save that was asked for; None in another process.
    """

    def __init__(self, message: str, *, step: int = -1, handle: object = None) -> None:
        super().__init__(message)
        self.step = step
        self.handle = handle

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {**self.__dict__, "handle": None}


class SourceError(CloudCkptError, ValueError):
    """What is to be imported is damaged, contradicts itself, or is of a kind that is not read; nothing was committed.

    Attributes:
        key: the file, or the tensor or value in it.
    """

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class RankLostError(CloudCkptError):
    """Other ranks of this save or restore died, hang, gave up or never came.

    Attributes:
        ranks: which.
        phase: what was going on.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), phase: str = "") -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.phase = phase


class StalledError(CloudCkptError):
    """A transfer of this rank stood still until the deadline; its request was left to itself.

    Attributes:
        key: the object in transfer.
        still_s: seconds without a finished request.
    """

    def __init__(self, message: str, *, key: str = "", still_s: float = 0.0) -> None:
        super().__init__(message)
        self.key = key
        self.still_s = still_s


def is_outage(error: BaseException) -> bool:
    """Tell whether a store is why a save failed, so that another time or place may do better.

    What the call or the set-up is wrong about is no outage (a bucket that is missing, creates that are not enforced),
    nor is a rank that is lost.
    """
    if isinstance(error, SaveFailedError):
        return bool(error.failures) and all(map(is_outage, error.failures.values()))
    is_wrong = isinstance(error, ObjectNotFoundError | CreateNotEnforcedError)
    return isinstance(error, StorageError | StalledError) and not is_wrong


def is_transient(error: BaseException) -> bool:
    """Tell whether the retry layer may try the same operation again."""
    return isinstance(error, TransientError)


def tells_outcome(error: BaseException) -> bool:
    """Tell whether a save that raised this has met its end: an interrupt comes at any time, and says nothing of it."""
    causes = error.failures.values() if isinstance(error, SaveFailedError) and error.failures else [error]
    return all(isinstance(cause, CloudCkptError) and not isinstance(cause, CommitUnknownError) for cause in causes)


def text_of(thing: object, show: Callable[[object], str] = str) -> str:
    """Return the text of anybody's object or error for a message; where it has none, of what type it is.

    What it does wrong must not keep others from being told, a state from being taken back, or a thread from its work.
    """
    try:
        return show(thing)
    except Exception as exc:  # noqa: BLE001 (anybody's code)
        return f"{type(thing).__qualname__}, whose text fails with {type(exc).__name__}"
