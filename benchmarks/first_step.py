"""Turn ways to resume into time lines of what a spot job waits for: process start → first step, beside the link's time.

    python -m benchmarks.first_step                       all ways, 2 GiB, 3 runs, target s3slow
    python -m benchmarks.first_step --ways plain,both     some of them
    python -m benchmarks.first_step --quick               smoke test: 16 MiB, 1 run

A GPT-like model with AdamW is saved once; parameters are a third of the state. Then each number is a fresh process that
imports, builds the model, restores and takes one step; all ways take turns. What it ends with is compared, bit for bit,
with what was saved. The link's time is that of a raw client, as many connections, and as many bytes as the model has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.shared.child import MARK, MeasurementError, report_of_child
from benchmarks.shared.units import format_bytes, parse_bytes

__all__ = ["WAYS", "main"]

WAYS = ("plain", "wait", "prefetch", "both")
MOMENTS = ("started", "torch imported", "model built", "manager opened", "model whole", "first step", "all whole")
_QUICK_BYTES = 16 << 20
_SPAN_BYTES = 8 << 20
_CONNECTIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    """One process.

    Attributes:
        way: one of `WAYS`; or `save`, which makes the state, or `link`, which reads as many bytes as its model has.
        began_s: by `time.time`, just before it was started.
    """

    way: str
    url: str
    size_bytes: int
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    began_s: float = 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit status."""
    from benchmarks.shared.targets import TARGETS, open_target

    parser = argparse.ArgumentParser(description="Measure process start → first step.")
    parser.add_argument("--size", type=parse_bytes, default=parse_bytes("2GiB"), help="bytes of the state, about")
    parser.add_argument("--target", choices=TARGETS, default="s3slow")
    parser.add_argument("--ways", default=",".join(WAYS), help=", ".join(WAYS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every moment to this file")
    parser.add_argument("--directory", type=Path, default=Path("/tmp"), help="where `local` writes")
    parser.add_argument("--quick", action="store_true", help="16 MiB and one run: a smoke test, no measurement")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.runs = min(options.size, _QUICK_BYTES), 1
    ways = options.ways.split(",")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ("link", *ways)}
    with (
        open_target(options.target, size_bytes=options.size, directory=options.directory) as target,
        target.ground() as ground,
    ):
        spec = {"url": ground.url, "size_bytes": options.size, "storage_options": ground.storage_options}
        _child(_Spec(way="save", **spec))
        for turn in range(options.runs):
            for way in ways if target.is_local else found:
                print(f"… run {turn + 1} of {options.runs}: {way}", file=sys.stderr, flush=True)
                found[way].append(_child(_Spec(way=way, began_s=time.time(), **spec)))
    print(_table(options, found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return 0


def _child(spec: _Spec) -> dict[str, float]:
    return report_of_child("benchmarks.first_step", asdict(spec), f"first step, {spec.way}")


def _table(options: argparse.Namespace, found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    link_s = median(one["link"] for one in found["link"]) if found["link"] else float("nan")
    title = (
        f"Seconds from the start of the process, {format_bytes(options.size)} of state on {options.target}, "
        f"median of {options.runs}; the link takes {link_s:.2f} s for the model's bytes"
    )
    lines = [
        title,
        "",
        f"| way | {' | '.join(MOMENTS)} | after the model was built, × link | processor seconds |",
        f"|---|{'---:|' * (len(MOMENTS) + 2)}",
    ]
    for way, runs in found.items():
        if way == "link" or not runs:
            continue
        moments = {name: median(run[name] for run in runs) for name in (*MOMENTS, "cpu")}
        told = " | ".join(f"{moments[name]:.2f}" for name in MOMENTS)
        ratio = (moments["model whole"] - moments["model built"]) / link_s
        lines.append(f"| {way} | {told} | {ratio:.2f} | {moments['cpu']:.2f} |")
    return "\n".join(lines)


# ---- in the child ---------------------------------------------------------------------------------------------------


def _work(spec: _Spec) -> dict[str, float]:
    if spec.way == "link":
        return {"link": _link_s(spec)}
    if spec.way == "save":
        _save(spec)
        return {}
    return _resume(spec)


def _built(size_bytes: int) -> tuple[Any, Any]:
    """Return a model, and its optimizer without state; a third of `size_bytes` are parameters."""
    import torch

    from benchmarks.shared.states import STATES

    class Layers(torch.nn.Module):
        """As many parameters as a GPT has, in a network that is quick to walk through."""

        def __init__(self) -> None:
            super().__init__()
            for name, shape in STATES["gpt"].shapes(size_bytes // 3).items():
                self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(torch.empty(shape)))

        def forward(self) -> torch.Tensor:
            found: torch.Tensor = torch.stack([one.view(-1)[:4096].square().mean() for one in self.parameters()]).sum()
            return found

    model = Layers()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _filled(size_bytes: int, *, steps: int = 1) -> tuple[Any, Any]:
    """Return model and optimizer as they are saved; each call makes the same ones."""
    import torch

    model, optimizer = _built(size_bytes)
    draw = torch.Generator().manual_seed(7)
    block = torch.randn(1 << 20, generator=draw)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            moments = [torch.empty_like(parameter) for _ in range(2)]
            for number, tensor in enumerate([parameter, *moments]):
                for start in range(0, tensor.numel(), len(block)):
                    part = tensor.view(-1)[start : start + len(block)]
                    part.copy_((block[: len(part)] + place + start % 977).abs_().mul_(1e-2 * (number + 1)))
            state = {"step": torch.tensor(float(steps)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
            optimizer.state[parameter] = state
    return model, optimizer


def _save(spec: _Spec) -> None:
    from cloudckpt import CheckpointManager

    model, optimizer = _filled(spec.size_bytes)
    with CheckpointManager(spec.url, storage_options=dict(spec.storage_options) or None) as manager:
        manager.save(1, {"model": model, "optimizer": optimizer})


def _resume(spec: _Spec) -> dict[str, float]:
    moments: dict[str, float] = {}

    def note(name: str) -> None:
        moments[name] = time.time() - spec.began_s

    storage_options = dict(spec.storage_options) or None
    note("started")
    if spec.way in ("prefetch", "both"):
        import cloudckpt

        cloudckpt.prefetch(spec.url, storage_options=storage_options)
    import torch  # noqa: F401 (it is what is measured)

    note("torch imported")
    model, optimizer = _built(spec.size_bytes)
    note("model built")
    from cloudckpt import CheckpointManager

    with CheckpointManager(spec.url, storage_options=storage_options, progress="off") as manager:
        note("manager opened")
        wait = ["model"] if spec.way in ("wait", "both") else None
        manager.restore({"model": model, "optimizer": optimizer}, wait=wait)
        note("model whole")
        model().backward()
        optimizer.step()
        note("first step")
        manager.wait()
        note("all whole")
    moments["cpu"] = time.process_time()
    _check(spec, model, optimizer)
    return moments


def _check(spec: _Spec, model: Any, optimizer: Any) -> None:
    """Refuse a number of a resumed training that is not, bit for bit, the one that went on."""
    import torch

    other, others = _filled(spec.size_bytes)
    other().backward()
    others.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        if not torch.equal(one, two):
            raise MeasurementError("the parameters differ after the first step")
        for name, value in optimizer.state[one].items():
            if not torch.equal(value, others.state[two][name]):
                raise MeasurementError(f"the optimizer's {name} differs after the first step")


def _link_s(spec: _Spec) -> float:
    """Read as many bytes as the model has, as obstore does, once its connections are warm."""
    import obstore
    from obstore.store import S3Store

    options = spec.storage_options
    bucket, _, prefix = spec.url.removeprefix("s3://").partition("/")
    store = S3Store(
        bucket,
        endpoint=options["endpoint_url"],
        region="us-east-1",
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        client_options={"allow_http": True},
        unsigned_payload=True,
    )
    left_bytes, ranges = spec.size_bytes // 3, []
    shards = [one for page in obstore.list(store, prefix) for one in page if one["path"].endswith(".safetensors")]
    for shard in shards:
        starts = range(0, min(shard["size"], left_bytes), _SPAN_BYTES)
        ranges += [(shard["path"], start, min(start + _SPAN_BYTES, shard["size"])) for start in starts]
        left_bytes -= min(shard["size"], left_bytes)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(
            pool.map(lambda one: obstore.get_range(store, one[0], start=one[1], end=one[1] + 1), ranges[:_CONNECTIONS])
        )
        began_s = time.perf_counter()
        list(pool.map(lambda one: len(obstore.get_range(store, one[0], start=one[1], end=one[2])), ranges))
        return time.perf_counter() - began_s


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")
        print(MARK + json.dumps(_work(_Spec(**json.loads(sys.argv[1])))))
    else:
        raise SystemExit(main())
