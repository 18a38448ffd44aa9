"""Numbers that cannot work together are refused when they are written down, not in the middle of a save."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cloudckpt.errors import OptionsError
from cloudckpt.options import KIB, MIB, Options, RetryPolicy, as_clock, as_seconds


def test_the_defaults_are_valid_together() -> None:
    assert Options() == Options(retry=RetryPolicy())


def test_units_are_binary() -> None:
    assert (KIB, MIB) == (1024, 1_048_576)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(RetryPolicy)])
@pytest.mark.parametrize("value", [0, -1])
def test_a_retry_policy_has_only_positive_numbers(name: str, value: int) -> None:
    with pytest.raises(OptionsError, match=name):
        RetryPolicy(**{name: value})


TIMES = [(kind, f.name) for kind in (RetryPolicy, Options) for f in dataclasses.fields(kind) if f.name.endswith("_s")]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, 1.1e9, 10**400, True, "60"])
@pytest.mark.parametrize(("kind", "name"), TIMES)
def test_a_time_is_a_number_that_every_clock_and_lock_can_count(
    kind: type[RetryPolicy | Options], name: str, value: object
) -> None:
    with pytest.raises(OptionsError, match=rf"{name} is .*; give a number"):
        kind(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1.1e9, 10**400, True, "60"])
def test_so_is_one_that_a_call_is_given(value: object) -> None:
    with pytest.raises(OptionsError, match=r"timeout is .*; give a number of seconds from 0, and at most 1e\+09"):
        as_seconds("timeout", value)


def test_the_longest_time_can_be_waited_for() -> None:
    assert as_seconds("timeout", 1e9) == 1e9 < threading.TIMEOUT_MAX


def test_a_deadline_may_be_shorter_than_the_patience_with_one_request_which_gets_a_share_of_it() -> None:
    assert RetryPolicy(deadline_s=9.0).request_timeout_s == RetryPolicy().request_timeout_s


@pytest.mark.parametrize("seconds", [1.0, 8.0, 25.0, 119.5, 1e6])
def test_within_any_time_the_stores_own_error_comes_first_then_the_transfers_then_the_other_ranks(
    seconds: float,
) -> None:
    options = Options().within(seconds)
    assert options.retry.deadline_s == min(seconds, 300.0)
    assert options.retry.deadline_s < options.transfer_timeout_s < options.progress_timeout_s <= seconds + 4.0


@pytest.mark.parametrize("name", ["shard_bytes", "block_bytes", "span_bytes", "concurrency", "memory_budget_bytes"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_and_counts_are_positive(name: str, value: int) -> None:
    with pytest.raises(OptionsError, match=name):
        Options(**{name: value})


def test_a_span_covers_whole_blocks() -> None:
    with pytest.raises(OptionsError, match="whole blocks"):
        Options(block_bytes=4 * MIB, span_bytes=6 * MIB)


@pytest.mark.parametrize("larger", ["shard_bytes", "block_bytes"])
def test_the_memory_budget_holds_at_least_one_of_each(larger: str) -> None:
    sizes: dict[str, Any] = {"shard_bytes": 4 * MIB, "block_bytes": 4 * MIB, larger: 16 * MIB}

    with pytest.raises(OptionsError, match="memory_budget_bytes"):
        Options(**sizes, memory_budget_bytes=16 * MIB - 1)
    assert Options(**sizes, memory_budget_bytes=16 * MIB).memory_budget_bytes == 16 * MIB


@pytest.mark.parametrize("value", [Options(), RetryPolicy()])
def test_options_do_not_change_once_made(value: Options | RetryPolicy) -> None:
    name = dataclasses.fields(value)[0].name

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Options(shard_bytes=1.5e6), "shard_bytes is 1500000.0; give a whole number"),  # type: ignore[arg-type]
        (lambda: Options(concurrency=True), "concurrency is True; give a whole number"),
        (lambda: Options(concurrency="8"), "concurrency is '8'; give a whole number"),  # type: ignore[arg-type]
        (
            lambda: Options(memory_budget_bytes=2.0**30),
            "memory_budget_bytes is 1073741824.0; give a whole number or None",
        ),  # type: ignore[arg-type]
        (lambda: Options(signed_payload="no"), "signed_payload is 'no'; give True or False"),  # type: ignore[arg-type]
        (lambda: Options(retry=None), "retry is None; give a RetryPolicy"),  # type: ignore[arg-type]
        (lambda: Options(finish_timeout_s="1"), "finish_timeout_s is '1'; give a number"),  # type: ignore[arg-type]
        (lambda: RetryPolicy(max_attempts=1.5), "max_attempts is 1.5; give a whole number"),  # type: ignore[arg-type]
        (lambda: Options.of([1]), "options is [1]; give cloudckpt.Options"),  # type: ignore[arg-type]
        (lambda: Options.of({"retries": 1}), "options have no 'retries'; there are shard_bytes, "),
        (lambda: Options.of({"retry": {"concurrency": 1}}), "options have no 'concurrency'; there are max_attempts, "),
        (lambda: Options.of(1), "options is 1; give cloudckpt.Options"),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_another_type_is_refused_when_it_is_written_down(make: Callable[[], object], words: str) -> None:
    with pytest.raises(OptionsError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize("told", [math.nan, math.inf, -math.inf, "1", None, 10**400, True])
def test_a_clock_that_gives_no_number_is_named(told: Any) -> None:
    with pytest.raises(OptionsError, match="has returned"):
        as_clock(lambda: told)()
    assert as_clock(lambda: 2)() == 2.0
