"""Answer a person at a terminal: the command `cloudckpt`, put together from a module a command.

Tables for people by default, JSON lines for programs with `--json`. An error is one line on stderr with the next
action, after warnings of what was tried, and the status is 1; 2 where the command line itself is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

import cloudckpt
from cloudckpt.cli.export import export
from cloudckpt.cli.import_ import import_
from cloudckpt.cli.ls import ls
from cloudckpt.cli.show import show

__all__ = ["app"]


class _App(typer.Typer):
    """The command, which ends with one line where nobody can take its answer: a full disk, a reader that is gone."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as exc:
            if isinstance(exc, cloudckpt.CloudCkptError):
                raise
            # What is left in its buffer goes nowhere, or the end of the interpreter would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo(f"cloudckpt: the answer could not be written: {exc.strerror}", err=True)
            raise SystemExit(1) from None


# Locals are left out of a traceback: storage options hold secrets (FORMAT invariant 16).
app = _App(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 (typer calls it)
    if is_asked:
        typer.echo(f"cloudckpt {cloudckpt.__version__}")
        raise typer.Exit


@app.callback(epilog="Ends with 0 if all went well, 1 with the reason on stderr, and 2 for a wrong command line.")
def _main(
    *,
    version: Annotated[  # noqa: ARG001 (its callback answers)
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Look at checkpoints on local disk, S3, GCS or any fsspec URL."""
    logging.basicConfig(level=logging.WARNING, format="cloudckpt: %(message)s")


app.command()(ls)
app.command()(show)
app.command()(export)
app.command("import")(import_)
