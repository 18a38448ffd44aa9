"""Let the ranks of a job tell each other things, and know who of them is lost, without waiting for ever.

Over a gloo group of our own. Here is the only pickle of the package: between processes of one job, never to a store.
"""

from cloudckpt.ranks.group import Group, RanksFailedError, UndecidedError, refuse_lonely_rank
from cloudckpt.ranks.outcome import own_failures, plain_errors
from cloudckpt.ranks.packet import Countdown, Packet
from cloudckpt.ranks.vote import Vote

__all__ = [
    "Countdown",
    "Group",
    "Packet",
    "RanksFailedError",
    "UndecidedError",
    "Vote",
    "own_failures",
    "plain_errors",
    "refuse_lonely_rank",
]
