"""What reads whole checkpoints holds less than 256 MiB, and a copy what it may, however large they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from servers import FreshPrefix

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from pathlib import Path
import cloudckpt.copying


def high_bytes():
    # Not ru_maxrss: that of a new process begins with the peak of the one that started it.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


name, given, named, small, options = json.loads(sys.argv[1])
# Imports, connections and thread pools are not what is measured.
cloudckpt.copying.verify(small, deep=True, storage_options=options, progress="off")
Path("/proc/self/clear_refs").write_text("5")
before = high_bytes()
getattr(cloudckpt.copying, name)(*given, **named, progress="off")
print(high_bytes() - before)
"""
LIMIT_BYTES = 256 << 20
# In flight: what a process has besides comes on top.
BUDGET = {"memory_budget_bytes": 200 << 20}


def grown_bytes(small: tuple[str, object], name: str, *given: str, **named: Any) -> int:
    command = [sys.executable, "-c", PROGRAM, json.dumps([name, given, named, *small])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_copy_a_look_and_a_comparison_hold_little(is_remote: bool, s3_url: FreshPrefix, tmp_path: Path) -> None:
    state = {f"w{number}": torch.randn(24 << 20) for number in range(4)}
    cloudckpt.save(state, tmp_path / "a", progress="off")
    options = s3_url.storage_options if is_remote else None
    base = s3_url.url if is_remote else str(tmp_path)
    other, back = f"{base}/b", str(tmp_path / "back")
    small = (f"{base}/small", options)
    cloudckpt.save({"w": torch.ones(1 << 20)}, small[0], storage_options=options, progress="off")
    to, back_from = {"target_storage_options": options}, {"storage_options": options}
    assert grown_bytes(small, "copy", str(tmp_path / "a"), other, **to, options=BUDGET) < LIMIT_BYTES
    assert grown_bytes(small, "copy", other, back, **back_from, options=BUDGET) < LIMIT_BYTES
    assert grown_bytes(small, "verify", other, deep=True, storage_options=options) < LIMIT_BYTES
    changed = {name: tensor + 1 for name, tensor in state.items()}
    cloudckpt.save(changed, tmp_path / "c", progress="off")
    cloudckpt.save(changed, tmp_path / "d", options={"shard_bytes": 16 << 20}, progress="off")
    for second in ("c", "d"):
        grown = grown_bytes(small, "diff", other, str(tmp_path / second), storage_options=options)
        assert grown < LIMIT_BYTES, second
