"""Answer a person at a terminal: the command `cloudckpt`, put together from a module a command.

Tables for people by default, JSON lines for programs with `--json`. How a command ends stands in `command`.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

import cloudckpt
from cloudckpt.cli.command import answering, command
from cloudckpt.cli.cp import cp
from cloudckpt.cli.diff import diff
from cloudckpt.cli.export import export
from cloudckpt.cli.import_ import import_
from cloudckpt.cli.latest import latest
from cloudckpt.cli.ls import ls
from cloudckpt.cli.pin import pin, unpin
from cloudckpt.cli.probe import probe
from cloudckpt.cli.prune import prune
from cloudckpt.cli.report import report
from cloudckpt.cli.rm import rm
from cloudckpt.cli.show import show
from cloudckpt.cli.sweep import sweep
from cloudckpt.cli.verify import verify

__all__ = ["app"]


class _App(typer.Typer):
    """The command; its own help and version, too, may have nobody who takes them."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            with answering():
                try:
                    return super().__call__(*args, **kwargs)
                finally:
                    sys.stdout.flush()
        except typer.Exit as exc:
            raise SystemExit(exc.exit_code) from None


# Errors are told by `command`, each in one line: a traceback of typer's shows locals, and those hold secrets
# (FORMAT invariant 16).
app = _App(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(is_asked: bool) -> None:  # noqa: FBT001 (typer calls it)
    if is_asked:
        typer.echo(f"cloudckpt {cloudckpt.__version__}")
        raise typer.Exit


@app.callback(
    epilog="Ends with 0 if all went well, 1 with the reason on stderr, 2 for a wrong command line, and 3 where a check "
    "found damage or a difference."
)
def _main(
    *,
    version: Annotated[  # noqa: ARG001 (its callback answers)
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """See and steer checkpoints on local disk, S3, GCS or any fsspec URL."""
    logging.basicConfig(level=logging.WARNING, format="cloudckpt: %(message)s")


# Each command here; its options stand in its module, those that all share in `command`.
app.command("ls")(command(ls, is_reading=True))
app.command("latest")(command(latest, is_reading=True))
app.command("probe")(command(probe))
app.command("report")(command(report))
app.command("show")(command(show, is_reading=True))
app.command("pin")(command(pin))
app.command("unpin")(command(unpin))
app.command("rm")(command(rm))
app.command("prune")(command(prune))
app.command("sweep")(command(sweep))
app.command("verify")(command(verify, is_reading=True))
app.command("diff")(command(diff, is_reading=True))
app.command("cp")(command(cp))
app.command("export")(command(export))
app.command("import")(command(import_))
