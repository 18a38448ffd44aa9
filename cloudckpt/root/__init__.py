"""What exists below one root, and what may go: epochs and commits, retention rules, pruning, sweeping.

The catalog is the only room that creates or deletes a manifest.
"""

from cloudckpt.root.absence import mistaken_for
from cloudckpt.root.catalog import Catalog
from cloudckpt.root.checkpoint import Checkpoint, Fit, Unreadable, prefix_of
from cloudckpt.root.choice import Candidate, Choice, Wanted, newest_or_the_one, nothing_at, the_one_at
from cloudckpt.root.cleaning import Cleaner
from cloudckpt.root.destination import Destination, Epoch, Target, own_url
from cloudckpt.root.holders import ShardPlaces, index_of, own_bytes
from cloudckpt.root.known import ManifestCache
from cloudckpt.root.naming import committed_as, give_name, named, named_candidates, names_of, no_name
from cloudckpt.root.overview import Overview, overview
from cloudckpt.root.pinning import copy_pin, pin, pins_of, refuse_pinned, unpin
from cloudckpt.root.pins import Pin
from cloudckpt.root.pruning import Pruner, RetentionScope
from cloudckpt.root.replacing import (
    Exists,
    check_exists,
    check_own,
    check_place,
    refuse_files,
    refuse_nested,
)
from cloudckpt.root.retention import (
    KeepAll,
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
from cloudckpt.root.sharing import BaseGoneError
from cloudckpt.root.sweep import Orphan, sweep
from cloudckpt.root.thinning import Plan, Thinning
from cloudckpt.root.waiting import wait_for_next

__all__ = [
    "BaseGoneError",
    "Candidate",
    "Catalog",
    "Checkpoint",
    "Choice",
    "Cleaner",
    "Destination",
    "Epoch",
    "Exists",
    "Fit",
    "KeepAll",
    "KeepBest",
    "KeepEvery",
    "KeepFor",
    "KeepLast",
    "ManifestCache",
    "Orphan",
    "Overview",
    "Pin",
    "Plan",
    "Pruner",
    "Retention",
    "RetentionRule",
    "RetentionScope",
    "Roots",
    "ShardPlaces",
    "Target",
    "Thinning",
    "Unreadable",
    "Wanted",
    "check_exists",
    "check_own",
    "check_place",
    "checked_rules",
    "committed_as",
    "copy_pin",
    "give_name",
    "index_of",
    "mistaken_for",
    "named",
    "named_candidates",
    "names_of",
    "newest_or_the_one",
    "no_name",
    "nothing_at",
    "overview",
    "own_bytes",
    "own_url",
    "pin",
    "pins_of",
    "prefix_of",
    "refuse_files",
    "refuse_nested",
    "refuse_pinned",
    "sweep",
    "the_one_at",
    "unpin",
    "wait_for_next",
    "watched_rules",
    "why_kept",
]
