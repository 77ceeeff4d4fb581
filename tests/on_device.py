"""Runs a model on a device: a GPU, or the processor behind an RPC server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rpc_server import rpc_server

from coreinfer_edge.binding.core import devices
from coreinfer_edge.run.gpu_budget import (
    CUBLAS_BYTES,
    CUDA_BYTES,
    CUDA_GRANULARITY,
    CUDA_RUN_BYTES,
)

MIB = 1 << 20

# What CUDA takes itself comes on top of a budget.
IS_CUDA = any(device.name.startswith("CUDA") for device in devices())
# The memory of Mesa's software driver is that of the process.
IS_SOFTWARE = any("llvmpipe" in device.description for device in devices())
TIMEOUT = 1800 if IS_SOFTWARE else 240
EXTRA = CUDA_BYTES + CUDA_RUN_BYTES + CUDA_GRANULARITY if IS_CUDA else 0
# The same for weights that are not quantised.
EXTRA_CUBLAS = EXTRA + CUBLAS_BYTES if IS_CUDA else 0

# Answers two prompts in a process of its own, and prints what it took.
SCRIPT = """
import dataclasses, json, sys, threading
from coreinfer_edge import CoreInferError, EdgeLLM
from coreinfer_edge.binding.core import context_memory, devices
from coreinfer_edge.run.process_memory import private_bytes
path, options = sys.argv[1], json.loads(sys.argv[2])
more = options.pop("more", {})
try:
    options = {"n_threads": 1, "n_threads_batch": 1, "n_ctx": 512, **options}
    with EdgeLLM(path, **options) as llm:
        answers, peak = [], 0
        stop = threading.Event()

        def watch():
            global peak
            while not stop.wait(0.005):
                peak = max(peak, private_bytes() or 0)

        watching = threading.Thread(target=watch)
        watching.start()
        prompt = [7919 * i % 300 + 10 for i in range(more.get("prompt", 200))]
        for turn in range(2):
            answers.append(llm.llama.detokenize(
                [t for t, _ in zip(llm.llama.generate(prompt, temp=0.0), range(24))], special=True
            ).decode("latin-1"))
            llm.generate(prompt, max_tokens=24, temperature=0)
            prompt += [5, 6, 7]  # the second turn continues the first
        stop.set()
        watching.join()
        statistics = llm.llama.session.of_prompt
        print(json.dumps({
            "answers": answers,
            "last": dataclasses.asdict(llm.last),
            "plan": llm.plan and llm.plan.as_dict(),
            "device": context_memory(llm.llama.ctx, 0),
            "devices": [context_memory(llm.llama.ctx, i) for i in range(len(devices()))],
            "peak": peak,
            "full_bytes": llm.llama.core.full_bytes if llm.llama.core else 0,
            "core_bytes": llm.llama.core.core_bytes if llm.llama.core else 0,
            "statistics": statistics and {
                name: [array.tolist() for array in getattr(statistics, name)]
                for name in more.get("statistics", [])
            },
        }))
except CoreInferError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@contextmanager
def device_addresses(n: int = 1) -> Iterator[list[str]]:
    """Addresses of n servers for ``rpc``; none where there is a GPU."""
    with ExitStack() as servers:
        n_servers = 0 if devices() else n
        yield [servers.enter_context(rpc_server())[0] for _ in range(n_servers)]


def run(path: Path, **options: Any) -> dict[str, Any]:
    """What SCRIPT prints, with these options of ``EdgeLLM``."""
    command = [sys.executable, "-c", SCRIPT, str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
