"""Compares what was planned for NVIDIA GPUs with what is taken, for random budgets.

Each combination of budget, context, density and levels is a process of its own, which answers one
prompt. Prints a line for each, and at the end how many kept to their budget.

python tools/check_gpu_budgets.py 7b.gguf --least 2.2GiB --most 5GiB -n 20
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

MIB = 1 << 20


def used_mib() -> list[int]:
    """The memory of each GPU that is in use, by anybody."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def taken(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The plan, and the most that the process took of each GPU."""
    before = most = used_mib()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.05):
            most = [max(pair) for pair in zip(most, used_mib(), strict=True)]

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        from coreinfer_edge import EdgeLLM, MemoryBudgetError

        with EdgeLLM(model, **options) as llm:
            prompt = [7919 * i % 20000 + 300 for i in range(options["n_ctx"] * 3 // 4)]
            llm.generate(prompt, max_tokens=32, temperature=0)
            assert llm.plan is not None
            plan = llm.plan.as_dict()
    except MemoryBudgetError as error:
        return {"refused": str(error)}
    finally:
        done.set()
        watching.join()
    return {"plan": plan, "used": [a - b for a, b in zip(most, before, strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--least", default="2GiB", help="the smallest budget")
    parser.add_argument("--most", default="6GiB", help="the largest budget")
    parser.add_argument("-n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(taken(options.model, json.loads(options.one))))
        return
    from coreinfer_edge.run.planning import parse_size

    rng = random.Random(options.seed)
    n_kept, n_run = 0, 0
    for _ in range(options.n):
        budget = rng.randint(parse_size(options.least) // MIB, parse_size(options.most) // MIB)
        one = {
            "gpu_memory": budget * MIB,
            "n_ctx": rng.choice([256, 512, 1024, 2048, 4096]),
            "density": rng.choice([None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7]),
            "levels": rng.choice([None, ["full"]]),
        }
        command = [sys.executable, *sys.argv, "--one", json.dumps(one)]
        lines = subprocess.run(command, stdout=subprocess.PIPE).stdout.decode().splitlines()
        result = json.loads(lines[-1]) if lines else {"refused": "it failed"}
        what = f"{budget} MiB, context {one['n_ctx']}, density {one['density']}, {one['levels']}"
        if "refused" in result:
            print(f"{what}: {result['refused']}", flush=True)
            continue
        n_run += 1
        plan = result["plan"]
        parts = []
        for device, used in zip(plan["devices"], result["used"], strict=False):
            planned = device["total"] / MIB
            parts.append(f"{device['name']} {used} MiB, {used / planned:.3f} of {planned:.0f}")
        kept = all(used <= budget for used in result["used"])
        n_kept += kept
        print(
            f"{what}: {plan['n_gpu_layers']} layers, FFN {plan['ffn']}, density"
            f" {plan['density']:.2f}: {', '.join(parts)}{'' if kept else ' OVER THE BUDGET'}",
            flush=True,
        )
    print(f"{n_kept} of {n_run} kept to the budget")


if __name__ == "__main__":
    main()
