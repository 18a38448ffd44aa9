"""Pages and docstrings tell the truth: their snippets run, and the commands, options, files and attributes named exist.

The blocks of a page run in their order, in one namespace and one empty directory. What a page cannot show whole stands
in `PREAMBLE` and `FILLED_IN`; `s3://` and `gs://` reach servers on loopback by the environment, and nothing else is
replaced. What is not run stands in `NOT_RUN`. A block with a title is a file, which the commands of any page may run.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import dropwhile, pairwise
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

import cloudckpt
from cloudckpt.cli import app
from cloudckpt.errors import CreateNotEnforcedError
from cloudckpt.store import open_store, probe_create
from servers import GcsServer, S3Server

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("README.md", "ARCHITECTURE.md", "SECURITY.md", "docs/*.md", "*/README.md", "cloudckpt/format/FORMAT.md")
PAGES = sorted({str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern)})

PREAMBLE = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from cloudckpt import AccumulationWindow, CheckpointManager, KeepBest, KeepLast, ResumableSampler

def train_step(*_):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    return loss.detach()

model = nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
dataset, batches = TensorDataset(torch.randn(256, 4)), torch.randn(8, 2, 4)
sampler = ResumableSampler(dataset)
state = {"model": model, "optimizer": optimizer}
state_dict = {"weight": torch.ones(3)}
total = 502
"""
# The same for docstrings, which are shorter.
MORE = """
from pathlib import Path
import torch.distributed.checkpoint as dcp
import cloudckpt
from cloudckpt import *

def loss(batch):
    return model(batch).square().mean()

class Stream:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

stream, train, data_epochs = Stream(), train_step, 2
manager = CheckpointManager("./root")
if __name__ == "CloudReader":  # its checkpoint
    cloudckpt.save(state_dict, "s3://bucket/run-7/step-0000012000-e0003")
"""
# What a page leaves to the reader → the name of what fills it in here.
FILLED_IN = {"…as printed…": "secret", "http://127.0.0.1:S3_PORT": "s3", "http://127.0.0.1:GCS_PORT": "gs"}

# Page, and how a block of `text` or what looks like a command begins → what it is, since it is not run.
NOT_RUN = {
    ("README.md", "----- process 3"): "printed by the demo, which tests/examples runs",
    ("ARCHITECTURE.md", "cli/"): "the tree",
    ("ARCHITECTURE.md", "save:"): "the way of one tensor",
    ("SECURITY.md", '{\n  "Version"'): "policies of a bucket, for which no server is here",
    ("cloudckpt/format/FORMAT.md", "<root>/epochs/"): "keys",
    ("cloudckpt/format/FORMAT.md", "cloudckpt index"): "the first bytes of an index",
    ("README.md", "cloudckpt: nothing is committed"): "printed by Progress, whose words tests/report holds",
    ("docs/report.md", '{"storage_gib_month"'): "prices, which tests/page reads from there",
    ("docs/scale.md", " s  served"): "a histogram, by tests/store/test_throttling",
    ("README.md", "saves     block"): "printed by str(Advice), whose words tests/report holds",
    ("README.md", "torchrun --nproc-per-node 8 train.py"): "a program of the reader's",
    ("docs/first-save.md", "cloudckpt: nothing is committed"): "as on the page README.md",
    ("docs/first-save.md", "cloudckpt probe"): "as on the page README.md",
    ("docs/kubernetes.md", "cloudckpt ls"): "the cluster's own run",
    ("docs/commands.md", "cloudckpt latest"): "waits for a job",
    ("docs/ranks.md", "import os"): "run by torchrun, in tests/test_site.py",
}
# By tests/test_site.py.
HELD_ELSEWHERE = ("yaml", "console")
# Of programs that are not ours only the name is looked at.
FOREIGN = {"[", "echo", "exit", "srun", "truncate"}
# What a page names that is not in the repository → why.
NOT_IN_THE_TREE = {
    ".servers/": "made by `make servers-up`",
    "./dir": "any directory",
    "epochs/": "a key",
    "epochs/N.json": "a key",
    "epochs/NNNNNNNNNN.json": "a key",
    "pins/": "a key",
    "site/": "made by `make docs`",
    "site/index.html": "made by `make docs`",
    "step-SSSSSSSSSS-eEEEE/": "a key",
    "autoscaling/target-lifecycle-state": "asked of EC2",
    "instance/maintenance-event": "asked of Compute Engine",
    "instance/preempted": "asked of Compute Engine",
    "spot/instance-action": "asked of EC2",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it begins, what it is in, which file it is if it is one, what stands in it."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, without comments; a line that ends with a backslash goes on in the next."""
        joined = self.text.replace("\\\n", " ").splitlines() if self.language in ("bash", "console") else []
        typed = joined if self.language == "bash" else [line[2:] for line in joined if line.startswith("$ ")]
        return [command for line in typed if (command := shlex.join(_words(line)))]


def _words(line: str) -> list[str]:
    """Return the words of a command, without the variables that are set before it."""
    return list(dropwhile(lambda word: re.match(r"[A-Za-z_]+=", word) is not None, shlex.split(line, comments=True)))


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    text = text_of(page)
    found = re.finditer(r'^```(\w*)(?: title="(.*)")?\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    return tuple(Block(page, text.count("\n", 0, one.start()) + 2, one[1], one[2] or "", one[3]) for one in found)


@cache
def prose_of(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def quoted_in(page: str) -> list[str]:
    """Return what stands between backticks in the prose of a page, on one line."""
    return [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", prose_of(page))]


def is_listed(page: str, text: str) -> bool:
    """Tell whether something of a page is not run, for a reason."""
    return any(page == listed and text.startswith(begin) for listed, begin in NOT_RUN)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
TITLES = {block.title for block in BLOCKS if block.title}
PROGRAMS = ("python", "make", "torchrun", "docker", "pip", ".venv/bin/python", "cloudckpt")
COMMANDS = sorted(
    {(block.page, command) for block in BLOCKS for command in block.commands}
    | {(page, one) for page in PAGES for one in quoted_in(page) if one.split()[0] in PROGRAMS and " " in one}
)
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXPLAINED = [name for name in cloudckpt.__all__ if SNIPPET.search(inspect.getdoc(getattr(cloudckpt, name)) or "")]
RUNNABLE = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


def test_a_block_that_is_not_run_is_listed_with_a_reason_and_no_other() -> None:
    unknown = [block.place for block in BLOCKS if block.language not in ("python", "bash", "text", *HELD_ELSEWHERE)]
    assert unknown == [], "say the language of a block: python, bash or text"
    texts = [(block.page, block.text) for block in BLOCKS if block.language == "text"]
    assert [text for text in texts if not is_listed(*text)] == []
    others = [(block.page, block.text) for block in BLOCKS if block.language == "python"]
    found = [*texts, *others, *COMMANDS]
    used = {one for one in NOT_RUN for page, text in found if one[0] == page and text.startswith(one[1])}
    assert used == set(NOT_RUN)


# -- snippets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled_in(
    seaweedfs_server: S3Server, fake_gcs_server: GcsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, str]:
    """Point the environment at servers with empty buckets, as a person would at the cloud."""
    for server in (seaweedfs_server, fake_gcs_server):
        for bucket in ("bucket", "cloudckpt"):
            if bucket not in server.buckets():
                server.make_bucket(bucket)
            for url in server.raw_list(f"{server.scheme}://{bucket}/"):
                server.raw_delete(url)
    s3 = {name: str(value) for name, value in seaweedfs_server.storage_options.items()}
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake_gcs_server.endpoint_url)
    monkeypatch.chdir(tmp_path)
    for url in ("s3://bucket", "s3://cloudckpt"):
        prove_create(url)
    return {"secret": s3["secret"], "s3": s3["endpoint_url"], "gs": fake_gcs_server.endpoint_url}


def prove_create(url: str) -> None:
    """Let this process know that creates are exclusive there, before a snippet asks.

    SeaweedFS's lock of a key ends by its clock: on a machine that stands still for seconds two of eight get in.
    """
    for patience in reversed(range(3)):
        try:
            with open_store(url) as store:
                return probe_create(store)
        except CreateNotEnforcedError:
            if not patience:
                raise
    return None


@pytest.mark.parametrize("name", EXPLAINED)
def test_the_snippet_of_a_docstring_runs(name: str, filled_in: dict[str, str]) -> None:
    names: dict[str, object] = {"__name__": name}
    exec(PREAMBLE + MORE, names)
    for text in SNIPPET.findall(inspect.getdoc(getattr(cloudckpt, name)) or ""):
        exec(compile(text, name, "exec"), names)


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_snippets_of_a_page_run_in_their_order(page: str, filled_in: dict[str, str]) -> None:
    names: dict[str, object] = {"__name__": page}
    exec(PREAMBLE, names)
    for block in blocks_of(page):
        if block.language == "python" and not is_listed(page, block.text):
            text = block.text
            for blank, name in FILLED_IN.items():
                text = text.replace(blank, filled_in[name])
            exec(compile("\n" * (block.line - 1) + text, block.page, "exec"), names)
        for command in block.commands if block.language == "bash" else ():
            program, *arguments = shlex.split(command)
            if program == "cloudckpt" and not is_listed(page, command):
                answer = CliRunner().invoke(app, arguments)
                assert (answer.exit_code, answer.stderr) == (0, ""), f"{block.place}: {command}"


def test_what_is_filled_in_stands_on_a_page() -> None:
    python = "".join(block.text for block in BLOCKS if block.language == "python")
    assert [blank for blank in FILLED_IN if blank not in python] == []


# -- commands ----------------------------------------------------------------------------------------------------------


@cache
def help_of(script: str) -> str:
    """Return what a script of ours says of its options; in this process, which has imported what it imports."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [script, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    return said.getvalue()


def check_options(words: list[str], known: str) -> None:
    for word, value in pairwise([*words, ""]):
        if word.startswith("--"):
            option, _, given = word.partition("=")
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"there is no {option}"
            if option in ("--peers", "--parts", "--targets"):
                names = (given or value).split(",")
                assert [name for name in names if not re.search(rf"(?<![\w-]){name}(?![\w-])", known)] == []


def check_python(words: list[str]) -> None:
    script, *rest = words
    if script == "-m":
        assert find_spec(rest[0]) is not None
    elif script not in TITLES:
        assert (ROOT / script).is_file()
        check_options(rest, help_of(script))


def check_torchrun(words: list[str]) -> None:
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    check_options(words[:place], get_args_parser().format_help())
    check_python(words[place:])


def check_make(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    subprocess.run(["make", "-n", *targets], check=True, capture_output=True, cwd=ROOT)


def check_docker(words: list[str]) -> None:
    assert words[:2] == ["compose", "-f"]
    services = (ROOT / words[2]).read_text(encoding="utf-8")
    start = words.index("up") + 1
    wanted = [word for word in words[start:] if not word.startswith("-")]
    assert [service for service in wanted if f"\n  {service}:\n" not in services] == []


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words.pop(0) == "install"
    (wanted,) = [word for word in words if not word.startswith("-")]
    name, extras = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", wanted).groups()
    assert name in (".", project["name"])
    assert set((extras or "").split(",")) - {""} <= set(project["optional-dependencies"])


def check_cloudckpt(words: list[str]) -> None:
    answer = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "200"})
    assert answer.exit_code == 0
    check_options(words[1:], answer.output)


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    ".venv/bin/python": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "docker": check_docker,
    "pip": check_pip,
    "cloudckpt": check_cloudckpt,
}


@pytest.mark.parametrize(("page", "command"), [one for one in COMMANDS if not is_listed(*one)])
def test_a_command_of_a_page_and_its_options_exist(page: str, command: str) -> None:
    program, *words = shlex.split(command)
    if program not in FOREIGN:
        CHECKS[program](words)


# -- names -------------------------------------------------------------------------------------------------------------


def is_there(page: str, path: str) -> bool:
    return any(list(base.glob(path.rstrip("/"))) for base in (ROOT, (ROOT / page).parent))


def test_a_file_that_a_page_names_is_there() -> None:
    absent = {
        (page, one)
        for page in PAGES
        for one in quoted_in(page)
        if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)*/?", one)
        and ("/" in one or re.search(r"\.(py|md|toml|yaml)$", one))
        # What make builds may be there, and need not.
        and (one in NOT_IN_THE_TREE or not is_there(page, one))
        and one not in TITLES
    }
    assert sorted(one for one in absent if one[1] not in NOT_IN_THE_TREE) == []
    assert {one for _, one in absent} == set(NOT_IN_THE_TREE)


def slugs_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_file_or_a_heading_leads_there(page: str) -> None:
    for target, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text_of(page)):
        if not target.startswith(("http://", "https://")):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), target
            assert not heading or heading in slugs_of(path), f"{target}#{heading}"


@pytest.mark.parametrize("page", PAGES)
def test_an_attribute_that_a_page_names_exists(page: str) -> None:
    owners: dict[str, object] = {name: getattr(cloudckpt, name) for name in cloudckpt.__all__}
    owners |= {"manager": cloudckpt.CheckpointManager, "Options": cloudckpt.Options()}
    found = [one.groups() for text in quoted_in(page) for one in re.finditer(r"\b(\w+)\.([a-z]\w+)", text)]
    assert [f"{owner}.{name}" for owner, name in found if owner in owners and not hasattr(owners[owner], name)] == []
