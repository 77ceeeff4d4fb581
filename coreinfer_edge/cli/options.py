"""The options that several commands share, and opening a model with them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from coreinfer_edge.choose.statistics import LEVELS, Level
from coreinfer_edge.errors import ArgumentError

if TYPE_CHECKING:
    from coreinfer_edge.run.llm import EdgeLLM


def parse_warmup(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter("a number of tokens, or auto")


def parse_density(text: str) -> float | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter("a number up to 1, or auto") from None


_LAYERS = re.compile(r"(?P<first>-?\d{1,4})(-(?P<last>\d{1,4}))?(=(?P<density>\d*\.?\d+))?")


def parse_layers(text: str) -> dict[int, float]:
    """``0-5,-1`` names layers that stay dense, ``6-10=0.3`` gives layers a density."""
    result: dict[int, float] = {}
    for item in text.split(","):
        match = _LAYERS.fullmatch(item.strip())
        if match is None:
            raise typer.BadParameter(
                "layers like 0-5,-1 (to stay dense; -1 is the last) or 6-10=0.3 (with a density)"
            )
        first = int(match["first"])
        last = int(match["last"] or first)
        if last < first:
            raise typer.BadParameter(f"{item.strip()}: the first layer comes before the last")
        for layer in range(first, last + 1):
            result[layer] = float(match["density"] or 1)
    return result


def parse_list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def parse_densities(text: str) -> list[float | Literal["auto"]]:
    return [parse_density(item) for item in parse_list(text)]


def parse_levels(text: str) -> list[Level]:
    names = {str(level): level for level in LEVELS}
    try:
        return [names[item] for item in parse_list(text)]
    except KeyError:
        raise typer.BadParameter("some of full, 4, 3 and 2 (bits), with commas") from None


_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "stop")

Model = Annotated[
    str, typer.Argument(help="A .gguf file, demo, or hf://org/repo/file.gguf.", show_default=False)
]
Density = Annotated[
    Any,
    typer.Option(
        parser=parse_density,
        metavar="SHARE|auto",
        help="Fraction of the FFN's bytes to read; auto: the smallest within --quality; 1:"
        " llama.cpp as it is. Default: the whole model with faster kernels.",
    ),
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="Rule that chooses neurons: energy, stability, similarity, griffin, static;"
        " dense for none."
    ),
]
KlTarget = Annotated[
    float | None,
    typer.Option(
        "--quality",
        help="Most KL divergence to dense, in nats, for density auto (default: 0.1).",
    ),
]
Layers = Annotated[
    Any,
    typer.Option(
        parser=parse_layers,
        metavar="LAYERS",
        help="Layers to keep dense, like 0-5,-1, or with a density, like 6-10=0.3.",
    ),
]
Levels = Annotated[
    Any,
    typer.Option(
        parser=parse_levels,
        metavar="LIST",
        help="Precisions that a neuron can have: full, and 4, 3 and 2 bits, with commas (default:"
        " all that there are here). With full alone, density is of neurons.",
    ),
]
Refresh = Annotated[
    int | None, typer.Option(min=1, help="Choose again after this many tokens of the core set.")
]
Warmup = Annotated[
    Any,
    typer.Option(
        parser=parse_warmup, metavar="TOKENS|auto", help="Tokens to decode dense before the choice."
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="Limit of memory, like 1.5GiB; weights that do not fit stay in the file.",
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="Limit of a GPU's memory, like 3GiB, or 3GiB,2GiB for two; FFN weights that do not fit"
        " stay in main memory.",
    ),
]
Rpc = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST:PORT", help="An RPC server of llama.cpp, as a GPU. Repeatable."),
]
Repack = Annotated[
    bool | None,
    typer.Option(
        "--repack/--no-repack",
        help="Load the weights for our own, faster kernels (default: if memory allows).",
    ),
]
ExactText = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="The whole model's text, token for token: the core set only drafts. Faster where"
        " --memory leaves weights in the file.",
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Context = Annotated[int | None, typer.Option("--ctx", min=1, help="Context length in tokens.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, max=512, help="CPU threads.")]
GpuLayers = Annotated[
    int, typer.Option("--gpu-layers", min=-1, help="Layers to put on a GPU; -1 is all.")
]
ChatFormat = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How to write messages for the model: chatml, llama-3, gemma, ...",
        show_default="the model's own template",
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with the text and all figures.")
]
ResultsAsJson = Annotated[
    bool, typer.Option("--json", help="Print the results as one JSON object.")
]
Plot = Annotated[
    Path | None,
    typer.Option(help="Draw a plot into this file (.png, .svg or .pdf).", show_default=False),
]
Verbose = Annotated[bool, typer.Option(help="Show the log of llama.cpp.")]


@dataclass(frozen=True)
class ModelOptions:
    """How a model is to run."""

    density: Density = None
    quality: KlTarget = None
    strategy: Strategy = None
    layers: Layers = None
    warmup: Warmup = "auto"
    refresh: Refresh = None
    levels: Levels = None
    memory: Memory = None
    gpu_memory: GpuMemory = None
    rpc: Rpc = None
    repack: Repack = None
    exact: ExactText = False
    n_ctx: Context = None
    n_threads: Threads = None
    n_gpu_layers: GpuLayers = 0

    def open_model(self, model: str | Path, verbose: bool, **others: Any) -> EdgeLLM:
        """Load the model. Options that were not given have the defaults of EdgeLLM."""
        from coreinfer_edge.model.source import resolve
        from coreinfer_edge.run.llm import EdgeLLM

        names = [field.name for field in fields(ModelOptions)]
        given = {name: getattr(self, name, None) for name in (*names, "seed", "chat_format")}
        return EdgeLLM(
            resolve(model),
            verbose=verbose,
            **given_options(n_threads_batch=self.n_threads, **given),
            **others,
        )


@dataclass(frozen=True)
class AnswerOptions(ModelOptions):
    """The options of ``generate`` and ``chat``: for the model, and for sampling."""

    max_tokens: MaxTokens = 256
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Randomness; 0 always takes the likeliest token.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from this much probability.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Sample from this many tokens; 0 is all.")
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            min=-1,
            help="Seed of the sampling; the same seed gives the same text.",
            show_default="random, -1",
        ),
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text. Repeatable.")] = (
        None
    )
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Hold the text to this grammar (GBNF, as llama.cpp's).",
            show_default=False,
        ),
    ] = None
    json_schema: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Hold the text to JSON of this schema.", show_default=False
        ),
    ] = None

    def sampling(self) -> dict[str, Any]:
        """The arguments of ``EdgeLLM.generate`` and ``chat`` that were given."""
        given = given_options(**{name: getattr(self, name) for name in _SAMPLING})
        return given | grammar_options(self.grammar, self.json_schema)


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each field of its parameter ``options``, a dataclass."""
    hints = get_type_hints(command, include_extras=True)
    kind = hints["options"]
    of_field = get_type_hints(kind, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "options":
            parameters += [
                parameter.replace(name=f.name, annotation=of_field[f.name], default=f.default)
                for f in fields(kind)
            ]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        command(options=options, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def given_options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def grammar_options(grammar: Path | None, json_schema: Path | None) -> dict[str, str]:
    """The argument ``grammar``, if either option is given."""
    if grammar is not None and json_schema is not None:
        raise typer.BadParameter("give --grammar or --json-schema, not both")
    if grammar is None and json_schema is None:
        return {}
    from coreinfer_edge.run.arguments import read_text

    if grammar is not None:
        return {"grammar": read_text(grammar, "the grammar file")}
    assert json_schema is not None
    import json

    from coreinfer_edge.run.json_schema import schema_grammar

    text = read_text(json_schema, "the schema file")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the schema file {json_schema} is not JSON: {error}") from error
    return {"grammar": schema_grammar(schema, f"the schema {json_schema}")}
