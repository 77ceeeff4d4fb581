"""Models whose weights are streamed from their file, to compare with the same in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coreinfer_edge.binding.placement import Placement
from coreinfer_edge.run.core_llama import CoreLlama

# one batch each, so that rounding is the same with and without a plan
EXACT: dict[str, Any] = {
    "n_ctx": 512,
    "n_threads": 1,
    "n_threads_batch": 1,
    "n_batch": 64,
    "n_ubatch": 64,
}


def streamed(path: Path, is_streamed: bool, **options: Any) -> CoreLlama:
    n_outputs = 0 if options.get("logits_all") else 32
    placement = Placement(streamed=is_streamed, n_outputs=n_outputs)
    return CoreLlama(
        model_path=str(path),
        files=[path],
        placement=placement,
        verbose=False,
        **{
            "density": 0.5,
            "quality": 0.25,
            "strategy": "energy",
            "layers": None,
            "refresh": None,
            "warmup": 0,
            "prior": None,
            **EXACT,
            **options,
        },
    )


def greedy(llama: CoreLlama, n: int = 24) -> list[int]:
    steps = llama.generate([4 + 31 * i % 290 for i in range(100)], temp=0.0)
    tokens = [token for _, token in zip(range(n), steps, strict=False)]
    steps.close()
    return tokens


def assert_same_answer(path: Path) -> None:
    """Streamed from the file and with all weights in memory."""
    whole, from_file = streamed(path, False), streamed(path, True)
    try:
        assert greedy(from_file) == greedy(whole)
    finally:
        whole.close()
        from_file.close()
