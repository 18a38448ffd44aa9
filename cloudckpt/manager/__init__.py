"""The policy of one root for one job: when to save, what to keep, what to resume from."""

from cloudckpt.manager.manager import CheckpointManager
from cloudckpt.manager.parts import SavedParts

__all__ = ["CheckpointManager", "SavedParts"]
