"""The site tells what the code does: what its hook puts in, manifests for clusters, the table of errors, links."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import cloudckpt
from cloudckpt.cli import app
from cloudckpt.preemption import EXIT_PREEMPTED
from docs import hooks, session
from tests.programs import run_to_end

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
PUBLIC = {name: getattr(cloudckpt, name) for name in cloudckpt.__all__}
ERRORS = [name for name, value in PUBLIC.items() if isinstance(value, type) and issubclass(value, Exception)]
COMMANDS = [str(one.name) for one in app.registered_commands]


@cache
def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@cache
def shown(page: str) -> str:
    return hooks.completed(text_of(page), page)


# -- what is put in ----------------------------------------------------------------------------------------------------


def test_each_public_name_stands_once_in_the_reference_and_no_other() -> None:
    named = re.findall(r"^::: cloudckpt\.(\w+)$", shown("api.md"), re.MULTILINE)
    assert sorted(named) == sorted(cloudckpt.__all__)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_told_with_each_of_its_options(name: str) -> None:
    section = shown("commands.md").split(f"\n### {name}\n")[1].split("\n### ")[0]
    shared = shown("commands.md").split("\n### Options of all")[1]
    answer = help_of(name)
    assert [
        one for one in re.findall(r"(?<![\w-])--[a-z][a-z-]+", answer) if one not in section + shared + "--help"
    ] == []


def help_of(name: str) -> str:
    answer = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400", "TERM": "dumb"})
    assert answer.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", answer.output)


def test_a_file_of_the_repository_is_shown_whole_and_its_links_lead_into_the_site() -> None:
    for page, source in hooks.SHOWN.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        plain = re.compile(r"\]\([^)]*\)")
        assert plain.sub("]()", shown(page)) == plain.sub("]()", text)


@pytest.mark.parametrize("page", PAGES)
def test_a_link_of_the_site_leads_to_a_page_of_it(page: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", shown(page))
    meant = [os.path.normpath(Path(page).parent / link) for link in links]
    assert [link for link in meant if link not in PAGES and not (DOCS / link).is_file()] == []
    assert [link for link in meant if link.startswith("..")] == []


def test_the_navigation_names_each_page_once() -> None:
    tagged = re.sub(r"!!python/\S+ \{.*\}", "''", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = list(pages_in(yaml.safe_load(tagged)["nav"]))
    assert sorted(named) == PAGES


def pages_in(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_in(part)


@pytest.mark.parametrize("page", PAGES)
def test_a_list_begins_after_a_blank_line(page: str) -> None:
    # Markdown for the site takes it for a part of the paragraph otherwise.
    prose = re.sub(r"^```.*?^```$", "", shown(page), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?! *[-*\d|]| *$)(?! {2,})(.+)\n(?:[-*] |1\. )", prose, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES)
def test_a_variable_that_a_page_names_is_read_by_the_code(page: str) -> None:
    read = set(re.findall(r"\bCLOUDCKPT_[A-Z_]+\b", "".join(texts_of_the_code())))
    assert set(re.findall(r"\bCLOUDCKPT_[A-Z_]+\b", text_of(page))) <= read


# -- manifests for clusters --------------------------------------------------------------------------------------------

MANIFESTS = [
    one
    for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```$", text_of("kubernetes.md"), re.MULTILINE | re.DOTALL)
    for one in yaml.safe_load_all(block)
]
JOBS = [one for one in MANIFESTS if one["kind"] == "Job"]


def pod_of(job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container, {one["name"]: one["value"] for one in container["env"]}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_tells_cloudckpt_the_grace_time_that_its_pod_has(job: dict[str, Any]) -> None:
    pod, container, variables = pod_of(job)
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert float(variables["CLOUDCKPT_GRACE_S"]) == pod["terminationGracePeriodSeconds"] - float(hook[1])


@pytest.mark.parametrize("job", JOBS)
def test_a_job_runs_a_program_of_the_pages_and_sets_what_it_reads(job: dict[str, Any]) -> None:
    _, container, variables = pod_of(job)
    programs = {
        title: text
        for page in PAGES
        for title, text in re.findall(r'^```python title="(.*)"\n(.*?)^```$', text_of(page), re.MULTILINE | re.DOTALL)
    }
    program = programs[container["command"][-1]]
    assert [name for name in variables if name not in program and name != "CLOUDCKPT_GRACE_S"] == []


@pytest.mark.parametrize("job", JOBS)
def test_a_job_can_be_begun_again_and_tells_a_preemption_from_a_fault(job: dict[str, Any]) -> None:
    pod, _, _ = pod_of(job)
    rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
    # A policy is allowed for pods alone that are not started anew in their place.
    assert pod["restartPolicy"] == "Never"
    codes = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert all(values == [EXIT_PREEMPTED] for values in codes)
    assert job["spec"]["backoffLimit"] > 6


def test_the_service_of_ranks_is_the_one_that_their_job_meets_at() -> None:
    (service,) = [one for one in MANIFESTS if one["kind"] == "Service"]
    (job,) = [one for one in JOBS if one["spec"].get("completionMode") == "Indexed"]
    pod, container, _ = pod_of(job)
    name, domain = job["metadata"]["name"], service["metadata"]["name"]
    assert (service["spec"]["selector"], pod["subdomain"]) == ({"job-name": name}, domain)
    assert f"--rdzv-endpoint={name}-0.{domain}:29400" in container["command"]
    assert f"--nnodes={job['spec']['completions']}" in container["command"]


# -- errors ------------------------------------------------------------------------------------------------------------


@cache
def texts_of_the_code() -> tuple[str, ...]:
    """Return each text of the package, with a NUL for what is put in."""
    found = []
    for path in (ROOT / "cloudckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(one.value) if isinstance(one, ast.Constant) else "\0" for one in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(" ".join(one.split()) for one in found)


def test_each_error_has_a_section_and_no_other() -> None:
    named = re.findall(r"^### (\w+)$", text_of("troubleshooting.md"), re.MULTILINE)
    assert sorted(named) == sorted(ERRORS)


@pytest.mark.parametrize("row", re.findall(r"^\| `([^`]+)` \|", text_of("troubleshooting.md"), re.MULTILINE))
def test_what_an_error_is_said_to_say_stands_in_the_code(row: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in row.split("…") if piece.strip(" ;:,()")]
    wanted = re.compile(".*".join(pieces))
    assert any(wanted.search(text) for text in texts_of_the_code())


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_what_differs_from_run_to_run_is_left_out_of_the_session() -> None:
    line = "cloudckpt: saved step 100 to s3://bucket/run-7/step-0000000100-e0001: 219.7 KiB in 0.09 s (2.4 MiB/s)"
    assert session.steady(line).endswith("219.7 KiB in … (…)")
    assert session.steady(" 300      2  1 min 3 s  2026-11-30 10:00:00  219.7 KiB  loss 0.0123").split()[2:] == [
        *["…", "…", "219.7", "KiB", "loss", "…"]
    ]


@pytest.mark.slow
def test_each_command_is_in_the_session_and_beside_other_tools() -> None:
    typed = "\n".join(command for steps in session.STEPS.values() for step in steps for command in step.commands)
    assert [name for name in COMMANDS if f"cloudckpt {name} " not in typed] == []
    assert sorted(re.findall(r"^\| `(\w+)` ", text_of("comparison.md"), re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_session_is_what_the_commands_print() -> None:
    assert session.same(session.session(), text_of("session.md")), "run python docs/session.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [2])
def test_the_program_of_many_ranks_runs_and_resumes(ranks: int, tmp_path: Path) -> None:
    found = re.search(r'^```python title="train_ranks.py"\n(.*?)^```$', text_of("ranks.md"), re.MULTILINE | re.DOTALL)
    assert found is not None
    (tmp_path / "train_ranks.py").write_text(found[1], encoding="utf-8")
    said = ""
    for steps, count in ((30, ranks), (50, 1)):
        command = [sys.executable, "-m", "torch.distributed.run", f"--master-port={free_port()}"]
        command += [f"--nproc-per-node={count}", "train_ranks.py"]
        environment = {**os.environ, "STEPS": str(steps), "PYTHONPATH": str(ROOT)}
        done = run_to_end(command, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        said += done.stderr
    assert "saved step 20" in said
    assert "restored step 20" in said
    assert "saved step 40" in said


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra `docs`: make docs")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = run_to_end(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES} <= pages
    assert 'src="https://' not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "site")
