"""Hear that this machine is about to go, from signals, clouds and schedulers; decide with all ranks when to save."""

from cloudckpt.preemption.notices import Notice
from cloudckpt.preemption.schedule import Schedule
from cloudckpt.preemption.watch import EXIT_PREEMPTED, Preemption

__all__ = ["EXIT_PREEMPTED", "Notice", "Preemption", "Schedule"]
