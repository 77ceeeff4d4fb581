"""Measures a model on a GPU whose memory is capped: llama.cpp's placements beside ours.

Each way to place the model is a process of its own, in turns. llama.cpp's ways are dense: as many
whole layers as fit (-ngl), or all layers with the FFNs of all, or of just enough, in main memory
(--override-tensor). Exact decoding drafts with the core set; --agreement says how often a draft is
right, since random weights have no agreement of their own. Prints a line of JSON for each run, then
a table of medians.

python tools/bench_gpu.py 7b.gguf --cap 2.4GiB --density 0.4
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

WAYS = {
    "layers": "llama.cpp, whole layers on the GPU",
    "ffn-on-cpu": "llama.cpp, FFNs of all layers on the CPU",
    "some-ffn-on-cpu": "llama.cpp, FFNs of some layers on the CPU",
    "core": "core set, gpu_memory",
    "exact": "exact, gpu_memory",
    "whole": "llama.cpp, no cap",
    "whole-core": "core set, no cap",
}


def used_mib() -> list[int]:
    """The memory of each GPU that is in use, by anybody."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def less(after: list[int], before: list[int]) -> list[int]:
    return [a - b for a, b in zip(after, before, strict=True)]


def agree_by_chance(llama: Any, agreement: float) -> None:
    """Let drafts agree with this probability: those of random weights never would."""
    rng = random.Random(0)
    sample = llama.sample

    def drawn(*arguments: Any, idx: int | None = None, **named: Any) -> int:
        token = sample(*arguments, idx=idx, **named)
        if idx is None or idx + 1 >= llama.n_tokens:
            return int(token)
        draft = int(llama.input_ids[idx + 1])
        return draft if rng.random() < agreement else (draft + 1) % llama.n_vocab()

    llama.sample = drawn


def load(options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The model placed in one way, and facts about the placement."""
    from coreinfer_edge import EdgeLLM
    from coreinfer_edge.binding.core import host_buffer_type
    from coreinfer_edge.binding.llama import Llama
    from coreinfer_edge.model.source import header_of
    from coreinfer_edge.run.gpu_planner import GpuPlanner
    from coreinfer_edge.run.planning import PlanRequest

    way, n_ctx, density = options.way, options.ctx, options.density
    if way in ("core", "exact"):
        exact = way == "exact"
        llm = EdgeLLM(
            options.model,
            gpu_memory=options.cap,
            memory=options.memory,
            density=density,
            levels=options.levels,
            n_ctx=n_ctx,
            exact=exact,
        )
        if exact and options.agreement is not None:
            agree_by_chance(llm.llama, options.agreement)
        plan = llm.plan
        assert plan is not None
        return llm, plan.as_dict()
    if way == "whole-core":
        given: dict[str, Any] = {"density": density, "levels": options.levels, "warmup": 0}
        given["flash_attn"] = None
        return EdgeLLM(options.model, n_gpu_layers=-1, n_ctx=n_ctx, **given), {}
    header = header_of(options.model)
    most = header.n_layers + 1
    arguments: dict[str, Any] = {"model_path": str(header.path), "n_ctx": n_ctx, "verbose": False}
    # where the GPU has it, as llama.cpp's own programs
    arguments["flash_attn"] = False if options.no_flash_attn else None
    if way == "whole":
        return Llama(**arguments, n_gpu_layers=most), {}
    planner = GpuPlanner(
        PlanRequest(header=header, llama_kwargs=arguments, strategy="dense"), options.cap
    )
    if way == "layers":
        n = planner.plan().n_gpu_layers
        return Llama(**arguments, n_gpu_layers=n), {"n_gpu_layers": n}
    n = header.n_layers
    if way == "some-ffn-on-cpu":
        host = planner.planned([most], "host").devices[0]
        whole = planner.planned([most], "device").devices[0]
        ffn = (whole.weights - host.weights) / n  # of a layer
        n = math.ceil(n - (host.budget - host.total) / ffn)
    pattern = rf"^blk\.({'|'.join(map(str, range(n)))})\.ffn_(up|gate|down)\.weight$"
    overrides = {pattern: host_buffer_type()}
    # not mapped: in pinned memory
    llm = Llama(**arguments, n_gpu_layers=most, tensor_buft_overrides=overrides, use_mmap=False)
    return llm, {"ffn_on_cpu": n}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One way: medians of the rounds after the first."""
    before = used_mib()
    from coreinfer_edge.binding.core import devices

    devices()
    driver = less(used_mib(), before)
    start = time.perf_counter()
    llm, facts = load(options)
    result: dict[str, Any] = {"way": options.way, "load_seconds": time.perf_counter() - start}
    most = used_mib()
    llama = getattr(llm, "llama", llm)
    import numpy as np

    rng = np.random.default_rng(7)
    rounds = []
    for _ in range(options.rounds):
        prompt = rng.integers(300, 30000, options.prompt).tolist()
        times = [time.perf_counter()]
        for _token in llama.generate(prompt, temp=0.0):
            times.append(time.perf_counter())
            if len(times) > options.tokens:
                break
        most = [max(pair) for pair in zip(most, used_mib(), strict=True)]
        steps = np.diff(times)
        # exact: several tokens come at once, and the first ones come without drafts
        step = np.mean(steps[24:]) if options.way == "exact" else np.median(steps[1:])
        rounds.append(
            {
                "prefill_tokens_per_second": options.prompt / steps[0],
                "tokens_per_second": 1 / float(step),
                "choose_seconds": float(steps[1] - np.median(steps[1:])),
                "answer_seconds": times[-1] - times[0],
            }
        )
    for key in rounds[0]:
        result[key] = round(statistics.median(float(run[key]) for run in rounds[1:] or rounds), 3)
    if options.way == "exact":
        run = llm.llama.session.run
        result.update(drafted=run.drafted, accepted=run.accepted, passes=run.passes)
    used = less(most, before)
    return {**result, "used_mib": sum(used), "used_of_each": used, "driver_mib": driver, **facts}


def levels(text: str) -> list[Any]:
    return [level if level == "full" else int(level) for level in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--cap", required=True, help="memory of the GPU, like 2.4GiB")
    parser.add_argument("--memory", help="of main memory, for the core set and exact")
    parser.add_argument(
        "--density", type=lambda text: None if text == "most" else float(text), default=0.4
    )
    parser.add_argument("--levels", type=levels, help="like full,4,3,2; by default all there are")
    parser.add_argument(
        "--agreement", type=float, help="exact: how often a draft is right, by chance"
    )
    parser.add_argument("--no-flash-attn", action="store_true", help="llama.cpp's ways without it")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="answers in each process")
    parser.add_argument("--turns", type=int, default=2, help="processes for each way")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for _ in range(options.turns):
        for way in options.ways:
            done = subprocess.run([sys.executable, *sys.argv, "--way", way], stdout=subprocess.PIPE)
            lines = done.stdout.decode().splitlines()
            if done.returncode == 0 and lines:
                found[way].append(json.loads(lines[-1]))
                print(lines[-1], flush=True)
            else:
                print(f"{way}: failed", flush=True)
    print(f"{'':44}{'prefill':>9}{'decode':>9}{'answer':>9}{'MiB':>8}")
    for way, runs in found.items():
        if runs:
            keys = ("prefill_tokens_per_second", "tokens_per_second", "answer_seconds", "used_mib")
            row = [statistics.median(run[key] for run in runs) for key in keys]
            print(f"{WAYS[way]:44}{row[0]:9.0f}{row[1]:9.1f}{row[2]:9.2f}{row[3]:8.0f}")


if __name__ == "__main__":
    main()
