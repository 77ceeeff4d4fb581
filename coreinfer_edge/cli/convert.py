"""``coreinfer-edge convert``: make a GGUF with statistics of its neurons."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coreinfer_edge.cli.interrupts import ends_when_terminated
from coreinfer_edge.cli.options import (
    GpuLayers,
    Threads,
    Verbose,
)
from coreinfer_edge.cli.output import (
    progress_bar,
    reports_errors,
)
from coreinfer_edge.errors import ArgumentError


@reports_errors
def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A .gguf file, demo, hf://org/repo/file.gguf; or a Hugging Face model: its folder"
            " or hf://org/repo.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The new .gguf file.", show_default=False)
    ],
    type: Annotated[
        str | None,
        typer.Option(
            help="Type to quantise a Hugging Face model to: q4_k_m, q8_0, f16, ...",
            show_default="q4_k_m",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text (or .jsonl) like that of the model's later use.",
            show_default="text that the model generates",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="About this many tokens of it are read.",
            show_default="32768, or 8192 generated",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(help="Engine: torch (Hugging Face models only, with gradients) or native."),
    ] = "auto",
    clusters: Annotated[
        int, typer.Option(min=0, max=256, help="Groups of texts for strategy similarity.")
    ] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, report the size of the output, and stop.")
    ] = False,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    verbose: Verbose = False,
) -> None:
    """Add statistics of a model's neurons to its file, for better core sets.

    Runs calibration text through the model. The tensors of a .gguf stay as they are; a Hugging
    Face model is converted and quantised first. The new file works in every other llama.cpp
    program too.
    """
    from coreinfer_edge.calibrate.convert import Conversion, check
    from coreinfer_edge.calibrate.convert import convert as convert_model
    from coreinfer_edge.calibrate.text import read_calibration
    from coreinfer_edge.model.source import resolve_source
    from coreinfer_edge.report.prior import gain_in_words

    text = None if calibration is None else read_calibration(calibration)
    path = resolve_source(source)
    if type is not None and path.is_file():
        raise ArgumentError(
            "--type is for a Hugging Face model: the tensors of a GGUF stay as they are"
        )
    conversion = Conversion(
        source=path,
        output=output,
        type=(type or "q4_k_m").lower(),
        calibration=text,
        n_tokens=calibration_tokens,
        n_clusters=clusters,
        seed=seed,
        back_end=backend,
        overwrite=overwrite,
        n_threads=threads,
        n_gpu_layers=gpu_layers,
        verbose=verbose,
    )
    if dry_run:
        expected = check(conversion)
        about = "about " if conversion.from_folder else ""
        mebibyte = 2**20
        print(
            f"{output}: {about}{expected.tensor_bytes / mebibyte:.1f} MiB of tensors"
            f" ({f'quantised to {conversion.type}' if conversion.from_folder else 'unchanged'}),"
            f" about {expected.statistics_bytes / mebibyte:.1f} MiB of statistics"
            f" ({'torch, with gradients' if conversion.with_torch else 'native'}) of"
            f" up to {conversion.tokens} tokens"
            f" {'that the model generates' if text is None else f'of {calibration}'}"
        )
        return
    with ends_when_terminated():
        prior = convert_model(conversion, progress_bar)
    print(f"{output}: with statistics of {prior.n_tokens} tokens", file=sys.stderr)
    if prior.gain is not None:
        print(gain_in_words(prior.gain), file=sys.stderr)
