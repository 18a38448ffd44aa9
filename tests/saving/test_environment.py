"""The record of the job in a manifest says where it ran, and starts no process to find out."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest

from cloudckpt.saving.environment import environment
from tests.programs import run_forked

# In a process of its own, because the record and what `platform` finds are kept for the life of one.
WITHOUT_PROCESSES = """
import platform, subprocess

platform._uname_cache = None
platform._platform_cache.clear()

def refuse(*arguments, **options):
    raise SystemExit("a process was started")

subprocess.Popen.__init__ = refuse
from cloudckpt.saving.environment import environment
print(environment("file:///root", "local")["platform"])
"""


def test_the_record_names_system_and_machine_without_starting_a_process() -> None:
    done = run_forked("-c", WITHOUT_PROCESSES)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{platform.system()}-{platform.release()}-{platform.machine()}")


def test_what_is_alike_for_all_roots_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = environment("file:///one", "local")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: pytest.fail(f"{name} was looked up again"))
    assert environment("s3://bucket/two", "obstore") == {**first, "root": "s3://bucket/two", "data_path": "obstore"}
