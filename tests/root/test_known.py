"""What was read before is read again unless a listing shows that it stands; and the cache is nobody's to rely on."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from cloudckpt.format import FORMAT_VERSION, IndexRef, Manifest, checkpoint_prefix, digest_of, index_key, shard_key
from cloudckpt.root import Catalog, ManifestCache, Roots, known, overview, pin, unpin
from tests.store.fault_store import Bucket, FaultStore

INDEX = b"index"


def commit(bucket: Bucket, step: int, attempt: str, **fields: object) -> str:
    """Commit around every client; return the key of the manifest."""
    prefix = checkpoint_prefix(step, 1)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        state="committed",
        step=step,
        epoch=1,
        attempt=attempt,
        created_at="2026-01-01T00:00:00.000+00:00",
        shard_count=1,
        total_bytes=5,
        index=IndexRef(size_bytes=len(INDEX), sha256=digest_of(INDEX)),
        **fields,  # type: ignore[arg-type]
    )
    bucket.raw_put(prefix + shard_key(attempt, 0, 0), b"shard")
    bucket.raw_put(prefix + index_key(attempt), INDEX)
    bucket.raw_put(f"{prefix}manifest.json", manifest.encode())
    return f"{prefix}manifest.json"


def attempt(number: int) -> str:
    return f"{number:016x}"


@pytest.fixture
def bucket() -> Bucket:
    bucket = Bucket()
    for step in range(40):
        commit(bucket, step, attempt(step), metrics={"loss": 1.0 + step})
    return bucket


@pytest.fixture
def cache(tmp_path: Path) -> ManifestCache:
    return ManifestCache(tmp_path / "cache")


def look(bucket: Bucket, cache: ManifestCache | None, *, is_quick: bool = False) -> tuple[dict[int, str], int]:
    """Return step → attempt as a new process finds them, and its requests."""
    client = FaultStore(bucket)
    found = overview(Catalog(client), cache, is_quick=is_quick)
    return {one.step: one.attempt for one in found.checkpoints}, client.op_count


def test_the_second_look_costs_a_listing_and_finds_the_same(bucket: Bucket, cache: ManifestCache) -> None:
    first, first_count = look(bucket, cache)
    second, second_count = look(bucket, cache)
    assert second == first == {step: attempt(step) for step in range(40)}
    assert (first_count, second_count) == (41, 1)
    assert look(bucket, None)[1] == 41


@pytest.mark.parametrize("is_quick", [False, True])
def test_pins_are_seen_in_either_listing_and_cost_requests_only_where_there_are_any(
    bucket: Bucket, cache: ManifestCache, *, is_quick: bool
) -> None:
    look(bucket, cache)
    pin(Roots([Catalog(FaultStore(bucket))]), 7, "good")
    for known_before in (cache, None):
        client = FaultStore(bucket)
        found = overview(Catalog(client), known_before, is_quick=is_quick)
        assert [(one.step, one.note) for one in found.pins] == [(7, "good")]
    unpin(Roots([Catalog(FaultStore(bucket))]), 7)
    client = FaultStore(bucket)
    assert overview(Catalog(client), cache, is_quick=is_quick).pins == []
    assert client.op_count == 1


def remake(bucket: Bucket, *, keeps_old: bool) -> None:
    """Delete a checkpoint, and save its step again, in the same second and with as many bytes."""
    key = commit(bucket, 7, attempt(77), metrics={"loss": 8.0})
    assert len(bucket.raw_get(key)) > 0
    if not keeps_old:
        for name in [name for name in bucket.raw_list() if attempt(7) in name and name.startswith(key[:22])]:
            del bucket.objects[name]


def delete_manifest(bucket: Bucket) -> None:
    del bucket.objects[f"{checkpoint_prefix(7, 1)}manifest.json"]


def void(bucket: Bucket) -> None:
    delete_manifest(bucket)
    assert Catalog(FaultStore(bucket)).void(checkpoint_prefix(7, 1))


def remove(bucket: Bucket) -> None:
    for name in [name for name in bucket.raw_list() if name.startswith(checkpoint_prefix(7, 1))]:
        del bucket.objects[name]


CHANGES: list[tuple[str, Callable[[Bucket], None], str | None]] = [
    ("saved again", lambda bucket: remake(bucket, keeps_old=False), attempt(77)),
    ("saved again beside the old shards", lambda bucket: remake(bucket, keeps_old=True), attempt(77)),
    ("manifest deleted", delete_manifest, None),
    ("voided", void, None),
    ("removed", remove, None),
]


@pytest.mark.parametrize(("change", "now"), [case[1:] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_what_changed_since_it_was_read_is_seen(
    bucket: Bucket, cache: ManifestCache, change: Callable[[Bucket], None], now: str | None
) -> None:
    look(bucket, cache)
    change(bucket)
    found, _ = look(bucket, cache)
    assert found.get(7) == now
    assert found == look(bucket, None)[0]


def test_a_quick_look_lists_prefixes_alone(bucket: Bucket, cache: ManifestCache) -> None:
    look(bucket, cache)
    delete_manifest(bucket)
    found, request_count = look(bucket, cache, is_quick=True)
    assert request_count == 1
    assert found[7] == attempt(7), "its prefix is listed still, which is all that is looked at"
    remove(bucket)
    assert 7 not in look(bucket, cache, is_quick=True)[0]


def test_left_to_itself_a_look_is_quick_only_where_to_look_at_each_would_take_long(
    bucket: Bucket, cache: ManifestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(bucket, cache)
    delete_manifest(bucket)
    found = overview(Catalog(FaultStore(bucket)), cache, is_quick=None)
    assert (len(found.checkpoints), found.unchecked, found.check_request_count) == (39, 0, 0)
    monkeypatch.setattr(known, "_PAGE", 10)
    monkeypatch.setattr(known, "READERS", 2)
    commit(bucket, 7, attempt(7), metrics={"loss": 8.0})
    look(bucket, cache)
    delete_manifest(bucket)
    commit(bucket, 50, attempt(50))
    found = overview(Catalog(FaultStore(bucket)), cache, is_quick=None)
    # One flat listing of 12 pages; the new one was read.
    assert (len(found.checkpoints), found.unchecked, found.check_request_count) == (41, 40, 12)


def test_what_is_new_is_read_and_known_from_then_on(bucket: Bucket, cache: ManifestCache) -> None:
    look(bucket, cache)
    commit(bucket, 100, attempt(100))
    assert [look(bucket, cache)[1] for _ in range(2)] == [2, 1]


def test_where_shards_are_many_manifests_are_read_and_not_all_objects_listed(cache: ManifestCache) -> None:
    bucket = Bucket()
    for step in range(3):
        commit(bucket, step, attempt(step))
        # As a save of many ranks says; the listing would have a page for each.
    for key in [key for key in bucket.raw_list() if key.endswith("manifest.json")]:
        step = int(key[5:15])
        commit_many(bucket, key, step)
    look(bucket, cache)
    client = FaultStore(bucket)
    overview(Catalog(client), cache)
    assert sorted(op.verb for op in client.trace) == ["list", "read", "read", "read"]


def commit_many(bucket: Bucket, key: str, step: int) -> None:
    manifest = Manifest.decode(bucket.raw_get(key), key=key)
    import msgspec

    bucket.raw_put(key, msgspec.structs.replace(manifest, shard_count=1_000).encode())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "a directory"])
def test_a_damaged_cache_changes_nothing(bucket: Bucket, tmp_path: Path, damage: str) -> None:
    cache = ManifestCache(tmp_path / "cache")
    whole, _ = look(bucket, cache)
    (file,) = (tmp_path / "cache").iterdir()
    data = file.read_bytes()
    if damage == "a directory":
        file.unlink()
        file.mkdir()
    else:
        middle = len(data) // 2
        texts = {"cut": data[:middle], "empty": b"", "foreign": b"\x93NUMPY" * 99}
        flipped = data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        file.write_bytes(texts.get(damage, flipped))
    assert look(bucket, cache)[0] == whole
    assert look(bucket, cache)[0] == whole


def test_the_cache_is_the_users_alone(bucket: Bucket, tmp_path: Path, cache: ManifestCache) -> None:
    kept = os.umask(0)
    try:
        look(bucket, cache)
    finally:
        os.umask(kept)
    (file,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_cache_that_cannot_be_written_is_done_without(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ManifestCache(tmp_path / "file" / "cache")
    assert [look(bucket, cache)[1] for _ in range(2)] == [41, 41]


def test_the_cache_keeps_below_its_limit_and_lets_the_oldest_go(tmp_path: Path) -> None:
    cache = ManifestCache(tmp_path, limit_bytes=3_000)
    for number in range(6):
        bucket = Bucket()
        commit(bucket, 1, attempt(1), metadata={"note": os.urandom(400).hex()})
        overview(Catalog(FaultStore(bucket, url=f"memory://bucket/{number}")), cache)
        newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    files = list(tmp_path.iterdir())
    assert 0 < sum(path.stat().st_size for path in files) <= 3_000
    assert newest in files


def test_roots_of_two_servers_are_told_apart(bucket: Bucket, cache: ManifestCache) -> None:
    look(bucket, cache)
    other = FaultStore(Bucket(), endpoint="https://other.example")
    assert overview(Catalog(other), cache).checkpoints == ()


def test_the_cache_lies_where_xdg_says_and_can_be_switched_off(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("CLOUDCKPT_CACHE", "off")
    assert ManifestCache.of_environment() is None
    monkeypatch.delenv("CLOUDCKPT_CACHE")
    look(bucket, ManifestCache.of_environment())
    assert len(list((tmp_path / "xdg" / "cloudckpt" / "manifests").iterdir())) == 1


def test_what_has_no_commit_is_told_with_its_bytes_and_age(bucket: Bucket, cache: ManifestCache) -> None:
    delete_manifest(bucket)
    for _ in range(2):
        (orphan,) = overview(Catalog(FaultStore(bucket)), cache, clock=lambda: bucket.now_s + 60).unfinished
        assert (orphan.prefix, orphan.object_count) == (checkpoint_prefix(7, 1), 2)
        assert orphan.total_bytes == len(INDEX) + len(b"shard")
        assert orphan.age_s >= 60


@pytest.mark.parametrize("what", ["fifo", "link", "folder", "deep"])
def test_what_is_no_file_of_its_own_is_not_read(tmp_path: Path, bucket: Bucket, what: str) -> None:
    cache = ManifestCache(tmp_path)
    expected, _ = look(bucket, cache)
    (file,) = tmp_path.iterdir()
    text = file.read_bytes()
    file.unlink()
    if what == "fifo":
        os.mkfifo(file)
    elif what == "link":
        (tmp_path / "elsewhere").write_bytes(text)
        file.symlink_to(tmp_path / "elsewhere")
    elif what == "folder":
        file.mkdir()
    else:
        file.write_bytes(zstandard.ZstdCompressor().compress(b"\x81\xa1x" + b"\x91" * 200_000 + b"\xc0"))
    assert cache.manifests(FaultStore(bucket)) == {}
    assert look(bucket, cache)[0] == expected


def test_files_of_others_are_not_thinned_out(tmp_path: Path, bucket: Bucket) -> None:
    other = tmp_path / "notes.bin"
    other.write_bytes(b"x" * 100_000)
    os.utime(other, (1, 1))
    look(bucket, ManifestCache(tmp_path, limit_bytes=50_000))
    assert other.exists()
