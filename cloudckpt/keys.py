"""Derive every object key from step, epoch, attempt, rank and number; read such keys back, strictly.

Pure names. Nothing that stands in a manifest or an index is ever used as a key: keys are derived here and only
compared (FORMAT invariant 4). A name that this module would not have written is no name of ours.
"""

from __future__ import annotations

import operator
import re
import secrets
from collections.abc import Iterable
from typing import Literal

from cloudckpt.errors import OptionsError, text_of

__all__ = [
    "EPOCHS_PREFIX",
    "EPOCH_LIMIT",
    "MANIFEST_NAME",
    "PINS_PREFIX",
    "SHARD_SUFFIX",
    "STEPS_BEGIN",
    "STEP_LIMIT",
    "EpochMark",
    "check_name",
    "checkpoint_prefix",
    "epoch_key",
    "index_key",
    "is_attempt",
    "mark_key",
    "marked_epoch",
    "name_key",
    "new_attempt",
    "parse_checkpoint_prefix",
    "parse_epoch_key",
    "parse_name_key",
    "parse_pin_key",
    "parse_shard_name",
    "pin_key",
    "shard_key",
    "shown",
    "step_number",
]

EPOCHS_PREFIX = "epochs/"
PINS_PREFIX = "pins/"
STEPS_BEGIN = "step-"
MANIFEST_NAME = "manifest.json"
SHARD_SUFFIX = ".safetensors"

# Ten digits keep keys in step order for every listing; more steps than that would break the order silently.
STEP_LIMIT = 10**10
EPOCH_LIMIT = 10**10
EpochMark = Literal["committed", "emptied"]
_CHECKPOINT = re.compile(r"\Astep-([0-9]{10})-e([0-9]{4,10})/\Z")
_EPOCH = re.compile(r"\Aepochs/([0-9]{10})\.json\Z")
_SHARD = re.compile(r"r([0-9]{5,})-([0-9]{4,})\.safetensors")
_ATTEMPT = re.compile(r"\A[0-9a-f]{16}\Z")
# What every store, shell and URL takes as it is.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*(/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*")
_NAME_LIMIT = 200
_NOT_NAMES = ("latest", "best")
_SHOWN = 200


def shown(value: object) -> str:
    """Return `repr(value)` for a message, where foreign text has neither control characters nor megabytes."""
    text = text_of(value, repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def step_number(step: object) -> int:
    """Return a training step as an `int`; numpy's and torch's whole numbers are ones, True is none.

    Raises:
        OptionsError: it is no whole number.
    """
    try:
        if not isinstance(step, bool):
            return operator.index(step)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise OptionsError(f"step is {shown(step)}; give the training step, a whole number")


def checkpoint_prefix(step: int, epoch: int) -> str:
    """Return the prefix (with its slash) of the checkpoint that `epoch` saves at `step`."""
    if not 0 <= step < STEP_LIMIT:
        raise OptionsError(f"step {step} is not between 0 and {STEP_LIMIT - 1}; give the training step")
    if not 0 <= epoch < EPOCH_LIMIT:
        raise OptionsError(f"epoch {epoch} is not between 0 and {EPOCH_LIMIT - 1}")
    return f"{STEPS_BEGIN}{step:010d}-e{epoch:04d}/"


def parse_checkpoint_prefix(prefix: str) -> tuple[int, int] | None:
    """Return (step, epoch) of a prefix that `checkpoint_prefix` wrote, else None."""
    match = _CHECKPOINT.match(prefix)
    if match is None:
        return None
    step, epoch = int(match[1]), int(match[2])
    return (step, epoch) if checkpoint_prefix(step, epoch) == prefix else None


def epoch_key(epoch: int) -> str:
    """Return the key of an epoch's claim."""
    if not 0 < epoch < EPOCH_LIMIT:
        raise OptionsError(f"epoch {epoch} is not between 1 and {EPOCH_LIMIT - 1}")
    return f"{EPOCHS_PREFIX}{epoch:010d}.json"


def parse_epoch_key(key: str) -> int | None:
    """Return the epoch of a key that `epoch_key` wrote, else None."""
    match = _EPOCH.match(key)
    return int(match[1]) or None if match else None


def mark_key(mark: EpochMark, epoch: int) -> str:
    """Return the key of what says of an epoch that it has committed something, or that all up to it was deleted."""
    return f"{epoch_key(epoch).removesuffix('.json')}.{mark}"


def marked_epoch(mark: EpochMark, keys: Iterable[str]) -> int:
    """Return the highest epoch of which one of these keys is such a mark, 0 if none is."""
    ending = f".{mark}"
    named = (key.removesuffix(ending) for key in keys if key.endswith(ending))
    return max((parse_epoch_key(f"{name}.json") or 0 for name in named), default=0)


def pin_key(prefix: str) -> str:
    """Return the key of the pin of the checkpoint under a prefix."""
    if parse_checkpoint_prefix(prefix) is None:
        raise OptionsError(f"{prefix!r} is no step of a root, and only these are pinned")
    return f"{PINS_PREFIX}{prefix.removesuffix('/')}.json"


def parse_pin_key(key: str) -> str | None:
    """Return the prefix of the checkpoint of which `pin_key` wrote this key, else None."""
    if not (key.startswith(PINS_PREFIX) and key.endswith(".json")):
        return None
    prefix = f"{key.removeprefix(PINS_PREFIX).removesuffix('.json')}/"
    return None if parse_checkpoint_prefix(prefix) is None else prefix


def check_name(name: object) -> str:
    """Return a name that a checkpoint may be given.

    Raises:
        OptionsError: it is none.
    """
    if isinstance(name, str) and len(name) <= _NAME_LIMIT and _NAME.fullmatch(name) and name not in _NOT_NAMES:
        return name
    raise OptionsError(
        f"name is {shown(name)}; give letters, digits and _.=- (and / between parts that begin with a letter, a digit "
        f"or _), {_NAME_LIMIT} at most, and neither 'latest' nor 'best', which mean something else"
    )


def name_key(name: str, prefix: str, attempt: str) -> str:
    """Return the key that gives a name to what an attempt commits under a prefix."""
    if parse_checkpoint_prefix(prefix) is None:
        raise OptionsError(f"{prefix!r} is no step of a root, and only these have names")
    return f"{PINS_PREFIX}{check_name(name)}/{prefix.removesuffix('/')}.{attempt}"


def parse_name_key(key: str) -> tuple[str, str, str] | None:
    """Return (name, prefix, attempt) of a key that `name_key` wrote, else None."""
    above, _, last = key.rpartition("/")
    step, _, attempt = last.partition(".")
    name = above.removeprefix(PINS_PREFIX)
    if above == name or parse_checkpoint_prefix(f"{step}/") is None or not is_attempt(attempt):
        return None
    return (name, f"{step}/", attempt) if _NAME.fullmatch(name) else None


def new_attempt() -> str:
    """Return a fresh attempt id: 64 random bits, so that no two tries ever share a key."""
    return secrets.token_hex(8)


def is_attempt(text: str) -> bool:
    """Tell whether `text` has the form of an attempt id."""
    return _ATTEMPT.match(text) is not None


def index_key(attempt: str) -> str:
    """Return the index's key, relative to its checkpoint."""
    return f"{attempt}/index.bin"


def shard_key(attempt: str, rank: int, number: int) -> str:
    """Return a shard's key, relative to its checkpoint."""
    if rank < 0 or number < 0:
        raise OptionsError(f"shard {number} of rank {rank} has no key; both count from 0")
    return f"{attempt}/r{rank:05d}-{number:04d}{SHARD_SUFFIX}"


def parse_shard_name(key: str) -> tuple[int, int] | None:
    """Return (rank, number) of a key of a shard by its last part, else None."""
    match = _SHARD.fullmatch(key.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None
