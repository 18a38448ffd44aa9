"""Say what saves and restores did and cost: to the log, to a person at a terminal, and as advice on the interval."""

from cloudckpt.report.advice import Advice, advise
from cloudckpt.report.journal import Entry, Journal
from cloudckpt.report.progress import Progress, Show, as_bytes

__all__ = ["Advice", "Entry", "Journal", "Progress", "Show", "advise", "as_bytes"]
