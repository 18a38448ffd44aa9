"""Add up what saves and restores cost a job, and say what follows from it."""

from cloudckpt.report.advice import Advice, advise
from cloudckpt.report.meter import Meter

__all__ = [
    "Advice",
    "Meter",
    "advise",
]
