"""Where output goes: results to stdout, progress and sentences to stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from intaglio.errors import IntaglioError, printable

out = Console()
err = Console(stderr=True)

BAD_INPUT = 2
DEFECT = 70
INTERRUPTED = 130

# Newer versions of typer bring a click of their own; this is the UsageError of whichever it uses.
USAGE: Any = typer.BadParameter.__mro__[1]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def say(text: str) -> None:
    """Print one line to stderr, as it stands."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def paint(piece: str, marked: bool) -> None:
    """Print a piece of text to stdout as it comes, in green if it is marked; plain where nobody sees colours.

    Args:
        piece: any text.
        marked: whether it stands out.
    """
    out.print(Text(piece, style="bold green" if marked else ""), end="", soft_wrap=True)
    out.file.flush()


def print_json(value: Any) -> None:
    """Print one JSON document to stdout and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def read_stdin() -> str:
    """Return all of stdin as text.

    Raises:
        IntaglioError: it is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntaglioError(f"the prompt on stdin is not text: byte {error.start} is not UTF-8") from error


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Say a warning as one line on stderr; what libraries tell their own callers is left out."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        say(f"warning: {printable(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = show
        yield


def speaks_plainly(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn what goes wrong in a command into one sentence on stderr and an exit code.

    Bad input exits with 2, an interrupt with 130. Anything else is a defect of Intaglio and exits with 70; set
    INTAGLIO_TRACEBACK=1 to see where it came from.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if os.environ.get("INTAGLIO_TRACEBACK") == "1":
            return command(*args, **kwargs)
        try:
            with _warnings_in_one_line():
                return command(*args, **kwargs)
        except IntaglioError as error:
            say(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted; a carve goes on with --resume, prove when it is called again")
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError:
            say("error: this machine has too little memory for that; lower batch_size, samples or length")
            raise typer.Exit(BAD_INPUT) from None
        except BrokenPipeError:
            # The reader went away; nothing is left to say to it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            say("error: " + printable(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"))
            raise typer.Exit(BAD_INPUT) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            say(
                f"error: a defect of intaglio, please report it: {type(error).__name__}: {printable(text)} "
                "(INTAGLIO_TRACEBACK=1 shows where)"
            )
            raise typer.Exit(DEFECT) from None

    return run


class Verbs(TyperGroup):
    """The group of all verbs: what is wrong with the words of a command line is one sentence too, without its usage."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; see click."""
        run = functools.partial(super().main, args, prog_name, complete_var, False, windows_expand_args, **extra)
        if not standalone_mode:
            return run()
        try:
            result = run()
        except USAGE as error:
            what = error.format_message().rstrip(".")
            if what.count("\n") > 1:  # no verb was given: the list of verbs
                err.print(what, markup=False, highlight=False)
            else:
                where = error.ctx.command_path if error.ctx else "intaglio"
                say(f"error: {printable(what[:1].lower() + what[1:])}; {where} --help says what there is")
            sys.exit(BAD_INPUT)
        except typer.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A `Progress` callback drawn on stderr; silent where stderr is no terminal."""
    if not err.is_terminal:
        yield lambda done, total, what: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task("starting", total=None)
        current = ""

        def progress(done: int, total: int, what: str) -> None:
            nonlocal current
            stage = what.partition(":")[0]
            if stage != current:
                current = stage
                bar.reset(task, total=total)
            bar.update(task, completed=done, total=total, description=what)

        yield progress
