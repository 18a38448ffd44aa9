"""What a call on a thread of its own leaves behind when nobody waits for it any more: nothing on stderr."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cloudckpt.store.aside import Aside


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_call_that_an_event_loop_has_given_up_ends_in_silence() -> None:
    go_on, threads = threading.Event(), []

    def call() -> None:
        threads.append(threading.current_thread())
        go_on.wait(10)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(Aside(), call), 0.01)

    asyncio.run(give_up())
    go_on.set()
    threads[0].join(10)
    assert not threads[0].is_alive()
