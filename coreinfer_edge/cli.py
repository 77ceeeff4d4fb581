"""The command ``coreinfer-edge``."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
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
    from rich.table import Table

    from coreinfer_edge.edge import EdgeLLM
    from coreinfer_edge.evaluate import Setting
    from coreinfer_edge.task import TaskQuality

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
    if figures.estimated_kl is not None:
        how += f", estimated KL {figures.estimated_kl:.2f}"
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


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, if that is a terminal; yields what advances it."""
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
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def _read_text(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ArgumentError(f"{what} {file} cannot be read: {reason}") from error


def _figures(llm: EdgeLLM) -> dict[str, Any]:
    return {} if llm.last is None else dataclasses.asdict(llm.last)


# --- options -------------------------------------------------------------------------------------


def _warmup(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter("a number of tokens, or auto")


def _density(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter("a number up to 1, or auto") from None


_LAYERS = re.compile(r"(?P<first>-?\d{1,4})(-(?P<last>\d{1,4}))?(=(?P<density>\d*\.?\d+))?")


def _layers(text: str) -> dict[int, float]:
    """``0-5,-1`` names layers that stay dense, ``6-10=0.3`` gives layers a density."""
    result: dict[int, float] = {}
    for item in text.split(","):
        match = _LAYERS.fullmatch(item.strip())
        if match is None:
            raise typer.BadParameter(
                "layers like 0-5,-1 (to stay dense; -1 is the last) or 6-10=0.3 (with a density)"
            )
        first = int(match["first"])
        for layer in range(first, int(match["last"] or first) + 1):
            result[layer] = float(match["density"] or 1)
    return result


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _densities(text: str) -> list[float | Literal["auto"]]:
    return [_density(item) for item in _list(text)]


Model = Annotated[
    str, typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False)
]
Density = Annotated[
    Any,
    typer.Option(
        parser=_density,
        metavar="SHARE|auto",
        help="Fraction of FFN neurons to keep, up to 1 (dense); auto: as --quality needs.",
    ),
]
Strategy = Annotated[
    str,
    typer.Option(
        help="How to choose them: energy, stability, similarity, griffin, static; dense for none."
    ),
]
KlTarget = Annotated[
    float,
    typer.Option("--quality", help="KL divergence to dense, in nats, that density auto keeps to."),
]
Layers = Annotated[
    Any,
    typer.Option(
        parser=_layers,
        metavar="LAYERS",
        help="Layers to keep dense, like 0-5,-1, or with a density, like 6-10=0.3.",
    ),
]
Refresh = Annotated[
    int | None, typer.Option(min=1, help="Choose again after so many tokens of the core set.")
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
    density: float | Literal["auto"],
    quality: float,
    strategy: str,
    layers: dict[int, float] | None,
    warmup: int | Literal["auto"],
    refresh: int | None,
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
        quality=quality,
        strategy=strategy,
        layers=layers,
        warmup=warmup,
        refresh=refresh,
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
    quality: KlTarget = 0.25,
    strategy: Strategy = "energy",
    layers: Layers = None,
    warmup: Warmup = "auto",
    refresh: Refresh = None,
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
        _open(
            model,
            density,
            quality,
            strategy,
            layers,
            warmup,
            refresh,
            seed,
            context,
            threads,
            gpu_layers,
            verbose,
        ) as llm,
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
        return _read_text(file, "the prompt file")
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
    quality: KlTarget = 0.25,
    strategy: Strategy = "energy",
    layers: Layers = None,
    warmup: Warmup = "auto",
    refresh: Refresh = None,
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
        _open(
            model,
            density,
            quality,
            strategy,
            layers,
            warmup,
            refresh,
            seed,
            context,
            threads,
            gpu_layers,
            verbose,
        ) as llm,
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


@app.command("eval")
@_reports_errors
def evaluate(
    model: Model,
    text: Annotated[
        Path | None,
        typer.Option(help="Measure on windows of this text.", show_default="chat prompts of ours"),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            help="Measure free generation on this .jsonl with prompt and reference.",
            show_default=False,
        ),
    ] = None,
    density: Annotated[
        Any, typer.Option(parser=_densities, metavar="LIST", help="Densities, with commas; auto.")
    ] = "0.5",
    strategy: Annotated[
        Any, typer.Option(parser=_list, metavar="LIST", help="Strategies, with commas.")
    ] = "energy",
    quality: KlTarget = 0.25,
    layers: Layers = None,
    refresh: Refresh = None,
    warmup: Annotated[
        Any,
        typer.Option(
            parser=_warmup,
            metavar="TOKENS|auto",
            help="Tokens to decode dense before the choice.",
            show_default="0 with --text, auto without",
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of the text.")] = 24,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window's prompt.")] = 256,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to decode with the core set (with --task: at most).")
    ] = 128,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Also show the KL that density auto would expect.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw quality over density here.", show_default=False)
    ] = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as one JSON object.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Measure what a core set costs in quality, against the dense model.

    Prompts are pre-filled dense and continuations decoded with the core set, the true next token
    given at each step; the probabilities of the next token are compared with those of the dense
    model. Continuations come from --text, or are the dense model's own answers to chat prompts.
    """
    from coreinfer_edge import evaluate as ev
    from coreinfer_edge import quality_report
    from coreinfer_edge.arguments import check_arguments
    from coreinfer_edge.core_llama import auto_warmup
    from coreinfer_edge.edge import EdgeLLM
    from coreinfer_edge.gguf_header import read_header
    from coreinfer_edge.model_source import resolve

    if text is not None and task is not None:
        raise typer.BadParameter("give --text or --task, not both")
    if task is not None and (plot is not None or estimate):
        raise typer.BadParameter("--plot and --estimate do not go with --task")
    settings = [ev.Setting(of, share) for of in strategy for share in density]
    if not settings:
        raise typer.BadParameter("give at least one density and one strategy")
    if warmup is None:
        warmup = 0 if text is not None else "auto"
    if text is not None and warmup == "auto":
        warmup = auto_warmup(prompt_tokens)
    for setting in settings:
        if setting.strategy == "dense":
            raise typer.BadParameter("dense is what the others are measured against")
        check_arguments(setting.density, setting.strategy, warmup, None, None, quality, refresh)
    if plot is not None:
        quality_report.check_plot(plot)
    options = _given(n_threads=threads, n_threads_batch=threads)
    options |= {"n_gpu_layers": gpu_layers, "verbose": verbose}
    with _stdout_kept_for_json(as_json):
        path = resolve(model)
        if task is not None:
            choice = {"quality": quality, "layers": layers, "refresh": refresh, "warmup": warmup}
            results = _measure_task(path, task, settings, tokens, {**choice, **options})
        else:
            header = read_header(path)
            given = None if text is None else _read_text(text, "the text")
            with EdgeLLM(path, strategy="dense", n_ctx=1024 + tokens, **options) as llm:
                if given is not None:
                    samples = ev.text_samples(
                        llm.llama, given, windows, prompt_tokens, warmup, tokens
                    )
                else:
                    with _progress("the dense model answers", len(ev.CHAT_PROMPTS)) as advance:
                        samples = ev.chat_samples(
                            llm, warmup, tokens, ev.CHAT_PROMPTS, lambda: advance(1)
                        )
                with (
                    ev.Evaluation(
                        llm, header, settings, samples, layers, refresh, quality, estimate
                    ) as evaluation,
                    _progress("measuring", len(samples) * len(settings)) as advance,
                ):
                    report = evaluation.measure(lambda: advance(1))
    if task is not None:
        if as_json:
            _print_json({"model": model, "task": [dataclasses.asdict(r) for r in results]})
        else:
            _print_rich(quality_report.task_table(results))
        return
    if plot is not None:
        quality_report.plot(report, plot)
    if as_json:
        _print_json({"model": model, **dataclasses.asdict(report)})
    else:
        _print_rich(quality_report.table(report))
        if report.rank_correlation is not None:
            print(f"rank correlation of estimated and measured KL: {report.rank_correlation:.2f}")


def _print_rich(table: Table) -> None:
    from rich.console import Console

    # a file or a pipe has no width that the table must fit into
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table)


def _measure_task(
    path: Path, file: Path, settings: list[Setting], max_tokens: int, options: dict[str, Any]
) -> list[TaskQuality]:
    from coreinfer_edge.edge import EdgeLLM
    from coreinfer_edge.task import measure_task, read_task

    def open_model(setting: Setting) -> EdgeLLM:
        return EdgeLLM(path, setting.density, setting.strategy, **options)

    items = read_task(file)
    with _progress("answering", len(items) * (1 + len(settings))) as advance:
        return measure_task(open_model, items, settings, max_tokens, lambda: advance(1))


@app.command()
@_reports_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new .gguf file.", show_default=False)
    ],
    calibration: Annotated[
        Path,
        typer.Option(help="Text like what the model will be used for.", show_default=False),
    ],
    calibration_tokens: Annotated[
        int, typer.Option(min=64, help="About how many tokens of it to read.")
    ] = 32768,
    clusters: Annotated[
        int, typer.Option(min=0, max=256, help="Groups of texts for strategy similarity.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the grouping.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it exists.")] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    verbose: Verbose = False,
) -> None:
    """Add statistics of a model's neurons to its file, so that the core set is chosen better.

    Runs the calibration text through the model. The tensors stay as they are, and the new file
    works in every other llama.cpp program too.
    """
    from coreinfer_edge.calibrate import calibrate
    from coreinfer_edge.convert import check_output, write_with_prior
    from coreinfer_edge.edge import EdgeLLM
    from coreinfer_edge.gguf_header import read_header
    from coreinfer_edge.model_source import resolve

    path = resolve(source)
    header = read_header(path)
    check_output(header, output, overwrite)
    text = _read_text(calibration, "the calibration text")
    options = _given(n_threads=threads, n_threads_batch=threads)
    with (
        EdgeLLM(
            path, strategy="dense", n_ctx=512, n_gpu_layers=gpu_layers, verbose=verbose, **options
        ) as llm,
        _progress("reading, tokens", calibration_tokens) as advance,
    ):
        prior = calibrate(llm, header, text, calibration_tokens, clusters, seed, advance)
    with _progress("writing, bytes", sum(t.n_bytes for t in header.tensors.values())) as advance:
        write_with_prior(header, prior, output, overwrite, advance)
    print(f"{output}: with statistics of {prior.n_tokens} tokens", file=sys.stderr)


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
