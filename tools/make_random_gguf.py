"""Makes a GGUF file with random weights (coreinfer_edge/measure/random_model.py).

python tools/make_random_gguf.py out.gguf --arch llama --type q4_k --shape small
python tools/make_random_gguf.py 1b.gguf --shape 1b --type q4_0
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# As a script beside a built source tree; an installed coreinfer_edge goes first.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from coreinfer_edge.measure.random_model import ARCHS, SHAPES, TYPES, make_random_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="GGUF file to write")
    parser.add_argument("--arch", choices=ARCHS, default="llama")
    parser.add_argument("--type", choices=TYPES, default="f32", help="type of all matrices")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    for name in ("n-layer", "n-embd", "n-ff", "n-head", "n-head-kv", "n-vocab", "n-ctx"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--head-dim", type=int, help="default: n_embd / n_head")
    parser.add_argument(
        "--tied",
        action=argparse.BooleanOptionalAction,
        help="use the token embedding as the output (default: as in the shape)",
    )
    parser.add_argument("--bias", action="store_true", default=None, help="with llama")
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    path = arguments.pop("path")
    start = time.perf_counter()
    try:
        make_random_gguf(path, **arguments)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{path} cannot be written: {error.strerror}")
    seconds = time.perf_counter() - start
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB in {seconds:.1f} s")


if __name__ == "__main__":
    main()
