"""The command ``coreinfer-edge``."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec

import typer

from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    InsufficientMemoryError,
    PromptTooLongError,
)

# The libraries and EdgeLLM are imported where they are used: --help must not wait for them.
if TYPE_CHECKING:
    from coreinfer_edge.edge import EdgeLLM

app = typer.Typer(
    name="coreinfer-edge",
    help="Run a language model with only the core neurons of its feed-forward layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

INTERRUPTED = 130
BROKEN_PIPE = 141

P = ParamSpec("P")


def main() -> NoReturn:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 shows a replacement, and the command goes on.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
    raise SystemExit(0)


# --- errors and output ---------------------------------------------------------------------------


def _reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """End a command with one line on standard error and an exit status, never a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read the output has left; flushing again at exit would only raise again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
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
            _fail(
                error,
                f"unexpected {type(error).__name__}: {error} (this is a defect of coreinfer-edge:"
                " please report it, with the output of --verbose)",
                bool(kwargs.get("as_json")),
                error,
                bool(kwargs.get("verbose")),
            )

    return run


def _fail(
    kind: Exception,
    message: str,
    as_json: bool,
    cause: BaseException | None = None,
    verbose: bool = False,
) -> NoReturn:
    if cause is not None and verbose:
        traceback.print_exception(cause)
    _say_error(message)
    if as_json:
        _print_json({"error": {"type": type(kind).__name__, "message": _plain(message)}})
    raise typer.Exit(1)


def _say_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    line = Text.assemble(("error: ", "bold red"), _plain(message))
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)


def _plain(message: str) -> str:
    """One line that cannot steer a terminal: messages quote names and texts out of files."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(message.split())
    )


def _print_json(value: Any) -> None:
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
def _stdout_kept_for_json(as_json: bool) -> Iterator[None]:
    """Send what libraries write to standard output to standard error meanwhile."""
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


def _print_figures(llm: EdgeLLM) -> None:
    """One line on standard error with the figures of the last answer."""
    from rich.console import Console

    figures = llm.last
    if figures is None:
        return
    mebibyte = 2**20
    how = f"density {figures.density:.2f} ({figures.strategy})"
    if figures.strategy != "dense" and figures.density == 1:
        how = "dense: it ended during warm-up"
    Console(stderr=True, highlight=False, style="dim").print(
        f"[{figures.prompt_tokens} + {figures.completion_tokens} tokens,"
        f" {figures.decode_tokens_per_second:.1f} tok/s,"
        f" {how},"
        f" FFN {figures.core_ffn_bytes / mebibyte:.1f} of"
        f" {figures.full_ffn_bytes / mebibyte:.1f} MiB,"
        f" pre-fill {figures.prefill_seconds:.2f} s, choice {figures.choose_seconds:.2f} s,"
        f" peak memory {figures.peak_memory_bytes / mebibyte:.0f} MiB]",
        soft_wrap=True,
        markup=False,
    )


def _figures(llm: EdgeLLM) -> dict[str, Any]:
    return {} if llm.last is None else dataclasses.asdict(llm.last)


# --- options -------------------------------------------------------------------------------------


def _warmup(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter("a number of tokens, or auto")


Model = Annotated[
    str, typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False)
]
Density = Annotated[float, typer.Option(help="Fraction of FFN neurons to keep, up to 1 (dense).")]
Strategy = Annotated[
    str, typer.Option(help="How to choose them: energy, or dense for none at all.")
]
Warmup = Annotated[
    Any,
    typer.Option(
        parser=_warmup, metavar="TOKENS|auto", help="Tokens to decode dense before the choice."
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="Randomness; 0 always takes the likeliest token.")
]
TopP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")
]
TopK = Annotated[int | None, typer.Option(min=0, help="Sample from so many tokens; 0 is all.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the sampling.")]
Context = Annotated[int | None, typer.Option("--ctx", min=1, help="Context length in tokens.")]
Threads = Annotated[int | None, typer.Option(min=1, max=512, help="CPU threads.")]
GpuLayers = Annotated[int, typer.Option(min=-1, help="Layers to put on a GPU; -1 is all.")]
Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text. Repeatable.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with the text and all figures.")
]
Verbose = Annotated[bool, typer.Option(help="Show the log of llama.cpp.")]


def _open(
    model: str,
    density: float,
    strategy: str,
    warmup: int | Literal["auto"],
    seed: int | None,
    context: int | None,
    threads: int | None,
    gpu_layers: int,
    verbose: bool,
) -> EdgeLLM:
    """Load the model. Options that were not given are left to EdgeLLM's defaults."""
    from coreinfer_edge.edge import EdgeLLM
    from coreinfer_edge.model_source import resolve

    return EdgeLLM(
        resolve(model),
        density=density,
        strategy=strategy,
        warmup=warmup,
        n_gpu_layers=gpu_layers,
        verbose=verbose,
        **_given(seed=seed, n_ctx=context, n_threads=threads, n_threads_batch=threads),
    )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


# --- commands ------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("coreinfer-edge")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"coreinfer-edge {version}")
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


@app.command()
@_reports_errors
def generate(
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Argument(help="The text to continue; - reads standard input.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="Read the prompt from this file.", show_default=False)
    ] = None,
    density: Density = 0.5,
    strategy: Strategy = "energy",
    warmup: Warmup = "auto",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    stop: Stop = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a text, and print it as it comes."""
    text = _read_prompt(prompt, file)
    sampling = _given(temperature=temperature, top_p=top_p, top_k=top_k, stop=stop or None)
    with (
        _stdout_kept_for_json(as_json),
        _open(model, density, strategy, warmup, seed, context, threads, gpu_layers, verbose) as llm,
    ):
        if as_json:
            answer = llm.generate(text, max_tokens=max_tokens, **sampling)
        else:
            _print_pieces(llm.stream(text, max_tokens=max_tokens, **sampling))
            _print_figures(llm)
        result = _figures(llm)
    if as_json:
        _print_json({"model": model, "prompt": text, "text": answer, **result})


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    if file is not None:
        if prompt is not None:
            raise typer.BadParameter("give a prompt or --file, not both")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ArgumentError(f"the prompt file {file} cannot be read: {reason}") from error
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError("the prompt on standard input is not UTF-8 text") from error
    if prompt is None:
        raise typer.BadParameter("give a prompt, --file, or a prompt on standard input")
    return prompt


def _print_pieces(pieces: Iterable[str]) -> str:
    """Print an answer as it comes, and return it. Ends its line even when interrupted."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    finally:
        if not text.endswith("\n"):
            print(flush=True)
    return text


@app.command()
@_reports_errors
def chat(
    model: Model,
    system: Annotated[
        str | None, typer.Option(help="Tell the model first how to be.", show_default=False)
    ] = None,
    density: Density = 0.5,
    strategy: Strategy = "energy",
    warmup: Warmup = "auto",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    context: Context = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    stop: Stop = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Talk with a model.

    A line is a message; end it with a backslash to go on in the next one. /exit or Ctrl-D leaves,
    Ctrl-C stops an answer. Messages can also be piped in, a line each.
    """
    messages = [{"role": "system", "content": system}] if system is not None else []
    n_fixed = len(messages)
    sampling = _given(temperature=temperature, top_p=top_p, top_k=top_k, stop=stop or None)
    interactive = sys.stdin.isatty() and not as_json
    figures: dict[str, Any] = {}
    with (
        _stdout_kept_for_json(as_json),
        _open(model, density, strategy, warmup, seed, context, threads, gpu_layers, verbose) as llm,
    ):
        for message in _messages(interactive):
            messages.append({"role": "user", "content": message})
            answer = None
            while answer is None and len(messages) > n_fixed:
                try:
                    answer = _answer(llm, messages, interactive, max_tokens=max_tokens, **sampling)
                except PromptTooLongError as error:
                    if len(messages) > n_fixed + 1:
                        print("[the context is full: the oldest turn is dropped]", file=sys.stderr)
                    elif not interactive:
                        raise
                    else:
                        _say_error(str(error))
                    del messages[n_fixed : n_fixed + 2]
            if answer is None:
                continue
            messages.append({"role": "assistant", "content": answer})
            figures = _figures(llm)
            if not as_json:
                _print_figures(llm)
    if as_json:
        _print_json({"model": model, "messages": messages, **figures})


def _answer(llm: EdgeLLM, messages: list[dict[str, str]], interactive: bool, **options: Any) -> str:
    """Print the model's answer as it comes. Ctrl-C at a terminal stops the answer, not the chat."""
    said: list[str] = []

    def pieces() -> Iterator[str]:
        for piece in llm.chat(messages, stream=True, **options):
            said.append(piece)
            yield piece

    try:
        _print_pieces(pieces())
    except KeyboardInterrupt:
        if not interactive:
            raise
    return "".join(said)


def _messages(interactive: bool) -> Iterator[str]:
    """What the user says, message by message, until /exit or the end of the input."""
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history and editing)
        print(
            "/exit or Ctrl-D leaves, Ctrl-C stops an answer, \\ continues a line.", file=sys.stderr
        )
    lines: list[str] = []
    while True:
        try:
            line = _read_line("... " if lines else "> ", interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise
            # As in a shell: what was typed is dropped.
            lines = []
            print(file=sys.stderr)
            continue
        if line is None:
            if interactive:
                print(file=sys.stderr)
            elif lines:
                yield "\n".join(lines)
            return
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        message = "\n".join([*lines, line])
        lines = []
        if message.strip() == "/exit":
            return
        if message.strip():
            yield message


def _read_line(prompt: str, interactive: bool) -> str | None:
    """A line without its end, or None at the end of the input."""
    if interactive:
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


@app.command()
@_reports_errors
def inspect(
    model: Model,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the description as one JSON object.")
    ] = False,
) -> None:
    """Show what is in a model file, and what density does to it."""
    from rich.console import Console

    from coreinfer_edge.inspect import describe, render
    from coreinfer_edge.model_source import resolve

    with _stdout_kept_for_json(as_json):
        description = describe(resolve(model))
    if as_json:
        _print_json(description.as_dict())
    else:
        Console(highlight=False).print(render(description))


if __name__ == "__main__":
    main()
