"""Objects with state_dict and load_state_dict as users write them: they clear, share, grow and refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator


class Stateful:
    """What a user writes: numbers and tensors, and two methods; kinds differ in how they take state."""

    def __init__(self, generator: Generator) -> None:
        self.count = int(torch.randint(100, (), generator=generator))
        self.tensor = torch.rand(3, generator=generator)
        self.step()

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": self.tensor, "nested": [{"t": self.tensor + 1}, (1, "a"), {2: None}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.tensor = state["count"], state["tensor"]

    def step(self) -> None:
        self.count += 1
        self.tensor = self.tensor * 1.5


class Zeroing(Stateful):
    """Clears what it has before it copies."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensor.zero_()
        self.tensor.copy_(state["tensor"])
        self.count = state["count"]


class BestIsCurrent(Stateful):
    """Keeps two names for what may be one tensor, as after a step that was the best."""

    def __init__(self, generator: Generator) -> None:
        super().__init__(generator)
        self.best = self.tensor if self.count % 2 else self.tensor + 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": self.tensor, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.best = state["best"]

    def step(self) -> None:
        super().step()
        self.best = self.tensor


class Growing(Stateful):
    """Its tensor has another shape at each step."""

    def step(self) -> None:
        self.count += 1
        self.tensor = torch.cat([self.tensor, self.tensor[:1]])


class Changing(Stateful):
    """Its tensor has another dtype at times."""

    def step(self) -> None:
        self.count += 1
        self.tensor = self.tensor.to([torch.float64, torch.float32, torch.int64][self.count % 3])


class Noise(Stateful):
    """A generator's state, which is a tensor of bytes."""

    def __init__(self, generator: Generator) -> None:
        self.own = Generator().manual_seed(int(torch.randint(100, (), generator=generator)))

    def state_dict(self) -> dict[str, Any]:
        return {"own": self.own.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.set_state(state["own"])

    def step(self) -> None:
        torch.rand(2, generator=self.own)


class RefusedError(Exception):
    """What an object of a user says."""


class Refusing(Stateful):
    """Takes no state, and says so when it is asked."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RefusedError("not this one")


class HalfTaking(Stateful):
    """Says that it takes no state when half of it is taken."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["count"] == self.count and torch.equal(state["tensor"], self.tensor):
            return  # it is given back what it had
        super().load_state_dict(state)
        if type(state.get("nested")) is list:
            raise RefusedError("no more of it")


class Scaler(Stateful):
    """A GradScaler in use."""

    def __init__(self, generator: Generator) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=float(torch.randint(1, 9, (), generator=generator)))
        self.scaler.scale(torch.ones(1))
        self.state_dict, self.load_state_dict = self.scaler.state_dict, self.scaler.load_state_dict  # type: ignore[method-assign]

    def step(self) -> None:
        self.scaler.update(self.scaler.get_scale() * 2)


STATEFULS: dict[str, Callable[[Generator], Stateful]] = {
    "plain": Stateful,
    "zeroing": Zeroing,
    "best is current": BestIsCurrent,
    "growing": Growing,
    "changing": Changing,
    "noise": Noise,
    "scaler": Scaler,
    "refusing": Refusing,
    "half taking": HalfTaking,
}
MAY_REFUSE = {"refusing", "half taking"}
