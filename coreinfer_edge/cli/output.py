"""The output of commands: answers, figures, tables, JSON, progress, and errors as one line."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import typer

from coreinfer_edge.choose.statistics import level_names
from coreinfer_edge.cli.option_names import with_option_names
from coreinfer_edge.cli.streams import drop_output
from coreinfer_edge.errors import CoreInferError, InsufficientMemoryError

# Imported where they are used: --help must not wait for them.
if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from coreinfer_edge.run.figures import Figures
    from coreinfer_edge.run.llm import EdgeLLM


# Between lines of progress, where there is no terminal.
LINE_SECONDS = 15.0

INTERRUPTED = 130
BROKEN_PIPE = 141

P = ParamSpec("P")


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line on standard error and an exit status, never a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            with _output_errors():
                sys.stdout.flush()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of the output has ended.
            drop_output()
            raise typer.Exit(BROKEN_PIPE) from None
        except OutputError as error:
            drop_output()
            _fail(error, str(error), as_json=False)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EBADF):
                _defect(error, **kwargs)
            drop_output()
            where = error.filename or "standard output"
            _fail(OutputError(), f"{where} cannot be written: {error.strerror}", as_json=False)
        except CoreInferError as error:
            _fail(error, str(error), bool(kwargs.get("as_json")))
        except MemoryError as error:
            _fail(
                InsufficientMemoryError(),
                "out of memory: choose a smaller --ctx, a smaller --density or a smaller model",
                bool(kwargs.get("as_json")),
                error,
                bool(kwargs.get("verbose")),
            )
        # Typer ends commands with RuntimeErrors of its own.
        except (typer.Exit, typer.BadParameter, typer.Abort):
            raise
        except Exception as error:
            _defect(error, **kwargs)

    return run


def _defect(error: Exception, **options: Any) -> NoReturn:
    _fail(
        error,
        f"unexpected {type(error).__name__}: {error} (this is a defect of coreinfer-edge:"
        " please report it, with the output of --verbose)",
        bool(options.get("as_json")),
        error,
        bool(options.get("verbose")),
    )


def _fail(
    kind: Exception,
    message: str,
    as_json: bool,
    cause: BaseException | None = None,
    verbose: bool = False,
) -> NoReturn:
    if cause is not None and verbose:
        traceback.print_exception(cause)
    say_error(message)
    if as_json:
        print_error_json(type(kind).__name__, message)
    raise typer.Exit(1)


def print_error_json(kind: str, message: str) -> None:
    with suppress(OutputError):  # standard error has the error itself
        print_json({"error": {"type": kind, "message": _plain(message)}})


def say_error(message: str, kind: str = "error", style: str = "bold red") -> None:
    """One line on standard error."""
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble((f"{kind}: ", style), _plain(message))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Replaces ``warnings.showwarning``, which would show a line of our source."""
    say_error(str(message), "warning", "bold yellow")


def _plain(message: str) -> str:
    """One line without control characters: messages quote names and texts from files."""
    line = with_option_names(" ".join(message.split()))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


class OutputError(CoreInferError):
    """Standard output cannot be written."""


@contextmanager
def _output_errors() -> Iterator[None]:
    """Turn errors of writing to standard output, such as a full disk, into ours."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error


def print_json(value: Any) -> None:
    with _output_errors():
        print(json.dumps(_finite(value)), flush=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def stdout_kept_for_json(as_json: bool) -> Iterator[None]:
    """With --json, send the output of libraries to standard error for the time being."""
    if not as_json:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def print_figures(llm: EdgeLLM) -> None:
    """One line on standard error with the figures of the last answer."""
    from rich.console import Console

    if (figures := llm.last) is None:
        return
    how = f"density {figures.density:.2f} ({figures.strategy})"
    if figures.levels:
        how += f", levels {level_names(figures.levels)}"
    if figures.estimated_kl is not None:
        how += f", estimated KL {figures.estimated_kl:.2f}"
    if figures.passes:
        how = f"exact, {figures.tokens_per_pass:.2f} tokens a pass, drafts of " + how
    elif figures.strategy != "dense" and not figures.core_tokens:
        how = "dense: it ended during warm-up"
    Console(stderr=True, highlight=False, style="dim").print(
        f"[{figures.prompt_tokens} + {figures.completion_tokens} tokens,"
        f" {figures.decode_tokens_per_second:.1f} tok/s, {how},"
        f" FFN {figures.core_ffn_bytes / 2**20:.1f} of {figures.full_ffn_bytes / 2**20:.1f} MiB,"
        f"{' our kernels,' if figures.packed_bytes else ''}"
        f" pre-fill {figures.prefill_seconds:.2f} s, choice {figures.choose_seconds:.2f} s,"
        f" {_memory_of(figures, llm)}, seed {figures.seed}, {_end_of(figures)}]",
        soft_wrap=True,
        markup=False,
    )


def _memory_of(figures: Figures, llm: EdgeLLM) -> str:
    """What ``memory`` limits where it is given, else what the system says of the process."""
    budget = llm.plan.memory_budget if llm.plan else None
    if budget is None or not figures.peak_private_bytes:
        return f"peak resident memory {figures.peak_memory_bytes / 2**20:.0f} MiB"
    most = figures.peak_private_bytes / 2**20
    return f"peak private memory {most:.0f} of {budget / 2**20:.0f} MiB"


def _end_of(figures: Figures) -> str:
    """Why the answer ended."""
    if figures.context_full:
        return "cut: the context is full, give a larger --ctx"
    if figures.finish_reason == "length":
        return "cut at --max-tokens"
    return "complete" if figures.finish_reason else "stopped"


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress on standard error; yields its advance function.

    A bar where that is a terminal. Elsewhere a line at first, and one now and then: a log that says
    nothing for an hour looks as if the command hangs.
    """
    if not sys.stderr.isatty():
        yield _progress_lines(label, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def _progress_lines(label: str, total: int) -> Callable[[int], None]:
    print(f"{label} ...", file=sys.stderr, flush=True)
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            said = f"{label}: {done} of {total} after {now - start:.0f} s"
            print(said, file=sys.stderr, flush=True)

    return advance


def figures_of(llm: EdgeLLM) -> dict[str, Any]:
    return {} if llm.last is None else dataclasses.asdict(llm.last)


def print_pieces(pieces: Iterable[str]) -> str:
    """Print an answer as it comes, and return it. An interrupt ends its line too."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            with _output_errors():
                print(piece, end="", flush=True)
    except BaseException:
        _end_line(text or "\n")  # nothing was printed: no line to end
        raise
    _end_line(text)
    return text


def _end_line(text: str) -> None:
    if not text.endswith("\n"):
        with _output_errors():
            print(flush=True)


def print_table(table: Table | Group) -> None:
    from rich.console import Console

    with _output_errors():
        # a file or a pipe has no width
        Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)
