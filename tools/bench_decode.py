#!/usr/bin/env python3
"""Measures what the core path gains and costs, on a random-weight model, as JSON.

Dense and core run in turn (A B A B ...) in one process, decoding in bursts of a few tokens; figures
are medians.
Efficiency is the speed-up over the ratio of the bytes read per token: 1.0 would be all that there
is to gain. Example:

    python tools/bench_decode.py --shape 1b --type q4_0 q8_0 q4_k --density 0.4 0.6
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from make_random_gguf import SHAPES, make_random_gguf

from coreinfer_edge import EdgeLLM
from coreinfer_edge.gguf_header import read_header
from coreinfer_edge.inspect import describe

BURST = 8


def bytes_per_token(path: Path, n_cached: int) -> tuple[int, int, int]:
    """Bytes that decoding one token dense reads.

    Args:
        path: the model.
        n_cached: tokens in the KV cache, which is in half precision.

    Returns:
        Bytes of all weights, of the FFN weights among them, and of keys and values.
    """
    (dense,) = describe(path, densities=[1.0]).densities
    keys_and_values = sum(
        n_cached * tensor.shape[1] * 2
        for name, tensor in read_header(path).tensors.items()
        if re.search(r"\.attn_[kv]\.weight", name)
    )
    return dense.read_bytes_per_token, dense.ffn_bytes, keys_and_values


class Run:
    """One pre-fill, and the tokens after it on demand."""

    def __init__(self, llm: EdgeLLM, prompt: list[int]) -> None:
        self.llama = llm.llama
        self.tokens = self.llama.generate(prompt, temp=0.0)
        self.decode(2)  # the second token is the first with the core set: it chooses and gathers

    def decode(self, n: int) -> float:
        """Decode n more tokens; seconds per token."""
        start = time.perf_counter()
        produced = sum(1 for _ in itertools.islice(self.tokens, n))
        assert produced == n, "the context is full"
        return (time.perf_counter() - start) / n

    @property
    def figures(self) -> Any:
        return self.llama.run


def spread(values: list[float]) -> float:
    """Distance between the quartiles over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def measure(path: Path, density: float, args: argparse.Namespace) -> dict[str, Any]:
    """Dense and core in turn, on one model at one density."""
    # a new prompt each round, so that nothing is cached and the core set is gathered anew
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 260, args.prompt).tolist() for _ in range(args.rounds)]
    options: dict[str, Any] = {
        "n_ctx": args.prompt + args.decode + 16,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": not args.no_flash_attn,
    }
    prefill: dict[str, list[float]] = {"dense": [], "core": []}
    decode: dict[str, list[float]] = {"dense": [], "core": []}
    choose = []
    with (
        EdgeLLM(path, strategy="dense", **options) as dense,
        EdgeLLM(path, density=density, warmup=0, **options) as core,
    ):
        Run(dense, prompts[0][::-1])  # reads the model from the disk
        for prompt in prompts:
            runs = {"dense": Run(dense, prompt), "core": Run(core, prompt)}
            for name, run in runs.items():
                prefill[name].append(run.figures.prefill_seconds)
            choose.append(runs["core"].figures.choose_seconds)
            # in short bursts, so that what slows the machine down meets both
            for _ in range(args.decode // BURST):
                for name, run in runs.items():
                    decode[name].append(run.decode(BURST))
            core_ffn_bytes = runs["core"].figures.core_bytes
            for run in runs.values():
                run.tokens.close()

    weights, ffn_bytes, cache = bytes_per_token(path, args.prompt + args.decode // 2)
    dense_bytes = weights + cache
    core_bytes = dense_bytes - ffn_bytes + core_ffn_bytes
    seconds = {name: statistics.median(values) for name, values in decode.items()}
    speedup = seconds["dense"] / seconds["core"]
    ratio = dense_bytes / core_bytes
    dense_prefill = statistics.median(prefill["dense"])
    return {
        "density": density,
        "dense_tokens_per_second": 1 / seconds["dense"],
        "core_tokens_per_second": 1 / seconds["core"],
        "dense_spread": spread(decode["dense"]),
        "core_spread": spread(decode["core"]),
        "dense_bytes_per_token": dense_bytes,
        "core_bytes_per_token": core_bytes,
        "speedup": speedup,
        "bytes_ratio": ratio,
        "efficiency": speedup / ratio,
        "dense_prefill_seconds": dense_prefill,
        "core_prefill_seconds": statistics.median(prefill["core"]),
        "collect_share": statistics.median(prefill["core"]) / dense_prefill - 1,
        "first_choose_share": choose[0] / dense_prefill,
        "choose_seconds": statistics.median(choose),
        "choose_share": statistics.median(choose) / dense_prefill,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--type", nargs="+", default=["q4_0"])
    parser.add_argument("--density", nargs="+", type=float, default=[0.4, 0.6])
    parser.add_argument("--prompt", type=int, default=256, help="tokens to pre-fill")
    parser.add_argument("--decode", type=int, default=32, help="tokens to decode in each round")
    parser.add_argument("--rounds", type=int, default=9)
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
