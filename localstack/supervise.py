"""Become a server, and leave a watcher behind that ends it when the process that asked for it is gone.

Usage: `python supervise.py COMMAND [ARGUMENT...]` with standard input connected to a pipe that only the
owner holds. The pipe closes with its owner, however the owner died, and the watcher then kills the whole
process group; so a test run that was killed leaves no server behind. The process itself turns into COMMAND,
so its id is the server's own. Run it as the leader of a process group of its own.
"""

from __future__ import annotations

import os
import signal
import sys


def _watch(owner_pipe: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(owner_pipe, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Fork the watcher and turn into the command."""
    if os.getpgrp() != os.getpid():
        raise SystemExit("supervise.py must lead a process group: start it with start_new_session=True")
    if os.fork() == 0:
        _watch(sys.stdin.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
