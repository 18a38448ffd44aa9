"""Object verbs over one root: put, create, get, list and delete, on local disk, S3, GCS and whatever fsspec opens.

A store moves bytes and knows nothing of tensors, steps or ranks. Each backend makes one request per verb and raises our
errors; the one layer around it is the only place that tries again. No cloud library is imported before a URL asks.
"""

from cloudckpt.store.aside import undisturbed
from cloudckpt.store.assembling import Place, appended, assembled, refuse_beyond_one_put
from cloudckpt.store.base import Listing, ObjectInfo, Store, check_key, is_key
from cloudckpt.store.buffers import joined, new_memory
from cloudckpt.store.intake import Flow, Intake, IntakeError, RangeGets
from cloudckpt.store.limit import LeftBehindError, note_move, one_deadline, told_of_moves, watched
from cloudckpt.store.local import scrub
from cloudckpt.store.location import TEXT_OPTIONS, local_path
from cloudckpt.store.opening import environment_options, open_store
from cloudckpt.store.probe import probe_create, probe_write, race
from cloudckpt.store.proof import PROVEN_BYTES
from cloudckpt.store.redact import hide
from cloudckpt.store.retrying import RetryingStore
from cloudckpt.store.stats import StoreStats, Traffic

__all__ = [
    "PROVEN_BYTES",
    "TEXT_OPTIONS",
    "Flow",
    "Intake",
    "IntakeError",
    "LeftBehindError",
    "Listing",
    "ObjectInfo",
    "Place",
    "RangeGets",
    "RetryingStore",
    "Store",
    "StoreStats",
    "Traffic",
    "appended",
    "assembled",
    "check_key",
    "environment_options",
    "hide",
    "is_key",
    "joined",
    "local_path",
    "new_memory",
    "note_move",
    "one_deadline",
    "open_store",
    "probe_create",
    "probe_write",
    "race",
    "refuse_beyond_one_put",
    "scrub",
    "told_of_moves",
    "undisturbed",
    "watched",
]
