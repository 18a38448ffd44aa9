"""Of exports to one place one is at work; what it wrote is whole or not there; nobody takes away another's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import cloudckpt
from cloudckpt import ChecksumError, CloudHFReader, CloudHFWriter, OptionsError
from cloudckpt.convert.exporting import Kind
from cloudckpt.convert.holding import MARK, Hold, held
from cloudckpt.errors import ConflictError, StorageError
from cloudckpt.store import ObjectInfo, RetryingStore, open_store
from servers import FreshPrefix

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
KINDS: tuple[Kind, ...] = ("torch", "safetensors", "huggingface", "dcp")
NAMES = [f"w{number}" for number in range(3)]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[int], str]:
    """Return what saves a checkpoint that is full of a number."""

    def save(value: int) -> str:
        url = tmp_path / f"c{value}"
        if not url.exists():
            cloudckpt.save({name: torch.full((64,), float(value)) for name in NAMES}, url, progress="off")
        return str(url)

    return save


def damaged(url: str) -> str:
    shard = next(Path(url).rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return url


def target_of(to: Kind, folder: Path) -> Path:
    return folder / {"torch": "x.pt", "safetensors": "x.safetensors"}.get(to, "")


def exported(url: str, folder: Path, to: Kind, *, overwrite: bool = False) -> cloudckpt.Exported:
    shard_bytes = 256 if to == "huggingface" else None
    target = target_of(to, folder)
    return cloudckpt.export(url, target, to=to, overwrite=overwrite, max_shard_bytes=shard_bytes, progress="off")


def value_in(folder: Path, to: Kind) -> float:
    """Return the one number that an export is full of, as other programs read it."""
    state = {name: torch.zeros(64) for name in NAMES}
    if to == "torch":
        state = torch.load(folder / "x.pt", weights_only=True)
    elif to == "safetensors":
        state = load_file(folder / "x.safetensors")
    else:
        reader = CloudHFReader(folder) if to == "huggingface" else None
        dcp.load(state, checkpoint_id=None if reader else folder, storage_reader=reader, no_dist=True)
    (value,) = {float(one) for name in NAMES for one in state[name].unique()}
    return value


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_the_last_file(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something, once, right before the file comes to stand that makes an export one."""
    begin, todo = Hold._begin, [act]

    def began(hold: Hold, name: str, text: bytes | None) -> None:
        if name == hold._last and todo:
            todo.pop()()
        begin(hold, name, text)

    monkeypatch.setattr(Hold, "_begin", began)


@pytest.mark.parametrize("to", KINDS)
def test_of_two_exports_at_once_one_is_refused(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def other() -> None:
        with pytest.raises(OptionsError, match=r"is under way, or was killed, and nothing was written: its mark"):
            exported(saved(2), out, to)

    at_the_last_file(monkeypatch, other)
    exported(saved(1), out, to)
    assert value_in(out, to) == 1
    assert not [name for name in files(out) if name.endswith(MARK)]


@pytest.mark.parametrize(
    ("to", "other", "name"),
    [
        ("huggingface", "safetensors", "model.safetensors"),
        ("huggingface", "torch", "pytorch_model.bin"),
        ("dcp", "torch", ".metadata"),
        ("safetensors", "torch", "x-00001-of-00002.safetensors"),
    ],
)
def test_exports_of_which_one_could_remove_the_others_files_exclude_each_other(
    to: Kind, other: Kind, name: str, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def begin() -> None:
        with pytest.raises(OptionsError, match=r"is under way, or was killed"):
            cloudckpt.export(saved(2), out / name, to=other, progress="off")

    at_the_last_file(monkeypatch, begin)
    exported(saved(1), out, to)
    assert value_in(out, to) == 1


def test_exports_to_two_files_of_one_folder_are_under_way_at_once(
    saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_last_file(monkeypatch, lambda: exported(saved(2), tmp_path / "out", "safetensors"))
    exported(saved(1), tmp_path / "out", "torch")
    assert files(tmp_path / "out").keys() == {"x.pt", "x.safetensors"}


def before_it_is_put(monkeypatch: pytest.MonkeyPatch, verb: str, act: Callable[[], object], ends: str) -> None:
    """Do something, once, between the request for a file and what the store does of it."""
    request, todo = getattr(RetryingStore, verb), [act]

    def requested(store: RetryingStore, key: str, data: object) -> None:
        if key.endswith(ends) and todo:
            todo.pop()()
        request(store, key, data)

    monkeypatch.setattr(RetryingStore, verb, requested)


LAST = {"huggingface": "index.json", "dcp": ".metadata"}


@pytest.mark.parametrize("to", LAST)
def test_a_last_file_that_comes_late_names_files_that_are_there(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported(saved(1), out, to)
    before_it_is_put(monkeypatch, "put", lambda: exported(saved(2), out, to, overwrite=True), LAST[to])
    with pytest.raises(ConflictError, match="has taken over while the last file of this one was put") as failed:
        exported(saved(3), out, to, overwrite=True)
    assert failed.value.__notes__ == [f"the export is whole at {out.as_uri()}"]
    assert value_in(out, to) == 3


@pytest.mark.parametrize("to", KINDS)
def test_an_export_that_takes_over_and_fails_gives_the_place_back(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, bad = tmp_path / "out", damaged(saved(2))

    def fail() -> None:
        with pytest.raises(ChecksumError):
            exported(bad, out, to, overwrite=True)

    at_the_last_file(monkeypatch, fail)
    done = exported(saved(1), out, to)
    assert (value_in(out, to), files(out).keys()) == (1, set(done.files))


@pytest.mark.parametrize("to", LAST)
def test_a_last_file_that_would_replace_what_came_meanwhile_is_not_put(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before_it_is_put(monkeypatch, "create", lambda: exported(saved(2), out, to, overwrite=True), LAST[to])
    with pytest.raises(ConflictError, match="another program has written"):
        exported(saved(1), out, to)
    assert value_in(out, to) == 2
    assert len(files(out)) == (4 if to == "huggingface" else 2)


@pytest.mark.parametrize("to", LAST)
def test_a_last_file_whose_put_was_interrupted_names_files_that_are_there_if_it_lands(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put = tmp_path / "out", list[tuple[str, bytes]]()
    create = RetryingStore.create

    def interrupted(store: RetryingStore, key: str, data: bytes) -> None:
        if key.endswith(LAST[to]):
            put.append((key, data))
            raise KeyboardInterrupt
        create(store, key, data)

    url, other = saved(1), saved(2)
    monkeypatch.setattr(RetryingStore, "create", interrupted)
    with pytest.raises(KeyboardInterrupt) as failed:
        exported(url, out, to)
    assert "may still come to stand there" in failed.value.__notes__[-1]
    monkeypatch.undo()
    exported(other, out, to, overwrite=True)
    assert value_in(out, to) == 2
    (out / put[0][0]).write_bytes(put[0][1])
    assert value_in(out, to) == 1


def test_what_another_program_has_written_meanwhile_stays(
    saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {f"model-{number:05d}-of-00003.safetensors": b"theirs" for number in range(1, 4)}
    theirs["model.safetensors.index.json"] = b"{}"

    def write() -> None:
        for name, data in theirs.items():
            (tmp_path / "hf" / name).write_bytes(data)

    at_the_last_file(monkeypatch, write)
    with pytest.raises(ConflictError, match="another program has written"):
        exported(saved(1), tmp_path / "hf", "huggingface")
    assert files(tmp_path / "hf") == theirs


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    for number in range(3):
        (tmp_path / "config" / f"{number}.json").write_text("{}")
    return tmp_path / "config"


def described(url: str, out: Path, config: Path, *, overwrite: bool = False) -> cloudckpt.Exported:
    return cloudckpt.export(
        url, out, to="huggingface", config=config, max_shard_bytes=256, overwrite=overwrite, progress="off"
    )


def test_what_describes_a_model_is_not_taken_from_the_export_that_has_taken_over(
    saved: Callable[[int], str], tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done = tmp_path / "out", list[cloudckpt.Exported]()
    before_it_is_put(
        monkeypatch, "create", lambda: done.append(described(saved(2), out, config, overwrite=True)), "1.json"
    )
    with pytest.raises(ConflictError):
        described(saved(1), out, config)
    assert files(out).keys() == set(done[0].files)


@pytest.mark.parametrize("name", ["1.json", "model.safetensors"])
def test_what_describes_a_model_replaces_no_other_that_came_meanwhile(
    name: str, saved: Callable[[int], str], tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, todo = Hold._begin, [name]

    def began(hold: Hold, file: str, text: bytes | None) -> None:
        if text is not None and todo:
            (tmp_path / "out" / todo.pop()).write_bytes(b"theirs")
        begin(hold, file, text)

    monkeypatch.setattr(Hold, "_begin", began)
    with pytest.raises(ConflictError, match="another program has written"):
        described(saved(1), tmp_path / "out", config)
    assert files(tmp_path / "out") == {name: b"theirs"}


@pytest.mark.parametrize("to", KINDS)
def test_an_export_whose_place_is_taken_over_ends_and_takes_nothing_away(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_the_last_file(monkeypatch, lambda: exported(saved(2), out, to, overwrite=True))
    with pytest.raises(ConflictError, match="has taken over"):
        exported(saved(1), out, to)
    assert value_in(out, to) == 2
    assert not [name for name in files(out) if name.endswith(MARK)]


def test_where_a_store_without_create_has_let_in_two_the_first_ends(
    saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    at_the_last_file(monkeypatch, lambda: (out / MARK).write_bytes(b"another's"))
    with pytest.raises(ConflictError) as failed:
        exported(saved(1), out, "dcp")
    assert "the files that were written were removed" in failed.value.__notes__[-1]
    assert files(out) == {MARK: b"another's"}


@pytest.mark.parametrize("error", [StorageError("the disk is full", op="put", key="x"), KeyboardInterrupt()])
def test_an_export_of_several_files_that_failed_is_in_the_way_of_none(
    error: BaseException, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    at_the_last_file(monkeypatch, fail)
    with pytest.raises(type(error)) as failed:
        exported(saved(1), tmp_path / "hf", "huggingface")
    assert "were removed" in failed.value.__notes__[0]
    assert [path for path in (tmp_path / "hf").rglob("*") if path.is_file()] == []
    assert len(exported(saved(1), tmp_path / "hf", "huggingface").files) == 4


@pytest.mark.parametrize("to", KINDS)
def test_an_export_that_fails_leaves_the_one_that_it_was_to_replace(
    to: Kind, saved: Callable[[int], str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    exported(saved(1), out, to)
    before = files(out)
    with pytest.raises(ChecksumError) as failed:
        exported(damaged(saved(2)), out, to, overwrite=True)
    assert files(out) == before
    assert "the export before it is there as it was" in failed.value.__notes__[-1]


@pytest.mark.parametrize("failed", [ChecksumError("damaged", key="x"), KeyboardInterrupt()], ids=["fault", "interrupt"])
def test_whoever_writes_beside_a_file_that_fails_is_told_why_that_did(failed: BaseException, tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        hold = Hold(store, "", MARK, is_replacing=False)
        with pytest.raises(type(failed)), hold.standing("2"):
            raise failed
        with pytest.raises(type(failed)) as told, hold.standing("1"):
            pass
    assert told.value is failed


@pytest.mark.parametrize("to", KINDS)
def test_until_the_last_file_of_an_export_stands_the_old_one_is_read(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", list[float]()
    exported(saved(1), out, to)
    count = len(files(out))
    at_the_last_file(monkeypatch, lambda: seen.append(value_in(out, to)))
    exported(saved(2), out, to, overwrite=True)
    assert (seen, value_in(out, to), len(files(out))) == ([1], 2, count)


@pytest.mark.parametrize("to", KINDS)
def test_what_a_kill_left_is_named_and_can_be_replaced(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    exported(saved(1), out, to)
    mark = out / (MARK if target_of(to, out) == out else target_of(to, out).name + MARK)
    for path in out.iterdir():
        path.unlink()
    mark.write_bytes(b"0" * 32)
    stray = out / ("__0_0-00000000.distcp" if to == "dcp" else "model-00000000-00001-of-00002.safetensors")
    stray.touch()
    with pytest.raises(OptionsError, match=r"overwrite=True, --force"):
        exported(saved(2), out, to)
    done = exported(saved(2), out, to, overwrite=True)
    assert value_in(out, to) == 2
    assert not mark.exists()
    if to in ("dcp", "huggingface"):
        assert files(out).keys() - set(done.files) == {stray.name}  # whose export may be at work still
        assert stray.name in caplog.text
        done = exported(saved(2), out, to, overwrite=True)
        assert files(out).keys() == set(done.files)


def test_a_mark_of_a_time_beyond_all_calendars_is_told_all_the_same() -> None:
    told = str(held("file:///x", MARK, ObjectInfo(key=MARK, size_bytes=1, modified_s=1e12)))
    assert f"its mark {MARK} is there since 9999-12-30" in told


def test_a_save_for_hugging_face_is_refused_early_where_an_export_is_under_way(tmp_path: Path) -> None:
    (tmp_path / MARK).write_bytes(b"0" * 32)
    with pytest.raises(dcp.CheckpointException, match="another export to"):
        dcp.save({"w": torch.ones(3)}, storage_writer=CloudHFWriter(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


@pytest.mark.parametrize("to", KINDS)
def test_an_interrupt_at_the_end_of_an_export_is_told_that_it_is_whole(
    to: Kind, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    begin = Hold.standing.__wrapped__  # type: ignore[attr-defined]

    def interrupted(hold: Hold, name: str, text: bytes | None = None) -> Iterator[Callable[[], None]]:
        yield from begin(hold, name, text)
        if name == hold._last:
            raise KeyboardInterrupt

    monkeypatch.setattr(Hold, "standing", contextmanager(interrupted))
    with pytest.raises(KeyboardInterrupt) as failed:
        exported(saved(1), out, to)
    assert failed.value.__notes__ == [f"the export is whole at {target_of(to, out).as_uri()}"]
    assert value_in(out, to) == 1


@pytest.mark.parametrize("late", ["_remove_old", "_let_go", "close"])
def test_an_interrupt_after_the_last_file_is_told_that_the_export_is_whole(
    late: str, saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, out = RetryingStore if late == "close" else Hold, tmp_path / "out"
    call, todo = getattr(of, late), [KeyboardInterrupt()]

    def interrupted(self: object, *args: object) -> None:
        if todo and (out / "x.pt").exists():
            raise todo.pop()
        call(self, *args)

    url = saved(1)
    monkeypatch.setattr(of, late, interrupted)
    with pytest.raises(KeyboardInterrupt) as failed:
        exported(url, out, "torch")
    assert failed.value.__notes__ == [f"the export is whole at {(out / 'x.pt').as_uri()}"]
    assert list(files(out)) == ["x.pt"]


def test_another_programs_file_that_came_meanwhile_is_not_replaced(
    saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_last_file(monkeypatch, lambda: (tmp_path / "x.pt").write_bytes(b"another's"))
    with pytest.raises(ConflictError, match="another program has written"):
        exported(saved(1), tmp_path, "torch")
    assert (tmp_path / "x.pt").read_bytes() == b"another's"


def test_a_mark_holds_on_a_bucket(
    saved: Callable[[int], str], s3_url: FreshPrefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = f"{s3_url.url}/dcp", s3_url.storage_options

    def export(value: int) -> cloudckpt.Exported:
        return cloudckpt.export(saved(value), url, to="dcp", target_storage_options=options, progress="off")

    def other() -> None:
        with pytest.raises(OptionsError, match="is under way"):
            export(2)

    at_the_last_file(monkeypatch, other)
    export(1)
    with pytest.raises(OptionsError, match="already, and nothing was written"):
        export(2)


def test_a_store_that_cannot_tell_what_is_there_is_no_reason_to_say_so(
    saved: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = StorageError("the disk is gone", op="head", key="x")

    def gone(*_: object, **__: object) -> None:
        raise error

    at_the_last_file(monkeypatch, gone)
    monkeypatch.setattr(Hold, "_told", gone)
    with pytest.raises(StorageError) as failed:
        exported(saved(1), tmp_path / "out", "dcp")
    assert "is not known" in failed.value.__notes__[-1]
