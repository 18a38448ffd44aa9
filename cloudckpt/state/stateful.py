"""Save and restore an object by its own state_dict and load_state_dict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import cast

import torch

from cloudckpt.state.backup import backup_of
from cloudckpt.state.beside import Beside
from cloudckpt.state.collector import collector_awake
from cloudckpt.state.entry import Choosy, Entry, Misfit, Place, mapping_of
from cloudckpt.state.protocol import Stateful

__all__ = ["StatefulEntry"]

logger = logging.getLogger(__name__)


class StatefulEntry(Entry):
    """An object with a state_dict, which is handed memory of its own: it may clear what it has before it copies."""

    fills = False
    is_asked = True
    is_alike = True

    def __init__(self, place: Place, stateful: Stateful, beside: Beside) -> None:
        super().__init__(place)
        self._stateful = stateful
        self._beside = beside

    def current(self) -> object:
        with collector_awake():
            return self._stateful.state_dict()

    def fillable(self) -> object:
        try:
            return self.current()
        except Exception as exc:  # noqa: BLE001 (of an object that has no state before it was given one)
            logger.info("%s has no state yet (%s: %s); it takes what was saved", self.name, type(exc).__name__, exc)
            return {}

    def load(self, restored: object, live: object) -> None:
        state = self._beside.in_group_order(self._stateful, restored) if isinstance(restored, dict) else restored
        self._stateful.load_state_dict(cast("dict[str, object]", state))

    def backup(self) -> Callable[[], None] | None:
        return backup_of(self._stateful)

    def compare(self, restored: object, dtypes: Mapping[str, torch.dtype]) -> Misfit:
        """Ask an object that can tell before anything is changed."""
        if not isinstance(self._stateful, Choosy):
            return Misfit()
        found = self._stateful.state_dict_misfits(mapping_of(restored, self.name))
        return Misfit(reasons=[f"{self.name} {reason}" for reason in found])
