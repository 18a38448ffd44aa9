"""Say what saves and restores did and cost: to the log, a person, programs, and as advice on the interval."""

from cloudckpt.report.advice import Advice, Costs, advise
from cloudckpt.report.events import (
    Event,
    OnEvent,
    Preempted,
    Pruned,
    Restored,
    SaveBegun,
    SaveCommitted,
    SaveFailed,
    SaveStaged,
)
from cloudckpt.report.journal import Entry, Journal
from cloudckpt.report.loggers import ScalarEvents
from cloudckpt.report.prices import MONTH_S, Prices, money, prices_from
from cloudckpt.report.progress import Progress, Show, as_bytes, plain
from cloudckpt.report.telemetry import OpenTelemetryEvents

__all__ = [
    "MONTH_S",
    "Advice",
    "Costs",
    "Entry",
    "Event",
    "Journal",
    "OnEvent",
    "OpenTelemetryEvents",
    "Preempted",
    "Prices",
    "Progress",
    "Pruned",
    "Restored",
    "SaveBegun",
    "SaveCommitted",
    "SaveFailed",
    "SaveStaged",
    "ScalarEvents",
    "Show",
    "advise",
    "as_bytes",
    "money",
    "plain",
    "prices_from",
]
