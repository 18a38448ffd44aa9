"""Each program of `examples/` runs as one starts it from a shell, to its end, and leaves what it says that it saves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# All of them: one or the other is a way to save that benchmarks measure, too.
for framework in ("accelerate", "lightning", "megatron.core", "peft", "ray", "torch_checkpointing", "torchtitan"):
    pytest.importorskip(framework, reason="make integrations installs the frameworks")

from tests.programs import run_to_end  # noqa: E402

pytestmark = pytest.mark.timeout(900)

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SMALL = ("--steps", "10", "--save-every", "5", "--layers", "1", "--width", "32")
AMID = ("--steps", "80", "--save-every", "10", "--layers", "1", "--width", "32", "--batch-size", "32")
# What stands before the program and after it; and what it leaves, if that is no checkpoint.
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "demo.py": ((), ("--url", "root", *AMID, "--shard-mib", "0.02"), "demo-out/trajectories.png"),
    "fsdp_demo.py": ((), ("--url", "root", "--ranks", "2,2,2,1"), "demo-out/fsdp-record.json"),
    "train_fsdp.py": (TWO_RANKS, ("--url", "root", *SMALL), ""),
    "train_gpt.py": ((), ("root", *SMALL), ""),
    "integrations/accelerate_loop.py": (TWO_RANKS, ("--url", "root", "--fsdp", "--stateful"), ""),
    "integrations/hf_layout.py": (TWO_RANKS, ("--url", "root", "save"), "root/model.safetensors.index.json"),
    "integrations/hf_trainer.py": ((), ("--url", "root", "--lora"), ""),
    "integrations/megatron_loop.py": (TWO_RANKS, ("--url", "root"), ""),
    "integrations/peft_lora.py": ((), ("--url", "root"), ""),
    "integrations/ray_train.py": ((), ("--url", "root", "--steps", "5"), ""),
    "integrations/torch_checkpointing_loop.py": (TWO_RANKS, ("--url", "root"), ""),
    "integrations/torch_save.py": ((), ("--url", "root/last.pt"), "root/last.pt"),
    "integrations/torchtitan_loop.py": (TWO_RANKS, ("--url", "root"), ""),
    "integrations/train_lightning.py": ((), ("--url", "root", "--ranks", "2", "--shard"), ""),
}


def test_no_program_is_left_out() -> None:
    programs = [path for path in EXAMPLES.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert {path.relative_to(EXAMPLES).as_posix() for path in programs} == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_program_runs_to_its_end_and_leaves_what_it_saves(name: str, tmp_path: Path) -> None:
    before, after, left = COMMANDS[name]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("CLOUDCKPT_STORAGE_OPTIONS", None)
    after = tuple(str(tmp_path / one) if one.startswith("root") else one for one in after)
    ended = run_to_end([sys.executable, *before, EXAMPLES / name, *after], cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(tmp_path.glob(left or "root/**/manifest.json"))
