"""The benchmark of the way to the first step proves that what it timed was restored, and tells each way."""

from __future__ import annotations

import pytest

from benchmarks import first_step

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("forked_measurements")
def test_each_way_is_a_row_beside_the_links_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert first_step.main(["--quick", "--target", "s3sink"]) == 0
    told = capsys.readouterr().out
    assert "the link takes" in told
    assert [line.split("|")[1].strip() for line in told.splitlines() if line.startswith("| ")][1:] == [*first_step.WAYS]
