"""Stream PyTorch checkpoints straight to local disk, S3 or GCS, whole or not at all.

A name is imported when it is first asked for: most of them stand on PyTorch, and who imports cloudckpt need not save in
that process. `torch.distributed.checkpoint`, which takes longer to import than all of the package, is imported for
states that have what it plans: distributed tensors.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from cloudckpt.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ChecksumError,
    CloudCkptError,
    CommitUnknownError,
    ConflictError,
    CreateNotEnforcedError,
    CredentialsExpiredError,
    EarlierSaveFailedError,
    FencedError,
    FormatVersionError,
    IntegrityError,
    ManifestError,
    MissingShardError,
    OptionsError,
    PinnedError,
    RankLostError,
    RestoreFailedError,
    RetryExhaustedError,
    SaveFailedError,
    SourceError,
    StalledError,
    StateMismatchError,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.options import Options, RetryPolicy

if TYPE_CHECKING:
    from cloudckpt.ahead import Prefetch, prefetch
    from cloudckpt.checkpoint import contents, load, read, restore_files, save
    from cloudckpt.convert import (
        CloudHFReader,
        CloudHFWriter,
        Exported,
        export,
        import_,
        open,  # noqa: A004 (as gzip has it)
    )
    from cloudckpt.copying import Change, Copied, Damage, Difference, Verified, copy, diff, verify, verify_all
    from cloudckpt.dcp import CloudReader, CloudWriter
    from cloudckpt.format import register, register_code
    from cloudckpt.loading import Contents, TensorInfo
    from cloudckpt.manager import CheckpointManager, SavedParts
    from cloudckpt.page import report_page
    from cloudckpt.preemption import Notice, Preemption
    from cloudckpt.qualifying import Probe, probe
    from cloudckpt.report import (
        Advice,
        Event,
        OpenTelemetryEvents,
        Preempted,
        Prices,
        Pruned,
        Restored,
        SaveBegun,
        SaveCommitted,
        SaveFailed,
        SaveStaged,
        ScalarEvents,
    )
    from cloudckpt.root import Checkpoint, Fit, KeepAll, KeepBest, KeepEvery, KeepFor, KeepLast, Pin, RetentionRule
    from cloudckpt.saving import SaveHandle
    from cloudckpt.state import AccumulationWindow, PerRank, RandomState, RankZero, ResumableSampler, Trainable
    from cloudckpt.store import Traffic

    __version__: str

__all__ = [
    "AccessDeniedError",
    "AccumulationWindow",
    "Advice",
    "BucketNotFoundError",
    "Change",
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "ChecksumError",
    "CloudCkptError",
    "CloudHFReader",
    "CloudHFWriter",
    "CloudReader",
    "CloudWriter",
    "CommitUnknownError",
    "ConflictError",
    "Contents",
    "Copied",
    "CreateNotEnforcedError",
    "CredentialsExpiredError",
    "Damage",
    "Difference",
    "EarlierSaveFailedError",
    "Event",
    "Exported",
    "FencedError",
    "Fit",
    "FormatVersionError",
    "IntegrityError",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "ManifestError",
    "MissingShardError",
    "Notice",
    "OpenTelemetryEvents",
    "Options",
    "OptionsError",
    "PerRank",
    "Pin",
    "PinnedError",
    "Preempted",
    "Preemption",
    "Prefetch",
    "Prices",
    "Probe",
    "Pruned",
    "RandomState",
    "RankLostError",
    "RankZero",
    "RestoreFailedError",
    "Restored",
    "ResumableSampler",
    "RetentionRule",
    "RetryExhaustedError",
    "RetryPolicy",
    "SaveBegun",
    "SaveCommitted",
    "SaveFailed",
    "SaveFailedError",
    "SaveHandle",
    "SaveStaged",
    "SavedParts",
    "ScalarEvents",
    "SourceError",
    "StalledError",
    "StateMismatchError",
    "StorageError",
    "TensorInfo",
    "Traffic",
    "Trainable",
    "UnsupportedValueError",
    "Verified",
    "contents",
    "copy",
    "diff",
    "export",
    "import_",
    "load",
    "open",
    "prefetch",
    "probe",
    "read",
    "register",
    "register_code",
    "report_page",
    "restore_files",
    "save",
    "verify",
    "verify_all",
]

# The imports above, for a running program: the room, and what comes from it.
_LATE = {
    "ahead": ("Prefetch", "prefetch"),
    "checkpoint": ("contents", "load", "read", "restore_files", "save"),
    "convert": ("CloudHFReader", "CloudHFWriter", "Exported", "export", "import_", "open"),
    "copying": ("Change", "Copied", "Damage", "Difference", "Verified", "copy", "diff", "verify", "verify_all"),
    "dcp": ("CloudReader", "CloudWriter"),
    "format": ("register", "register_code"),
    "loading": ("Contents", "TensorInfo"),
    "manager": ("CheckpointManager", "SavedParts"),
    "page": ("report_page",),
    "preemption": ("Notice", "Preemption"),
    "qualifying": ("Probe", "probe"),
    "report": (
        "Advice",
        "Event",
        "OpenTelemetryEvents",
        "Preempted",
        "Prices",
        "Pruned",
        "Restored",
        "SaveBegun",
        "SaveCommitted",
        "SaveFailed",
        "SaveStaged",
        "ScalarEvents",
    ),
    "root": ("Checkpoint", "Fit", "KeepAll", "KeepBest", "KeepEvery", "KeepFor", "KeepLast", "Pin", "RetentionRule"),
    "saving": ("SaveHandle",),
    "state": ("AccumulationWindow", "PerRank", "RandomState", "RankZero", "ResumableSampler", "Trainable"),
    "store": ("Traffic",),
}

if not TYPE_CHECKING:  # a type checker that saw it would let every misspelt name pass

    def __getattr__(name: str) -> object:
        if name == "__version__":
            value = _installed_version()
        elif room := next((room for room, names in _LATE.items() if name in names), None):
            value = getattr(import_module(f"{__name__}.{room}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})

    def _installed_version() -> str:
        try:
            return version(__name__)
        except PackageNotFoundError:
            return "0+unknown"
