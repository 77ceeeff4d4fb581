"""Spends bytes on the precision of neurons: the least damage for the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.choose.statistics import LEVELS, Floats, Level

# The squared error of a neuron's output at each of LEVELS, relative to its square; of a neuron left
# out it is 1. tools/measure_levels.py measures the errors of the weights.
ERRORS = (0.0, 0.05, 0.22)


class _Step(NamedTuple):
    """From one level to the next better one."""

    level: int
    n_bytes: float  # more for a neuron
    gain: float  # damage less for a neuron of score 1


def _steps(neuron_bytes: Sequence[float], levels: Sequence[Level]) -> list[_Step]:
    """From left out to the best level, on the lower convex hull of damage over bytes.

    A level that is not on it is never the best for any score.
    """
    points = [(0.0, 1.0, -1)]
    kinds = sorted((neuron_bytes[i], ERRORS[i], i) for i in map(LEVELS.index, levels))
    for point in kinds:
        if point[1] >= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], point) >= _slope(points[-2], points[-1]):
            points.pop()
        points.append(point)
    return [_Step(b[2], b[0] - a[0], a[1] - b[1]) for a, b in itertools.pairwise(points)]


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def spend(
    scores: Sequence[Floats],
    neuron_bytes: Sequence[Sequence[float]],
    levels: Sequence[Level],
    n_bytes: float,
    block: int,
) -> list[npt.NDArray[np.int8]]:
    """Give each neuron of some layers a level, for these bytes to within half a step of a block.

    The damage of a neuron is its score times the error of its level. The neurons of a layer are
    taken in blocks, in the order of their scores; the steps of all blocks from a level to the next
    better one are taken in the order of the damage that they save for a byte, as long as the bytes
    last. No other choice that takes these bytes does less damage.

    Args:
        scores: the damage of leaving a neuron out, per layer [n_ff].
        neuron_bytes: the bytes of a neuron by level, as an index of LEVELS, per layer.
        levels: the levels that a neuron can have.
        n_bytes: the bytes of all layers.
        block: the neurons of a block.

    Returns:
        An index of LEVELS for each neuron, -1 for one that is left out, per layer [n_ff]. At least
        one block of each layer is kept.
    """
    orders = [np.argsort(-of_layer, kind="stable") for of_layer in scores]
    sizes = [_block_sizes(len(of_layer), block) for of_layer in scores]
    steps = [_steps(of_layer, levels) for of_layer in neuron_bytes]
    gains, costs = [], []
    for of_layer, order, size, layer_steps in zip(scores, orders, sizes, steps, strict=True):
        starts = np.cumsum(size) - size
        mean = np.add.reduceat(of_layer[order].astype(np.float64), starts) / size
        for i, step in enumerate(layer_steps):
            gain = mean * (step.gain / step.n_bytes)
            if i == 0:
                gain[0] = np.inf  # something is kept
            gains.append(gain)
            costs.append(size * step.n_bytes)
    # of equal gains the lower steps first: none comes before one that it builds on
    by_gain = np.argsort(-np.concatenate(gains), kind="stable")
    cost = np.concatenate(costs)[by_gain]
    n_least = len(scores)
    n_taken = int(np.searchsorted(np.cumsum(cost) - cost / 2, n_bytes, side="right"))
    taken = np.zeros(len(by_gain), dtype=np.int64)
    taken[by_gain[: max(n_least, n_taken)]] = 1
    result = []
    at = 0
    for order, size, layer_steps in zip(orders, sizes, steps, strict=True):
        end = at + len(size) * len(layer_steps)
        n_of_block = taken[at:end].reshape(len(layer_steps), -1).sum(axis=0)
        at = end
        level_after = np.array([-1, *(step.level for step in layer_steps)], dtype=np.int8)
        of_each = np.empty(len(order), dtype=np.int8)
        of_each[order] = np.repeat(level_after[n_of_block], size)
        result.append(of_each)
    return result


def _block_sizes(n: int, block: int) -> npt.NDArray[np.int64]:
    return np.diff(np.append(np.arange(0, n, block), n))


def damage(scores: Floats, levels: npt.NDArray[np.int8]) -> float:
    """The damage of these levels of all neurons, -1 for one that is left out."""
    errors = np.array([*ERRORS, 1.0])  # -1 is the last
    return float((scores * errors[levels]).sum(dtype=np.float64))
