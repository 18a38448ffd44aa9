"""The policy of one root for one job: when to save, what to keep, what to resume from."""

from cloudckpt.manager.manager import CheckpointManager

__all__ = ["CheckpointManager"]
