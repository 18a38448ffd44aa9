"""Turn a fixed list of commands into `session.md`: what each of them printed, against real servers on loopback.

    first-save.md ──▶ train.py ─┐
    STEPS ──────────────────────┴──▶ a shell, with SeaweedFS as s3:// and fake-gcs-server as gs:// ──▶ session.md

Run it anew when a command prints something else: `python docs/session.py`. What differs from run to run (times, rates,
random names) is printed as `…`, so that two runs differ in nothing, or in blanks; a test holds the page to that. To
add a command, add a step.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "session.md"
sys.path.insert(0, str(ROOT / "localstack"))

from servers import GcsServer, S3Server, fake_gcs, seaweedfs  # noqa: E402 (its folder is put on the path above)


@dataclass(frozen=True, slots=True)
class Step:
    """What is typed, why, and with which status it ends; `cloudckpt` and `python` are this interpreter's."""

    why: str
    commands: Sequence[str]
    status: int = 0


_RUN = "s3://bucket/run-7"
# Heading → steps. The bucket is called `bucket` at both servers, and is empty.
STEPS: Mapping[str, Sequence[Step]] = {
    "Train, and train on": (
        Step(
            "The program is that of [First save](first-save.md). It trains 250 steps, and is then asked for 500:",
            (
                "RUN_URL=s3://bucket/run-7 STEPS=250 python train.py",
                "RUN_URL=s3://bucket/run-7 STEPS=500 python train.py",
            ),
        ),
    ),
    "Look": (
        Step(
            "What is committed there, and which rule keeps it:", ("cloudckpt ls s3://bucket/run-7 --utc --keep-last 2",)
        ),
        Step("For a program:", ("cloudckpt ls s3://bucket/run-7 --json --limit 1",)),
        Step("What is in the newest:", ("cloudckpt show s3://bucket/run-7 --utc --depth 1",)),
        Step("One tensor, read and looked through:", ("cloudckpt show s3://bucket/run-7 --tensor model.0.weight",)),
        Step("The newest, for a script:", ("cloudckpt latest s3://bucket/run-7",)),
        Step("A page about the run, to be opened in a browser:", ("cloudckpt report s3://bucket/run-7 -o run-7.html",)),
        Step("The best by a metric:", ("cloudckpt latest s3://bucket/run-7 --best loss",)),
    ),
    "Check, compare, copy": (
        Step("Every byte compared with its digest:", ("cloudckpt verify s3://bucket/run-7 --deep",)),
        Step(
            "What changed between two steps; status 3 says that something did:",
            (f"cloudckpt diff {_RUN}/step-0000000400-e0002 {_RUN}/step-0000000499-e0002 --limit 3",),
            3,
        ),
        Step(
            "The whole root into the other store, twice: what is there is not sent again.",
            (
                "cloudckpt cp s3://bucket/run-7 gs://bucket/run-7 --all",
                "cloudckpt cp s3://bucket/run-7 gs://bucket/run-7 --all",
            ),
        ),
        Step("A copy on a disk:", ("cloudckpt cp s3://bucket/run-7 ./copy --all",)),
        Step(
            "Which is then damaged: a shard of the newest is cut short.",
            ("truncate --size 1000 copy/step-0000000499-e0002/*/*.safetensors",),
        ),
        Step("", ("cloudckpt verify ./copy",), 3),
    ),
    "Convert": (
        Step(
            "The model alone, for another program; then the whole state, into the other store and back:",
            (
                "cloudckpt export s3://bucket/run-7 ./model.safetensors --to safetensors --prefix model.",
                "cloudckpt export s3://bucket/run-7 gs://bucket/state.pt --to torch",
                "cloudckpt import gs://bucket/state.pt gs://bucket/imported",
                "cloudckpt ls gs://bucket/imported --utc",
            ),
        ),
    ),
    "Keep and remove": (
        Step(
            "A pin keeps a checkpoint, whatever rules say. What a pass would remove, and then the pass:",
            (
                'cloudckpt pin s3://bucket/run-7 300 --note "reported in the paper"',
                "cloudckpt prune s3://bucket/run-7 --keep-last 1 --dry-run",
                "cloudckpt prune s3://bucket/run-7 --keep-last 1 --grace 0 --yes",
            ),
        ),
        Step("What is pinned is not removed by hand either:", ("cloudckpt rm s3://bucket/run-7 300 --yes",), 1),
        Step(
            "Unless it is unpinned first:",
            (
                "cloudckpt unpin s3://bucket/run-7 300",
                "cloudckpt rm s3://bucket/run-7 300 --grace 0 --yes",
                "cloudckpt ls s3://bucket/run-7 --utc",
                "cloudckpt sweep s3://bucket/run-7 --older-than 1s --yes",
            ),
        ),
    ),
    "Qualify a store": (
        Step("Whether a root may stand there:", ("cloudckpt probe gs://bucket/run-7 --size 8 --rounds 3",)),
    ),
    "When something is wrong": (
        Step("One line that says what to do, and a status:", ("cloudckpt ls s3://bucket/run-8",), 1),
        Step("", ("cloudckpt latest s3://bukket/run-7",), 1),
        Step("", ("cloudckpt export s3://bucket/run-7 ./all.safetensors --to safetensors",), 1),
    ),
}

_INTRODUCTION = """# A session

Real commands and what they printed, on SeaweedFS as `s3://` and fake-gcs-server as `gs://`, both on loopback. Made by
`python docs/session.py`. `…` stands for what differs from run to run: times, rates, random names, versions.
"""

# What differs from run to run: the last group of each, else all of it.
_DIFFERING = [
    re.compile(pattern)
    for pattern in (
        r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|\+00:00)?",  # a time
        r"\b(?:[0-9a-f]{16}|[0-9a-f]{32,64})\b",  # a digest, an attempt
        r"\b\d+(?:\.\d+)? (?:B|KiB|MiB|GiB)/s",  # a rate
        r"\b\d+(?:\.\d+)? (?:ms|s|min|h)\b(?: \d+ (?:s|min)\b)?",  # how long
        r'"(?:age_s|loss|created_at|digest|attempt)": ("[^"]*"|[0-9.e-]+)',
        r'"object_count": \d+, "total_bytes": (\d+)',  # an index is compressed, and names what differs
        r"\bloss +(\d\S*)",
        # what is said of the job that saved, and what a tensor holds
        r"^(?:attempt|package\.\w+|python|platform|machine|device|data_path|minimum|maximum|mean|std) +(\S.*)$",
    )
]


def session() -> str:
    """Run all of it; return the page.

    Raises:
        RuntimeError: a command ended with another status than was meant.
    """
    with tempfile.TemporaryDirectory(prefix="cloudckpt-session-") as directory:
        place = Path(directory)
        (place / "s3").mkdir()
        (place / "gs").mkdir()
        with seaweedfs(place / "s3") as s3, fake_gcs(place / "gs") as gs:
            for server in (s3, gs):
                server.make_bucket("bucket")
            work = place / "work"
            work.mkdir()
            (work / "train.py").write_text(program(), encoding="utf-8")
            environment = _environment(place, s3, gs)
            parts = [_INTRODUCTION]
            for heading, steps in STEPS.items():
                parts.append(f"## {heading}\n")
                parts += [_told(step, work, environment) for step in steps]
    return "\n".join(parts)


def program() -> str:
    """Return the program of the first page."""
    text = (ROOT / "docs" / "first-save.md").read_text(encoding="utf-8")
    found = re.search(r'^```python title="train.py"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise RuntimeError("docs/first-save.md has no block with the title train.py")
    return found[1]


def _environment(place: Path, s3: S3Server, gs: GcsServer) -> dict[str, str]:
    options = {name: str(value) for name, value in s3.storage_options.items()}
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "GOOGLE_", "CLOUDCKPT_"))}
    paths = [str(ROOT), *filter(None, [ours.get("PYTHONPATH")])]
    return {
        **ours,
        "AWS_ENDPOINT_URL": options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "STORAGE_EMULATOR_HOST": gs.endpoint_url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_PROXY": "127.0.0.1,localhost",
        "XDG_CACHE_HOME": str(place / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "TZ": "UTC",
    }


def _told(step: Step, work: Path, environment: Mapping[str, str]) -> str:
    lines = [_run(command, step.status, work, environment) for command in step.commands]
    return "\n".join([*([step.why, ""] if step.why else []), "```console", *lines, "```", ""])


def _run(command: str, status: int, work: Path, environment: Mapping[str, str]) -> str:
    """Run one command in a shell, its two outputs in one; return it as it looks on a terminal."""
    python = f'"{sys.executable}"'
    typed = re.sub(r"(^| )cloudckpt ", rf"\1{python} -m cloudckpt ", re.sub(r"(^| )python ", rf"\1{python} ", command))
    done = subprocess.run(
        ["sh", "-c", typed],
        cwd=work,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode != status:
        raise RuntimeError(f"`{command}` ended with {done.returncode}, not {status}:\n{done.stdout}")
    ended = [f"$ echo $?\n{status}"] if status else []
    return "\n".join(
        [f"$ {command}", *([text] if (text := steady(done.stdout.replace(str(work), "…")).rstrip()) else []), *ended]
    )


def steady(text: str) -> str:
    """Return what was printed with `…` in place of what differs; in a table as wide as that was."""
    return "\n".join(_steady_line(line) for line in text.splitlines())


def _steady_line(line: str) -> str:
    for pattern in _DIFFERING:
        line = pattern.sub(_blank, line)
    return line.rstrip()


def _blank(found: re.Match[str]) -> str:
    start, stop = found.span(found.re.groups)
    # What stands before more than one blank is a cell, and has a neighbour.
    width = stop - start if found.string[stop:].startswith("  ") else 0
    return found.string[found.start() : start] + "…".ljust(width) + found.string[stop : found.end()]


def same(one: str, other: str) -> bool:
    """Tell whether two pages differ in nothing but blanks: columns are as wide as what stands in them."""
    return " ".join(one.split()) == " ".join(other.split())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page, unless it says so already."""
    argparse.ArgumentParser(description="Run the session, and write docs/session.md.").parse_args(arguments)
    page = session()
    if PAGE.exists() and same(page, PAGE.read_text(encoding="utf-8")):
        print("docs/session.md is as it should be")
    else:
        PAGE.write_text(page, encoding="utf-8")
        print("docs/session.md is written")


if __name__ == "__main__":
    main()
