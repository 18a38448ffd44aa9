"""Laws of the disk store that only a disk has: names, links, temp names, directories, and every error of the kernel.

What all stores promise is in `contract.py`; what survives a power cut in `test_local_power_loss.py`.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import stat
import threading
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudckpt.errors import (
    AccessDeniedError,
    CommitUnknownError,
    CreateNotEnforcedError,
    ObjectExistsError,
    ObjectNotFoundError,
    OptionsError,
    StorageError,
    TransientError,
)
from cloudckpt.options import MIB, RetryPolicy
from cloudckpt.store.disk import NOT_OFFERED, Disk
from cloudckpt.store.local import LocalStore
from cloudckpt.store.location import local_path
from cloudckpt.store.retrying import RetryingStore
from tests.store.fault_disk import FaultDisk

TEMP_NAME = ".cloudckpt-tmp-" + "0" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def disk() -> FaultDisk:
    return FaultDisk()


@pytest.fixture
def store(root: Path, disk: FaultDisk) -> LocalStore:
    return LocalStore(str(root), disk=disk)


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def fork(action: Callable[[], None]) -> int:
    """Run `action` in a process of its own; return its id, to be waited for."""
    with warnings.catch_warnings():
        # From 3.12 on Python warns of other threads; the child makes system calls only, and ends here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        action()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of the test run may go on in the child
        traceback.print_exc()
    finally:
        os._exit(code)


def fail_fsync(monkeypatch: pytest.MonkeyPatch, code: int, is_hit: Callable[[bool, int], bool]) -> list[bool]:
    """Let fsync fail where `is_hit` says so of (is it a directory, number of the call); return what was asked for."""
    real, asked = os.fsync, list[bool]()

    def fsync(fd: int) -> None:
        asked.append(stat.S_ISDIR(os.fstat(fd).st_mode))
        if is_hit(asked[-1], len(asked) - 1):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return asked


class TestNames:
    @pytest.mark.parametrize(
        ("url", "path"),
        [
            ("/data/run", "/data/run"),
            ("/data/run/", "/data/run"),
            ("/data/100%25", "/data/100%25"),
            ("file:///data/run", "/data/run"),
            ("file:///data/my%20run%25", "/data/my run%"),
            ("FILE:///data/run", "/data/run"),
            ("local:///data/run", "/data/run"),
            ("file:///~/run", "/~/run"),
            ("/data/a/../run", "/data/run"),
            ("/data/s3://run", "/data/s3:/run"),
        ],
    )
    def test_a_url_or_path_names_one_absolute_path(self, url: str, path: str) -> None:
        assert local_path(url) == path

    def test_a_relative_path_stays_where_it_was_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = LocalStore("./run")
        monkeypatch.chdir("/")
        store.put("a", views(b"x"))
        assert (tmp_path / "run" / "a").read_bytes() == b"x"

    def test_a_leading_tilde_is_the_home_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert local_path("~/run") == f"{tmp_path}/run"
        assert local_path("./~/run") == f"{Path.cwd()}/~/run"

    @pytest.mark.parametrize(
        "url",
        ["", "file://", "file://host/run", "file:/run", "file://./run", "s3://bucket", "/a\0b"],
    )
    def test_what_names_no_place_on_this_disk_is_refused(self, url: str) -> None:
        with pytest.raises(OptionsError):
            local_path(url)

    def test_the_home_of_nobody_is_refused(self) -> None:
        with pytest.raises(OptionsError, match="home directory of nobody"):
            local_path("~nobody-has-this-name/run")

    @pytest.mark.parametrize("name", ["plain", "with space", "100%25", "a?b#c", "ünï", "~", "a+b=c"])
    def test_the_url_leads_back_to_the_same_root(self, tmp_path: Path, name: str) -> None:
        store = LocalStore(str(tmp_path / name))
        assert local_path(store.url) == str(tmp_path / name)

    def test_a_path_that_is_no_text_is_kept(self, tmp_path: Path) -> None:
        path = os.fsencode(tmp_path) + b"/\xff"
        assert os.fsencode(local_path(LocalStore(os.fsdecode(path)).url)) == path

    @pytest.mark.parametrize("key", [TEMP_NAME, f"a/{TEMP_NAME}", f"{TEMP_NAME}/a", "../a", "/a", "a//b", "a/", "a\0"])
    def test_a_key_that_could_mean_something_else_is_refused(self, store: LocalStore, root: Path, key: str) -> None:
        for verb in (
            lambda: store.put(key, views(b"x")),
            lambda: store.create(key, b"x"),
            lambda: store.head(key),
            lambda: store.read(key, limit_bytes=9),
            lambda: store.delete([key]),
        ):
            with pytest.raises(OptionsError):
                verb()
        assert not root.exists()


class TestWriting:
    @pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
    def test_modes_are_those_that_the_umask_leaves_also_of_temp_names(
        self, store: LocalStore, disk: FaultDisk, root: Path, umask: int
    ) -> None:
        temp_modes: list[int] = []

        def look(name: str) -> None:
            if name == "write":
                temp_modes.extend(stat.S_IMODE(path.stat().st_mode) for path in root.rglob(".cloudckpt-tmp-*"))

        disk.before = look
        before = os.umask(umask)
        try:
            store.put("a/b", views(b"x"))
            store.create("a/c", b"y")
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("", "a", "a/b", "a/c")]
        assert modes == [0o777 & ~umask, 0o777 & ~umask, 0o666 & ~umask, 0o666 & ~umask]
        assert temp_modes == [0o666 & ~umask] * 2

    def test_directories_below_one_of_a_group_are_the_groups(self, store: LocalStore, root: Path) -> None:
        root.mkdir()
        root.chmod(0o2775)
        before = os.umask(0o002)
        try:
            store.put("a/b/c", views(b"x"))
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")]
        assert modes == [0o2775, 0o2775, 0o664]

    def test_nothing_but_the_objects_is_left(self, store: LocalStore, root: Path) -> None:
        store.put("a/b", views(b"x"))
        store.put("a/b", views(b"y"))
        store.create("c", b"z")
        with pytest.raises(ObjectExistsError):
            store.create("c", b"other")
        assert files(root) == ["a/b", "c"]

    def test_every_byte_arrives_when_the_kernel_takes_a_few_at_a_time(self, root: Path) -> None:
        disk = FaultDisk()
        whole = disk.write
        disk.write = lambda fd, buffers, *, offset: whole(fd, [buffers[0][:7]], offset=offset)  # type: ignore[method-assign]
        parts = [bytes([number % 251]) * (number % 19) for number in range(300)]
        LocalStore(str(root), disk=disk).put("a", views(*parts))
        assert (root / "a").read_bytes() == b"".join(parts)

    def test_more_buffers_than_one_call_takes_arrive_in_order(self, store: LocalStore, root: Path) -> None:
        parts = [number.to_bytes(4, "big") for number in range(5000)]
        store.put("a", views(*parts))
        assert (root / "a").read_bytes() == b"".join(parts)

    def test_buffers_of_other_formats_are_written_as_their_bytes(self, store: LocalStore, root: Path) -> None:
        grid = memoryview(bytes(range(24))).cast("B", (2, 3, 4))
        store.put("a", [memoryview(b"ab").cast("b"), grid, memoryview(bytes(8)).cast("d")])
        assert (root / "a").read_bytes() == b"ab" + bytes(range(24)) + bytes(8)

    def test_no_copy_of_the_callers_memory_is_made(self, store: LocalStore) -> None:
        data, target = bytes(32 * MIB), bytearray(32 * MIB)
        store.put("warm/up", views(b"x"))
        tracemalloc.start()
        store.put("a", [memoryview(data)[: 9 * MIB], memoryview(data)[9 * MIB :]])
        store.get("a", start=0, stop=len(data), into=memoryview(target))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < MIB

    def test_an_object_above_a_key_is_refused(self, store: LocalStore) -> None:
        store.put("a", views(b"x"))
        with pytest.raises(StorageError, match="cannot share a name"):
            store.put("a/b", views(b"y"))

    def test_an_object_where_a_directory_is_is_refused(self, store: LocalStore, root: Path) -> None:
        store.put("a/b", views(b"x"))
        with pytest.raises(StorageError, match="cannot share a name"):
            store.put("a", views(b"y"))
        with pytest.raises(ObjectExistsError):
            store.create("a", b"y")
        assert files(root) == ["a/b"]

    def test_a_name_too_long_for_the_disk_is_refused(self, store: LocalStore) -> None:
        with pytest.raises(StorageError, match="shorter"):
            store.put("a" * 256, views(b"x"))

    def test_a_path_longer_than_the_kernels_limit_works(self, tmp_path: Path) -> None:
        root = tmp_path.joinpath(*["d" * 200] * 15)
        store = LocalStore(str(root))
        key = "/".join(["k" * 200] * 4)
        store.put(key, views(b"x"))
        assert store.read(key, limit_bytes=1) == b"x"

    def test_a_limit_on_the_size_of_files_is_an_error_that_leaves_nothing(self, store: LocalStore, root: Path) -> None:
        store.put("warm/up", views(b"x"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
        try:
            with pytest.raises(StorageError, match="shard_bytes"):
                store.put("big", views(bytes(2 * MIB)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert files(root) == ["warm/up"]


class TestFailedWrites:
    KINDS = (
        (errno.ENOSPC, StorageError, "no room left"),
        (errno.EDQUOT, StorageError, "no room left"),
        (errno.EFBIG, StorageError, "shard_bytes"),
        (errno.EROFS, AccessDeniedError, "read-only"),
        (errno.EACCES, AccessDeniedError, "owner"),
        (errno.EPERM, AccessDeniedError, "owner"),
        (errno.EIO, StorageError, "device is failing"),
        (errno.ENAMETOOLONG, StorageError, "shorter"),
        (errno.EMFILE, TransientError, "ulimit"),
        (errno.ENFILE, TransientError, "too many open files"),
        (errno.ENOMEM, TransientError, "memory"),
        (errno.EAGAIN, TransientError, "busy"),
        (errno.EBUSY, TransientError, "busy"),
        (errno.ETIMEDOUT, TransientError, "did not answer"),
        (errno.ESTALE, TransientError, "handle"),
        (errno.ETXTBSY, TransientError, "holds the file"),
        (errno.EINTR, TransientError, "busy"),
        (errno.ENOTCONN, TransientError, "mount it again"),
        (errno.ENODEV, StorageError, "mount it again"),
        (errno.ENXIO, StorageError, "mount it again"),
        (errno.EUCLEAN, StorageError, "fsck"),
        (errno.EBADMSG, StorageError, "fsck"),
        (errno.EXDEV, StorageError, "manual"),
    )

    @pytest.mark.parametrize(("code", "kind", "advice"), KINDS, ids=lambda value: getattr(value, "__name__", value))
    def test_each_error_of_the_kernel_has_a_kind_and_a_next_action(
        self, store: LocalStore, disk: FaultDisk, root: Path, code: int, kind: type[StorageError], advice: str
    ) -> None:
        disk.fail("open_new", code)
        with pytest.raises(kind, match=advice) as caught:
            store.put("step/shard", views(b"x"))
        assert type(caught.value) is kind
        assert (caught.value.op, caught.value.key) == ("put", "step/shard")
        assert all(word in str(caught.value) for word in ("step/shard", str(root), errno.errorcode[code]))
        assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize("call", ["open_new", "write", "start_writeback", "sync", "rename", "sync_directory"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_a_failed_put_leaves_the_old_object_or_the_new_one_whole_and_no_temp_name(
        self, store: LocalStore, disk: FaultDisk, root: Path, call: str, code: int
    ) -> None:
        store.put("a/b", views(b"old"))
        disk.fail(call, code)
        with pytest.raises(StorageError):
            store.put("a/b", views(bytes(9 * MIB)))
        assert files(root) == ["a/b"]
        new = call == "sync_directory"
        assert (root / "a/b").read_bytes() == (bytes(9 * MIB) if new else b"old")

    @pytest.mark.parametrize("call", ["make_directory", "open_new", "write", "sync", "link"])
    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE, errno.EDQUOT])
    def test_a_failed_create_leaves_nothing(
        self, store: LocalStore, disk: FaultDisk, root: Path, call: str, code: int
    ) -> None:
        disk.fail(call, code)
        disk.fail("rename_new", code)  # a device that fails a link fails a rename, too
        with pytest.raises(StorageError):
            store.create("a/b", b"x")
        assert not root.exists() or files(root) == []

    def test_a_put_is_not_done_before_its_directory_is_durable(self, store: LocalStore, disk: FaultDisk) -> None:
        store.put("a/b", views(b"old"))
        disk.calls.clear()
        store.put("a/b", views(bytes(9 * MIB)))
        assert [call for call in disk.calls if call in ("sync", "rename", "sync_directory")] == [
            "sync",
            "rename",
            "sync_directory",
        ]

    def test_a_create_whose_directory_is_not_confirmed_is_unknown(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        store.create("a/first", b"x")
        disk.fail("sync_directory", errno.EIO)
        with pytest.raises(CommitUnknownError, match="power cut"):
            store.create("a/second", b"y")
        assert (root / "a/second").read_bytes() == b"y"

    @pytest.mark.parametrize("code", sorted({*NOT_OFFERED["sync_directory"], errno.EIO}), ids=errno.errorcode.get)
    def test_a_file_system_without_fsync_of_directories_is_no_failure(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        fail_fsync(monkeypatch, code, lambda is_directory, number: is_directory)
        LocalStore(str(root)).create("a/b", b"x")
        assert files(root) == ["a/b"]

    def test_a_directory_that_could_be_synced_before_or_after_has_failed(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = LocalStore(str(root))
        store.put("a/first", views(b"x"))
        asked = fail_fsync(monkeypatch, errno.EIO, lambda is_directory, number: is_directory and number == 1)
        with pytest.raises(CommitUnknownError, match="EIO"):
            store.create("a/b", b"x")
        assert asked == [False, True, False, True]
        assert files(root) == ["a/b", "a/first"]

    def test_a_device_that_makes_no_new_file_durable_has_failed(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = LocalStore(str(root))
        store.put("a/first", views(b"x"))
        fail_fsync(monkeypatch, errno.EIO, lambda is_directory, number: number >= 1)
        with pytest.raises(CommitUnknownError, match="EIO"):
            store.create("a/b", b"x")
        assert files(root) == ["a/b", "a/first"]

    @pytest.mark.parametrize("code", sorted({*NOT_OFFERED["sync_directory"], errno.EIO}), ids=errno.errorcode.get)
    def test_an_object_that_is_not_durable_is_a_failure_whatever_the_disk_calls_it(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        fail_fsync(monkeypatch, code, lambda is_directory, number: not is_directory)
        with pytest.raises(StorageError, match=errno.errorcode[code]):
            LocalStore(str(root)).put("a/b", views(b"x"))
        assert files(root) == []

    def test_an_interrupt_leaves_no_temp_name(self, store: LocalStore, disk: FaultDisk, root: Path) -> None:
        def interrupt(name: str) -> None:
            if name == "sync":
                raise KeyboardInterrupt

        disk.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            store.put("a", views(b"x"))
        assert files(root) == []

    def test_no_descriptor_is_left_open_by_failures(self, store: LocalStore, disk: FaultDisk) -> None:
        store.put("a/b", views(b"x"))
        before = len(list(Path("/proc/self/fd").iterdir()))
        for call in ("open_directory", "open_new", "write", "sync", "rename", "sync_directory", "entries"):
            disk.fail(call, errno.EIO)
            with pytest.raises(StorageError):
                store.list() if call == "entries" else store.put("a/c/d", views(b"y"))
            store.delete(["a/c/d"])
        assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestCreate:
    @pytest.mark.parametrize("code", sorted(NOT_OFFERED["link"]), ids=errno.errorcode.get)
    def test_without_hard_links_an_exclusive_rename_is_used(
        self, store: LocalStore, disk: FaultDisk, root: Path, code: int
    ) -> None:
        disk.fail("link", code, times=2)
        store.create("a", b"first")
        with pytest.raises(ObjectExistsError):
            store.create("a", b"second")
        assert (root / "a").read_bytes() == b"first"
        assert files(root) == ["a"]
        assert disk.calls.count("rename_new") == 2

    @pytest.mark.parametrize("code", sorted(NOT_OFFERED["rename_new"]), ids=errno.errorcode.get)
    @pytest.mark.parametrize("no_link", [errno.EOPNOTSUPP, errno.EIO])
    def test_a_file_system_that_cannot_create_exclusively_is_refused(
        self, store: LocalStore, disk: FaultDisk, root: Path, code: int, no_link: int
    ) -> None:
        disk.fail("link", no_link)
        disk.fail("rename_new", code)
        with pytest.raises(CreateNotEnforcedError, match="root on another one") as caught:
            store.create("a", b"x")
        assert errno.errorcode[no_link] in str(caught.value)
        assert files(root) == []

    def test_a_system_without_the_exclusive_rename_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ctypes.CDLL", lambda *args, **kwargs: object())
        with pytest.raises(OSError, match="not implemented") as caught:
            Disk().rename_new("a", "b", at=0)
        assert caught.value.errno in NOT_OFFERED["rename_new"]

    @pytest.mark.parametrize("code", [errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
    def test_a_link_that_fails_for_once_is_worth_another_try(
        self, store: LocalStore, disk: FaultDisk, root: Path, code: int
    ) -> None:
        disk.fail("link", code)
        with pytest.raises(TransientError):
            store.create("a", b"x")
        store.create("a", b"x")
        assert files(root) == ["a"]

    def test_of_several_processes_exactly_one_wins_each_key(self, root: Path, tmp_path: Path) -> None:
        def race(name: str) -> None:
            store = LocalStore(str(root))
            store.put(f"ready/{name}", [])
            while len(store.list("ready/").objects) < 3:
                time.sleep(0.001)
            won = [str(number) for number in range(40) if wins(store, f"claims/{number}", name)]
            (tmp_path / name).write_text(",".join(won))

        def wins(store: LocalStore, key: str, name: str) -> bool:
            try:
                store.create(key, name.encode())
            except ObjectExistsError:
                return False
            return True

        racers = {name: fork(lambda name=name: race(name)) for name in "ABC"}
        assert [os.waitpid(racer, 0)[1] for racer in racers.values()] == [0, 0, 0]
        winners = {str(number): (root / f"claims/{number}").read_text() for number in range(40)}
        for name in racers:
            mine = [number for number, winner in winners.items() if winner == name]
            assert (tmp_path / name).read_text() == ",".join(mine)


class TestLinks:
    @pytest.fixture
    def outside(self, tmp_path: Path) -> Path:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_bytes(b"secret")
        return outside

    def test_what_was_moved_and_linked_is_read_where_it_is(self, store: LocalStore, root: Path, outside: Path) -> None:
        (outside / "deep").mkdir()
        (outside / "deep/object").write_bytes(b"deep")
        store.put("kept/object", views(b"x"))
        (root / "link").symlink_to(outside)
        (root / "object").symlink_to(outside / "secret")
        assert store.read("link/secret", limit_bytes=99) == b"secret"
        assert store.get("link/deep/object", start=1, stop=3) == b"ee"
        assert store.read("object", limit_bytes=99) == b"secret"
        assert store.head("object").size_bytes == 6
        keys = ["kept/object", "link/deep/object", "link/secret", "object"]
        assert [(info.key, info.size_bytes) for info in store.list().objects] == list(
            zip(keys, [1, 4, 6, 6], strict=True)
        )
        assert [info.key for info in store.list("link/").objects] == keys[1:3]
        assert store.list(delimiter="/").prefixes == ("kept/", "link/")
        assert [info.key for info in store.list(delimiter="/").objects] == ["object"]

    def test_nothing_is_written_or_deleted_through_a_linked_directory(
        self, store: LocalStore, root: Path, outside: Path
    ) -> None:
        (outside / "deep").mkdir()
        (outside / "deep/object").write_bytes(b"deep")
        root.mkdir()
        (root / "link").symlink_to(outside)
        for verb in (
            lambda: store.put("link/new", views(b"x")),
            lambda: store.put("link/deep/new", views(b"x")),
            lambda: store.create("link/new", b"x"),
            lambda: store.delete(["link/secret"]),
            lambda: store.delete(["link/deep/object"]),
        ):
            with pytest.raises(StorageError, match=r"'link/.*through a symbolic link"):
                verb()
        assert files(outside) == ["deep/object", "secret"]
        assert (root / "link").is_symlink()

    @pytest.mark.parametrize("target", ["unmounted", "step"])
    def test_what_a_link_that_leads_nowhere_stood_for_is_away_and_not_absent(
        self, store: LocalStore, root: Path, target: str
    ) -> None:
        store.put("other/object", views(b"x"))
        (root / "step").symlink_to(root / target)
        assert store.list(delimiter="/").prefixes == ("other/", "step/")
        for verb in (
            lambda: store.read("step/manifest", limit_bytes=99),
            lambda: store.get("step/manifest", start=0, stop=1),
            lambda: store.head("step/manifest"),
            lambda: store.read("step", limit_bytes=99),
            lambda: store.list("step/"),
        ):
            with pytest.raises(StorageError, match=r"'step.*symbolic link") as caught:
                verb()
            assert not isinstance(caught.value, ObjectNotFoundError)

    def test_a_root_below_a_link_that_leads_nowhere_is_away_and_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "mnt").symlink_to(tmp_path / "disk")
        store = LocalStore(tmp_path / "mnt" / "runs" / "7")
        for verb in (store.list, lambda: store.put("object", views(b"x"))):
            with pytest.raises(StorageError, match=r"mnt is a symbolic link to nothing") as caught:
                verb()
            assert not isinstance(caught.value, ObjectNotFoundError)
        assert not (tmp_path / "disk").exists()

    def test_a_link_that_leads_back_is_entered_once(self, store: LocalStore, root: Path) -> None:
        store.put("a/b/object", views(b"x"))
        (root / "a/b/up").symlink_to(root / "a")
        (root / "a/b/here").symlink_to(".")
        assert [info.key for info in store.list().objects] == ["a/b/object"]

    def test_a_put_replaces_a_link_and_not_what_it_points_to(
        self, store: LocalStore, root: Path, outside: Path
    ) -> None:
        root.mkdir()
        (root / "a").symlink_to(outside / "secret")
        store.put("a", views(b"x"))
        assert (outside / "secret").read_bytes() == b"secret"
        assert store.read("a", limit_bytes=1) == b"x"

    def test_nothing_takes_the_place_of_a_device_a_pipe_or_a_socket(self, store: LocalStore, root: Path) -> None:
        root.mkdir()
        os.mkfifo(root / "pipe")
        with pytest.raises(StorageError, match=r"'pipe' .* is a device, a pipe or a socket"):
            store.put("pipe", views(b"x"))
        with pytest.raises(StorageError, match="is a device, a pipe or a socket"), store.assembled("pipe"):
            pytest.fail("what is refused is not written first")
        assert (root / "pipe").is_fifo()
        assert [one.name for one in root.iterdir()] == ["pipe"]

    def test_a_create_takes_a_dangling_link_for_taken(self, store: LocalStore, root: Path, outside: Path) -> None:
        root.mkdir()
        (root / "a").symlink_to(outside / "new")
        with pytest.raises(ObjectExistsError):
            store.create("a", b"x")
        assert files(outside) == ["secret"]

    def test_a_delete_removes_a_link_and_not_what_it_points_to(
        self, store: LocalStore, root: Path, outside: Path
    ) -> None:
        root.mkdir()
        (root / "a").symlink_to(outside / "secret")
        store.delete(["a"])
        assert files(outside) == ["secret"]
        assert files(root) == []

    def test_a_listing_skips_what_is_nothing_to_read_and_says_so_once(
        self, store: LocalStore, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.put("a/b", views(b"x"))
        (root / "a/link").symlink_to(root / "nothing")
        with caplog.at_level(logging.WARNING, "cloudckpt"):
            for _ in range(3):
                assert [info.key for info in store.list().objects] == ["a/b"]
        assert [record.getMessage().count("a/link") for record in caplog.records] == [1]

    def test_the_root_may_be_a_link_of_the_users_own(self, tmp_path: Path, outside: Path) -> None:
        (tmp_path / "root").symlink_to(outside)
        store = LocalStore(str(tmp_path / "root"))
        store.put("a/b", views(b"x"))
        assert files(outside) == ["a/b", "secret"]
        assert [info.key for info in store.list().objects] == ["a/b", "secret"]

    def test_a_root_that_points_nowhere_is_an_error_and_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "root").symlink_to(tmp_path / "unmounted")
        store = LocalStore(str(tmp_path / "root"))
        for verb in (store.list, lambda: store.put("a", views(b"x"))):
            with pytest.raises(StorageError, match="symbolic link to nothing"):
                verb()

    def test_a_special_file_is_no_object_and_nobody_waits_for_it(self, store: LocalStore, root: Path) -> None:
        root.mkdir()
        os.mkfifo(root / "fifo")
        for verb in (lambda: store.head("fifo"), lambda: store.read("fifo", limit_bytes=1)):
            with pytest.raises(ObjectNotFoundError):
                verb()
        assert store.list().objects == ()


class TestReading:
    def test_an_object_cut_short_is_a_definite_error(self, store: LocalStore) -> None:
        store.put("a", views(b"12345"))
        with pytest.raises(StorageError, match="has 5 bytes") as caught:
            store.get("a", start=3, stop=6)
        assert not isinstance(caught.value, TransientError)

    def test_an_object_that_shrinks_while_it_is_read_is_an_error(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        store.put("a", views(bytes(100)))
        disk.before = lambda name: os.truncate(root / "a", 10) if name == "read" else None
        with pytest.raises(StorageError, match="cut short"):
            store.get("a", start=0, stop=100)

    def test_a_read_above_its_limit_does_not_allocate(self, store: LocalStore, root: Path) -> None:
        store.put("a", views(b""))
        os.truncate(root / "a", 1 << 40)
        with pytest.raises(StorageError, match="more than the 99 bytes"):
            store.read("a", limit_bytes=99)

    @pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1)])
    def test_what_is_no_range_is_refused(self, store: LocalStore, start: int, stop: int) -> None:
        with pytest.raises(OptionsError):
            store.get("a", start=start, stop=stop)

    @pytest.mark.parametrize("into", [memoryview(bytearray(2)), memoryview(bytes(3))])
    def test_a_buffer_that_does_not_fit_or_cannot_be_written_is_refused(
        self, store: LocalStore, into: memoryview
    ) -> None:
        store.put("a", views(b"abc"))
        with pytest.raises(OptionsError):
            store.get("a", start=0, stop=3, into=into)

    def test_a_buffer_of_another_format_is_filled(self, store: LocalStore) -> None:
        store.put("a", views(bytes(range(16))))
        into = bytearray(16)
        store.get("a", start=0, stop=16, into=memoryview(into).cast("d"))
        assert into == bytes(range(16))


class TestListing:
    def test_a_root_that_is_not_there_is_empty(self, store: LocalStore) -> None:
        assert store.list().objects == ()
        assert store.list("a/", delimiter="/").prefixes == ()

    def test_a_root_that_is_an_object_is_an_error_and_not_empty(self, tmp_path: Path) -> None:
        (tmp_path / "root").write_bytes(b"x")
        store = LocalStore(str(tmp_path / "root"))
        for verb in (store.list, lambda: store.put("a", views(b"x")), lambda: store.delete(["a"])):
            with pytest.raises(StorageError, match="not a directory"):
                verb()

    @pytest.mark.parametrize("call", ["open_path", "open_directory", "entries"])
    @pytest.mark.parametrize("delimiter", ["", "/"])
    def test_a_listing_that_fails_is_never_empty(
        self, store: LocalStore, disk: FaultDisk, call: str, delimiter: str
    ) -> None:
        store.put("a/b", views(b"x"))
        disk.fail(call, errno.EACCES)
        with pytest.raises(AccessDeniedError):
            store.list(delimiter=delimiter)

    def test_a_directory_without_objects_is_no_prefix(self, store: LocalStore, root: Path) -> None:
        store.put("a/b/c", views(b"x"))
        (root / "empty/deep").mkdir(parents=True)
        (root / "temp").mkdir()
        (root / "temp" / TEMP_NAME).write_bytes(b"left by a crash")
        assert store.list(delimiter="/").prefixes == ("a/",)

    def test_names_that_no_key_can_have_are_foreign_and_skipped(self, store: LocalStore, root: Path) -> None:
        store.put("a", views(b"x"))
        for name in (b"new\nline", b"not-text-\xff", b"back\\slash", TEMP_NAME.encode()):
            (root / os.fsdecode(name)).write_bytes(b"y")
        assert [info.key for info in store.list().objects] == ["a"]

    def test_another_delimiter_is_refused(self, store: LocalStore) -> None:
        with pytest.raises(OptionsError, match="delimiter"):
            store.list(delimiter="-")

    def test_a_prefix_out_of_the_root_is_refused(self, store: LocalStore) -> None:
        for prefix in ("../", "a/../../", "/", "//a", f"{TEMP_NAME}/"):
            with pytest.raises(OptionsError):
                store.list(prefix)


class TestDeleting:
    def test_directories_go_with_their_last_object_and_the_root_stays(self, store: LocalStore, root: Path) -> None:
        for key in ("a/b/c/1", "a/b/c/2", "a/d"):
            store.put(key, views(b"x"))
        store.delete(["a/b/c/1"])
        assert (root / "a/b/c").is_dir()
        store.delete(["a/b/c/2"])
        assert sorted(path.name for path in root.rglob("*")) == ["a", "d"]
        store.delete(["a/d"])
        assert list(root.iterdir()) == []

    def test_what_cannot_be_deleted_is_named_and_counted_and_the_rest_goes(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        for key in ("a/1", "a/2", "a/3", "b/4"):
            store.put(key, views(b"x"))
        disk.fail("unlink", errno.EACCES, skip=1, times=2)
        with pytest.raises(AccessDeniedError, match=r"'a/2'.*2 of 4 objects"):
            store.delete(["a/1", "a/2", "a/3", "b/4"])
        assert files(root) == ["a/2", "a/3"]

    def test_a_delete_is_not_done_before_it_is_durable(self, store: LocalStore, disk: FaultDisk) -> None:
        store.put("a/b", views(b"x"))
        disk.fail("sync_directory", errno.EIO)
        with pytest.raises(StorageError, match="may still be there"):
            store.delete(["a/b"])

    def test_a_directory_is_no_object_to_delete(self, store: LocalStore, root: Path) -> None:
        store.put("a/b", views(b"x"))
        store.delete(["a", "a/b/c", "x/y"])
        assert files(root) == ["a/b"]

    def test_a_directory_that_cannot_be_removed_is_no_failure(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        store.put("a/b", views(b"x"))
        disk.fail("remove_directory", errno.EACCES)
        store.delete(["a/b"])
        assert files(root) == []

    def test_puts_and_deletes_in_one_directory_do_not_lose_each_others_objects(self, root: Path) -> None:
        store = LocalStore(str(root))

        def churn(name: str) -> None:
            for number in range(150):
                key, data = f"step/attempt/{name}", f"{name}{number}".encode()
                store.put(key, views(data))
                assert store.read(key, limit_bytes=99) == data
                store.delete([key])

        with ThreadPoolExecutor(3) as pool:
            for future in [pool.submit(churn, name) for name in "abc"]:
                future.result()
        assert list(root.iterdir()) == []

    def test_a_put_starts_anew_when_its_directory_vanishes(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        vanished: list[bool] = []

        def vanish(name: str) -> None:
            if name == "open_new" and not vanished:
                vanished.append(True)
                (root / "a/b").rmdir()
                (root / "a").rmdir()

        disk.before = vanish
        store.put("a/b/c", views(b"x"))
        assert files(root) == ["a/b/c"]

    def test_a_directory_that_vanishes_for_ever_is_an_error(self, store: LocalStore, disk: FaultDisk) -> None:
        disk.fail("open_new", errno.ENOENT, times=10**6)
        with pytest.raises(TransientError, match="vanished 50 times"):
            store.put("a", views(b"x"))


class TestLeftovers:
    @pytest.fixture(autouse=True)
    def _killed_writer(self, root: Path) -> None:
        """Let a process die by SIGKILL once it has written a shard's bytes."""

        def die() -> None:
            disk = FaultDisk()
            disk.before = lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == "sync" else None
            LocalStore(str(root), disk=disk).put("step/attempt/shard", views(bytes(1000)))

        assert os.waitstatus_to_exitcode(os.waitpid(fork(die), 0)[1]) == -signal.SIGKILL

    def test_a_killed_writer_leaves_nothing_that_can_be_seen(self, store: LocalStore, root: Path) -> None:
        (left,) = files(root)
        assert left.startswith("step/attempt/.cloudckpt-tmp-")
        assert store.list().objects == ()
        assert store.list(delimiter="/").prefixes == ()

    def test_what_a_killed_writer_left_goes_with_the_objects_beside_it(self, store: LocalStore, root: Path) -> None:
        store.put("step/manifest", views(b"x"))
        store.delete(["step/manifest"])
        assert list(root.iterdir()) == []

    def test_what_killed_writers_left_anywhere_goes_with_an_object_of_the_root(
        self, store: LocalStore, root: Path
    ) -> None:
        store.put("other/shard", views(b"x"))
        (root / "users own").mkdir()
        store.delete(["probe"])
        assert files(root) == ["other/shard"]
        assert sorted(path.name for path in root.iterdir()) == ["other", "users own"]


class TestTempNames:
    def test_a_living_writers_temp_name_is_left_alone(self, store: LocalStore, disk: FaultDisk, root: Path) -> None:
        def clean(name: str) -> None:
            if name == "rename":
                disk.before = lambda name: None
                LocalStore(str(root)).delete(["nothing", "a/nothing"])

        disk.before = clean
        store.put("a/b", views(b"x"))
        assert disk.calls.count("open_new") == 1
        assert files(root) == ["a/b"]

    def test_a_writer_whose_temp_name_was_removed_starts_anew(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        def remove(name: str) -> None:
            if name in ("rename", "link"):
                disk.before = lambda name: None
                for path in root.rglob(".cloudckpt-tmp-*"):
                    path.unlink()

        disk.before = remove
        store.put("a/b", views(b"x"))
        disk.before = remove
        store.create("a/c", b"y")
        assert [(root / name).read_bytes() for name in files(root)] == [b"x", b"y"]

    def test_a_delete_below_a_root_that_is_not_there_is_done(self, store: LocalStore, root: Path) -> None:
        store.delete(["a", "b/c"])
        assert not root.exists()


class TestDurableDirectories:
    def test_a_directory_is_made_durable_once_per_store_whoever_made_it(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        (root / "a/b").mkdir(parents=True)
        store.put("a/b/1", views(b"x"))
        # The parent of the root, the root (for a), a (for b), and b (for the object).
        assert disk.calls.count("sync_directory") == 4
        store.put("a/b/2", views(b"x"))
        assert disk.calls.count("sync_directory") == 5

    def test_a_directory_that_was_made_again_is_made_durable_again(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        store.put("a/b/1", views(b"x"))
        (root / "a/b").rename(root / "a/old")
        (root / "a/b").mkdir()
        disk.calls.clear()
        store.put("a/b/2", views(b"x"))
        assert disk.calls.count("sync_directory") == 2

    def test_a_directory_that_went_with_its_last_object_is_made_durable_when_it_comes_back(
        self, store: LocalStore, disk: FaultDisk
    ) -> None:
        store.put("a/b/1", views(b"x"))
        store.delete(["a/b/1"])  # file systems give the number of a directory that is gone to the next one
        disk.calls.clear()
        store.put("a/b/1", views(b"x"))
        assert disk.calls.count("sync_directory") == 3

    def test_a_parent_of_the_root_that_cannot_be_read_is_not_our_care(
        self, store: LocalStore, disk: FaultDisk, root: Path
    ) -> None:
        root.mkdir()
        disk.fail("open_path", errno.EACCES)
        store.put("a", views(b"x"))
        assert files(root) == ["a"]

    def test_the_memory_of_durable_directories_is_bounded(
        self, store: LocalStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("cloudckpt.store.local_tree._REMEMBERED_DIRECTORIES", 10)
        for number in range(25):
            store.put(f"{number}/a", views(b"x"))
        assert len(store._tree._durable) <= 10


def test_refresh_and_close_are_harmless_and_repeatable(store: LocalStore) -> None:
    store.refresh()
    store.close()
    store.close()
    assert (store.engine, store.is_create_atomic) == ("local", True)
    assert repr(store) == f"LocalStore({store.url!r})"


def busy_threads() -> list[threading.Thread]:
    """Return all threads but those that are kept for the next call."""
    return [thread for thread in threading.enumerate() if thread.name != "cloudckpt-hand"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = busy_threads()
    yield
    assert set(busy_threads()) <= set(before)


@pytest.mark.parametrize("trouble", ["file", "long", "object-above"])
def test_a_create_that_a_disk_refuses_for_good_is_no_unknown_commit(tmp_path: Path, trouble: str) -> None:
    root, key = tmp_path / "root", "a/k"
    if trouble == "file":
        root.write_bytes(b"no directory")
    elif trouble == "long":
        root = tmp_path / ("x" * 300)
    else:
        root.mkdir()
        (root / "a").write_bytes(b"an object")
    store = RetryingStore(LocalStore(root), RetryPolicy(backoff_base_s=0.001))
    with pytest.raises(StorageError) as caught:
        store.create(key, b"x")
    assert type(caught.value) is StorageError
    assert caught.value.attempts <= 3
