"""Mistakes that somebody could make are each noticed by a test; one that has no place any more is replaced here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.programs import run_to_end
from tests.reliability.planting import Bug, copy_tree, planted
from tests.reliability.records import Cell, Section, Trials, write

ROOT = Path(__file__).resolve().parent.parent.parent
SECTION = Section(
    number=20,
    title="Planted bugs",
    about=(
        "A mistake is made in a copy of the package, and the test that must notice it is run there, and without the "
        "mistake before. Lost is a mistake that nobody noticed."
    ),
)
BUGS = (
    Bug(
        what="a commit does not ask whether a newer job has claimed the root",
        file="root/catalog.py",
        old="        if manifest.epoch:\n            self.claims.fence(manifest.epoch)\n        claim = ",
        new="        claim = ",
        caught_by="root/test_history.py::test_a_job_whose_claim_is_gone_is_fenced_and_commits_nothing",
    ),
    Bug(
        what="blocks that were read are not compared with their digests",
        file="transfer/download.py",
        old="        if is_right:\n",
        new="        if is_right or True:\n",
        caught_by="transfer/test_upload_download.py::test_a_block_that_was_wrong_once_is_read_again",
    ),
    Bug(
        what="a manifest's seal is not checked",
        file="format/manifest.py",
        old="    return seal is not None and digest_of(",
        new="    return True or digest_of(",
        caught_by="format/test_manifest.py::test_every_flipped_bit_is_found_and_is_never_taken_for_a_newer_version",
    ),
    Bug(
        what="objects are not made durable before they get their name",
        file="store/local.py",
        old="            self._disk.sync(file)\n            get_on()\n",
        new="            get_on()\n",
        caught_by="store/test_local_power_loss.py::test_a_power_cut_never_takes_what_was_acknowledged_nor_shows_a_part_of_an_object",
    ),
    Bug(
        what="names of objects are not made durable",
        file="store/local.py",
        old="        self._disk.rename(temp, name, at=fd)\n        self._disk.sync_directory(fd)\n",
        new="        self._disk.rename(temp, name, at=fd)\n",
        caught_by="store/test_local_power_loss.py::test_a_power_cut_never_takes_what_was_acknowledged_nor_shows_a_part_of_an_object",
    ),
    Bug(
        what="the result of a create that failed is taken for another's, and not read back",
        file="store/retrying.py",
        old='        if not is_ours:\n            raise ObjectExistsError(\n                f"{self._key!r} on',
        new='        if is_ours:\n            raise ObjectExistsError(\n                f"{self._key!r} on',
        caught_by="store/test_retrying.py::TestEveryVerb::test_a_transient_fault_is_survived",
    ),
    Bug(
        what="a sweep believes the clock of its own machine",
        file="root/sweep.py",
        old="        now_s = store.head(key).modified_s\n",
        new="        now_s = time.time()\n",
        caught_by="root/test_history.py::test_what_is_young_is_left_until_it_is_old_enough",
    ),
    Bug(
        what="a sweep does not make sure that nothing is committed later where it removes",
        file="root/sweep.py",
        old="    is_voided = catalog.void(orphan.prefix, is_sharing=orphan.may_be_shared)\n",
        new="    is_voided = True\n",
        caught_by="root/test_history.py::test_a_sweep_grants_what_was_pruned_its_grace_time",
    ),
    Bug(
        what="what was pinned while it was pruned is not put back",
        file="root/pruning.py",
        old="        pinned = catalog.pins.prefixes() if gone else set()\n",
        new="        pinned: set[str] = set()\n",
        caught_by="root/test_pins.py::test_a_pass_that_removes_lists_the_pins_twice",
    ),
    Bug(
        what="shards are deleted although they are pinned by then",
        file="root/cleaning.py",
        old="        pinned = self._catalog.pins.prefixes() if closed else set()\n",
        new="        pinned = set()\n",
        caught_by="root/test_pins.py::test_who_removes_shards_has_made_their_manifest_void_and_asked_for_pins_after_that",
    ),
    Bug(
        what="a sweep does not ask for pins again once what it removes is void",
        file="root/sweep.py",
        old="    if not is_voided or catalog.pins.is_pinned(orphan.prefix):\n",
        new="    if not is_voided:\n",
        caught_by="root/test_pins.py::test_a_sweep_asks_for_pins_again_once_it_has_made_void_what_it_removes",
    ),
    Bug(
        what="a job that went on from a copy refers to shards that only the copied root has",
        file="saving/reuse.py",
        old="        if entry.holder is None or has_holders:\n",
        new="        if entry.holder is None or has_holders or True:\n",
        caught_by="manager/test_reuse.py::test_a_job_that_goes_on_from_a_copy_refers_to_nothing_that_is_not_there",
    ),
    Bug(
        what="a manifest that a read does not find counts as gone, though a listing shows it",
        file="root/sharing.py",
        old="in sorted(unseen) if catalog.is_shown(prefix)), None)",
        new="in sorted(unseen) if not prefix), None)",
        caught_by="manager/test_reuse.py::test_a_removal_takes_nothing_that_manifests_may_name_which_it_cannot_read",
    ),
    Bug(
        what="a copy of an optimizer does not wait for what a restore has left for later",
        file="state/later.py",
        old="    coming.wait()\n    one = ",
        new="    one = ",
        caught_by="loading/test_rest.py::test_a_copy_that_is_made_before_all_is_there_is_one_of_the_whole",
    ),
    Bug(
        what="rules keep one less than they say",
        file="root/retention.py",
        old="        return {checkpoint.order for checkpoint in checkpoints[-self.n :]}\n",
        new="        return {checkpoint.order for checkpoint in checkpoints[-self.n + 1 :]}\n",
        caught_by="root/test_retention.py::test_a_later_epoch_is_newer_than_a_higher_step",
    ),
    Bug(
        what="a job claims an epoch of one source alone: not above what was copied there",
        file="root/claims.py",
        old="        epoch = max(highest, above) + 1\n",
        new="        epoch = highest + 1\n",
        caught_by="root/test_history.py::test_an_epoch_is_above_every_prefix_also_where_the_claims_are_gone",
    ),
    Bug(
        what="a delete takes whatever a listing names",
        file="root/removal.py",
        old="        if not key.startswith(starts) or _is_manifest(key):\n",
        new="        if not starts:\n",
        caught_by="root/test_removal.py::test_a_key_that_was_not_meant_keeps_all_from_going",
    ),
)


def run_planted(folder: Path, bugs: Sequence[Bug]) -> list[list[str]]:
    """Return of each bug which test has failed; nothing else may go wrong."""
    copy_tree(ROOT, folder)
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
    given = json.dumps([asdict(bug) for bug in bugs])
    ran = run_to_end([sys.executable, "tests/reliability/planting.py", given], cwd=folder, env=env)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line)["failing"] for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_a_planted_bug_has_its_place(bug: Bug) -> None:
    planted((ROOT / "cloudckpt" / bug.file).read_text(encoding="utf-8"), bug)
    assert (ROOT / "tests" / bug.caught_by.partition("::")[0]).is_file()


def test_a_bug_without_a_place_is_refused() -> None:
    with pytest.raises(AssertionError, match="stands 0 times"):
        planted("nothing of it", BUGS[0])


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_each_planted_bug_is_noticed_and_nothing_else_fails(tmp_path: Path) -> None:
    controls = [replace(BUGS[0], old="", new="", file="py.typed", caught_by=name) for name in _files()]
    with Trials(SECTION, "a mistake in the package") as trials:
        ends = run_planted(tmp_path, [*controls, *BUGS])
        assert [end for end in ends[: len(controls)] if end] == [], "a test fails without any mistake"
        for bug, failing in zip(BUGS, ends[len(controls) :], strict=True):
            if failing and all(name.startswith("tests/") and " in " not in name for name in failing):
                trials.count("noticed by a test")
                write(Cell(section=SECTION, table="By which test", row=bug.what, column="test", text=f"`{failing[0]}`"))
            else:
                trials.lose(f"{bug.what}: {failing or 'no test failed'}")


def _files() -> list[str]:
    return sorted({bug.caught_by for bug in BUGS})
