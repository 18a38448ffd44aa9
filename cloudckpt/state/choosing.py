"""Part a state into what is restored and what is to stay as it is, by the names that a caller gives.

    entries, names ──▶ chosen │ staying ──▶ memory of the staying that a restore of the chosen would write into

Knows names and entries; reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cloudckpt.errors import OptionsError
from cloudckpt.format import told_near
from cloudckpt.state.entry import Entry, in_common_order, is_tensor
from cloudckpt.state.overlap import overlapping

__all__ = ["is_chosen", "parted", "shared_with"]


def is_chosen(name: str, only: Sequence[str] | None) -> bool:
    """Tell whether a name is one of those, or lies below one; None are all."""
    return only is None or any(name == one or name.startswith(f"{one}.") for one in only)


def parted(
    entries: Sequence[Entry], only: Sequence[str] | None, option: str = "only"
) -> tuple[list[Entry], list[Entry]]:
    """Return the entries that are meant by the names in an option, and the others.

    Raises:
        OptionsError: a name means none of them; says what is near it.
    """
    if only:
        entries = [one for entry in entries for one in entry.singly()]
    names = [entry.name for entry in entries if not entry.is_beside]
    for one in only or ():
        if not any(is_chosen(name, [one]) for name in names):
            raise OptionsError(
                f"{option} names {one!r}, which is nothing that the state has for itself{told_near(one, names)}; "
                "nothing was restored"
            )
    chosen = [entry for entry in entries if is_chosen(entry.name, only)]
    return chosen, [entry for entry in entries if not is_chosen(entry.name, only)]


def shared_with(staying: Sequence[Entry], written: Mapping[str, object]) -> list[str]:
    """Say which memory of what is to stay a restore would write into.

    Args:
        staying: entries that are to stay as they are.
        written: name → live tensor that is written into.
    """
    still = {
        name: leaf
        for entry in in_common_order(staying)
        if entry.is_itself
        for name, leaf in entry.flat(entry.current()).leaves.items()
        if is_tensor(leaf)
    }
    found = []
    for names in overlapping([*written.items(), *still.items()]):
        mine, theirs = (next((name for name in names if name in group), None) for group in (written, still))
        if mine is not None and theirs is not None:
            found.append(f"{mine} shares memory with {theirs}, which is not to be restored (name it, too, or clone it)")
    return found
