"""Turn a function into a command: the options that all share in, its errors out as one line and a status.

    options of the command line ──▶ `Access` ──▶ the function ──▶ 0 all went well
                                                   ├─ our error ──▶ 1, one line with the next action
                                                   ├─ no such option, or no such value ──▶ 2
                                                   ├─ a check that found something     ──▶ 3 (`FOUND`)
                                                   ├─ Ctrl-C    ──▶ 130, one line that says what was done
                                                   ╰─ nobody reads the answer any more ──▶ 141, nothing

A command that changes something tells what it has done in a note of the KeyboardInterrupt that it lets pass
(`add_note`). No traceback unless `--debug` asks for it, and no secret in either.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Annotated

import typer

from cloudckpt.cli.asking import Access, Engine, StorageOptions, ended
from cloudckpt.errors import CloudCkptError
from cloudckpt.store import hide

__all__ = ["FOUND", "answering", "command"]

FOUND = 3
"""The status where a check found damage or a difference."""
_INTERRUPTED = 130
# As a shell tells of a program whose reader is gone, which is what it would have died of.
_UNREAD = 141

_Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.", rich_help_panel="Shared")]


def _access(  # what every command asks for that opens a store
    *,
    storage_options: StorageOptions = None,
    storage_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="One of them, as often as needed: a.b=… for a nested one. The value is JSON where it is (true, 3, "
            "null, '\"3\"'), else text; digits are text for a key, a secret, a token. Added to --storage-options, "
            "or to those of the environment.",
            rich_help_panel="Shared",
        ),
    ] = None,
    endpoint_url: Annotated[
        str | None, typer.Option(help="The server to ask, http(s)://host:port.", rich_help_panel="Shared")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="The profile of AWS's configuration files, for s3://.", rich_help_panel="Shared")
    ] = None,
    engine: Engine = "auto",
) -> Access:
    return Access(
        storage_options=storage_options,
        storage_option=tuple(storage_option or ()),
        endpoint_url=endpoint_url,
        profile=profile,
        engine=engine,
    )


_ACCESS = inspect.signature(_access, eval_str=True).parameters


def command(call: Callable[..., None], *, is_reading: bool = False) -> Callable[..., None]:
    """Return what typer registers: `call`, whose parameter `access: Access` stands for the options all share.

    Args:
        call: the command; its docstring is its help.
        is_reading: it changes nothing, so that it has done nothing when it is interrupted.
    """
    own = inspect.signature(call, eval_str=True).parameters
    has_access = "access" in own

    def run(*, debug: bool, **given: object) -> None:
        with answering(is_debugged=debug, is_reading=is_reading):
            if has_access:
                given["access"] = _access(**{name: given.pop(name) for name in _ACCESS})  # type: ignore[arg-type]
            call(**given)

    taken = {name for parameter in own.values() for name in _declared(parameter)}
    shared = [_without(parameter, taken) for parameter in (*(_ACCESS.values() if has_access else ()), _DEBUG)]
    options = [parameter for name, parameter in own.items() if name != "access"]
    signature = inspect.Signature([*options, *shared])
    run.__name__, run.__doc__ = call.__name__, call.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return run


def _declared(parameter: inspect.Parameter) -> Sequence[str]:
    """Return how an option is written, where its module says so."""
    about = getattr(parameter.annotation, "__metadata__", ())
    return [name for one in about for name in getattr(one, "param_decls", None) or ()]


def _without(parameter: inspect.Parameter, taken: set[str]) -> inspect.Parameter:
    """Return a shared option without those of its names that a command has for one of its own."""
    if not taken.intersection(_declared(parameter)):
        return parameter
    told = copy(parameter.annotation.__metadata__[0])
    told.param_decls = tuple(name for name in told.param_decls if name not in taken)
    return parameter.replace(annotation=Annotated[parameter.annotation.__origin__, told])


_DEBUG = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)


@contextmanager
def answering(*, is_debugged: bool = False, is_reading: bool = True) -> Iterator[None]:
    """Run a command; whatever it raises ends it with one line and a status."""
    try:
        yield
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as exc:
        # What typer ends a command with is its own business: an exit, a wrong command line.
        if _is_of_typer(exc):
            raise
        if is_debugged:
            sys.stderr.write(hide("".join(traceback.format_exception(exc))))
        raise _end_of(exc, is_reading=is_reading) from None


def _is_of_typer(exc: BaseException) -> bool:
    return isinstance(exc, typer.Exit | typer.Abort | typer.BadParameter) or hasattr(exc, "exit_code")


def _end_of(exc: BaseException, *, is_reading: bool) -> typer.Exit:
    if isinstance(exc, KeyboardInterrupt):
        done = getattr(exc, "__notes__", []) or (["nothing was changed"] if is_reading else [])
        return ended("; ".join(["interrupted", *done]), status=_INTERRUPTED)
    if isinstance(exc, CloudCkptError):
        return ended("; ".join([str(exc), *getattr(exc, "__notes__", [])]), status=1)
    if isinstance(exc, OSError) and exc.filename is None:
        # Nobody takes the answer: what a store or a file refuses has a name, or is an error of ours. What is left in
        # its buffer goes nowhere, or the end of the interpreter would complain once more.
        _give_up_stdout()
        if isinstance(exc, BrokenPipeError):
            return typer.Exit(_UNREAD)
        return ended(f"the answer could not be written: {exc.strerror}", status=1)
    if isinstance(exc, OSError):
        return ended(str(exc), status=1)
    fault = f"{type(exc).__name__}: {exc}".rstrip(": ")
    return ended(f"{fault}. This is a fault of cloudckpt: please report it with what --debug shows", status=1)


def _give_up_stdout() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout.flush()
