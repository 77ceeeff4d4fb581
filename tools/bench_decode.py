#!/usr/bin/env python3
"""Measures what the core path gains and costs, on a random-weight model, as JSON.

Dense and core run in turn (A B A B ...) in one process; figures are medians over the rounds.
Efficiency is the speed-up over the ratio of the bytes read per token: 1.0 would be all that there
is to gain. Example:

    python tools/bench_decode.py --shape 1b --type q4_0 q8_0 q4_k --density 0.4 0.6
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from make_random_gguf import SHAPES, make_random_gguf

from coreinfer_edge import EdgeLLM
from coreinfer_edge.gguf_header import read_header


def bytes_per_token(path: Path) -> tuple[int, int]:
    """Bytes of weights that decoding one token reads dense, and those of the FFNs among them."""
    tensors = read_header(path).tensors
    tied = "output.weight" not in tensors
    total = sum(t.n_bytes for name, t in tensors.items() if tied or name != "token_embd.weight")
    return total, sum(
        t.n_bytes for name, t in tensors.items() if ".ffn_" in name and "norm" not in name
    )


def run(llm: EdgeLLM, prompt: list[int], n_decode: int) -> dict[str, float]:
    """Pre-fill and decode once; what it took."""
    llama = llm.llama
    tokens = llama.generate(prompt, temp=0.0)
    produced = list(itertools.islice(tokens, n_decode + 1))
    tokens.close()
    assert len(produced) == n_decode + 1
    figures = llama.run
    return {
        "prefill": figures.prefill_seconds,
        "choose": figures.choose_seconds,
        "decode": n_decode / figures.decode_seconds,
        "core_bytes": figures.core_bytes,
    }


def spread(values: list[float]) -> float:
    """Distance between the quartiles over the median."""
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def measure(path: Path, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """Dense and core in turn, on one model at one density."""
    # a new prompt each round, so that nothing is cached and the core set is gathered anew
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 260, args.prompt).tolist() for _ in range(args.rounds + 1)]
    options: dict[str, Any] = {
        "n_ctx": args.prompt + args.decode + 8,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": not args.no_flash_attn,
    }
    with (
        EdgeLLM(path, strategy="dense", **options) as dense,
        EdgeLLM(path, density=density, warmup=0, **options) as core,
    ):
        first = run(core, prompts[-1], args.decode)  # the only one that reads the norms of down
        run(dense, prompts[-1], args.decode)
        a, b = [], []
        for prompt in prompts[:-1]:
            a.append(run(dense, prompt, args.decode))
            b.append(run(core, prompt, args.decode))

    def median(runs: list[dict[str, float]], key: str) -> float:
        return statistics.median(r[key] for r in runs)

    dense_bytes, ffn_bytes = bytes_per_token(path)
    core_bytes = dense_bytes - ffn_bytes + int(b[0]["core_bytes"])
    speedup = median(b, "decode") / median(a, "decode")
    ratio = dense_bytes / core_bytes
    return {
        "density": density,
        "dense_tokens_per_second": median(a, "decode"),
        "core_tokens_per_second": median(b, "decode"),
        "dense_spread": spread([r["decode"] for r in a]),
        "core_spread": spread([r["decode"] for r in b]),
        "dense_bytes_per_token": dense_bytes,
        "core_bytes_per_token": core_bytes,
        "speedup": speedup,
        "bytes_ratio": ratio,
        "efficiency": speedup / ratio,
        "dense_prefill_seconds": median(a, "prefill"),
        "core_prefill_seconds": median(b, "prefill"),
        "collect_share": median(b, "prefill") / median(a, "prefill") - 1,
        "first_choose_seconds": first["choose"],
        "choose_seconds": median(b, "choose"),
        "choose_share_of_prefill": median(b, "choose") / median(a, "prefill"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--type", nargs="+", default=["q4_0"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.4, 0.6])
    parser.add_argument("--prompt", type=int, default=256, help="tokens to pre-fill")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode in each run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--no-flash-attn", action="store_true", help="llama.cpp's own default is on"
    )
    parser.add_argument("--threads", type=int, default=None, help="default: llama.cpp's")
    parser.add_argument("--cache", type=Path, default=None, help="folder to keep the models in")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = []
        for type_ in args.type:
            path = folder / f"random-{args.shape}-{type_}.gguf"
            if not path.exists():
                print(f"making {path.name}", file=sys.stderr)
                make_random_gguf(path, "llama", type=type_, shape=args.shape)
            for density in args.density:
                result = {"shape": args.shape, "type": type_, **measure(path, density, args)}
                results.append(result)
                print(f"{type_} {density}: efficiency {result['efficiency']:.3f}", file=sys.stderr)
    print(json.dumps({"machine": platform.processor() or platform.machine(), "results": results}))


if __name__ == "__main__":
    main()
