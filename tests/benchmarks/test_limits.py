"""The benchmark of limits puts our saves beside what the machine can do, and says where their time went."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from benchmarks import limits
from benchmarks.sink.server import Sink


@pytest.mark.slow
@pytest.mark.parametrize("target", ["s3sink", "local"])
def test_a_save_is_measured_beside_its_limit_and_its_phases_are_told(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--target", target, "--gib", "0.03", "--rounds", "1", "--timeline", "--directory", str(tmp_path)]
    assert limits.main(arguments) == 0
    timeline, head, limit, ours = capsys.readouterr().out.splitlines()
    assert [word.split()[0] for word in timeline.partition("ms: ")[2].partition(" ms;")[0].split(", ")] == [
        *("opening", "shards", "gather", "index", "commit", "rest"),
    ]
    assert head.split()[0] == "way"
    assert [limit.split()[0], ours.split()[0]] == limits.WAYS[target]


def test_a_small_object_of_the_sink_has_the_etag_of_s3() -> None:
    sink = Sink(1 << 20)
    try:
        extents = sink.arena.allocate(5)
        at = 0
        for view in sink.arena.views(extents):
            view[:] = b"hello"[at : at + len(view)]
            at += len(view)
        view.release()
        assert sink.etag(extents, 5) == hashlib.md5(b"hello", usedforsecurity=False).hexdigest()
    finally:
        sink.arena.close()
