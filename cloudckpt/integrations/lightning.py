"""Let Lightning's Trainer and Fabric keep their checkpoints in a root of cloudckpt, under the paths that they know.

    Trainer(plugins=[CloudCheckpointIO("s3://bucket/run-7")])                           single device, DDP
    Trainer(plugins=[…], strategy=CloudModelParallelStrategy())                         FSDP2, tensor parallel
    Trainer(plugins=[…], callbacks=[CloudRandomState()])                                resumed with the same numbers
    Trainer(plugins=[…], callbacks=[CloudPreemption()])                                 all ranks end as one, saved
    Fabric(plugins=[CloudCheckpointIO("s3://bucket/run-7")])                            save and load

    path "checkpoints/last.ckpt" ──save──▶ one checkpoint of the root, its metadata has the path ──▶ a stub at the path
    a new process ──▶ stubs for all of the root ──▶ ckpt_path="last" finds one ──load──▶ the newest of that path

Saved is the whole dict that Lightning makes. A path moves to its new checkpoint in the request that commits it, and the
old one goes afterwards. The stub is a small local file, so that all that Lightning decides by files (`last`, `best`,
the number after a name, `save_last="link"`) stays as it is; `torch.load` of it reads the root, so that
`Model.load_from_checkpoint(callback.best_model_path)` does. One job at a time writes to a root; another one that saves
there ends it, by `FencedError`.

What Lightning still does itself: when to save, what to keep, what is the best. Files that `torch.save` has left are
loaded and removed as ever. Not done: paths that are URLs (give `ModelCheckpoint` a local `dirpath`); a link
(`save_last="link"`) on another machine; Lightning's own strategies that shard, which save past any plugin, to a folder
of this machine (take those below; `CloudRandomState` refuses the others); Fabric's, which take no plugin.

Run with lightning 2.6.6 and pytorch_lightning 2.6.6 (whichever the program has imported first), torch 2.13, on CPU.
"""

from __future__ import annotations

import logging
import os
import pickletools
import secrets
import signal
import sys
import threading
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from cloudckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFoundError,
    Options,
    OptionsError,
    PinnedError,
    Preemption,
    RandomState,
    RankZero,
    SaveHandle,
    UnsupportedValueError,
    register_code,
)
from cloudckpt.integrations.framework import framework

__all__ = [
    "CloudCheckpointIO",
    "CloudFSDPStrategy",
    "CloudModelParallelStrategy",
    "CloudPreemption",
    "CloudRandomState",
    "opened",
]

logger = logging.getLogger(__name__)

# The same code under two names, whose classes do not know each other.
_IS_OLD_NAME = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
_PACKAGE, _TRAINER, _FABRIC = (
    ("pytorch_lightning", "pytorch_lightning", "lightning_fabric")
    if _IS_OLD_NAME
    else ("lightning", "lightning.pytorch", "lightning.fabric")
)
with framework(_PACKAGE, lowest="2.6.6", extra="lightning"):
    _pytorch: Any = import_module(_TRAINER)
    _strategies: Any = import_module(f"{_TRAINER}.strategies")
    _exceptions: Any = import_module(f"{_TRAINER}.utilities.exceptions")
    _TorchCheckpointIO: Any = import_module(f"{_FABRIC}.plugins").TorchCheckpointIO

_NOTE = "lightning"
"""Where a checkpoint says what it is to Lightning: in the metadata its path, in the state of a strategy the rest."""
_STUB_BYTES = 8192
_GENERATORS = "CloudRandomState"

# By root: whose stubs this process may read.
_ROOTS: dict[str, CloudCheckpointIO] = {}


def opened(root: str, name: str) -> dict[str, Any]:
    """Return the checkpoint that a stub stands for; this is what `torch.load` calls for one.

    Only a root for which this process has made a `CloudCheckpointIO` is read: no file leads anywhere else.

    Args:
        root: the URL of the root, without credentials.
        name: the path of the checkpoint, as it was saved.

    Raises:
        CheckpointNotFoundError: this process has no `CloudCheckpointIO` of that root, or nothing is saved there.
    """
    if (known := _ROOTS.get(root)) is None:
        raise CheckpointNotFoundError(
            f"this file stands for the checkpoint {name} of {root}; to load it, first make CloudCheckpointIO({root!r}) "
            "in this process"
        )
    return known.load_checkpoint(known.place(name))


class _Stub:
    """What a stub holds: torch.load of it is a call of `opened`."""

    def __init__(self, root: str, name: str) -> None:
        self._arguments = root, name

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return opened, self._arguments


# Without it torch.load, whose default is weights_only=True, refuses a stub.
torch.serialization.add_safe_globals([opened])


class CloudCheckpointIO(_TorchCheckpointIO):  # type: ignore[misc,unused-ignore]
    """Where Lightning's Trainer and Fabric save to and load from: one root of cloudckpt.

    ```python
    trainer = Trainer(
        plugins=[CloudCheckpointIO("s3://bucket/run-7")],
        callbacks=[ModelCheckpoint("checkpoints", monitor="val_loss", save_top_k=3, save_last=True)],
    )
    trainer.fit(model, ckpt_path="last")    # on any machine, where `checkpoints` may be empty
    ```

    Making one lists the root, and lays a stub for each of its checkpoints below `local`. With DDP rank 0 saves and each
    rank loads for itself. It belongs to one thread.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        local: str | os.PathLike[str] = ".",
        background: bool = False,
        storage_options: Mapping[str, object] | None = None,
        engine: str = "auto",
        options: Options | Mapping[str, object] | None = None,
        progress: Any = "auto",
        on_event: Any = None,
    ) -> None:
        """Look for what the root holds; nothing is written there before the first save.

        Args:
            url: the root: a directory, `s3://…`, `gs://…` or any fsspec URL, for one run of training.
            local: what Lightning's paths are taken relative to, so that another machine finds them below its own.
            background: copy and return; the save goes on while training does, and what fails in it is raised by the
                next save, load, removal or the end. Use it in the place of Lightning's `AsyncCheckpointIO`.
            storage_options: as for `CheckpointManager`.
            engine: as for `CheckpointManager`.
            options: as for `CheckpointManager`.
            progress: as for `CheckpointManager`.
            on_event: as for `CheckpointManager`.

        Raises:
            OptionsError: an argument of another kind.
            StorageError: the root could not be listed.
        """
        self._base = Path(os.path.realpath(local))
        self._background = background
        self._given: dict[str, Any] = {
            "url": url,
            "storage_options": storage_options,
            "engine": engine,
            "options": options,
            "progress": progress,
            "on_event": on_event,
        }
        self._forget()
        self.url = self.manager().url
        _ROOTS[self.url] = self
        self._lay_all()
        self.teardown()

    def _forget(self) -> None:
        self._manager: CheckpointManager | None = None
        self._owner = (0, 0)
        self._ranks: Literal["all", "self"] = "self"
        self._pending: tuple[SaveHandle, Path] | None = None
        self._places: dict[Path, Checkpoint] | None = None
        self._older: list[tuple[Path, Checkpoint]] = []
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        """Go to another process, or into a copy of the trainer, without the manager, which is this one's."""
        self._settle()
        return {name: getattr(self, name) for name in ("_base", "_background", "_given", "url")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        _ROOTS.setdefault(self.url, self)

    def manager(self, ranks: Literal["all", "self"] | None = None) -> CheckpointManager:
        """Return the manager of the root, opened when it is first asked for; `teardown` closes it.

        Args:
            ranks: `self`, or `all` where all ranks save and load together; None for the one that is open.

        Raises:
            OptionsError: another thread has opened it.
        """
        owner = os.getpid(), threading.get_ident()
        if self._manager is not None and self._owner[0] != owner[0]:
            self._forget()  # forked: the other is the parent's
        if self._manager is not None and self._owner != owner:
            raise OptionsError(
                "CloudCheckpointIO was called from two threads; in the place of AsyncCheckpointIO give it "
                "background=True"
            )
        if self._manager is not None and ranks not in (None, self._ranks):
            self.teardown()
        if self._manager is None:
            self._ranks, self._owner = ranks or self._ranks, owner
            self._manager = CheckpointManager(**self._given, ranks=self._ranks, save_rng=False)
        return self._manager

    # -- what Lightning calls ----------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save what Lightning has put together; return once it is committed, or copied with `background`.

        What the path stood for is removed then, not before.

        Args:
            checkpoint: names → plain values, tensors, containers of them; no objects.
            path: where Lightning wants a file; gets a stub.
            storage_options: None; the constructor takes them.

        Raises:
            OptionsError: storage options, or a path that is a URL.
            UnsupportedValueError: a value that cannot be read back, by its name; nothing was written.
            CloudCkptError: as `CheckpointManager.save` raises.
        """
        if storage_options is not None:
            raise OptionsError("give storage_options to CloudCheckpointIO; save_checkpoint takes none")
        _refuse_objects(checkpoint)
        self.save_state(checkpoint, path, about=checkpoint, ranks="self")

    def save_state(
        self,
        state: dict[str, Any],
        path: str | os.PathLike[str],
        *,
        about: Mapping[str, Any],
        ranks: Literal["all", "self"],
    ) -> None:
        """Save a state under a path; the strategies below call it on every rank.

        Args:
            state: as for `CheckpointManager.save`.
            path: where Lightning wants a file.
            about: Lightning's own dict, of which `epoch` and `global_step` go with the checkpoint.
            ranks: as for `manager`.

        Raises:
            CloudCkptError: as `save_checkpoint` raises.
        """
        place = self._place_to_save(path)
        _register_omegaconf()
        manager = self.manager(ranks)
        self._settle()
        self._saved()
        # A number of its own for each: Lightning saves one step under several paths.
        number, self._next = self._next, self._next + 1
        counts = {key: about[key] for key in ("epoch", "global_step") if type(about.get(key)) is int}
        note = {_NOTE: {"path": self._name(path), "is_of_strategy": ranks == "all", **counts}}
        if self._background:
            self._pending = manager.async_save(number, state, counts, note), place
            return
        saved = manager.save(number, state, counts, note)
        if saved is not None:  # always, since errors are raised
            self._committed(saved, place)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """Return what was saved under a path, verified, in new host tensors; or what a file of torch.save holds.

        Args:
            path: as it was saved, or relative to the root: `<url>/checkpoints/last.ckpt`.
            map_location: a device for the tensors; None is the CPU.
            weights_only: means nothing to a checkpoint of ours, in which there is no code; a file is loaded so.

        Raises:
            CheckpointNotFoundError: nothing is saved under that path; says what is.
            CloudCkptError: as `CheckpointManager.read` raises.
        """
        self._settle()
        place = self.place(path)
        if (found := self.find(place)) is None:
            if place.exists() and not _is_stub(place):
                return dict(super().load_checkpoint(place, map_location or "cpu", weights_only))
            raise self.not_found(place)
        _register_omegaconf()
        read = self.manager().read(found)
        if _is_of_strategy(found):
            read.update(_dict_of(read.pop(_NOTE)))
        return _dict_of(_moved(read, map_location))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove what was saved under a path, and the stub; what a person has pinned stays in the root.

        Raises:
            CloudCkptError: as `CheckpointManager.delete` raises.
        """
        self._settle()
        place = self.place(path)
        for other, one in [*self._older, *self._saved().items()]:
            if other == place:
                self._delete(one)
        self._older = [(other, one) for other, one in self._older if other != place]
        self._saved().pop(place, None)
        if place.is_symlink() or _is_stub(place):
            _take_away(place)
        elif place.exists():
            super().remove_checkpoint(place)

    def teardown(self) -> None:
        """Wait for a save under way and close the manager; a later call opens it again.

        Raises:
            CloudCkptError: a save failed in the background.
        """
        try:
            self._settle()
        finally:
            manager, self._manager, self._places = self._manager, None, None
            if manager is not None and self._owner[0] == os.getpid():
                manager.close()

    # -- paths and checkpoints ---------------------------------------------------------------------------------

    def place(self, path: str | os.PathLike[str]) -> Path:
        """Return the local path that a path of Lightning's or a URL below the root means: one for each file.

        It is absolute, and its folder has no links: Lightning itself spells one file now with them and now without.

        Raises:
            OptionsError: a URL outside of the root.
        """
        text = os.fspath(path)
        if "://" in text:
            inside = text.removeprefix(f"{self.url}/")
            if inside == text:
                raise OptionsError(f"{text} is not below {self.url}, the root of this CloudCheckpointIO")
            text = inside
        return self._place_of(text)

    def _place_of(self, name: str | os.PathLike[str]) -> Path:
        path = self._base / name
        return Path(os.path.realpath(path.parent)) / path.name

    def find(self, place: Path) -> Checkpoint | None:
        """Return the checkpoint that a path means now, asking the root: what was saved there last, or is linked since.

        A link is of this machine alone; on another one the path means what was saved there last.
        """
        self._settle()
        self._places = None
        saved = self._saved()
        own, end = saved.get(place), self._end_of(place)
        if end is None or (own is not None and not self._is_led_on(place, own)):
            return own
        if own is not None:
            logger.warning(
                "%s leads to %s on this machine alone; on others it is step %s of %s", place, end, own.step, self.url
            )
        return saved.get(end)

    def _end_of(self, place: Path) -> Path | None:
        """Return where a link leads, or a stub that was copied there, as Lightning does where it can make no links."""
        if place.is_symlink():
            return Path(os.path.realpath(place))
        root, name = _named_by(place) or ("", "")
        end = self._place_of(name)
        return end if root == self.url and end != place else None

    def _is_led_on(self, place: Path, own: Checkpoint) -> bool:
        """Tell whether a path was made to lead elsewhere after a checkpoint was saved there."""
        if (end := self._end_of(place)) is None:
            return False
        linked = self._saved().get(end)
        if linked is not None and (linked.epoch, linked.step) > (own.epoch, own.step):
            return True
        # A link to what is older: a person's, or from before another machine saved here. Only the clock tells.
        return place.lstat().st_mtime > own.created_at.timestamp()

    def _place_to_save(self, path: str | os.PathLike[str]) -> Path:
        if "://" in os.fspath(path):
            raise OptionsError(
                f"{os.fspath(path)} is a URL, where Lightning finds no 'last' and counts no versions; give "
                f"ModelCheckpoint and save_checkpoint a local path: what is saved goes to {self.url} all the same"
            )
        place = self.place(path)
        if place.is_dir():
            raise IsADirectoryError(f"{place} is a directory, as FSDP leaves one; save under another name")
        return place

    def _name(self, path: str | os.PathLike[str]) -> str:
        """Return what a path is called in the root: relative to the local folder, for other machines, if it is below.

        A link of this machine stays in the name: on another one there may be a folder, or a link that leads elsewhere.
        """
        place = self._place_of(path)
        for one in (Path(os.path.normpath(self._base / path)), place):
            if one.is_relative_to(self._base) and self._place_of(one) == place:
                return one.relative_to(self._base).as_posix()
        return place.as_posix()

    def _saved(self) -> dict[Path, Checkpoint]:
        """Return path → its newest checkpoint; listed once by a job that saves, which is the only one that does."""
        if self._places is None:
            self._places, self._older, self._next = {}, [], 0
            for one in self.manager().checkpoints():
                self._next = max(self._next, one.step + 1)
                if (name := _path_of(one)) is not None:
                    self._take(self._place_of(name), one)
        return self._places

    def _take(self, place: Path, one: Checkpoint) -> None:
        """Have a path stand for another checkpoint; what it stood for before is older."""
        places = self._saved()
        if place in places:
            self._older.append((place, places[place]))
        places[place] = one

    def not_found(self, place: Path) -> CheckpointNotFoundError:
        """Return the error that says what is saved instead."""
        names = ", ".join(sorted(filter(None, map(_path_of, self._saved().values())))) or "nothing"
        # Begun in Lightning's own words, which programs and its tests look for.
        return CheckpointNotFoundError(
            f"Checkpoint file not found: {self._name(place)} is not in {self.url}; saved there: {names}"
        )

    def _settle(self) -> None:
        """Wait for a save under way in the background, and have its path stand for it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            handle, place = pending
            if (saved := handle.result()) is not None:
                self._committed(saved, place)

    def _committed(self, saved: Checkpoint, place: Path) -> None:
        self._take(place, saved)
        self._lay_each({place: saved})
        # Also what a process left that was killed just here.
        for other, one in self._older:
            if other == place:
                self._delete(one)
        self._older = [(other, one) for other, one in self._older if other != place]

    def _delete(self, one: Checkpoint) -> None:
        try:
            self.manager().remove(one)
        except PinnedError as exc:
            logger.warning("%s stays: %s", one.url, exc)
        except CheckpointNotFoundError:
            logger.info("%s is gone already", one.url)

    # -- stubs -------------------------------------------------------------------------------------------------

    def _lay_each(self, stubs: Mapping[Path, Checkpoint]) -> None:
        """Put stubs there; where one cannot be, its checkpoint is in the root all the same, and loaded from there."""
        failed: dict[Path, OSError] = {}
        for place, one in stubs.items():
            try:
                self._lay(place, one)
            except OSError as exc:
                failed[place] = exc
        for place, error in list(failed.items())[-1:]:
            logger.warning(
                "%d stubs could not be laid, such as %s (%s); what they stand for is saved in %s and loads by path, "
                "but Lightning does not find it here as 'last': make room, or free the path, and start again",
                len(failed),
                place,
                error,
                self.url,
            )

    def _lay(self, place: Path, checkpoint: Checkpoint) -> None:
        """Put a stub there, in one step, as old as its checkpoint: Lightning takes the youngest for the last."""
        data = BytesIO()  # torch.save to a path raises RuntimeError where the disk is full
        torch.save(_Stub(self.url, _path_of(checkpoint) or self._name(place)), data)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{secrets.token_hex(8)}")  # not longer than a name may be, whatever it is of
        try:
            beside.write_bytes(data.getbuffer())
            age = checkpoint.created_at.timestamp()
            os.utime(beside, (age, age))
            beside.replace(place)
        finally:
            beside.unlink(missing_ok=True)

    def _lay_all(self) -> None:
        """Have a stub below `local` for each path of the root, and none for what is gone from there."""
        saved = self._saved()
        inside = {
            place: one for place, one in saved.items() if not Path(self._name(_path_of(one) or place)).is_absolute()
        }
        self._lay_each(
            {
                place: one
                for place, one in inside.items()
                if (_is_stub(place) or not place.exists()) and not self._is_led_on(place, one)
            }
        )
        for directory in {place.parent for place in inside}:
            for place in directory.glob("*.ckpt"):
                if place.is_symlink() or (named := _named_by(place)) is None:
                    continue
                if named[0] == self.url and self._place_of(named[1]) not in saved:
                    _take_away(place)
        if outside := sorted(str(place) for place in saved.keys() - inside.keys()):
            logger.warning(
                "%d checkpoints of %s were saved outside of %s, such as %s, and have no stub here, so that Lightning "
                "does not find them as 'last'; to have them, give CloudCheckpointIO local= a folder above them",
                len(outside),
                self.url,
                self._base,
                outside[-1],
            )


def _path_of(checkpoint: Checkpoint) -> str | None:
    note = checkpoint.metadata.get(_NOTE)
    path = note.get("path") if isinstance(note, dict) else None
    return path if isinstance(path, str) else None


def _is_of_strategy(checkpoint: Checkpoint) -> bool:
    note = checkpoint.metadata.get(_NOTE)
    return isinstance(note, dict) and note.get("is_of_strategy") is True


def _take_away(place: Path) -> None:
    try:
        place.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("the stub %s could not be removed (%s); its checkpoint is gone from the root", place, exc)


def _named_by(place: Path) -> tuple[str, str] | None:
    """Return the root and the name that a stub stands for; None for any other file. Runs nothing that is in it."""
    with suppress(OSError, ValueError, RuntimeError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        if place.is_file() and place.stat().st_size <= _STUB_BYTES:
            with zipfile.ZipFile(place) as file:
                (member,) = (one for one in file.infolist() if one.filename.endswith("/data.pkl"))
                if member.file_size > _STUB_BYTES:
                    return None
                operations = [(one.name, argument) for one, argument, _ in pickletools.genops(file.read(member))]
            words = [one for one in operations if one[0] not in ("PROTO", "BINPUT")]
            (_, root), (_, name) = words[1:3]
            if words == [
                ("GLOBAL", f"{__name__} {opened.__name__}"),
                ("BINUNICODE", root),
                ("BINUNICODE", name),
                *((one, None) for one in ("TUPLE2", "REDUCE", "STOP")),
            ]:
                return str(root), str(name)
    return None


def _is_stub(place: Path) -> bool:
    return _named_by(place) is not None


def _dict_of(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise OptionsError(f"this is no checkpoint of Lightning: a {type(value).__name__}")
    return value


def _register_omegaconf() -> None:
    """Let the type of hyper-parameters be a value: Lightning saves it where a program gives them as OmegaConf's."""
    if (omegaconf := sys.modules.get("omegaconf")) is not None:
        register_code(omegaconf.DictConfig, name="omegaconf.DictConfig")
        register_code(omegaconf.ListConfig, name="omegaconf.ListConfig")


def _objects(value: object, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from _objects(child, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, child in enumerate(value):
            yield from _objects(child, f"{name}.{place}")
    elif isinstance(value, nn.Module) or (hasattr(value, "load_state_dict") and not isinstance(value, type)):
        yield name, value


def _refuse_objects(checkpoint: Mapping[str, Any]) -> None:
    """Refuse what would be saved as its state_dict, and read back as a dict."""
    for key, value in checkpoint.items():
        for name, found in _objects(value, key):
            hint = (
                "save_hyperparameters(ignore=[…]) keeps it out, as Lightning itself advises"
                if "hyper_parameters" in key
                else "put its state_dict() there"
            )
            raise UnsupportedValueError(f"{name} is a {type(found).__name__}, which cannot be read back as one: {hint}")


def _moved(value: Any, where: Any) -> Any:
    """Return a value with its tensors on another device, in whatever containers a checkpoint can hold."""
    if where is None:
        return value
    if not isinstance(where, str | int | torch.device):
        raise OptionsError(f"map_location is {where!r}; give a device")

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(where)
        if isinstance(leaf, Namespace | SimpleNamespace):  # hyper-parameters; to torch a leaf
            leaf.__dict__.update(tree_map(move, leaf.__dict__))
        return leaf

    return tree_map(move, value)


class _Together:
    """What a strategy that shards does: all ranks save the module and the optimizers themselves, and restore them."""

    # A mixin before a class of Lightning's, which has these.
    model: Any
    optimizers: Any
    lightning_module: Any
    checkpoint_io: Any
    broadcast: Any

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` saves the module itself, without a copy."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing: `save_checkpoint` saves the optimizers themselves."""
        del optimizer
        return {}

    def _io(self) -> CloudCheckpointIO:
        if not isinstance(self.checkpoint_io, CloudCheckpointIO):
            raise OptionsError(
                f"{type(self).__name__} saves by CloudCheckpointIO; call Trainer(plugins=[CloudCheckpointIO(url)], …)"
            )
        return self.checkpoint_io

    def setup(self, trainer: Any) -> None:
        """Refuse to begin without a `CloudCheckpointIO`; else do as Lightning's strategy does."""
        self._io()
        super().setup(trainer)  # type: ignore[misc]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Save on every rank, each its own part; as `CloudCheckpointIO.save_checkpoint` does for the rest.

        Args:
            checkpoint: what Lightning has put together; of what is neither module nor optimizer rank 0's is saved.
            filepath: rank 0's is taken.
            storage_options: None.

        Raises:
            CloudCkptError: as `CloudCheckpointIO.save_checkpoint` raises.
        """
        if storage_options is not None:
            raise OptionsError("give storage_options to CloudCheckpointIO; save_checkpoint takes none")
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        _refuse_objects(rest)
        state = {"state_dict": self.model, _NOTE: RankZero(rest)}
        if "optimizer_states" in checkpoint:
            state["optimizer_states"] = list(self.optimizers)
        self._io().save_state(state, self.broadcast(filepath), about=checkpoint, ranks="all")

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:  # noqa: FBT001
        """Restore module and optimizers in place, each rank its part, on any number of ranks; return the rest.

        Args:
            checkpoint_path: rank 0's is taken.
            weights_only: means nothing: there is no code in a checkpoint.

        Raises:
            OptionsError: it was saved by another strategy.
            CloudCkptError: as `CheckpointManager.restore` raises.
        """
        del weights_only
        io = self._io()
        manager = io.manager("all")
        place = io.place(self.broadcast(checkpoint_path))
        found = io.find(place)
        if found is None:
            raise io.not_found(place)
        if not _is_of_strategy(found):
            raise OptionsError(
                f"{found.url} was saved without {type(self).__name__}, by a strategy whose optimizers are numbered; "
                "load it there, or the module alone by load_from_checkpoint"
            )
        rest: RankZero = RankZero({})
        state: dict[str, Any] = {"state_dict": self.model, _NOTE: rest}
        if self.optimizers and self.lightning_module.trainer.state.fn == "fit":
            state["optimizer_states"] = list(self.optimizers)
        manager.restore(state, found, strict=bool(self.lightning_module.strict_loading), only=list(state))
        return _dict_of(rest.value)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove it, on every rank; as `CloudCheckpointIO.remove_checkpoint` does."""
        self._io().manager("all")
        self._io().remove_checkpoint(self.broadcast(filepath))

    def teardown(self) -> None:
        """Wait for what is under way, as long as there are ranks to speak to."""
        if isinstance(self.checkpoint_io, CloudCheckpointIO):
            self.checkpoint_io.teardown()
        super().teardown()  # type: ignore[misc]


class CloudModelParallelStrategy(_Together, _strategies.ModelParallelStrategy):  # type: ignore[misc,unused-ignore]
    """Lightning's `ModelParallelStrategy` (FSDP2, tensor parallel), saving by `CloudCheckpointIO`; takes the same.

    ```python
    trainer = Trainer(strategy=CloudModelParallelStrategy(), plugins=[CloudCheckpointIO("s3://bucket/run-7")])
    ```
    """


class CloudFSDPStrategy(_Together, _strategies.FSDPStrategy):  # type: ignore[misc,unused-ignore]
    """Lightning's `FSDPStrategy` (FSDP1), saving by `CloudCheckpointIO`; takes the same.

    `state_dict_type` means nothing to it: each rank saves its part.
    """


class CloudRandomState(_pytorch.Callback):  # type: ignore[misc,unused-ignore]
    """Save the random number generators of all ranks with each checkpoint, and give them back where training goes on.

    Lightning saves none. Before the first batch it makes the loader's iterator, which draws: at the begin of an epoch
    the generators are given back before that, in the middle of one after it.
    """

    def __init__(self) -> None:
        """Stand for the generators of this process."""
        self._kept: dict[str, Any] | None = None
        self._is_within = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse a strategy that would save past the plugin, to a folder of this machine.

        Raises:
            OptionsError: one of Lightning's that shards; says which to take.
        """
        del pl_module, stage
        strategy = type(trainer.strategy)
        is_past_it = strategy.save_checkpoint is not _strategies.Strategy.save_checkpoint
        if (
            is_past_it
            and not issubclass(strategy, _Together)
            and isinstance(trainer.strategy.checkpoint_io, CloudCheckpointIO)
        ):
            raise OptionsError(
                f"{strategy.__name__} does not save by a CheckpointIO; take CloudModelParallelStrategy or "
                "CloudFSDPStrategy of cloudckpt.integrations.lightning"
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Put the generators of every rank into the checkpoint; every rank is asked."""
        del pl_module
        own = RandomState().state_dict()
        states = [own]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(states, own)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        is_within = progress.current.ready > 0 and not progress.is_last_batch
        checkpoint[_GENERATORS] = {"ranks": states, "is_within_epoch": is_within}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take the generators of this rank out of the checkpoint; one without, or of fewer ranks, leaves them."""
        del pl_module
        saved = checkpoint.get(_GENERATORS)
        states, is_within = (saved["ranks"], saved["is_within_epoch"]) if saved else ([], False)
        if trainer.global_rank >= len(states):
            logger.warning(
                "rank %d: the checkpoint holds generators of %d ranks and none of this one, which keeps its own",
                trainer.global_rank,
                len(states),
            )
            return
        self._kept, self._is_within = states[trainer.global_rank], is_within
        self._apply()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give them back before the loader's iterator is made."""
        del trainer, pl_module
        self._apply()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Give them back before the next batch of an epoch that was under way."""
        del trainer, pl_module
        if self._is_within:
            self._apply()
        self._kept = None

    def _apply(self) -> None:
        if self._kept is not None:
            RandomState().load_state_dict(self._kept)


class CloudPreemption(_pytorch.Callback):  # type: ignore[misc,unused-ignore]
    """End training after the same batch on all ranks when any of them has notice that its machine goes.

    ```python
    callbacks=[ModelCheckpoint("checkpoints", save_last=True, save_on_exception=True), CloudPreemption()]
    ```

    Lightning hears SIGTERM alone, and with several ranks its handler speaks to the others in the middle of whatever
    they are at, which can hang. While it trains this one hears in its place, SIGTERM and what the machine itself offers
    (EC2, GCE, Azure, Slurm), asks all ranks after each batch, and ends by Lightning's `SIGTERMException`, at which
    `ModelCheckpoint(save_on_exception=True)` saves. The exit status is that of the `Preemption`, 143; where Lightning
    has started the ranks itself, 0, because it kills the others of one that ends otherwise.
    """

    def __init__(self, preemption: Preemption | None = None) -> None:
        """Choose what to heed.

        Args:
            preemption: not started; None for all that this machine offers.
        """
        self._preemption = Preemption() if preemption is None else preemption

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to listen, in the place of Lightning.

        Raises:
            OptionsError: no callback would save.
        """
        del pl_module
        callbacks = trainer.callbacks
        if not any(
            getattr(one, "save_on_exception", False) or isinstance(one, _pytorch.callbacks.OnExceptionCheckpoint)
            for one in callbacks
        ):
            raise OptionsError("nothing would be saved at the end; give ModelCheckpoint save_on_exception=True")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._preemption.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask all ranks whether any has notice, and end then; ModelCheckpoint comes after this one."""
        del pl_module, outputs, batch, batch_idx
        has_notice = self._preemption.notice is not None
        if trainer.strategy.reduce_boolean_decision(has_notice, all=False):
            raise _exceptions.SIGTERMException(self._preemption.exit_code if trainer.strategy.launcher is None else 0)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Listen no more; Lightning gives the handlers back that it found."""
        del trainer, pl_module, stage
        self._preemption.stop()
