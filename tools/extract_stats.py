"""Extracts the statistics of a model's FFN neurons into a NumPy file (.npz).

If the GGUF has statistics, these are extracted. Otherwise calibration text is run through the
model. With --hf, torch runs the text through the Hugging Face model that the GGUF was made from.

The arrays are named LAYER.mean, LAYER.mean_square, LAYER.normalized_mean_square, LAYER.down_norms
[n_ff each], LAYER.gradient (with --hf) and LAYER.frequency [n_clusters, n_ff]; besides tokens,
layers, and sensitivity, zero_share [n_ffn] where known.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_edge.calibrate.convert import Conversion, calibrated
from coreinfer_edge.calibrate.text import read_calibration
from coreinfer_edge.choose.prior import Prior, from_header
from coreinfer_edge.errors import CoreInferError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.model.source import resolve


def arrays_of(prior: Prior) -> dict[str, Any]:
    """The arrays of the .npz by name."""
    result: dict[str, Any] = {"tokens": prior.n_tokens, "layers": prior.layers}
    for name in ("sensitivity", "zero_share"):
        if getattr(prior, name) is not None:
            result[name] = getattr(prior, name)
    kinds = ("mean", "mean_square", "normalized_mean_square", "down_norms", "gradient")
    for i, layer in enumerate(prior.layers):
        for kind in kinds:
            if (arrays := getattr(prior, kind)) is not None:
                result[f"{layer}.{kind}"] = arrays[i]
        if prior.clusters is not None:
            result[f"{layer}.frequency"] = prior.clusters.frequency[i]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=".gguf, demo or hf:// address of one")
    parser.add_argument("output", type=Path, help="the .npz file to write")
    parser.add_argument("--hf", type=Path, help="folder of the Hugging Face model it is made from")
    parser.add_argument("--calibration", type=Path, help="text or .jsonl; default: generated")
    parser.add_argument("--tokens", type=int, help="about how many tokens of it")
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        header = read_header(resolve(args.model))
        prior = None if args.hf or args.calibration else from_header(header)
        if prior is None:
            prior = calibrated(
                Conversion(
                    source=args.hf or header.path,
                    output=args.output,
                    calibration=read_calibration(args.calibration) if args.calibration else None,
                    n_tokens=args.tokens,
                    n_clusters=args.clusters,
                    seed=args.seed,
                    n_threads=args.threads,
                ),
                header,
            )
        np.savez(args.output, **arrays_of(prior))
    except (CoreInferError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
