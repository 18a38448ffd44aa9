"""A connection serves whoever asks in the same words, outlives each of them, and waits for the next a while."""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from cloudckpt.store import kept
from cloudckpt.store.kept import key_of, leave, left_when_dropped, release_idle, retire, take, use


class FakeWire:
    """A wire that counts how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_shared", {})
    monkeypatch.setattr(kept, "_dropped", deque())


def opened(key: object) -> tuple[Any, Any]:
    lease: Any = take(key, FakeWire)  # type: ignore[arg-type]
    return lease, lease.wire


def test_the_same_key_is_the_same_wire_and_another_key_another() -> None:
    (one, wire), (two, same), (three, other) = opened("a"), opened("a"), opened("b")
    assert wire is same is not other
    leave(one, two, three)


def test_what_others_use_is_not_closed() -> None:
    (one, wire), (two, _) = opened("a"), opened("a")
    leave(one)
    assert wire.closed == 0
    leave(two)
    assert wire.closed == 0
    assert opened("a")[1] is wire


def test_few_wait_for_their_next_user_and_the_oldest_goes_first() -> None:
    wires = []
    for number in range(kept._IDLE + 2):
        lease, wire = opened(number)
        leave(lease)
        wires.append(wire)
    assert [wire.closed for wire in wires] == [1, 1, *[0] * kept._IDLE]


def test_none_waits_for_long() -> None:
    lease, wire = opened("a")
    leave(lease)
    lease._left_s -= kept._IDLE_S + 1
    leave(opened("b")[0])
    assert wire.closed == 1
    assert opened("a")[1] is not wire


def test_what_was_retired_is_given_to_nobody_and_closed_by_its_last_user() -> None:
    (one, wire), (two, _) = opened("a"), opened("a")
    verb = use(two)
    retire(one)
    leave(one)
    anew, other = opened("a")
    assert other is not wire
    leave(two)
    assert wire.closed == 0
    leave(verb)
    assert wire.closed == 1
    leave(anew)


def test_without_a_key_nothing_is_shared_or_kept() -> None:
    (one, wire), (_, other) = opened(None), opened(None)
    assert wire is not other
    leave(one)
    assert wire.closed == 1


def test_of_two_that_connect_at_once_one_is_used_and_the_other_closed() -> None:
    made: list[FakeWire] = []
    meet = threading.Barrier(2)

    def connect() -> Any:
        meet.wait()
        made.append(FakeWire())
        return made[-1]

    leases: list[Any] = []
    threads = [threading.Thread(target=lambda: leases.append(take("a", connect))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert leases[0] is leases[1]
    assert sorted(wire.closed for wire in made) == [0, 1]
    leave(*leases)


def test_what_a_dropped_owner_had_is_left() -> None:
    class Owner:
        pass

    owner, (lease, wire) = Owner(), opened("a")
    left_when_dropped(owner, lease)
    del owner
    gc.collect()
    release_idle()
    assert wire.closed == 1


def test_a_lease_of_the_parent_is_not_a_childs_to_close() -> None:
    lease, wire = opened("a")
    lease._pid = os.getppid()  # as a child sees it
    retire(lease)
    leave(lease)
    assert wire.closed == 0


@pytest.mark.parametrize(
    "change",
    [{"key": "b"}, {"nested": {"region": "eu"}}, {"flag": True}, {"more": None}],
    ids=str,
)
def test_other_options_are_another_key(change: dict[str, object]) -> None:
    options = {"key": "a", "nested": {"region": "us"}, "flag": 1}
    assert key_of(options) == key_of(dict(reversed(options.items())))
    assert key_of(options) != key_of({**options, **change})


def test_what_torch_sets_while_it_is_imported_makes_no_other_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("a")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert key_of("a") == before
    monkeypatch.setenv("AWS_PROFILE", "other")
    assert key_of("a") != before


def test_another_environment_or_a_file_of_keys_that_changed_is_another_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = [key_of("a")]
    monkeypatch.setenv("AWS_PROFILE", "other")
    keys.append(key_of("a"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    keys.append(key_of("a"))
    (tmp_path / "credentials").write_text("[other]")
    keys.append(key_of("a"))
    (tmp_path / "credentials").write_text("[other]\n")
    keys.append(key_of("a"))
    assert len(set(keys)) == 5


def test_options_that_cannot_be_compared_are_no_key() -> None:
    assert key_of({"session": {1, 2}}) is None
