"""Measures what the levels below full do to the FFN weights of a model.

PYTHONPATH=. python tools/measure_levels.py model.gguf

prints for each level the squared error of the weights, relative to their squares: for up and gate
by rows, for down by rows over all neurons. A neuron's output is a product of two or three rounded
weights, whose errors add up: the sum is what choose/levels.py has as ERRORS.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

from coreinfer_edge.binding.core import rounded
from coreinfer_edge.choose.statistics import LEVELS, Level

ROWS = 64  # of each matrix, evenly spaced


def relative_error(weights: np.ndarray, level: Level) -> float:
    rows = weights[:: max(1, len(weights) // ROWS)].astype(np.float32)
    held = np.stack([rounded(level, row) for row in rows])
    return float(((held - rows) ** 2).sum() / (rows**2).sum())


def main() -> None:
    tensors = {
        part: [t for t in gguf.GGUFReader(sys.argv[1]).tensors if f".ffn_{part}.weight" in t.name]
        for part in ("up", "gate", "down")
    }
    for level in LEVELS[1:]:
        errors = {
            part: float(
                np.mean(
                    [
                        relative_error(gguf.dequantize(t.data, t.tensor_type), level)
                        for t in of_part[:: max(1, len(of_part) // 8)]
                    ]
                )
            )
            for part, of_part in tensors.items()
            if of_part
        }
        parts = ", ".join(f"{part} {error:.4f}" for part, error in errors.items())
        print(f"{level} bits: {parts}; together {sum(errors.values()):.3f}")


if __name__ == "__main__":
    main()
