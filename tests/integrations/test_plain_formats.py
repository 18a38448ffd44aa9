"""The programs of the two formats that are no framework's: killed and started again, or on another number of ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raw_access import FreshPrefix

pytest.importorskip("transformers", minversion="5", reason="make integrations installs the frameworks")

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAMS = REPOSITORY / "examples" / "integrations"
LIMIT_S = 240.0


def environment(place: FreshPrefix) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "CLOUDCKPT_STORAGE_OPTIONS": json.dumps(place.storage_options),
        "HF_HUB_OFFLINE": "1",
    }


def output_of(command: list[str], place: FreshPrefix) -> str:
    ended = subprocess.run(
        command, env=environment(place), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def losses_in(text: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+) loss (\S+)$", text, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_of_torch_save_is_gone_on_from_after_each_kill(s3_url: FreshPrefix) -> None:
    program = [sys.executable, str(PROGRAMS / "torch_save.py"), "--steps", "30", "--url"]
    alone = losses_in(output_of([*program, f"{s3_url.url}/alone.pt"], s3_url))
    found: dict[int, str] = {}
    for stop in (4, 11, 23):
        with subprocess.Popen(
            [*program, f"{s3_url.url}/killed.pt"], env=environment(s3_url), stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                found |= losses_in(line)
                if stop in found:
                    break
            running.kill()
            found |= losses_in(running.stdout.read())
    found |= losses_in(output_of([*program, f"{s3_url.url}/killed.pt"], s3_url))
    assert found == alone
    assert len(alone) == 30


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_of_two_ranks_computes_the_same_on_one_and_on_two(s3_url: FreshPrefix) -> None:
    program = [str(PROGRAMS / "hf_layout.py"), "--url", f"{s3_url.url}/llama"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    saved = output_of([*ranks, "save"], s3_url).split()[-1]
    assert output_of([sys.executable, *program, "load"], s3_url).split()[-1] == saved
    assert output_of([*ranks, "load"], s3_url).split()[-1] == saved
