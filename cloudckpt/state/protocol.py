"""Say what an object must have whose state is saved by its own methods, as PyTorch says it.

PyTorch's own protocol of that name stands in a module that takes a second to import, and is the same.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

__all__ = ["Stateful"]


@runtime_checkable
class Stateful(Protocol):
    """An object with `state_dict` and `load_state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state that `state_dict` returned."""
