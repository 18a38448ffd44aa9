"""The benchmark of copies says of each goal whether it is met."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import copying

pytestmark = pytest.mark.slow


def test_each_call_is_measured_beside_the_one_that_it_is_compared_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copying.main(["--quick", "--directory", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert [line.split("  ")[0] for line in told.splitlines()[:6]] == [
        *("save", "load", "verify --deep", "verify", "cp", "diff"),
    ]
    assert "cp is " in told
    assert "verify --deep is " in told
