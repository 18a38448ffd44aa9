"""The record of the job in a manifest says where it ran, and starts no process to find out."""

from __future__ import annotations

import platform
import sys

from tests.programs import run_to_end

# In a process of its own, because the record and what `platform` finds are kept for the life of one.
WITHOUT_PROCESSES = """
import subprocess

def refuse(*arguments, **options):
    raise SystemExit("a process was started")

subprocess.Popen.__init__ = refuse
from cloudckpt.saving.environment import environment
print(environment("file:///root", "local")["platform"])
"""


def test_the_record_names_system_and_machine_without_starting_a_process() -> None:
    done = run_to_end([sys.executable, "-c", WITHOUT_PROCESSES])

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{platform.system()}-{platform.release()}-{platform.machine()}")
