#!/usr/bin/env python3
"""Exact decoding beside dense decoding: tokens that differ, and how fast each is.

    tools/bench_exact.py model.gguf                  # in memory
    tools/bench_exact.py model.gguf --memory 180MiB  # both within this, the FFNs from the file
    tools/bench_exact.py --table                     # when it pays, by agreement and cost

Greedy answers to the chat prompts of ``eval``, in turns: dense, exact, exact, dense. With --memory
dense decoding streams all FFN weights for each token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings
from contextlib import ExitStack
from typing import Any

from coreinfer_edge import EdgeLLM
from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.measure.quality import CHAT_PROMPTS
from coreinfer_edge.run.exact import Pace


def answers(llm: EdgeLLM, prompt: str, max_tokens: int) -> tuple[list[int], float, float]:
    """The tokens of an answer, and its seconds and processor seconds without the prompt's."""
    processor = time.process_time()
    if llm.llama.why_no_chat is None:
        message = {"role": "user", "content": prompt}
        text = llm.chat([message], max_tokens=max_tokens, temperature=0)
    else:  # a base model goes on writing
        text = llm.generate(prompt, max_tokens=max_tokens, temperature=0)
    processor = time.process_time() - processor
    assert llm.last is not None
    seconds = llm.last.decode_seconds + llm.last.choose_seconds
    return llm.llama.tokenize(text.encode(), add_bos=False), seconds, processor


def all_answers(
    model: str, options: dict[str, Any], prompts: list[str], max_tokens: int
) -> list[Any]:
    """The answers of a model of its own, with what was drafted for each."""
    warnings.simplefilter("ignore")
    with EdgeLLM(model, **options) as llm:
        assert llm.plan is not None
        print(f"streamed: {llm.plan.streamed}, density {llm.plan.density:.2f}", flush=True)
        results = []
        for prompt in prompts:
            found = answers(llm, prompt, max_tokens)
            assert llm.last is not None
            results.append((*found, (llm.last.drafted, llm.last.accepted, llm.last.passes)))
        return results


def compare(arguments: argparse.Namespace) -> None:
    options: dict[str, Any] = {
        "n_ctx": 1024,
        "n_threads": arguments.threads,
        "n_threads_batch": arguments.threads,
        "memory": arguments.memory,
    }
    drafting = {"density": arguments.density, "levels": arguments.levels, "exact": True}
    # dense all the way: a core set that an answer never comes to
    dense = {"warmup": 10**6, "density": 0.05} if arguments.memory else {}
    rows: list[tuple[float, float, float, float]] = []
    differ = n_tokens = drafted = accepted = passes = 0

    def one(which: dict[str, Any], prompts: list[str]) -> list[Any]:
        task = (arguments.model, {**options, **which}, prompts, arguments.max_tokens)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(all_answers, task)

    prompts = list(CHAT_PROMPTS[: arguments.prompts])
    with ExitStack() as stack:
        if arguments.memory is None:  # both live side by side, and take turns
            models = [
                stack.enter_context(EdgeLLM(arguments.model, **options, **which))
                for which in (dense, drafting)
            ]
            pairs = []
            for i, prompt in enumerate(prompts):
                pair: list[Any] = [None, None]
                for k in (0, 1) if i % 2 else (1, 0):
                    found = answers(models[k], prompt, arguments.max_tokens)
                    last = models[k].last
                    assert last is not None
                    pair[k] = (*found, (last.drafted, last.accepted, last.passes))
                pairs.append(pair)
        else:  # a budget counts what a process has: one after the other, in processes of their own
            half = len(prompts) // 2
            first = one(dense, prompts[:half]), one(drafting, prompts[:half])
            second = one(drafting, prompts[half:]), one(dense, prompts[half:])
            pairs = [
                *map(list, zip(first[0], first[1], strict=True)),
                *map(list, zip(second[1], second[0], strict=True)),
            ]
    for (tokens, seconds, processor, _), (own, own_seconds, own_processor, figures) in pairs:
        differ += sum(a != b for a, b in zip(tokens, own, strict=False)) + abs(
            len(tokens) - len(own)
        )
        n_tokens += len(tokens)
        rows.append((seconds, own_seconds, processor, own_processor))
        drafted, accepted, passes = (
            a + b for a, b in zip((drafted, accepted, passes), figures, strict=True)
        )
    print(f"{differ} of {n_tokens} tokens differ")
    print(
        f"{drafted} drafted, {accepted} accepted, {passes} passes,"
        f" {1 + accepted / max(1, passes):.2f} tokens a pass"
    )
    speed = statistics.median(row[0] / row[1] for row in rows if row[1])
    processor = statistics.median(row[2] / row[3] for row in rows)
    total = sum(row[0] for row in rows) / sum(row[1] for row in rows)
    print(f"speed of exact in that of dense: {speed:.2f} (median), {total:.2f} (in all)")
    print(f"by processor time, prompts included: {processor:.2f} (median)")


def table() -> None:
    """How many times as fast as dense, by agreement and by what a core token costs."""
    agreements = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    print("core token / dense pass | " + " | ".join(f"{a:.0%}" for a in agreements))
    for cost in (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8):
        pace = Pace(cost)
        pace.passed(1, 1.0)
        for _ in range(31):  # a further token of a pass: little where weights stream
            pace.passed(16, 1.0 + 15 * (0.02 if cost < 0.3 else 0.12))
        gains = [max(1.0, pace.gain(agreement)) for agreement in agreements]
        print(f"{cost} | " + " | ".join(f"{gain:.2f}" for gain in gains))


def level(text: str) -> Level:
    return text if text == "full" else int(text)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--memory")
    parser.add_argument("--density", type=float)
    parser.add_argument(
        "--levels", type=lambda text: [level(x) for x in text.split(",")], default=["full"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--always", action="store_true", help="draft whether it pays or not")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.always:
        for name in ("pays", "may_pay"):
            setattr(Pace, name, True)
        Pace.next_pays = lambda pace, likely: likely > 0.3  # type: ignore[method-assign]
        Pace.verifying_pays = lambda pace, likely: likely > 0.1  # type: ignore[method-assign]
    if arguments.table:
        table()
    else:
        compare(arguments)


if __name__ == "__main__":
    main()
