"""Decide whether a save that failed ends the training, or is let fail: a store may be there again for the next one.

Only an outage of a store is ever forgiven. What the call is wrong about, a newer job, or a rank that is lost would meet
the next save just as well. All ranks meet the same error, count the same, and decide the same. The thread of a
background save may enter, never beside the training's.
"""

from __future__ import annotations

from typing import Literal, get_args

from cloudckpt.errors import OptionsError, is_outage
from cloudckpt.options import as_count
from cloudckpt.report import Journal

__all__ = ["OnError", "Tolerance"]

OnError = Literal["raise", "warn"]
"""What a save does that the store has failed."""


class Tolerance:
    """How many saves in a row a store may fail.

    Attributes:
        terms: what must be the same on every rank, by the names of the manager's options.
    """

    def __init__(self, journal: Journal, on_error: str, max_failures: int) -> None:
        """Forgive by choice, and note what was forgiven.

        Raises:
            OptionsError: no such choice, or a number that is none.
        """
        if on_error not in get_args(OnError):
            raise OptionsError(f"on_error is {on_error!r}; give {' or '.join(map(repr, get_args(OnError)))}")
        max_failures = as_count("max_failures", max_failures, least=1)
        self._journal = journal
        self._limit = max_failures if on_error == "warn" else 1
        self.terms: dict[str, str | int | None] = {"on_error": on_error, "max_failures": max_failures}
        self._count = 0
        self._judged: tuple[BaseException | None, bool] = None, False

    def saved(self) -> None:
        """Note that a save was committed: the row of failed ones ends."""
        self._count = 0

    def forgives(self, step: int, error: BaseException) -> bool:
        """Tell whether training goes on although a save has failed; of one error the same each time."""
        if self._judged[0] is not error:
            self._judged = error, self._judge(step, error)
        return self._judged[1]

    def _judge(self, step: int, error: BaseException) -> bool:
        if not is_outage(error):
            return False
        self._count += 1
        if self._count < self._limit:
            self._journal.note(
                f"step {step} was NOT saved, {self._count} in a row; at {self._limit} it ends training: {error}"
            )
            return True
        if self._limit > 1:
            error.add_note(f"{self._count} saves in a row failed, and max_failures is {self._limit}")
        return False
