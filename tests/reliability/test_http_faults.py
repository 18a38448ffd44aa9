"""Whatever an exchange over HTTP suffers, an operation is done, or ends with the right error, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import pytest

from cloudckpt.options import RetryPolicy
from cloudckpt.store.base import Store
from cloudckpt.store.retrying import RetryingStore
from tests.reliability.http_faults import FAULTS, TIMES, broken, cells
from tests.reliability.records import Cell, Section, Trials, dose, write
from tests.store.engines import GCSFS, OBSTORE_GCS, OBSTORE_S3, S3FS, Engine
from tests.store.http_object_server import ObjectServer

SECTION = Section(
    number=40,
    title="Faults of the network and of stores",
    about="Every verb of a store, by every engine, over real sockets to a server that breaks its requests: the first "
    "one, the first three, or all. An operation that returns has done what it says; one that does not ends with the "
    "error that says what to do, within its deadline and its cap of requests; in both cases no other object has "
    "changed, none is there in part, and what is asked next is answered for itself. Bytes of a read that arrive spoilt "
    "under a right length are left to the digests, which stand below. A fault that never struck fails the run.",
)
ENGINES = {"s3fs": S3FS, "obstore, S3": OBSTORE_S3, "gcsfs": GCSFS, "obstore, GCS": OBSTORE_GCS}
# What of the matrix each engine tries by default.
_SHARE = 24


@contextmanager
def opened(engine: Engine) -> Iterator[tuple[Store, ObjectServer]]:
    with ObjectServer(page_size=5) as server:
        store = engine.open(server)
        server.put_object("root/x", b"x")
        # What is made once takes longer than a request whose time is short.
        warm = RetryingStore(store, RetryPolicy())
        warm.head("x")
        warm.get("x", start=0, stop=1)
        yield store, server
        store.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.timeout(900)
def test_a_broken_exchange_is_survived_or_told_and_nothing_is_lost(engine: str) -> None:
    whole = cells(ENGINES[engine].scheme)
    stride = dose(1, short=_SHARE)
    # In a short run the engines do not all try the same.
    chosen = whole[list(ENGINES).index(engine) * stride // len(ENGINES) :: stride]
    with opened(ENGINES[engine]) as (store, server):
        for is_silent, same in groupby(chosen, lambda cell: FAULTS[cell[0]].is_silent):
            kind = "an exchange in which nobody speaks" if is_silent else "a broken exchange"
            with Trials(SECTION, kind, engine=engine) as trials:
                for (fault, verb), row in groupby(same, lambda cell: cell[:2]):
                    _try(trials, store, server, fault, verb, [times for _, _, times in row])


def _try(trials: Trials, store: Store, server: ObjectServer, fault: str, verb: str, often: list[str]) -> None:
    outcomes = {times: broken(store, server, fault, verb, times) for times in often}
    for times, outcome in outcomes.items():
        if outcome.wrong:
            trials.lose(f"{fault}, {times}, {verb}: {outcome.wrong}")
        else:
            trials.count(outcome.text)
    if len(outcomes) == len(TIMES):
        shown = " · ".join(outcome.text for outcome in outcomes.values())
        table = f"What becomes of it: the fault {' · '.join(TIMES)}"
        write(Cell(section=SECTION, table=table, row=fault, column=verb, text=shown))
