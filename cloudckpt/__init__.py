"""Stream PyTorch checkpoints straight to local disk, S3 or GCS, whole or not at all."""

from importlib.metadata import PackageNotFoundError, version

from cloudckpt.checkpoint import load, read, save
from cloudckpt.dcp import CloudReader, CloudWriter
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
from cloudckpt.options import Options, RetryPolicy
from cloudckpt.preemption import Notice, Preemption
from cloudckpt.report import Advice
from cloudckpt.root import Checkpoint, KeepBest, KeepEvery, KeepFor, KeepLast
from cloudckpt.saving import SaveHandle
from cloudckpt.state import AccumulationWindow, PerRank, ResumableSampler

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
