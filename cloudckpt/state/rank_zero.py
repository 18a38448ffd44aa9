"""Save what the first rank has of something that differs between ranks, and give it to all of them.

    rank 0: value ──▶ saved under its name in the state        other ranks: are not asked
    every rank: what was saved, beside its `own` keys as they are there

Everything else in a state must be the same on all ranks, or each rank's own (`per_rank`). Nothing here touches a store.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

from torch import nn
from torch.optim import Optimizer

from cloudckpt.errors import OptionsError, UnsupportedValueError
from cloudckpt.format import Flat
from cloudckpt.late import DTensor, ShardedTensor
from cloudckpt.state.beside import Beside
from cloudckpt.state.entry import Entry, Place
from cloudckpt.state.per_rank import PerRank
from cloudckpt.state.protocol import Stateful
from cloudckpt.state.rng import RandomState
from cloudckpt.state.stateful import StatefulEntry
from cloudckpt.state.trainable import Trainable
from cloudckpt.state.values import ValueEntry

__all__ = ["RankZero", "rank_zero_entry"]

_DEPTH_LIMIT = 64
_DISTRIBUTED = (DTensor, ShardedTensor)


class RankZero:
    """A value, or an object with state_dict, that differs between ranks and of which the first rank's is saved.

    ```python
    history = {"best_loss": 0.3, "is_world_process_zero": True}  # which is False on the other ranks
    state = {"model": model, "history": RankZero(history, own=["is_world_process_zero"])}
    ```

    Other ranks' may differ, and are not asked: what they have is lost. After a restore every rank has what rank 0 had,
    except under its `own` keys, which are neither saved nor restored and stay as they are on each rank. Into a state
    without `RankZero` the same is restored as a plain value.

    Attributes:
        value: the value, which a restore updates where it can and replaces where it cannot; or the object.
        own: keys of it, or of its state_dict, that are each rank's own affair.
    """

    def __init__(self, value: object, *, own: Iterable[str] = ()) -> None:
        """Mark `value`.

        Raises:
            OptionsError: its state is shared by all ranks by its nature, or already each rank's own; or it has no
                keys, and `own` names some.
        """
        if (found := _forbidden(value, 0)) is not None:
            raise OptionsError(
                f"RankZero is for plain values and for one object with state_dict, not for a {type(found).__name__}; "
                "put that into the state by itself"
            )
        self.value = value
        self.own = (own,) if isinstance(own, str) else tuple(own)
        if self.own and not isinstance(value, dict) and not isinstance(value, Stateful):
            raise OptionsError(f"a {type(value).__name__} has no keys, and own names {', '.join(map(repr, self.own))}")


def _forbidden(value: object, depth: int) -> object | None:
    """Return what may not be one rank's, in a value or its containers."""
    if isinstance(value, nn.Module | Optimizer | PerRank | RandomState | RankZero | Trainable):
        return value
    if depth and isinstance(value, Stateful) and not isinstance(value, type):
        return value
    if isinstance(value, dict | list | tuple) and depth < _DEPTH_LIMIT:
        inner = value.values() if isinstance(value, dict) else value
        return next((found for child in inner if (found := _forbidden(child, depth + 1)) is not None), None)
    return None


def rank_zero_entry(place: Place, marked: RankZero, beside: Beside, shared: Collection[int]) -> Entry:
    """Return the entry of what is marked."""
    if isinstance(marked.value, Stateful) and not isinstance(marked.value, type):
        return _StatefulOfFirst(place, marked.value, beside, marked.own)
    inside = Place(place.path, place.name, marked.value, vars(marked), "value")
    return _ValueOfFirst(inside, shared, marked.own)


class _StatefulOfFirst(StatefulEntry):
    is_of_first_rank = True
    is_alike = False

    def __init__(self, place: Place, stateful: Stateful, beside: Beside, own: Collection[str]) -> None:
        super().__init__(place, stateful, beside)
        self.subject = stateful
        self._own = own

    def current(self) -> object:
        return _without(super().current(), self._own)

    def flat(self, nested: object) -> Flat:
        return _refuse_distributed(super().flat(nested), self.name)

    def load(self, restored: object, live: object) -> None:
        now = super().current() if self._own else {}
        super().load(_with(restored, now, self._own), live)


class _ValueOfFirst(ValueEntry):
    is_of_first_rank = True

    def __init__(self, place: Place, shared: Collection[int], own: Collection[str]) -> None:
        super().__init__(place, shared)
        self._own = own

    def current(self) -> object:
        return _without(super().current(), self._own)

    def flat(self, nested: object) -> Flat:
        return _refuse_distributed(super().flat(nested), self.name)

    def takes(self, name: str) -> bool:
        return True  # this rank's may be another one than was saved

    def load(self, restored: object, live: object) -> None:
        here = super().current()
        super().load(_with(restored, here, self._own), here)


def _without(state: object, own: Collection[str]) -> object:
    if not own or not isinstance(state, dict):
        return state
    kept = {key: value for key, value in state.items() if key not in own}
    return kept if type(state) is dict else type(state)(kept)


def _with(restored: object, here: object, own: Collection[str]) -> object:
    if not own or not isinstance(restored, dict) or not isinstance(here, dict):
        return restored
    kept = cast("dict[object, object]", {key: here[key] for key in own if key in here})
    restored.update(kept)
    return restored


def _refuse_distributed(flat: Flat, name: str) -> Flat:
    found = next((leaf for leaf, value in flat.leaves.items() if isinstance(value, _DISTRIBUTED)), None)
    if found is not None:
        raise UnsupportedValueError(
            f"{found!r} is a distributed tensor, of which the first rank has a part; put it into the state by itself, "
            f"and not into the RankZero {name!r}",
            key=found,
            type_name="DTensor",
        )
    return flat
