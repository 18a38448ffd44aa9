"""What the caller of a save or restore is told of what the ranks met, and how ranks are named: alike everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from cloudckpt.errors import CloudCkptError, CommitUnknownError, OptionsError, RankLostError, SaveFailedError
from cloudckpt.ranks import RanksFailedError, named_ranks, plain_errors
from cloudckpt.ranks.outcome import MissingPartsError, Sent, UndecidedError, pickled, unpickled


def told(
    error: Exception,
    size: int = 3,
    failed: Callable[[str, Mapping[int, BaseException]], CloudCkptError] | None = None,
) -> BaseException:
    with pytest.raises(BaseException) as caught, plain_errors(size, failed):  # noqa: PT011 (each test says which)
        raise error
    return caught.value


def save_failed(text: str, failures: Mapping[int, BaseException]) -> SaveFailedError:
    return SaveFailedError(f"nothing was committed: {text}", failures=failures)


def test_the_first_ranks_own_error_is_raised_and_notes_the_ranks_that_met_one() -> None:
    first, second = ValueError("one"), KeyError("two")

    error = told(RanksFailedError({2: second, 1: first}))

    assert error is first
    assert error.__notes__ == ["on ranks 1, 2"]


def test_what_rank_0_alone_met_needs_no_note() -> None:
    error = told(RanksFailedError({0: ValueError("one")}))

    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("failed", [None, save_failed])
def test_a_rank_that_failed_only_because_another_did_is_not_blamed(failed: Callable[..., CloudCkptError]) -> None:
    cause = OptionsError("cause")

    error = told(RanksFailedError({0: MissingPartsError("effect"), 1: cause}), failed=failed)

    assert cause in (error, getattr(error, "failures", {}).get(1))
    assert "effect" not in str(error)


def test_an_error_of_ours_that_every_rank_met_is_raised_itself() -> None:
    errors = {rank: OptionsError("the same") for rank in range(3)}

    assert told(RanksFailedError(errors), failed=save_failed) is errors[0]


@pytest.mark.parametrize(
    ("failures", "text"),
    [
        ({0: OptionsError("same"), 1: OptionsError("same")}, "rank 0: same; rank 1: same"),
        ({0: OptionsError("a"), 1: OptionsError("b"), 2: OptionsError("a")}, "rank 0: a; rank 1: b; rank 2: a"),
        ({rank: ValueError("not ours") for rank in range(3)}, "rank 0: not ours; rank 1: not ours; rank 2: not ours"),
    ],
)
def test_what_ranks_met_differently_is_summed_up(failures: dict[int, Exception], text: str) -> None:
    error = told(RanksFailedError(failures), failed=save_failed)

    assert isinstance(error, SaveFailedError)
    assert (str(error), error.failures) == (f"nothing was committed: {text}", failures)


def test_a_lone_process_is_told_the_type_of_an_error_that_is_not_ours() -> None:
    error = told(RanksFailedError({0: KeyError("lr")}), size=1, failed=save_failed)

    assert str(error) == "nothing was committed: KeyError('lr')"


def test_a_lost_rank_is_raised_as_it_is_or_as_what_failed() -> None:
    lost = RankLostError("rank 2 is silent", ranks=[2])

    assert told(lost) is lost
    error = told(lost, failed=save_failed)
    assert isinstance(error, SaveFailedError)
    assert error.failures == {2: lost}


def test_a_rank_0_that_was_lost_about_to_commit_leaves_the_outcome_unknown() -> None:
    error = told(UndecidedError("rank 0 is silent"), failed=save_failed)

    assert isinstance(error, CommitUnknownError)
    assert "whole or not there" in str(error)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0, 2"),
        ([0, 1], "ranks 0-1"),
        (range(2048), "ranks 0-2047"),
        ([7, 5, 6, 1, 5], "ranks 1, 5-7"),
        (range(0, 100, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, and 42 more"),
    ],
)
def test_ranks_are_named_in_runs_and_no_more_than_people_read(ranks: list[int], text: str) -> None:
    assert named_ranks(ranks) == text


def test_an_error_that_neither_pickles_nor_has_a_text_is_sent_by_its_type() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    sent = unpickled(pickled(Sent("save", error=MuteError())))
    assert str(sent.error).endswith("MuteError, whose text fails with RuntimeError")
