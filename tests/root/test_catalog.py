"""Which of the committed checkpoints a catalog names as the best, and which it takes to stand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.errors import OptionsError
from cloudckpt.format import FORMAT_VERSION, MANIFEST_NAME, IndexRef, Manifest, checkpoint_prefix, new_attempt
from cloudckpt.format.manifest import metrics_to_json
from cloudckpt.root import Catalog, Roots
from cloudckpt.store import open_store


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    store = open_store(str(tmp_path))
    yield Catalog(store)
    store.close()


def commit(catalog: Catalog, step: int, epoch: int = 1, **metrics: float) -> None:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=epoch,
        attempt=new_attempt(),
        created_at="",
        world_size=1,
        index=IndexRef(size_bytes=1, sha256="0" * 64),
        metrics=metrics_to_json(metrics),
    )
    catalog.commit(manifest, prefix=checkpoint_prefix(step, epoch))


def best_step(catalog: Catalog, metric: str, mode: str) -> int | None:
    found = Roots([catalog]).best(metric, mode)  # type: ignore[arg-type]
    return None if found is None else found.step


@pytest.mark.parametrize(("mode", "step"), [("min", 2), ("max", 3)])
def test_the_best_is_the_smallest_or_the_largest_as_the_mode_says(catalog: Catalog, mode: str, step: int) -> None:
    for number, loss in enumerate([0.5, -math.inf, math.inf, 0.1], start=1):
        commit(catalog, number, loss=loss)

    assert best_step(catalog, "loss", mode) == step


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equals_the_newer_is_the_best_and_a_later_epoch_is_newer(catalog: Catalog, mode: str) -> None:
    commit(catalog, 9, epoch=1, loss=1.0)
    commit(catalog, 2, epoch=2, loss=1.0)

    assert best_step(catalog, "loss", mode) == 2


def test_nan_and_missing_metrics_are_never_best(catalog: Catalog) -> None:
    commit(catalog, 1, loss=5.0)
    commit(catalog, 2, loss=math.nan)
    commit(catalog, 3, acc=0.0)

    assert best_step(catalog, "loss", "min") == best_step(catalog, "loss", "max") == 1


def test_nothing_is_best_where_no_checkpoint_has_the_metric(catalog: Catalog) -> None:
    assert best_step(catalog, "loss", "min") is None
    commit(catalog, 1, acc=1.0)

    assert best_step(catalog, "loss", "min") is None


@pytest.mark.parametrize(("metric", "mode"), [("", "min"), ("loss", "least")])
def test_a_metric_without_a_name_and_an_unknown_mode_are_refused(catalog: Catalog, metric: str, mode: str) -> None:
    with pytest.raises(OptionsError):
        best_step(catalog, metric, mode)


def test_the_url_of_a_checkpoint_below_the_root_of_a_disk_has_three_slashes() -> None:
    with open_store("/") as store:
        catalog = Catalog(store)
        assert "at file:///step-1;" in str(catalog.exists_error("step-1/"))
        assert "at file:///;" in str(catalog.exists_error(""))


def test_what_another_process_has_made_void_stands_for_nobody(tmp_path: Path) -> None:
    prefix = checkpoint_prefix(2, 1)
    with CheckpointManager(tmp_path, progress="off") as manager, closing(open_store(str(tmp_path))) as store:
        for step in (1, 2):
            manager.save(step, {"w": torch.zeros(10)})
        mine, others = Catalog(store), Catalog(store)
        newest = mine.adopt((tmp_path / prefix / MANIFEST_NAME).read_bytes(), prefix=prefix)
        assert mine.standing([newest]) == [newest]

        others.uncommit(prefix)
        assert others.void(prefix)  # its shards stand still

        assert mine.standing([newest]) == []
        assert [one.step for one in mine.survey().checkpoints] == [1]
        assert manager.all_steps() == [1]
