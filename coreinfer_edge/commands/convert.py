"""``coreinfer-edge convert``: add statistics of its neurons to a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from coreinfer_edge.commands.options import (
    GpuLayers,
    Threads,
    Verbose,
    given_options,
    read_text,
)
from coreinfer_edge.commands.output import (
    progress_bar,
    reports_errors,
)


@reports_errors
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
    text = read_text(calibration, "the calibration text")
    options = given_options(n_threads=threads, n_threads_batch=threads)
    with (
        EdgeLLM(
            path, strategy="dense", n_ctx=512, n_gpu_layers=gpu_layers, verbose=verbose, **options
        ) as llm,
        progress_bar("reading, tokens", calibration_tokens) as advance,
    ):
        prior = calibrate(llm, header, text, calibration_tokens, clusters, seed, advance)
    with progress_bar("writing, bytes", sum(t.n_bytes for t in header.tensors.values())) as advance:
        write_with_prior(header, prior, output, overwrite, advance)
    print(f"{output}: with statistics of {prior.n_tokens} tokens", file=sys.stderr)
