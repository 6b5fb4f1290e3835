"""Console output: results to stdout, progress and messages to stderr."""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from intaglio.errors import IntaglioError, printable

Dtype = Annotated[
    str | None,
    typer.Option(help="Dtype of the weights: float32, bfloat16, float16. [default: the checkpoint's own]"),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A bundled name (smollm2, minilm, splade-tiny, efficientnet-lite0), a directory, or a hub id (user/name,"
        " user/name@revision)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")]
Device = Annotated[str | None, typer.Option(help="Device: cpu, cuda, cuda:N, mps. [default: cpu]")]

out = Console()
err = Console(stderr=True)

BAD_INPUT = 2
DEFECT = 70
INTERRUPTED = 130

# Newer versions of typer vendor click; this is the UsageError of the one in use.
USAGE: Any = typer.BadParameter.__mro__[1]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def print_out(text: str) -> None:
    """Print one line to stdout, without markup or wrapping."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_err(text: str) -> None:
    """Print one line to stderr, without markup or wrapping."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


def paint(piece: str, marked: bool) -> None:
    """Print a piece of text to stdout, in green if it is marked and stdout is a terminal."""
    out.print(Text(piece, style="bold green" if marked else ""), end="", soft_wrap=True)
    out.file.flush()


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
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


def read_argument(value: str) -> str:
    """Return a text given as it is, as `@FILE`, or as `-` for stdin.

    Raises:
        IntaglioError: the file cannot be read, or it is not UTF-8.
    """
    if not value.startswith("@"):
        return read_stdin() if value == "-" else value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise IntaglioError(f"cannot read the text {value[1:]}: {reason}") from None


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print warnings as one line on stderr, without those that address a library's developers."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print_err(f"warning: {printable(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.showwarning = show
        yield


def handle_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn an exception in a command into one sentence on stderr and an exit code.

    Bad input exits with 2, an interrupt with 130. Any other exception is a bug of Intaglio and exits with 70; with
    INTAGLIO_TRACEBACK=1 its traceback is shown.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if os.environ.get("INTAGLIO_TRACEBACK") == "1":
            return command(*args, **kwargs)
        try:
            with _warnings_in_one_line():
                return command(*args, **kwargs)
        except IntaglioError as error:
            print_err(f"error: {error}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            print_err("interrupted; carve resumes with --resume, prove and index when run again")
            raise typer.Exit(INTERRUPTED) from None
        except MemoryError:
            print_err("error: this machine has too little memory for that; lower batch_size, samples or length")
            raise typer.Exit(BAD_INPUT) from None
        except BrokenPipeError:
            # The reader has closed the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except OSError as error:
            print_err(
                "error: " + printable(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
            )
            raise typer.Exit(BAD_INPUT) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            print_err(
                f"error: a defect of intaglio, please report it: {type(error).__name__}: {printable(text)} "
                "(INTAGLIO_TRACEBACK=1 shows where)"
            )
            raise typer.Exit(DEFECT) from None

    return run


class CommandGroup(TyperGroup):
    """The group of all commands; a usage error is one sentence, too."""

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
            if what.count("\n") > 1:  # no command was given: the list of commands
                err.print(what, markup=False, highlight=False)
            else:
                where = error.ctx.command_path if error.ctx else "intaglio"
                print_err(f"error: {printable(what[:1].lower() + what[1:])}; see {where} --help")
            sys.exit(BAD_INPUT)
        except typer.Abort:
            sys.exit(INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Yield a `Progress` callback drawn on stderr; it does nothing if stderr is not a terminal."""
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
