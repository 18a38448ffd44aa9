"""What is counted arrives on the page, whole and in one order; what was lost, or never ran, fails."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.reliability.page import about, main, page_of
from tests.reliability.records import FOLDER, OURS, Cell, Record, Section, Trials, read_records, write

LATER = Section(number=2, title="Later", about="What comes later.")
FIRST = Section(number=1, title="First", about="What comes first.")
RECORD = Record(
    section=FIRST,
    kind="a kill",
    subject=OURS,
    parameters={"store": "s3"},
    outcomes={"restored": 3},
    lost=0,
    seconds=1.4,
)
FOUND: list[Record | Cell] = [
    RECORD,
    replace(RECORD, parameters={"store": "disk", "seed": "7"}, outcomes={"restored": 1000, "refused | so": 2}),
    replace(RECORD, subject="another", outcomes={"restored": 1}, lost=2),
    replace(RECORD, section=LATER, kind="a flip", parameters={}),
    Cell(section=LATER, table="Faults", row="put", column="503", text="survives"),
    Cell(section=LATER, table="Faults", row="put", column="503", text="StalledError"),
    Cell(section=LATER, table="Faults", row="get", column="reset", text="survives"),
]
PAGE = """# Nothing is ever lost: the figures

Written by `make reliability`, not by hand. 1,008 trials of cloudckpt, in which **0** lost a checkpoint that was \
acknowledged, or gave one back wrong. Below its rows stand other ways to save, where the same was done to them. What \
is promised, and what is not: [Guarantees](guarantees.md). A trial that fails prints what it takes to run it again.

On a machine.

## First

What comes first.

| what was tried | on | trials | lost | what became of them | seconds |
|---|---|---|---|---|---|
| a kill (seed 7; store disk, s3) | cloudckpt | 1,005 | **0** | 1,003 restored; 2 refused \\| so | 3 |
| a kill (store s3) | another | 3 | **2** | 1 restored | 1 |

## Later

What comes later.

| what was tried | on | trials | lost | what became of them | seconds |
|---|---|---|---|---|---|
| a flip | cloudckpt | 3 | **0** | 3 restored | 1 |

### Faults

| | 503 | reset |
|---|---|---|
| get | – | survives |
| put | StalledError; survives | – |
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def test_a_page_adds_up_what_is_of_one_kind_whatever_the_order_of_the_records() -> None:
    assert page_of(FOUND, machine="On a machine.") == PAGE
    for seed in range(10):
        assert page_of(random.Random(seed).sample(FOUND, len(FOUND)), machine="On a machine.") == PAGE


def test_what_is_written_is_read_back(folder: Path) -> None:
    for one in FOUND:
        write(one)
    assert list(read_records(folder)) == FOUND
    main(str(folder), str(folder / "page.md"))
    assert (folder / "page.md").read_text() == page_of(FOUND, machine=about())


def test_trials_write_what_became_of_them(folder: Path) -> None:
    with Trials(FIRST, "a kill", store="s3", seed=7) as trials:
        trials.count("restored")
        trials.count("refused", 2)
        trials.count("never", 0)
    (record,) = read_records(folder)
    assert isinstance(record, Record)
    assert record == replace(
        RECORD,
        parameters={"store": "s3", "seed": "7"},
        outcomes={"restored": 1, "refused": 2},
        seconds=record.seconds,
    )


def test_a_trial_of_ours_that_lost_something_fails_and_stands_in_the_records(folder: Path) -> None:
    trials = Trials(FIRST, "a kill")
    trials.count("restored")
    trials.lose("step 3, seed 9")
    with pytest.raises(AssertionError, match="1 of 2 trials of 'a kill' lost something:\nstep 3, seed 9"), trials:
        pass
    (record,) = read_records(folder)
    assert isinstance(record, Record)
    assert (record.count, record.lost) == (2, 1)


def test_a_loss_of_others_is_written_down_and_does_not_fail(folder: Path) -> None:
    with Trials(FIRST, "a kill", "another") as trials:
        trials.lose("all of it")
    (record,) = read_records(folder)
    assert isinstance(record, Record)
    assert (record.subject, record.lost) == ("another", 1)


def test_trials_that_never_ran_or_did_not_end_write_nothing(folder: Path) -> None:
    with pytest.raises(AssertionError, match="no trial of 'a kill' ran"), Trials(FIRST, "a kill"):
        pass
    with pytest.raises(ZeroDivisionError), Trials(FIRST, "a kill") as trials:
        trials.count("restored", 1 // 0)
    assert list(read_records(folder)) == []


def test_no_page_is_written_of_nothing(folder: Path) -> None:
    with pytest.raises(SystemExit, match="holds no records"):
        main(str(folder), str(folder / "page.md"))
    assert not (folder / "page.md").exists()
