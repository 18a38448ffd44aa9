"""The error tree is public: its shape, what its members are besides, and that they cross process borders whole."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest

from cloudckpt import errors
from cloudckpt.errors import (
    BucketNotFoundError,
    ChecksumError,
    CloudCkptError,
    CredentialsExpiredError,
    ManifestError,
    MissingShardError,
    RetryExhaustedError,
    SaveFailedError,
    StateMismatchError,
    TransientError,
    UnsupportedValueError,
    is_transient,
)

TREE = {
    "CloudCkptError": "Exception",
    "OptionsError": "CloudCkptError ValueError",
    "StateMismatchError": "OptionsError",
    "CheckpointNotFoundError": "CloudCkptError FileNotFoundError",
    "ConflictError": "CloudCkptError",
    "CheckpointExistsError": "ConflictError FileExistsError",
    "PinnedError": "ConflictError",
    "FencedError": "ConflictError",
    "StorageError": "CloudCkptError",
    "AccessDeniedError": "StorageError PermissionError",
    "CredentialsExpiredError": "AccessDeniedError",
    "TransientError": "StorageError",
    "ThrottledError": "TransientError",
    "RetryExhaustedError": "StorageError",
    "CommitUnknownError": "StorageError",
    "ObjectNotFoundError": "StorageError FileNotFoundError",
    "BucketNotFoundError": "ObjectNotFoundError",
    "ObjectExistsError": "StorageError FileExistsError",
    "CreateNotEnforcedError": "StorageError",
    "IntegrityError": "CloudCkptError",
    "ChecksumError": "IntegrityError",
    "MissingShardError": "IntegrityError",
    "ManifestError": "IntegrityError",
    "FormatVersionError": "ManifestError",
    "UnsupportedValueError": "CloudCkptError TypeError",
    "SourceError": "CloudCkptError ValueError",
    "RankLostError": "CloudCkptError",
    "StalledError": "CloudCkptError",
    "RestoreFailedError": "CloudCkptError",
    "SaveFailedError": "CloudCkptError",
    "EarlierSaveFailedError": "SaveFailedError",
}
"""Error → its bases. A handler somewhere relies on every line: add, never change."""

STORAGE_FACTS = {"op": "put", "key": "step-1/a.safetensors", "attempts": 3, "elapsed_s": 1.5}
FACTS: dict[str, dict[str, Any]] = {
    "StateMismatchError": {"missing": ("a",), "unexpected": ("b", "c"), "mismatched": {"d": ((2, 3), (3, 2))}},
    "StorageError": STORAGE_FACTS,
    "PinnedError": {"note": "the paper"},
    "IntegrityError": {"key": "manifest.json"},
    "UnsupportedValueError": {"key": "scheduler.f", "type_name": "function"},
    "RankLostError": {"ranks": (1, 2), "phase": "commit"},
    "RestoreFailedError": {"name": "model", "changed": ("optimizer",)},
    "EarlierSaveFailedError": {"step": 3, "handle": None},
    "StalledError": {"key": "step-1/a.safetensors", "still_s": 1.5},
}
"""Attributes by the error that introduces them; those below inherit them."""

CLASSES = [getattr(errors, name) for name in TREE]


def facts_of(kind: type[CloudCkptError]) -> dict[str, Any]:
    return next((FACTS[base.__name__] for base in kind.__mro__ if base.__name__ in FACTS), {})


def test_the_tree_has_exactly_this_shape() -> None:
    found = {
        name: " ".join(base.__name__ for base in kind.__bases__)
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, CloudCkptError)
    }

    assert found == TREE


def test_everything_is_exported_and_drawn() -> None:
    assert set(errors.__all__) == {*TREE, "is_outage", "is_transient", "tells_outcome", "text_of"}
    assert [name for name in TREE if name not in str(errors.__doc__)] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_pickles_with_its_message_and_facts(kind: type[CloudCkptError]) -> None:
    facts = facts_of(kind)
    error = kind("step 7, rank 2: no", **facts)

    twin = pickle.loads(pickle.dumps(error))

    assert type(twin) is kind
    assert str(twin) == "step 7, rank 2: no"
    assert vars(twin) == vars(error)
    assert {name: getattr(twin, name) for name in facts} == facts


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_copies_with_its_notes(kind: type[CloudCkptError]) -> None:
    error = kind("no", **facts_of(kind))
    error.add_note("while saving step 7")

    twin = copy.deepcopy(error)

    assert (type(twin), str(twin), twin.__notes__) == (kind, "no", ["while saving step 7"])


@pytest.mark.parametrize("kind", CLASSES)
def test_facts_are_optional_and_never_absent(kind: type[CloudCkptError]) -> None:
    error = kind("no")

    assert [name for name in facts_of(kind) if not hasattr(error, name)] == []


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (StateMismatchError, ValueError),
        (errors.CheckpointNotFoundError, FileNotFoundError),
        (errors.CheckpointExistsError, FileExistsError),
        (CredentialsExpiredError, PermissionError),
        (BucketNotFoundError, FileNotFoundError),
        (errors.ObjectExistsError, FileExistsError),
        (UnsupportedValueError, TypeError),
    ],
)
def test_a_handler_for_the_builtin_catches_it_with_its_facts(
    kind: type[CloudCkptError], builtin: type[Exception]
) -> None:
    facts = facts_of(kind)

    with pytest.raises(builtin, match=r"\Ano such\Z") as caught:
        raise kind("no such", **facts)

    assert {name: getattr(caught.value, name) for name in facts} == facts


def test_no_error_looks_like_an_io_error_by_accident() -> None:
    """What is caught by `except OSError` is listed here, since retry code of others often starts so."""
    found = {kind.__name__ for kind in CLASSES if issubclass(kind, OSError)}

    assert found == {
        "CheckpointNotFoundError",
        "CheckpointExistsError",
        "AccessDeniedError",
        "CredentialsExpiredError",
        "ObjectNotFoundError",
        "BucketNotFoundError",
        "ObjectExistsError",
    }


def test_the_failures_of_a_save_pickle_with_the_errors_of_each_rank() -> None:
    failures = {0: ValueError("bad"), 3: ChecksumError("differs", key="r00003-0001.safetensors")}

    twin = pickle.loads(pickle.dumps(SaveFailedError("2 of 4 ranks failed", failures=failures)))

    assert [(rank, type(error), str(error)) for rank, error in twin.failures.items()] == [
        (0, ValueError, "bad"),
        (3, ChecksumError, "differs"),
    ]
    assert twin.failures[3].key == "r00003-0001.safetensors"


def test_facts_do_not_alias_what_the_caller_passed() -> None:
    failures: dict[int, BaseException] = {0: ValueError("bad")}
    error = SaveFailedError("failed", failures=failures)

    failures.clear()

    assert list(error.failures) == [0]


def test_only_transient_errors_are_tried_again() -> None:
    assert is_transient(TransientError("503", **STORAGE_FACTS))
    others = [kind("no") for kind in CLASSES if not issubclass(kind, TransientError)]
    assert [error for error in [*others, OSError(104, "reset"), TimeoutError()] if is_transient(error)] == []


@pytest.mark.parametrize("kind", [ChecksumError, MissingShardError, ManifestError])
def test_wrong_bytes_are_not_a_storage_fault(kind: type[CloudCkptError]) -> None:
    """Restore falls back to an older step on the first, and must not on the second."""
    assert not issubclass(kind, errors.StorageError)
    assert not issubclass(RetryExhaustedError, errors.IntegrityError)
