"""Measures what levels take: gathering them, and setting them once.

PYTHONPATH=. python tools/bench_levels.py model.gguf --density 0.5 --threads 2

prints the seconds of gathering by dropping and with levels of the same bytes, which take turns. If
the file has statistics from calibration, levels are set once too: what loading, prompts and answers
take beside the whole model in our layout. With --text FILE it prints what setting them once costs:
the KL divergence to the whole model, with the prompt evaluated whole and on the levels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_edge import EdgeLLM
from coreinfer_edge.choose.chooser import choose, choose_levels
from coreinfer_edge.choose.divergence import Divergence
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.choose.statistics import LEVELS
from coreinfer_edge.choose.strategies import Scored
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.process_memory import private_bytes

PROMPT, ANSWER = 256, 128  # tokens


class Times:
    """Medians of seconds on the clock, and of the processor."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[float, float]]] = {}

    def of(self, name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter(), time.process_time()
        result = call(*arguments, **named)
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
        self.taken.setdefault(name, []).append(seconds)
        return result

    def print(self) -> None:
        for name, taken in self.taken.items():
            clock, processor = (statistics.median(of_each) for of_each in zip(*taken, strict=True))
            print(f"{name:<42} {clock:7.3f} s, of the processor {processor:7.3f} s")


def gathering(path: Path, density: float, rounds: int, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    times = Times()
    with EdgeLLM(path, density=density, levels=LEVELS, **options) as llm:
        core = llm.llama.core
        assert core is not None
        densities = [density] * len(core.ffns)
        for _ in range(rounds):
            scores = [rng.lognormal(0, 1.5, ffn.n_ff).astype(np.float32) for ffn in core.ffns]
            scored = Scored(scores, scores)
            for name, chosen in (
                ("gathering by dropping", choose(scored, densities)),
                ("gathering with levels", choose_levels(scored, densities, core.ffns, LEVELS)),
            ):
                core.set_core({})
                times.of(name, core.set_core, chosen)
    times.print()


def set_once(path: Path, density: float, rounds: int, options: dict[str, Any]) -> None:
    kinds = {
        "whole": {"repack": True},
        "set once": {"density": density, "strategy": "static", "levels": LEVELS},
    }
    times = Times()
    held = {}
    for i in range(rounds):
        for kind, asked in kinds.items():
            with times.of(f"{kind}: loading", EdgeLLM, path, **asked, **options) as llm:
                n_vocab = llm.llama.n_vocab()
                prompt = [(7919 * j + i) % (n_vocab - 300) + 260 for j in range(PROMPT)]
                times.of(f"{kind}: {PROMPT} tokens of prompt", llm.llama.eval, prompt)
                for token in prompt[:64]:
                    times.of(f"{kind}: a token", llm.llama.eval, [token])
                held[kind] = private_bytes() or 0
    times.print()
    for kind, n_bytes in held.items():
        print(f"{kind}: {n_bytes / 2**20:,.0f} MiB of private memory")


def divergence(path: Path, density: float, text: Path, n: int, options: dict[str, Any]) -> None:
    of_kind = {"the prompt whole": Divergence(), "all on the levels": Divergence()}
    once_options = {"density": density, "strategy": "static", "levels": LEVELS}
    with (
        EdgeLLM(path, density=density, levels=LEVELS, logits_all=True, **options) as llm,
        EdgeLLM(path, logits_all=True, **once_options, **options) as once,
    ):
        core = llm.llama.core
        assert core is not None
        assert once.llama.core is not None
        assert once.llama.chooser is not None
        core.set_core(once.llama.chooser.choose(once.llama.core.statistics(), density))
        tokens = llm.llama.tokenize(text.read_bytes(), add_bos=False)
        for start in np.linspace(0, len(tokens) - PROMPT - ANSWER - 1, n).astype(int).tolist():
            window = tokens[start : start + PROMPT + ANSWER]
            logits = []
            for use_core, model in ((False, llm), (True, llm), (None, once)):
                model.llama.reset()
                model.llama.eval(window[:PROMPT])
                if use_core is not None:
                    core.use_core(use_core)
                model.llama.eval(window[PROMPT:])
                core.use_core(False)
                logits.append(model.llama.scores[PROMPT : PROMPT + ANSWER].copy())
            for divergence_of, got in zip(of_kind.values(), logits[1:], strict=True):
                divergence_of.add(logits[0], got)
    for kind, divergence_of in of_kind.items():
        print(f"{kind}: KL {divergence_of.kl:.3f}, the same token {divergence_of.agreement:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, help="measure the divergence on windows of this")
    parser.add_argument("--windows", type=int, default=24)
    args = parser.parse_args()
    options = {"n_ctx": 512, "n_threads": args.threads, "n_threads_batch": args.threads}
    has_prior = from_header(read_header(args.model)) is not None
    if args.text is not None:
        divergence(args.model, args.density, args.text, args.windows, options)
        return
    gathering(args.model, args.density, args.rounds, options)
    if has_prior:
        set_once(args.model, args.density, args.rounds, options)


if __name__ == "__main__":
    main()
