"""Laws of the listing benchmark, and of what listing may cost: requests do not grow beyond what has to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.listing import measure
from benchmarks.shared.targets import open_target
from benchmarks.sink.s3_words import Body, list_page, texts_of


def test_looking_at_a_root_costs_a_listing_and_what_was_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOUDCKPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with open_target("s3sink", size_bytes=1 << 20, directory=tmp_path) as target, target.ground() as ground:
        costs = {cost.what: cost.requests for cost in measure(ground, 20)}
    assert costs == {
        "latest": 2,
        # The listing tells that nothing is pinned.
        "ls, nothing cached": 21,
        "ls again": 1,
        "ls again, --json": 1,
        "ls again, --check": 1,
        "one listing": 1,
        # The claim of the epoch, once.
        "a retention pass with nothing to do": 2,
    }


@pytest.mark.parametrize("max_keys", ["1", "2", "3", "1000"])
@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", ["a-", "a/", "b"]),
        ("a/", ["a/0/", "a/1/", "a/2", "a/2/", "a/3"]),
        ("a/1", ["a/1/"]),
        ("a/1/", ["a/1/x", "a/1/y"]),
        ("c", []),
    ],
)
def test_pages_of_the_sink_make_up_the_whole_listing(prefix: str, expected: list[str], max_keys: str) -> None:
    body = Body(extents=[], size_bytes=0, etag="", modified_s=0.0)
    keys = sorted(["a-", "a/0/x", "a/1/x", "a/1/y", "a/2", "a/2/x", "a/3", "b"])
    found: list[str] = []
    mark = ["x"]
    while mark:
        token = {"continuation-token": found[-1]} if found else {}
        query = {"prefix": prefix, "delimiter": "/", "max-keys": max_keys, **token}
        document = list_page(keys, lambda _: body, "bucket", query).encode()
        found += sorted([*texts_of(document, "Key"), *texts_of(document, "Prefix")[1:]])
        mark = texts_of(document, "NextContinuationToken")
    assert found == expected
