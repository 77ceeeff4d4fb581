"""Measures what the levels below full do to the FFN weights of a model.

PYTHONPATH=. python tools/measure_levels.py model.gguf [--device]

prints for each level the squared error of the weights, relative to their squares: for up and gate
by rows, for down by rows over all neurons. A neuron's output is a product of two or three rounded
weights, whose errors add up: the sum is what choose/statistics.py has as ERRORS, and with --device
what native/core_set.cpp has of each type.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

from coreinfer_edge.binding.core import rounded, rounded_on_device
from coreinfer_edge.choose.statistics import LEVELS, Level
from coreinfer_edge.errors import ArgumentError

ROWS = 64  # of each matrix, evenly spaced
DEVICE_BLOCK = 256  # the columns of a level on a device are a multiple of this


def relative_error(tensor: gguf.ReaderTensor, level: Level, on_device: bool) -> float:
    weights = gguf.dequantize(tensor.data, tensor.tensor_type)
    rows = weights[:: max(1, len(weights) // ROWS)].astype(np.float32)
    columns = ".ffn_down." in tensor.name
    if on_device and columns:
        rows = rows[:, : rows.shape[1] // DEVICE_BLOCK * DEVICE_BLOCK]
    try:
        held = np.stack(
            [
                rounded_on_device(level, row, int(tensor.tensor_type), columns)
                if on_device
                else rounded(level, row)
                for row in rows
            ]
        )
    except ArgumentError:
        return float("nan")  # this width cannot have the level
    return float(((held - rows) ** 2).sum() / (rows**2).sum())


def main() -> None:
    on_device = "--device" in sys.argv
    tensors = {
        part: [t for t in gguf.GGUFReader(sys.argv[1]).tensors if f".ffn_{part}.weight" in t.name]
        for part in ("up", "gate", "down")
    }
    for level in LEVELS[1:]:
        errors = {
            part: float(
                np.mean(
                    [
                        relative_error(tensor, level, on_device)
                        for tensor in of_part[:: max(1, len(of_part) // 8)]
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
