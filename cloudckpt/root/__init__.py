"""What exists below one root, and what may go: epochs and commits, retention rules, pruning, sweeping.

The catalog is the only room that creates or deletes a manifest.
"""

from cloudckpt.root.absence import mistaken_for
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Fit, Unreadable
from cloudckpt.root.choice import Candidate, Choice, Wanted
from cloudckpt.root.destination import Destination, Epoch, Target, own_url
from cloudckpt.root.known import ManifestCache
from cloudckpt.root.overview import Overview, overview
from cloudckpt.root.pruning import Cleaner, Pruner, RetentionScope
from cloudckpt.root.replacing import Exists, check_exists, check_place, refuse_nested
from cloudckpt.root.retention import (
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    Retention,
    RetentionRule,
    checked_rules,
    watched_rules,
    why_kept,
)
from cloudckpt.root.roots import Roots
from cloudckpt.root.sweep import Orphan, sweep
from cloudckpt.root.waiting import wait_for_next

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
    "ManifestCache",
    "Orphan",
    "Overview",
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
    "mistaken_for",
    "overview",
    "own_url",
    "refuse_nested",
    "sweep",
    "wait_for_next",
    "watched_rules",
    "why_kept",
]
