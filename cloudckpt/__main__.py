"""Run the command line, as `cloudckpt` or `python -m cloudckpt`; Ctrl-C is answered while it loads, too.

What a command needs takes seconds to import, and libraries turn an interrupt of their import into errors of their own.
Nothing is begun until then, so that whoever interrupts is let go at once.
"""

import os
import signal

__all__ = ["main"]

_INTERRUPTED = 130


def main() -> None:
    """Run the command that the arguments of the process name, and end the process with its status."""
    answer = signal.getsignal(signal.SIGINT)
    # Else a parent has chosen that interrupts are ignored.
    is_pythons = answer is signal.default_int_handler
    if is_pythons:
        signal.signal(signal.SIGINT, _leave)
    from cloudckpt.cli import app

    if is_pythons:
        signal.signal(signal.SIGINT, answer)
    app()


def _leave(*_: object) -> None:
    os.write(2, b"cloudckpt: interrupted; nothing was changed\n")
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
