"""Stream PyTorch checkpoints straight to local disk, S3 or GCS, whole or not at all."""

from importlib.metadata import PackageNotFoundError, version

from cloudckpt.accumulation import AccumulationWindow
from cloudckpt.advice import Advice
from cloudckpt.background import SaveHandle
from cloudckpt.catalog import Checkpoint
from cloudckpt.checkpoint import load, read, save
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
    FencedError,
    FormatVersionError,
    IntegrityError,
    ManifestError,
    MissingShardError,
    OptionsError,
    RankLostError,
    RetryExhaustedError,
    SaveFailedError,
    StalledError,
    StateMismatchError,
    StorageError,
    UnsupportedValueError,
)
from cloudckpt.manager import CheckpointManager
from cloudckpt.notices import Notice
from cloudckpt.options import Options, RetryPolicy
from cloudckpt.per_rank import PerRank
from cloudckpt.preemption import Preemption
from cloudckpt.reader import CloudReader
from cloudckpt.retention import KeepBest, KeepEvery, KeepFor, KeepLast
from cloudckpt.sampler import ResumableSampler
from cloudckpt.writer import CloudWriter

try:
    __version__ = version("cloudckpt")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "AccessDeniedError",
    "AccumulationWindow",
    "Advice",
    "BucketNotFoundError",
    "Checkpoint",
    "CheckpointExistsError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "ChecksumError",
    "CloudCkptError",
    "CloudReader",
    "CloudWriter",
    "CommitUnknownError",
    "ConflictError",
    "CreateNotEnforcedError",
    "CredentialsExpiredError",
    "FencedError",
    "FormatVersionError",
    "IntegrityError",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "ManifestError",
    "MissingShardError",
    "Notice",
    "Options",
    "OptionsError",
    "PerRank",
    "Preemption",
    "RankLostError",
    "ResumableSampler",
    "RetryExhaustedError",
    "RetryPolicy",
    "SaveFailedError",
    "SaveHandle",
    "StalledError",
    "StateMismatchError",
    "StorageError",
    "UnsupportedValueError",
    "load",
    "read",
    "save",
]
