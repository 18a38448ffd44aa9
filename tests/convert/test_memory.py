"""A conversion of any size passes through a bounded memory, at whichever end the bucket is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from servers import FreshPrefix
from tests.programs import run_to_end

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import torch.distributed.checkpoint
from cloudckpt.convert import export, import_

def peak_kib():
    # Not ru_maxrss: that of a new process begins with the peak of the one that started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

before_kib = peak_kib()
call = json.loads(sys.argv[1])
(export if "to" in call else import_)(**call, progress="off")
print((peak_kib() - before_kib) * 1024)
"""
LIMIT_BYTES = 256 << 20
TENSOR_BYTES = 96 << 20
COUNT = 8


def grown_bytes(call: dict[str, Any]) -> int:
    """Convert in a process of its own; return how much its memory grew beyond what the imports take."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(call)]
    done = run_to_end(command)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_conversion_takes_little_more_than_the_largest_tensor(
    kind: str, is_remote: bool, s3_url: FreshPrefix, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    state = {f"w{number}": torch.randn(TENSOR_BYTES // 4) for number in range(COUNT)}
    cloudckpt.save(state, tmp_path / "saved", progress="off")
    options = s3_url.storage_options if is_remote else None
    base = s3_url.url if is_remote else str(tmp_path)
    target = f"{base}/out" + {"safetensors": "/x.safetensors", "torch": "/x.pt"}.get(kind, "")
    source = f"{base}/out/x.safetensors.index.json" if is_remote and kind == "safetensors" else target
    export = {"url": str(tmp_path / "saved"), "target": target, "to": kind, "target_storage_options": options}
    import_ = {"source": source, "url": f"{base}/back", "source_storage_options": options, "storage_options": options}
    # What is put from a file's pages counts, although the kernel takes them back when it wants to.
    pages_bytes = COUNT * TENSOR_BYTES if is_remote and kind == "torch" else 0
    grown = grown_bytes(export), grown_bytes(import_)
    assert grown[0] < LIMIT_BYTES + TENSOR_BYTES + pages_bytes
    assert grown[1] < LIMIT_BYTES + TENSOR_BYTES
    for name in ("w0", f"w{COUNT - 1}"):
        found = cloudckpt.read(f"{base}/back", name, storage_options=options, progress="off")
        assert torch.equal(found[name], state[name])  # type: ignore[arg-type]
