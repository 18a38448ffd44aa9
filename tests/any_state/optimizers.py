"""Optimizers and schedulers: all of torch's, and some with more in their state than torch's have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.swa_utils import SWALR


class Nested(Optimizer):
    """State in state, of other dtypes than its parameter, and keys of its own in its state_dict."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.scale = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.scale *= 1.25
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["inner"] = {
                        "count": torch.tensor([2**40 + 1]),
                        "copies": [parameter.detach().double().clone()],
                    }
                    state["low"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["name"] = "x"
                state["inner"]["count"] += 1
                state["inner"]["copies"][0] -= group["lr"] * parameter.grad.double()
                state["low"] += parameter.grad
                parameter.copy_(state["inner"]["copies"][0] * self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = dict(state_dict)
        self.scale = own.pop("scale")
        super().load_state_dict(own)


class Hooking(torch.optim.SGD):
    """Adds a key in a hook when it is saved, and takes it in another one."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.5)
        self.seen = 0
        self.register_state_dict_post_hook(lambda self, state: {**state, "seen": self.seen})
        self.register_load_state_dict_pre_hook(self._take)

    @staticmethod
    def _take(optimizer: Any, state: Any) -> Any:
        optimizer.seen = state["seen"]
        return {key: value for key, value in state.items() if key != "seen"}

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        self.seen += 1
        return super().step(closure)


Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=1),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "Adam with a tensor for lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "Adamax": torch.optim.Adamax,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "NAdam": torch.optim.NAdam,
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.1, betas=(0.9, 0.9)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "nested": Nested,
    "hooking": Hooking,
}
# Their groups share one tensor for lr, one state, or no more than one group.
ONE_GROUP = {"LBFGS"}


def _decayed(delay: int, epoch: int) -> float:
    return 1 / (epoch + delay + 1)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.75),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    # Functions belong to the program, which gives each group its own, wherever the group stands.
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(
        o, [functools.partial(_decayed, len(group["params"])) for group in o.param_groups]
    ),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.75),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SWALR": lambda o: SWALR(o, 0.02, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.75)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.75)]
    ),
}
