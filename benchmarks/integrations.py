"""Turn trainers into tables: what each does by itself when it is given a bucket, and with an adapter of ours.

    python -m benchmarks.integrations                     all, 200 MB, 3 runs, in the frameworks' environment
    python -m benchmarks.integrations --frameworks lightning,peft --mb 20 --runs 1
    python -m benchmarks.integrations --json F --markdown docs/integrations.md

Seconds and memory are taken on the in-memory sink, a fresh process for each number, the ways of a framework in turn.
Kills are made on SeaweedFS, whose listing is honest: a save is struck once half of the state's bytes have gone to the
store, or to the local folder that a framework took the URL for; and what is there then is listed, and resumed from in a
new process on another "machine" (an empty folder), and on the same one where something lies there.
What cannot run has a row that says why. The exit status is 1 when one of ours fails, or restores something else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.sink.process import running_sink
from benchmarks.trainers.meter import SAVES_AFTER, Found
from benchmarks.trainers.relay import Relay, running_relay
from benchmarks.trainers.report import Kill, Left, Row, section, tables
from benchmarks.trainers.runs import Host, HostError, Run

__all__ = ["FRAMEWORKS", "main", "measure"]

FRAMEWORKS = ("lightning", "transformers", "accelerate", "torchtitan", "torch_checkpointing", "ray", "peft")

_SERVERS = Path(__file__).resolve().parents[1] / "localstack"
_SINK_HEADROOM_BYTES = 256 << 20
_LOCAL = "s3:"
"""What a URL becomes where it is taken for a path."""
_TRIES = 3
_SETTLED_S, _SETTLE_LIMIT_S = 0.5, 10.0


@dataclass(frozen=True, slots=True)
class _Store:
    """Where runs save to."""

    endpoint_url: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def measure(
    found: dict[str, list[Row]],
    frameworks: Sequence[str],
    *,
    size_bytes: int,
    runs: int,
    folder: Path,
    kills: bool = True,
) -> None:
    """Fill in framework → its rows, so that what was found is there whenever this ends.

    Args:
        found: is filled.
        frameworks: of `FRAMEWORKS`.
        size_bytes: of each state, about.
        runs: numbers for each row.
        folder: where scratch folders and the server are; they are not removed.
        kills: also kill saves.
    """
    with ExitStack() as stack:
        sink = stack.enter_context(running_sink(5 * size_bytes + _SINK_HEADROOM_BYTES))
        store = _Store(sink.endpoint_url, "bench", "bench")
        bucket = stack.enter_context(_opened_bucket(folder / "seaweedfs")) if kills else None
        for framework in frameworks:
            try:
                host = stack.enter_context(Host(framework, folder))
            except HostError as error:
                found[framework] = [Row(way="stock", title=framework, line="", error=str(error))]
                continue
            rows = [
                Row(way=way, title=words["title"], line=words["line"], packages=host.packages)
                for way, words in host.ways.items()
            ]
            found[framework] = rows
            for turn in range(runs):
                for row in rows:
                    _log(f"{framework}, {row.way}: run {turn + 1} of {runs}")
                    if not row.error:
                        sink.clear()
                        _take_turn(row, host, store, size_bytes)
            for row in rows if bucket else ():
                _log(f"{framework}, {row.way}: a kill")
                if not row.error:
                    row.kill = _killed(row, host, bucket, framework, size_bytes)
            host.close()


def _take_turn(row: Row, host: Host, store: _Store, size_bytes: int) -> None:
    """Save and resume once."""
    task = {"way": row.way, "url": "s3://bench/run", "size_bytes": size_bytes}
    run = host.start({**task, "op": "train"}, store.environment)
    saved = _result(run)
    if saved.error:
        row.error = saved.error
        return
    row.is_local = row.is_local or (run.scratch / _LOCAL).exists()
    row.saves.append(saved)
    # Where nothing has come to the bucket, only this machine can resume.
    resuming = host.start({**task, "op": "resume"}, store.environment, run.scratch if row.is_local else None)
    resumed = _result(resuming)
    if not resumed.error and not resumed.step and not row.is_ours:
        row.is_forgotten = True
        return
    if not resumed.error and not _is_as_saved(resumed, saved, SAVES_AFTER[-1]):
        resumed.error = f"resumed from step {resumed.step} with other values than were saved"
    row.error = resumed.error
    if not resumed.error:
        row.loads.append(resumed)


def _result(run: Run) -> Found:
    found = run.result()
    if found.error:
        _log(f"failed with {found.error}\n{run.log()}")
    return found


def _is_as_saved(resumed: Found, saved: Found, step: int | None = None) -> bool:
    """Tell whether a step was found, and every bit of its tensors."""
    number = str(resumed.step)
    return step in (None, resumed.step) and resumed.sums.get(number) == saved.sums.get(number, -1)


# ---- kills ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Bucket:
    """A real S3, behind a relay that strikes."""

    server: Any
    relay: Relay
    url: str = "s3://bench"
    places: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    @property
    def store(self) -> _Store:
        options = self.server.storage_options
        return _Store(self.relay.endpoint_url, options["key"], options["secret"])

    def held(self, prefix: str) -> dict[str, tuple[str, int]]:
        """Return what is below a prefix: a name → whether `object` or `upload`, and its bytes."""
        client, found = self.server.client, {}
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="bench", Prefix=prefix):
            found |= {one["Key"]: ("object", one["Size"]) for one in page.get("Contents", ())}
        for one in client.list_multipart_uploads(Bucket="bench", Prefix=prefix).get("Uploads", ()):
            parts = client.list_parts(Bucket="bench", Key=one["Key"], UploadId=one["UploadId"]).get("Parts", ())
            found[one["UploadId"]] = ("upload", sum(part["Size"] for part in parts))
        return found

    def settled(self, prefix: str) -> dict[str, tuple[str, int]]:
        """Return what is there once that does not change any more."""
        end_s, last = time.monotonic() + _SETTLE_LIMIT_S, self.held(prefix)
        while time.monotonic() < end_s:
            time.sleep(_SETTLED_S)
            now = self.held(prefix)
            if now == last:
                break
            last = now
        return last


@contextmanager
def _opened_bucket(folder: Path) -> Iterator[_Bucket]:
    if str(_SERVERS) not in sys.path:
        sys.path.append(str(_SERVERS))
    from servers import seaweedfs

    with seaweedfs(folder) as server, running_relay(server.endpoint_url) as relay:
        server.make_bucket("bench")
        yield _Bucket(server, relay)


def _killed(row: Row, host: Host, bucket: _Bucket, framework: str, size_bytes: int) -> Kill:
    for _ in range(_TRIES):
        prefix = f"{framework}-{next(bucket.places)}/"
        task = {"way": row.way, "url": f"{bucket.url}/{prefix}run", "size_bytes": size_bytes}
        run = host.start({**task, "op": "train", "is_gated": True}, bucket.store.environment)
        if not run.await_gate():
            return Kill(error=_result(run).error or "ended before its second save")
        time.sleep(host.ways[row.way]["rest_s"])
        before, local_before = bucket.settled(prefix), _files(run.scratch / _LOCAL)
        _strike(run, bucket.relay, size_bytes // 2)
        saved = run.result()
        if run.was_struck:
            left = _left(before, bucket.settled(prefix), local_before, _files(run.scratch / _LOCAL))
            elsewhere = _result(host.start({**task, "op": "resume"}, bucket.store.environment))
            has_local = (run.scratch / _LOCAL).exists()
            here = host.start({**task, "op": "resume"}, bucket.store.environment, run.scratch) if has_local else None
            return Kill(left=left, elsewhere=_told(elsewhere, saved), here=_told(_result(here), saved) if here else "")
    return Kill(error="its second save was over each time before it could be struck")


def _strike(run: Run, relay: Relay, after_bytes: int) -> None:
    """Let the second save begin, and end the run in its middle, wherever it saves to."""
    relay.arm(after_bytes, run.strike)
    run.open_gate()
    run.strike_on_disk(run.scratch / _LOCAL, after_bytes)
    relay.arm(0, None)


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def _left(
    before: Mapping[str, tuple[str, int]],
    after: Mapping[str, tuple[str, int]],
    local_before: Mapping[str, int],
    local_after: Mapping[str, int],
) -> Left:
    new = [after[name] for name in after if after[name] != before.get(name)]
    sizes = {kind: [size for one, size in new if one == kind] for kind in ("object", "upload")}
    files = [size for path, size in local_after.items() if size != local_before.get(path)]
    return Left(
        objects=len(sizes["object"]),
        object_bytes=sum(sizes["object"]),
        uploads=len(sizes["upload"]),
        upload_bytes=sum(sizes["upload"]),
        files=len(files),
        file_bytes=sum(files),
    )


def _told(resumed: Found, saved: Found) -> str:
    """Say what a resume found, in the words of the table."""
    if resumed.error:
        return f"error: {resumed.error}"
    if not resumed.step:
        return "nothing: begins anew"
    return f"step {resumed.step}" + ("" if _is_as_saved(resumed, saved) else ", **with other values than were saved**")


def _log(text: str) -> None:
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200.0, help="size of each state, in 10^6 bytes")
    parser.add_argument("--runs", type=int, default=3, help="numbers for each row; 0 is kills alone")
    parser.add_argument("--frameworks", type=lambda text: text.split(","), default=list(FRAMEWORKS))
    parser.add_argument("--no-kills", dest="kills", action="store_false", help="times and memory alone")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables into this page, as a section of it")
    parser.add_argument("--directory", type=Path, help="where scratch folders are; a disk, for what writes to one")
    options = parser.parse_args(arguments)
    if unknown := set(options.frameworks) - set(FRAMEWORKS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FRAMEWORKS)}")
    found: dict[str, list[Row]] = {}
    size_bytes = int(options.mb * 1e6)
    try:
        with tempfile.TemporaryDirectory(prefix="ckpt-", dir=options.directory) as name:
            words = {"size_bytes": size_bytes, "runs": options.runs, "folder": Path(name), "kills": options.kills}
            measure(found, options.frameworks, **words)
    finally:  # also of one that is told to end
        told = tables(found, size_bytes=size_bytes, runs=options.runs, load=os.getloadavg()[1])
        print(told, flush=True)
    if options.json:
        told_json = {framework: [asdict(row) for row in rows] for framework, rows in found.items()}
        options.json.write_text(json.dumps(told_json, indent=1))
    if options.markdown:
        page = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(section(page, told))
    ours = [row for rows in found.values() for row in rows if row.is_ours]
    return 1 if any(row.error or row.is_wrong for row in ours) else 0


if __name__ == "__main__":
    # So that a run that is told to end leaves no server and no trainer behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
