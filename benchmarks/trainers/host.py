"""Turn tasks of one framework into runs, each in a fresh process that is forked behind the framework's imports.

    stdin: one task and its environment a line ──▶ fork ──▶ the framework trains or resumes ──▶ found.json in its folder
    stdout: a line with the process's id, and one when it has ended

What a framework imports takes seconds and is the same for all of its ways to save, so that it is imported once; no
thread runs and no connection is open when a process is forked.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.trainers.family import end_family

__all__ = ["main"]


def main(framework: str) -> None:
    """Serve tasks until stdin ends."""
    try:
        module = import_module(f"benchmarks.trainers.on_{framework}")
    except Exception as error:  # noqa: BLE001 (whatever a package fails with at import is the row's text)
        _say(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        return
    _say(
        ways={name: {"title": way.title, "line": way.line, "rest_s": way.rest_s} for name, way in module.WAYS.items()},
        packages=module.PACKAGES,
    )
    from benchmarks.trainers.meter import Task

    for line in sys.stdin:
        given = json.loads(line)
        pid = os.fork()
        if not pid:
            _run(module, Task(**given["task"]), given["environment"], given["scratch"])
        _say(pid=pid)
        _, status = os.waitpid(pid, 0)
        _say(status=os.waitstatus_to_exitcode(status))


def _say(**words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _run(module: Any, task: Any, environment: dict[str, str], scratch: str) -> None:
    """Be the process of one task, to its end."""
    from benchmarks.trainers.meter import Meter, ResumedError

    status = 1
    try:
        os.setsid()
        os.chdir(scratch)
        os.environ.update(environment)
        tempfile.tempdir = None
        log = os.open(Path(task.folder, "log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number, target in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(number, target)
        warnings.simplefilter("ignore")
        meter = Meter(task)
        try:
            module.WAYS[task.way].run(task, meter)
            status = 0
        except ResumedError:
            status = 0
        except BaseException as error:  # noqa: BLE001 (the process ends here; it is told)
            traceback.print_exc()
            meter.failed(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        end_family(os.getpid(), spare_first=True)  # helpers that a framework leaves
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1])
