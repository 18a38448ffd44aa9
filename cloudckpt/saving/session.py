"""Bring the ranks together for one step of a save, and let one error be the end of it on all of them.

The session may be begun by one thread and ended by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

from cloudckpt.errors import SaveFailedError
from cloudckpt.options import Options
from cloudckpt.ranks import Group, plain_errors

__all__ = ["Session"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The ranks together for one save: from its begin until a `PendingSave` has taken it over, or an error ends it."""

    group: Group
    what: str
    options: Options
    began_s: float
    _stack: ExitStack

    @classmethod
    @contextmanager
    def of(
        cls, group: Group, what: str, options: Options, *, check: Callable[[], None] | None = None
    ) -> Iterator[Self]:
        """Bring the ranks of `group` together; those that do another thing than `what` are told so.

        `check` is called while they come, and may raise why some will not.
        """
        began_s = time.monotonic()
        with ExitStack() as stack:
            stack.enter_context(plain_errors(group.size, _failed, about=group.about))
            stack.enter_context(group.session(what, deadline_s=options.progress_timeout_s, check=check))
            yield cls(group=group, what=what, options=options, began_s=began_s, _stack=stack)

    def hand_over(self) -> ExitStack:
        """Let it end in another thread: where what is returned ends."""
        self.group.hand_over()
        return self._stack.pop_all()


def _failed(text: str, failures: Mapping[int, BaseException]) -> SaveFailedError:
    return SaveFailedError(f"the save failed and nothing was committed: {text}", failures=failures)
