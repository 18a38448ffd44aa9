"""Whoever chooses every byte that comes in gets an error of ours, or nothing: no code, no path, no memory, no time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.format.test_hostile import CASES
from tests.reliability.hostile import (
    ARGUMENTS,
    FUZZED,
    OPTIONS,
    URLS,
    Found,
    caged,
    cases_of_objects,
    fuzzed,
    opened,
    told_by_cli,
)
from tests.reliability.records import Section, Trials, dose

SECTION = Section(
    number=60,
    title="Hostile input",
    about="Manifests, indexes, claims, DCP's `.metadata`, keys, URLs, storage options and arguments of the command "
    "that somebody chose byte for byte, read in a process that has 64 MiB of room. Each is refused by an error of "
    "cloudckpt's own, or is harmless. Lost is a trial that raised anything else, ran code, made a file, repeated a "
    "secret, or took more than that room or a second of processor time.",
)


def note(kind: str, found: Found, **parameters: object) -> None:
    became, wrong = found
    with Trials(SECTION, kind, **parameters) as trials:
        for outcome, times in became.items():
            trials.count(outcome, times)
        for one in wrong:
            trials.lose(one)


def test_no_url_and_no_option_opens_what_it_should_not(tmp_path: Path) -> None:
    note("hostile URLs and storage options", caged(opened, str(tmp_path)))


def test_no_argument_of_the_command_does_more_than_fail(tmp_path: Path) -> None:
    note("hostile arguments of the command", caged(told_by_cli, str(tmp_path)))


def test_no_object_that_was_made_by_hand_is_read(tmp_path: Path) -> None:
    note("hostile objects, each by name", caged(cases_of_objects, str(tmp_path), dose(1, short=10)))
    assert len(CASES) + len(URLS) + len(OPTIONS) + len(ARGUMENTS) >= 250


@pytest.mark.parametrize("kind", FUZZED)
@pytest.mark.timeout(3600)
def test_no_mutant_does_more_than_be_refused(kind: str, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    found = caged(fuzzed, str(tmp_path), kind, dose(30_000, short=500), seed)
    note(f"mutants: {kind}", found, seed=seed)
