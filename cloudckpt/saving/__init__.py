"""Lead all ranks through one save: who writes which boxes, shards out, index, commit; also from a copy, in a thread."""

from cloudckpt.saving.background import Background, SaveHandle
from cloudckpt.saving.lead import PendingSave, PlanMemory, begin_save
from cloudckpt.saving.output import RankOutput, Record, commit_index, discard, made, stats_of
from cloudckpt.saving.reuse import Reuse, ReuseMemory
from cloudckpt.saving.session import Session
from cloudckpt.saving.snapshot import expected_shards
from cloudckpt.saving.source import Source, Staging, chunk_of, is_elsewhere, object_of
from cloudckpt.saving.tally import Written, assemble, check_against_names, check_against_plan
from cloudckpt.saving.uncommitted import Uncommitted

__all__ = [
    "Background",
    "PendingSave",
    "PlanMemory",
    "RankOutput",
    "Record",
    "Reuse",
    "ReuseMemory",
    "SaveHandle",
    "Session",
    "Source",
    "Staging",
    "Uncommitted",
    "Written",
    "assemble",
    "begin_save",
    "check_against_names",
    "check_against_plan",
    "chunk_of",
    "commit_index",
    "discard",
    "expected_shards",
    "is_elsewhere",
    "made",
    "object_of",
    "stats_of",
]
