"""Train on four ranks in peace; then kill ranks in the middle of saves, tell one to end, go on, and compare.

    run A   ├─────────────────────────────────────────────────────────────┤   4 ranks

    run B   ├───────────┤ one rank killed during a save                       4 ranks
                    ├───────────┤ SIGTERM to one rank                         4 ranks, from the bucket alone
                                 ├───────────┤ one rank killed during a save  4 ranks, from the bucket alone
                                         ├────────────────────────────────┤   2 ranks, from the bucket alone

A rank is killed with SIGKILL while the bucket, listed around cloudckpt, shows some of *its* shards of a save, not all,
and no manifest; to be certain of that, the demo stops all ranks (SIGSTOP), looks, and kills one or lets all go on.
torchrun then ends the others. SIGTERM comes to the last rank alone, after a step that was not saved: all ranks save
the same step and end with 143 within 20 s. Ends with status 1 if a check breaks, and if a kill finds no moment.

What is equal in every bit, and what is not: a restore gives each tensor's exact bits on any number of ranks, and as
many ranks as before then repeat every loss exactly. Another number of ranks adds up the same gradients in another
order, so its losses differ from A's by float32 rounding, which training carries on; these are held to a tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import fsspec
from bucket import Attempt, attempts_in
from fsdp_record import Event, Left, Restored, Saved, Step, read_record
from runs import EXIT_INTERRUPTED, EXIT_PREEMPTED, NOTICE_S, QUIET_S, DemoError
from target import Target, seaweedfs_target, target_at

__all__ = ["FIRST_LOSS_TOLERANCE", "LOSS_TOLERANCE", "Part", "Size", "checks", "main", "show", "torchrun"]

SCRIPT = Path(__file__).resolve().with_name("train_fsdp.py")

# Relative. Right after a restore only the mean over the batch is added up in another order: a few units in the last
# place of a float32 (6e-8). Later steps also carry what the gradients' roundings did to the parameters.
FIRST_LOSS_TOLERANCE = 1e-6
LOSS_TOLERANCE = 1e-5

_POLL_S = 0.01
_SETTLE_S = 0.25
_SETTLE_DEADLINE_S = 30.0
# torchrun gives its ranks 30 s to end after SIGTERM.
_END_DEADLINE_S = 60.0

_STEP = re.compile(r"/step-(?P<step>\d{10})-e(?P<epoch>\d{4,})/?\Z")

Kind = TypeVar("Kind", bound=Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much to train; the fields are options of `train_fsdp.py`.

    Attributes:
        shard_mib: small, so that a rank's part of a save is many requests long and has a middle to be killed in.
    """

    steps: int = 40
    save_every: int = 4
    layers: int = 2
    width: int = 128
    batch_size: int = 12
    shard_mib: float = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one group of ranks did, from its start to its end.

    Attributes:
        half_written: the attempt that was under way when a rank was killed; None if none was.
        told: the rank that was sent SIGTERM, if one was.
        ended_in_time: whether all ranks had ended 20 s after the SIGTERM.
        newest_step: the newest step that was committed when the group had ended.
    """

    ranks: int
    events: Sequence[Event]
    half_written: Attempt | None = None
    told: int | None = None
    ended_in_time: bool = True
    newest_step: int | None = None

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def origin(self) -> Restored | None:
        """What the group restored; None if it began afresh."""
        return next(iter(self.of(Restored)), None)


# -- running -----------------------------------------------------------------------------------------------------------


@contextmanager
def torchrun(
    ranks: int, arguments: Sequence[str], *, log: Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a script on several ranks of this machine; end all of them afterwards, whatever happened."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(ranks), *arguments]
    # The ranks talk to each other over loopback; only torchrun's own two stores listen on every interface, always.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=settings, stdout=output, stderr=subprocess.STDOUT)
    with process:
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun so that it ends its ranks, which are in sessions of their own; SIGKILL for all if it does not."""
    ranks = _ranks_of(process)
    process.terminate()
    try:
        process.wait(_END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        for pid in [*ranks.values(), process.pid]:
            os.kill(pid, signal.SIGKILL)


def _ranks_of(process: subprocess.Popen[bytes]) -> dict[int, int]:
    """Return rank → process id of the children of a torchrun that is still there."""
    found: dict[int, int] = {}
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in map(int, children):
            if rank := re.search(rb"(?:\A|\0)RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes()):
                found[int(rank[1])] = pid
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return found


def run_part(
    target: Target, name: str, ranks: int, size: Size, out: Path, *, victim: int | None = None, told: int | None = None
) -> Part:
    """Train under root `name[0]` with some ranks until they end, or rank `victim` is killed, or rank `told` is told.

    Raises:
        DemoError: there was no moment to strike, or the training failed by itself.
    """
    record, log, listing = out / f"{name}.jsonl", out / f"{name}.log", _Listing(target, name[0])
    record.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    flags = [part for field, value in asdict(size).items() for part in (f"--{field.replace('_', '-')}", str(value))]
    flags += ["--grace-s", str(NOTICE_S)]
    arguments = [str(SCRIPT), "--url", target.root(name[0]), "--record", str(record), *flags]
    half_written, ended_in_time = None, True
    print(f"{name}: {ranks} ranks", end="", flush=True)
    with torchrun(ranks, arguments, log=log, **target.environment) as process:
        if victim is not None:
            half_written = _Hunt(process, record, listing, ranks, victim).strike()
        if told is not None:
            ended_in_time = _Notice(process, record, ranks, size.save_every).give(told)
        code = process.wait()
    if (code == 0) != (half_written is None and told is None):
        raise DemoError(f"torchrun ended with {code}; from {log}:\n{_complaints(log)}")
    committed = [attempt.step for attempt in listing.attempts() if attempt.is_committed]
    part = Part(
        ranks=ranks,
        events=read_record(record),
        half_written=half_written,
        told=told,
        ended_in_time=ended_in_time,
        newest_step=committed[-1] if committed else None,
    )
    print(f"; {_story(part, victim)}", flush=True)
    return part


def _complaints(log: Path) -> str:
    """Return the first lines that are not mere information: what failed first explains what failed after it."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines if " INFO " not in line][:40])


def _story(part: Part, victim: int | None) -> str:
    steps = part.of(Step)
    origin = f"restored step {part.origin.step}" if part.origin else "began afresh"
    trained = f"trained {steps[0].step} to {steps[-1].step}" if steps else "trained nothing"
    if part.told is not None:
        ends = ", ".join(f"rank {one.rank} with {one.code}" for one in sorted(part.of(Left), key=lambda one: one.rank))
        return f"{origin}, {trained}; SIGTERM to rank {part.told}: step {part.newest_step} is safe; {ends}"
    if part.half_written is None:
        return f"{origin}, {trained}"
    return (
        f"{origin}, {trained}; rank {victim} killed: {part.half_written.name} has {part.half_written.object_count} "
        "objects and no manifest"
    )


class _Listing:
    """One root, listed around cloudckpt; every look is a fresh listing."""

    def __init__(self, target: Target, run_name: str) -> None:
        options = {**target.storage_options, "use_listings_cache": False, "skip_instance_cache": True}
        self._fs, self._path = fsspec.core.url_to_fs(target.root(run_name), **options)

    def attempts(self) -> list[Attempt]:
        """List every attempt under the root, ordered by epoch and step."""
        return attempts_in(self._fs.find(self._path))

    def newest_keys(self) -> list[str]:
        """List the objects of the newest step alone: a listing of the whole root would outlast a save.

        Nothing is what an emulator may answer while it is written to: the next look decides.
        """
        places = list(filter(None, map(_STEP.search, self._fs.ls(self._path, detail=False))))
        if not places:
            return []
        newest = max(places, key=lambda place: (int(place["epoch"]), int(place["step"])))
        return list(self._fs.find(newest.string))


class _Hunt:
    """Kills one rank when the bucket shows a part of its shards of a save, and no manifest."""

    def __init__(
        self, process: subprocess.Popen[bytes], record: Path, listing: _Listing, ranks: int, victim: int
    ) -> None:
        self._process = process
        self._record = record
        self._listing = listing
        self._ranks = ranks
        self._victim = victim

    def strike(self) -> Attempt:
        """Wait for the moment, kill, and return the attempt that was under way."""
        whole_count = self._shards_of_first_save()
        while self._process.poll() is None:
            time.sleep(_POLL_S)
            if attempt := self._stop_and_look(whole_count):
                return attempt
        raise DemoError(f"the run ended before rank {self._victim} could be killed during a save")

    def _shards_of_first_save(self) -> int:
        """Wait for this group's first save, and count the shards that the victim has in it."""
        while self._process.poll() is None:
            time.sleep(_POLL_S)
            if any(isinstance(event, Saved) for event in read_record(self._record)):
                keys = self._listing.newest_keys()
                # Not the next save, which may be under way by now.
                if any(attempt.is_committed for attempt in attempts_in(keys)):
                    return self._shards_in(keys)
        raise DemoError("the training ended before its first save")

    def _shards_in(self, keys: Sequence[str]) -> int:
        return sum(f"/r{self._victim:05d}-" in key for key in keys)

    def _under_way(self, whole_count: int) -> Attempt | None:
        """Return the attempt of which the victim has uploaded some shards and not all."""
        keys = self._listing.newest_keys()
        is_part = 0 < self._shards_in(keys) < whole_count
        return next((attempt for attempt in attempts_in(keys) if is_part and not attempt.is_committed), None)

    def _stop_and_look(self, whole_count: int) -> Attempt | None:
        # The ranks stand still for every look: on a busy machine a save would end while its listing is on the way.
        pids = _ranks_of(self._process)
        if len(pids) != self._ranks:
            return None
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        found = self._under_way(whole_count)
        if found:
            self._settle()
            found = self._under_way(whole_count)
        if found:
            os.kill(pids.pop(self._victim), signal.SIGKILL)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        return found

    def _settle(self) -> None:
        """Wait until requests that were on their way when the ranks stopped have landed."""
        deadline_s = time.monotonic() + _SETTLE_DEADLINE_S
        before, now = None, self._listing.newest_keys()
        while before != now and time.monotonic() < deadline_s:
            time.sleep(_SETTLE_S)
            before, now = now, self._listing.newest_keys()


class _Notice:
    """Sends SIGTERM to one rank after a step that was not saved, when no save of the last seconds will do."""

    def __init__(self, process: subprocess.Popen[bytes], record: Path, ranks: int, save_every: int) -> None:
        self._process = process
        self._record = record
        self._ranks = ranks
        self._save_every = save_every

    def give(self, rank: int) -> bool:
        """Wait for the moment, send the signal, and tell whether all ranks ended in time; kill those that did not.

        Raises:
            DemoError: the run ended before there was such a moment.
        """
        while self._process.poll() is None:
            time.sleep(_POLL_S)
            if self._is_moment() and (pids := self._stopped()):
                return self._send(pids, rank)
        raise DemoError(f"the run ended before rank {rank} could be told")

    def _is_moment(self) -> bool:
        """Tell whether rank 0 has saved, and is in a step after which no interval is over."""
        events = read_record(self._record)
        last = events[-1] if events else None
        is_idle = isinstance(last, Step) and all((last.step + ahead) % self._save_every for ahead in (0, 1))
        return is_idle and any(isinstance(event, Saved) for event in events)

    def _stopped(self) -> dict[int, int]:
        """Stop all ranks; return none, and let them go on, if the moment has passed meanwhile."""
        pids = _ranks_of(self._process)
        if len(pids) != self._ranks:
            return {}
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        if self._is_moment():
            return pids
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        return {}

    def _send(self, pids: dict[int, int], rank: int) -> bool:
        time.sleep(QUIET_S)
        deadline_s = time.monotonic() + NOTICE_S
        os.kill(pids[rank], signal.SIGTERM)
        for pid in pids.values():
            os.kill(pid, signal.SIGCONT)
        while (late := _ranks_of(self._process)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        for pid in late.values():
            os.kill(pid, signal.SIGKILL)
        return not late


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """One step that B trained, beside the same step of A.

    Attributes:
        is_like_a: whether A's number of ranks trained this step and all steps of B before it.
        is_first: whether it is the first step after a restore.
    """

    step: int
    ranks: int
    a: float
    b: float
    is_like_a: bool
    is_first: bool

    @property
    def difference(self) -> float:
        """How far B is from A, relative to A."""
        return abs(self.b - self.a) / abs(self.a)


def losses_of(run_a: Part, run_b: Sequence[Part]) -> list[Loss]:
    """Hold every step that B trained against the same step of A."""
    by_step = {event.step: event.loss_value for event in run_a.of(Step)}
    like_a = _like_a(run_a, run_b)
    return [
        Loss(
            step=event.step,
            ranks=part.ranks,
            a=by_step[event.step],
            b=event.loss_value,
            is_like_a=number < like_a,
            is_first=part.origin is not None and event.step == part.origin.step + 1,
        )
        for number, part in enumerate(run_b)
        for event in part.of(Step)
    ]


def _like_a(run_a: Part, run_b: Sequence[Part]) -> int:
    """Count the parts of B, from its start, that had as many ranks as A."""
    return next((number for number, part in enumerate(run_b) if part.ranks != run_a.ranks), len(run_b))


def checks(run_a: Part, run_b: Sequence[Part], attempts: Sequence[Attempt]) -> dict[str, bool]:
    """Say what the demo claims, and whether each claim held; `attempts` are those on B's root at the end."""
    losses, like_a = losses_of(run_a, run_b), _like_a(run_a, run_b)
    saved_a = {saved.step: saved.digests for saved in run_a.of(Saved)}
    # The first part with other ranks has trained nothing yet when it restores.
    restored_like_a = [part.origin for part in run_b[: like_a + 1] if part.origin]
    half_written = {part.half_written.name for part in run_b if part.half_written}
    others = [loss for loss in losses if not loss.is_like_a]
    told = [pair for pair in pairwise(run_b) if pair[0].told is not None]
    return {
        f"restored on {_list(run_b[1:])} ranks, every tensor has the bits that were saved": all(_restores(run_b)),
        f"and, as long as only {run_a.ranks} ranks had trained, the bits of A where A saved that step": all(
            origin.digests == saved_a[origin.step] for origin in restored_like_a if origin.step in saved_a
        ),
        f"on {run_a.ranks} ranks, every loss of B has the bits of A's": all(
            loss.a.hex() == loss.b.hex() for loss in losses if loss.is_like_a
        ),
        f"on other ranks, the first loss is within {FIRST_LOSS_TOLERANCE:g} of A's": all(
            loss.difference <= FIRST_LOSS_TOLERANCE for loss in others[:1]
        ),
        f"and every later loss within {LOSS_TOLERANCE:g}": all(loss.difference <= LOSS_TOLERANCE for loss in others),
        "B trained every step that A trained": list(_kept(run_b)) == [event.step for event in run_a.of(Step)],
        "every group of ranks went on from the newest committed save": all(_resumes(run_b)),
        f"a SIGTERM to one rank ended all with {EXIT_PREEMPTED} after the same step, within {NOTICE_S:g} s": all(
            _is_left_together(part) for part, _ in told
        ),
        "and cost no step: the next group trained the very next one": all(
            later.origin is not None and later.origin.step == part.of(Step)[-1].step for part, later in told
        ),
        "no half-written attempt became a checkpoint": not any(
            one.is_committed and one.name in half_written for one in attempts
        ),
    }


def _is_left_together(part: Part) -> bool:
    ends = sorted((left.rank, left.step, left.code) for left in part.of(Left))
    last_step = part.of(Step)[-1].step
    return part.ended_in_time and ends == [(rank, last_step, EXIT_PREEMPTED) for rank in range(part.ranks)]


def _list(parts: Sequence[Part]) -> str:
    return ", ".join(dict.fromkeys(str(part.ranks) for part in parts))


def _restores(run_b: Sequence[Part]) -> Iterator[bool]:
    """Tell for each restore whether its digests are those of the save that it came from."""
    saved: dict[int, dict[str, str]] = {}
    for part in run_b:
        if part.origin:
            yield part.origin.digests == saved.get(part.origin.step)
        saved |= {event.step: event.digests for event in part.of(Saved)}


def _kept(run_b: Sequence[Part]) -> Iterator[int]:
    """Return the steps that led to B's end, without those that a later group trained again."""
    for part, later in zip(run_b, [*run_b[1:], None], strict=True):
        stop = later.origin.step + 1 if later and later.origin else math.inf
        yield from (event.step for event in part.of(Step) if event.step < stop)


def _resumes(run_b: Sequence[Part]) -> Iterator[bool]:
    """Tell for each group whether it restored the newest save that was committed before it."""
    newest: int | None = None
    for part in run_b:
        yield (part.origin.step if part.origin else None) == newest
        newest = part.newest_step


# -- showing -----------------------------------------------------------------------------------------------------------


def show(target: Target, ranks: Sequence[int], size: Size, out: Path) -> bool:
    """Run A with `ranks[0]` ranks and B with all of `ranks` in turn; print, record, and say whether all checks held."""
    out.mkdir(parents=True, exist_ok=True)
    run_a = run_part(target, "a", ranks[0], size, out)
    run_b = []
    for number, count in enumerate(ranks, start=1):
        is_told = number == 2 and number < len(ranks)
        victim = count - 1 if number < len(ranks) and not is_told else None
        told = count - 1 if is_told else None
        run_b.append(run_part(target, f"b{number}", count, size, out, victim=victim, told=told))
    losses, claims = losses_of(run_a, run_b), checks(run_a, run_b, _Listing(target, "b").attempts())
    print("", *_table(losses), sep="\n")
    _write_record(out / "fsdp-record.json", target, size, losses, claims)
    print(f"\nrecord  {out / 'fsdp-record.json'}\n")
    for claim, is_true in claims.items():
        print(f"{'held  ' if is_true else 'FAILED'}  {claim}")
    return all(claims.values())


def _table(losses: Sequence[Loss]) -> Iterator[str]:
    yield f"{'step':>5} {'ranks':>5} {'loss of A':>22} {'loss of B':>22} {'':>8}  difference, relative"
    for loss in losses:
        if loss.is_first:
            yield "----- restored"
        difference = "none, in any bit" if loss.a.hex() == loss.b.hex() else f"{loss.difference:.1e}"
        yield f"{loss.step:>5} {loss.ranks:>5} {loss.a.hex():>22} {loss.b.hex():>22} {loss.b:>8.4f}  {difference}"


def _write_record(path: Path, target: Target, size: Size, losses: Sequence[Loss], claims: dict[str, bool]) -> None:
    record = {
        "target": target.description,
        "url": target.url,
        "processors": os.cpu_count(),
        "size": asdict(size),
        "checks": claims,
        "largest_difference": max((loss.difference for loss in losses), default=None),
        "losses": [{**asdict(loss), "a": loss.a.hex(), "b": loss.b.hex()} for loss in losses],
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Kill a rank during a save, resume on other ranks, compare the bits.")
    parser.add_argument("--url", help="where to write instead of SeaweedFS on loopback: s3://…, gs://… or a directory")
    options = os.environ.get("CLOUDCKPT_STORAGE_OPTIONS", "{}")
    parser.add_argument("--storage-options", default=options, help="fsspec's options for --url, as JSON")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where record and logs go")
    parser.add_argument(
        "--ranks",
        default="4,4,4,2",
        help="ranks of each start of B, all but the last are interrupted; A has as many as the first",
    )
    for field in fields(Size):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the status to exit with."""
    given = _parser().parse_args(arguments)
    size = Size(**{field.name: getattr(given, field.name) for field in fields(Size)})
    ranks = [int(count) for count in given.ranks.split(",")]
    target = nullcontext(target_at(given.url, json.loads(given.storage_options))) if given.url else seaweedfs_target()
    try:
        with target as place:
            return 0 if show(place, ranks, size, given.out.resolve()) else 1
    except DemoError as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # What it had started has ended on the way here.
        print("The demo was interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
