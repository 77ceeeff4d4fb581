"""Makes a GGUF with statistics of its neurons, from a Hugging Face folder or a GGUF.

The same as ``coreinfer-edge convert``, as a script to copy from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from coreinfer_edge.calibrate.convert import BACK_ENDS, Conversion, convert
from coreinfer_edge.calibrate.hugging_face import TYPES
from coreinfer_edge.calibrate.text import read_calibration
from coreinfer_edge.errors import CoreInferError
from coreinfer_edge.model.source import resolve_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="folder, .gguf, demo or hf:// address")
    parser.add_argument("output", type=Path, help="the new .gguf file")
    parser.add_argument("--type", default="q4_k_m", choices=TYPES, help="of a converted folder")
    parser.add_argument("--calibration", type=Path, help="text or .jsonl; default: generated")
    parser.add_argument("--tokens", type=int, help="about how many tokens of it")
    parser.add_argument("--backend", default="auto", choices=BACK_ENDS)
    parser.add_argument("--clusters", type=int, default=8, help="for the strategy similarity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    try:
        prior = convert(
            Conversion(
                source=resolve_source(args.source),
                output=args.output,
                type=args.type,
                calibration=read_calibration(args.calibration) if args.calibration else None,
                n_tokens=args.tokens,
                n_clusters=args.clusters,
                seed=args.seed,
                back_end=args.backend,
                n_threads=args.threads,
            )
        )
    except CoreInferError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: with statistics of {prior.n_tokens} tokens")


if __name__ == "__main__":
    main()
