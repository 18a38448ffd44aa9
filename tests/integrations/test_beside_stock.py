"""The benchmark of trainers measures one, kills its saves, and tells what a resume then finds."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="make integrations installs the frameworks")

from benchmarks import integrations

pytestmark = pytest.mark.timeout(600)


def test_a_trainer_is_measured_alone_and_with_the_adapter_and_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--frameworks", "accelerate", "--mb", "12", "--runs", "1", "--directory", str(tmp_path)]
    assert integrations.main(words) == 0
    told = capsys.readouterr().out
    numbers, kills = told.split("The same trainings on SeaweedFS")
    rows = {line.split(" | ")[0]: line for line in numbers.splitlines()}
    assert "†" in rows["| accelerate"]
    assert "†" not in rows["| – with cloudckpt"]
    struck = {line.split(" | ")[0]: line for line in kills.splitlines()}
    assert "in `./s3:`" in struck["| accelerate"]
    assert struck["| – with cloudckpt"].endswith("| step 2 |")
