"""Keys are derived, and only what this library derives is read back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudckpt.errors import OptionsError
from cloudckpt.keys import (
    EPOCHS_PREFIX,
    MANIFEST_NAME,
    checkpoint_prefix,
    epoch_key,
    index_key,
    is_attempt,
    new_attempt,
    parse_checkpoint_prefix,
    parse_epoch_key,
    parse_pin_key,
    pin_key,
    shard_key,
)
from cloudckpt.store.base import check_key
from tests.effort import examples

LIMIT = 10**10
ATTEMPT = "0123456789abcdef"

steps = st.integers(0, LIMIT - 1)
epochs = st.integers(1, LIMIT - 1)


def near(right: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Texts that look like a key, with one character more or another one."""
    noise = st.sampled_from(["", "0", "1", "/", "\n", " ", "-", "e", "\u0663", "\uff10", "\x00", ".", "A"])
    inserted = st.builds(lambda text, at, extra: text[:at] + extra + text[at:], right, st.integers(0, 30), noise)
    replaced = st.builds(lambda text, at, extra: text[:at] + extra + text[at + 1 :], right, st.integers(0, 30), noise)
    return st.text() | right | inserted | replaced


def digits(least: int, most: int) -> st.SearchStrategy[str]:
    return st.text("0123456789", min_size=least, max_size=most)


@given(steps, epochs)
def test_a_checkpoint_prefix_reads_back_as_what_it_was_derived_from(step: int, epoch: int) -> None:
    assert parse_checkpoint_prefix(checkpoint_prefix(step, epoch)) == (step, epoch)


@settings(max_examples=examples(300))
@given(near(st.builds("step-{}-e{}/".format, digits(9, 11), digits(3, 11))))
def test_no_other_text_reads_as_a_checkpoint_prefix(text: str) -> None:
    place = parse_checkpoint_prefix(text)

    assert place is None or checkpoint_prefix(*place) == text


@given(steps, epochs)
def test_a_pin_key_reads_back_as_the_prefix_that_it_pins(step: int, epoch: int) -> None:
    prefix = checkpoint_prefix(step, epoch)
    assert parse_pin_key(pin_key(prefix)) == prefix


@settings(max_examples=examples(300))
@given(near(st.builds("pins/step-{}-e{}.json".format, digits(9, 11), digits(3, 11))))
def test_no_other_text_reads_as_a_pin_key(text: str) -> None:
    prefix = parse_pin_key(text)

    assert prefix is None or pin_key(prefix) == text


def test_only_a_step_of_a_root_has_a_pin_key() -> None:
    with pytest.raises(OptionsError, match="no step of a root"):
        pin_key("")


@given(epochs)
def test_an_epoch_key_reads_back_as_its_epoch(epoch: int) -> None:
    assert parse_epoch_key(epoch_key(epoch)) == epoch


@settings(max_examples=examples(300))
@given(near(digits(9, 11).map("epochs/{}.json".format)))
def test_no_other_text_reads_as_an_epoch_key(text: str) -> None:
    epoch = parse_epoch_key(text)

    assert epoch is None or epoch_key(epoch) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step-0000000007-e0001",
        "step-0000000007-e0001//",
        "step-0000000007-e0001/\n",
        "/step-0000000007-e0001/",
        "a/step-0000000007-e0001/",
        "step-7-e0001/",
        "step-00000000007-e0001/",
        "step-0000000007-e001/",
        "step-0000000007-e00001/",
        "step-0000000007-e00000000001/",
        "step-000000000\u0667-e0001/",
        "step-\uff10000000007-e0001/",
        "step--000000007-e0001/",
        "step-+000000007-e0001/",
        "step-0000000007-e-001/",
        "step-0000_00007-e0001/",
        "step-0x00000007-e0001/",
        "Step-0000000007-e0001/",
        "step-0000000007-E0001/",
        "step-0000000007\u2010e0001/",
        "step-0000000007-e0001\\",
        "step-0000000007-e0001/../",
        "step-%30000000007-e0001/",
        "step-0000000007-e0001/?versionId=3",
        "epochs/",
    ],
)
def test_a_prefix_of_another_form_is_not_ours(text: str) -> None:
    assert parse_checkpoint_prefix(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "epochs/0000000000.json",
        "epochs/1.json",
        "epochs/00000000001.json",
        "epochs/000000001.json",
        "epochs/0000000001.json\n",
        "epochs/0000000001.JSON",
        "epochs/0000000001xjson",
        "epochs/000000000\uff11.json",
        "epochs/-000000001.json",
        "epochs/clock-0123456789abcdef",
        "0000000001.json",
        "epochs//0000000001.json",
    ],
)
def test_a_claim_of_another_form_is_not_ours(text: str) -> None:
    assert parse_epoch_key(text) is None


@given(steps, steps, epochs)
def test_prefixes_of_one_epoch_sort_as_their_steps(step: int, other: int, epoch: int) -> None:
    assert (checkpoint_prefix(step, epoch) < checkpoint_prefix(other, epoch)) == (step < other)


@given(epochs, epochs)
def test_claims_sort_as_their_epochs(epoch: int, other: int) -> None:
    assert (epoch_key(epoch) < epoch_key(other)) == (epoch < other)


@pytest.mark.parametrize(("step", "epoch"), [(-1, 1), (LIMIT, 1), (0, -1), (0, LIMIT)])
def test_a_number_that_would_break_the_order_has_no_prefix(step: int, epoch: int) -> None:
    with pytest.raises(OptionsError, match="is not between 0 and 9999999999"):
        checkpoint_prefix(step, epoch)


@pytest.mark.parametrize("epoch", [-1, 0, LIMIT])
def test_a_number_that_is_no_epoch_has_no_claim(epoch: int) -> None:
    with pytest.raises(OptionsError, match="is not between 1 and 9999999999"):
        epoch_key(epoch)


@pytest.mark.parametrize(("rank", "number"), [(-1, 0), (0, -1)])
def test_a_shard_has_no_negative_number(rank: int, number: int) -> None:
    with pytest.raises(OptionsError, match="count from 0"):
        shard_key(ATTEMPT, rank, number)


@given(st.integers(0, 2**20), st.integers(0, 10**6), st.integers(0, 2**20), st.integers(0, 10**6))
def test_different_shards_have_different_keys(rank: int, number: int, other_rank: int, other_number: int) -> None:
    is_same_key = shard_key(ATTEMPT, rank, number) == shard_key(ATTEMPT, other_rank, other_number)

    assert is_same_key == ((rank, number) == (other_rank, other_number))


def test_keys_have_the_documented_form() -> None:
    prefix = checkpoint_prefix(12_000, 3)

    assert prefix + MANIFEST_NAME == "step-0000012000-e0003/manifest.json"
    assert prefix + index_key(ATTEMPT) == f"step-0000012000-e0003/{ATTEMPT}/index.bin"
    assert prefix + shard_key(ATTEMPT, 3, 7) == f"step-0000012000-e0003/{ATTEMPT}/r00003-0007.safetensors"
    assert epoch_key(3) == EPOCHS_PREFIX + "0000000003.json"


@given(steps, epochs, st.integers(0, 2**53), st.integers(0, 2**53))
def test_every_derived_key_is_one_that_a_store_takes(step: int, epoch: int, rank: int, number: int) -> None:
    attempt = new_attempt()
    prefix = checkpoint_prefix(step, epoch)
    keys = [MANIFEST_NAME, index_key(attempt), shard_key(attempt, rank, number)]

    assert [check_key(prefix + key) for key in keys] == [prefix + key for key in keys]
    assert check_key(epoch_key(epoch)) == epoch_key(epoch)


def test_attempts_are_recognised_and_never_alike() -> None:
    attempts = {new_attempt() for _ in range(1000)}

    assert len(attempts) == 1000
    assert [attempt for attempt in attempts if not is_attempt(attempt)] == []


@settings(max_examples=examples(300))
@given(near(st.text("0123456789abcdef", min_size=15, max_size=17)))
def test_no_other_text_is_an_attempt(text: str) -> None:
    assert is_attempt(text) == (re.fullmatch("[0-9a-f]{16}", text, re.ASCII) is not None)
