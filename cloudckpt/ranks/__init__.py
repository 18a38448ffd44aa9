"""Let the ranks of a job tell each other things, and know who of them is lost, without waiting for ever.

Over a gloo group of our own. Here is the only pickle of the package: between processes of one job, never to a store.
"""

from cloudckpt.ranks.accord import Accord
from cloudckpt.ranks.group import Group
from cloudckpt.ranks.outcome import MissingPartsError, RanksFailedError, named_ranks, own_failures, plain_errors
from cloudckpt.ranks.packet import Countdown, Packet
from cloudckpt.ranks.vote import Vote
from cloudckpt.ranks.world import ProcessGroup, Ranks, check_part, refuse_lonely_rank, taking_part, those_taking_part

__all__ = [
    "Accord",
    "Countdown",
    "Group",
    "MissingPartsError",
    "Packet",
    "ProcessGroup",
    "Ranks",
    "RanksFailedError",
    "Vote",
    "check_part",
    "named_ranks",
    "own_failures",
    "plain_errors",
    "refuse_lonely_rank",
    "taking_part",
    "those_taking_part",
]
