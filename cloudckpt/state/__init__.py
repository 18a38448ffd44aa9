"""The caller's objects as named tensors and values, and back: modules, optimizers, loaders, generators, containers.

Also what a training program puts into its state to be resumed exactly: a sampler, gradients of a window, state of one
rank.
"""

from cloudckpt.state.accumulation import AccumulationWindow
from cloudckpt.state.attributes import notes_of, stateless_module, with_attributes
from cloudckpt.state.capture import bind, capture, captured
from cloudckpt.state.collector import collector_at_rest, collector_awake
from cloudckpt.state.entry import Entry, is_tensor
from cloudckpt.state.files import FILES, Files
from cloudckpt.state.later import hold, taken_over
from cloudckpt.state.matching import plan_restore
from cloudckpt.state.overlap import local_parts
from cloudckpt.state.per_rank import PerRank, RankName
from cloudckpt.state.rank_zero import RankZero
from cloudckpt.state.restoration import Allowed, Resize, Restoration
from cloudckpt.state.rng import RandomState
from cloudckpt.state.sampler import ResumableSampler
from cloudckpt.state.saved import OURS, Saved
from cloudckpt.state.trainable import Trainable

__all__ = [
    "FILES",
    "OURS",
    "AccumulationWindow",
    "Allowed",
    "Entry",
    "Files",
    "PerRank",
    "RandomState",
    "RankName",
    "RankZero",
    "Resize",
    "Restoration",
    "ResumableSampler",
    "Saved",
    "Trainable",
    "bind",
    "capture",
    "captured",
    "collector_at_rest",
    "collector_awake",
    "hold",
    "is_tensor",
    "local_parts",
    "notes_of",
    "plan_restore",
    "stateless_module",
    "taken_over",
    "with_attributes",
]
