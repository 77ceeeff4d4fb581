"""The command ``coreinfer-edge``."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from coreinfer_edge.cli.bench import bench
from coreinfer_edge.cli.chat import chat
from coreinfer_edge.cli.convert import convert
from coreinfer_edge.cli.doctor import doctor
from coreinfer_edge.cli.eval import evaluate
from coreinfer_edge.cli.generate import generate
from coreinfer_edge.cli.inspect import inspect
from coreinfer_edge.cli.interrupts import raise_dropped_interrupts
from coreinfer_edge.cli.output import print_error_json, say_error, say_warning
from coreinfer_edge.cli.serve import serve
from coreinfer_edge.cli.streams import drop_output, open_closed_streams

app = typer.Typer(
    name="coreinfer-edge",
    help="Run a language model with only the core neurons of its feed-forward layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, command in (
    ("generate", generate),
    ("chat", chat),
    ("serve", serve),
    ("inspect", inspect),
    ("convert", convert),
    ("eval", evaluate),
    ("bench", bench),
    ("doctor", doctor),
):
    app.command(name)(command)


def main() -> NoReturn:
    """Entry point of the command."""
    open_closed_streams()
    raise_dropped_interrupts()
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 shows a replacement, and the command goes on.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    warnings.showwarning = say_warning
    try:
        status = app(standalone_mode=False)
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        status = 1
    except OSError as error:  # of --help and --version; commands tell theirs
        drop_output()
        say_error(f"standard output cannot be written: {error.strerror}")
        status = 1
    except _USAGE_ERRORS as error:
        error.show()
        if "--json" in sys.argv[1:]:
            print_error_json("UsageError", error.format_message())
        status = error.exit_code
    raise SystemExit(status if isinstance(status, int) else 0)


# The base class of BadParameter, which Typer has from Click or carries itself.
_USAGE_ERRORS: Any = typer.BadParameter.__bases__[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("coreinfer-edge")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"coreinfer-edge {version}", flush=True)  # a full disk shows here
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and leave."
        ),
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
