"""The programs of the two formats that are no framework's: killed and started again, or on another number of ranks."""

from __future__ import annotations

import pytest

from raw_access import FreshPrefix

pytest.importorskip("transformers", minversion="5.24", reason="make integrations installs the frameworks")
pytest.importorskip("accelerate", minversion="1.15", reason="make integrations installs the frameworks")

from tests.integrations.interrupted import assert_same_losses, run_program

pytestmark = pytest.mark.timeout(600)


def test_a_file_of_torch_save_is_gone_on_from_after_each_kill(s3_url: FreshPrefix) -> None:
    def file(name: str) -> FreshPrefix:
        return FreshPrefix(url=f"{s3_url.url}/{name}", server=s3_url.server)

    alone = run_program("torch_save.py", file("alone.pt"))
    runs = [run_program("torch_save.py", file("killed.pt"), after=after) for after in (4, 11)]
    runs.append(run_program("torch_save.py", file("killed.pt")))
    assert (alone.code, [run.code for run in runs]) == (0, [-9, -9, 0])
    assert min(runs[-1].losses) > 11
    assert_same_losses(runs, alone)


def test_a_model_of_two_ranks_computes_the_same_on_one_and_on_two(s3_url: FreshPrefix) -> None:
    saved, by_one, by_two = (
        run_program("hf_layout.py", s3_url, what, ranks=ranks).output.split()[-1]
        for what, ranks in (("save", 2), ("load", 1), ("load", 2))
    )
    assert by_one == by_two == saved
