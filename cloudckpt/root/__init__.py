"""What exists below one root, and what may go: epochs and commits, retention rules, pruning, sweeping.

The catalog is the only room that creates or deletes a manifest.
"""

from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Fit, Unreadable
from cloudckpt.root.choice import Candidate, Choice, Wanted
from cloudckpt.root.destination import Destination, Epoch, Target, own_url
from cloudckpt.root.pruning import Cleaner, Pruner, RetentionScope
from cloudckpt.root.replacing import Exists, check_exists, check_place
from cloudckpt.root.retention import (
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    Retention,
    RetentionRule,
    checked_rules,
    watched_rules,
)
from cloudckpt.root.roots import Roots
from cloudckpt.root.sweep import Orphan, sweep

__all__ = [
    "Candidate",
    "Catalog",
    "Checkpoint",
    "Choice",
    "Cleaner",
    "Destination",
    "Epoch",
    "Exists",
    "Fit",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "Orphan",
    "Pruner",
    "Retention",
    "RetentionRule",
    "RetentionScope",
    "Roots",
    "Target",
    "Unreadable",
    "Wanted",
    "check_exists",
    "check_place",
    "checked_rules",
    "own_url",
    "sweep",
    "watched_rules",
]
