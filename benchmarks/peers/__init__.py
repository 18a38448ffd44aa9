"""Each way to write and read a checkpoint as the same calls, by the name that commands and results know it by."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers.dcp import CONNECTOR, DCP, STOCK
from benchmarks.peers.files import FILES
from benchmarks.peers.formats import FORMATS
from benchmarks.peers.kinds import Opened, Peer, Place
from benchmarks.peers.ours import MANAGED, OURS
from benchmarks.peers.raw import RAW

__all__ = ["CONNECTOR", "MANAGED", "PEERS", "STOCK", "Opened", "Peer", "Place"]

PEERS: Mapping[str, Peer] = {**OURS, **DCP, **FILES, **FORMATS, **RAW}
