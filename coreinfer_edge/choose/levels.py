"""Spends bytes on the precision of neurons: the least damage for the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coreinfer_edge.choose.statistics import ERRORS, LEVELS, Floats, Level


class _Step(NamedTuple):
    """From one level to the next better one."""

    level: int
    n_bytes: float  # more for a neuron
    gain: float  # damage less for a neuron of score 1


def _steps(
    neuron_bytes: Sequence[float], errors: Sequence[float], levels: Sequence[Level]
) -> list[_Step]:
    """From left out to the best level, on the lower convex hull of damage over bytes.

    A level that is not on it is never the best for any score.
    """
    points = [(0.0, 1.0, -1)]
    kinds = sorted((neuron_bytes[i], errors[i], i) for i in map(LEVELS.index, levels))
    for point in kinds:
        if point[1] >= points[-1][1]:
            continue
        while len(points) > 1 and _slope(points[-2], point) >= _slope(points[-2], points[-1]):
            points.pop()
        points.append(point)
    return [_Step(b[2], b[0] - a[0], a[1] - b[1]) for a, b in itertools.pairwise(points)]


def _slope(a: tuple[float, float, int], b: tuple[float, float, int]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


class Spending(NamedTuple):
    """A layer to spend bytes on.

    Attributes:
        scores: the damage of leaving a neuron out, up to a factor [n_ff].
        neuron_bytes: the bytes of a neuron by level, as an index of LEVELS.
        weight: that factor, which makes the damage of several layers comparable.
        errors: the damage that each level does, of that of leaving the neuron out.
    """

    scores: Floats
    neuron_bytes: Sequence[float]
    weight: float = 1.0
    errors: Sequence[float] = ERRORS


def spend(
    layers: Sequence[Spending], levels: Sequence[Level], n_bytes: float, block: int
) -> tuple[list[npt.NDArray[np.int8]], float]:
    """Give each neuron of some layers a level, for these bytes to within half a step of a block.

    The damage of a neuron is its score times the error of its level. The neurons are taken in
    blocks, in the order of their scores; the steps of all blocks from a level to the next better
    one are taken in the order of the damage that they save for a byte, as long as the bytes last
    (Lagrange). No other choice that takes these bytes does less damage.

    Args:
        layers: the layers that share the bytes.
        levels: the levels that a neuron can have.
        n_bytes: the bytes of all layers.
        block: the neurons of a block.

    Returns:
        An index of LEVELS for each neuron, -1 for one that is left out, per layer [n_ff]. At least
        one block of each layer is kept. And the price: the damage that the last byte saved.
    """
    orders, sizes, steps, gains, costs = [], [], [], [], []
    for layer in layers:
        order = np.argsort(-layer.scores, kind="stable")
        starts = np.arange(0, len(order), block)
        size = np.diff(np.append(starts, len(order)))
        score = np.add.reduceat(layer.scores[order].astype(np.float64), starts) * layer.weight
        of_layer = _steps(layer.neuron_bytes, layer.errors, levels)
        gains += [score / size * (step.gain / step.n_bytes) for step in of_layer]
        costs += [size * step.n_bytes for step in of_layer]
        orders.append(order)
        sizes.append(size)
        steps.append(of_layer)
    # of equal gains the lower steps first: none comes before one that it builds on
    by_gain = np.argsort(-np.concatenate(gains), kind="stable")
    cost = np.concatenate(costs)[by_gain]
    n_taken = int(np.searchsorted(np.cumsum(cost) - cost / 2, n_bytes, side="right"))
    price = float(np.concatenate(gains)[by_gain[n_taken - 1]]) if n_taken else np.inf
    if n_taken == len(by_gain):
        price = 0.0
    taken = np.zeros(len(by_gain), dtype=np.int64)
    taken[by_gain[:n_taken]] = 1
    results = []
    for order, size, of_layer in zip(orders, sizes, steps, strict=True):
        n_steps = len(of_layer) * len(size)
        n_of_block = taken[:n_steps].reshape(len(of_layer), -1).sum(axis=0)
        taken = taken[n_steps:]
        n_of_block[0] = max(1, n_of_block[0])
        level_after = np.array([-1, *(step.level for step in of_layer)], dtype=np.int8)
        result = np.empty(len(order), dtype=np.int8)
        result[order] = np.repeat(level_after[n_of_block], size)
        results.append(result)
    return results, price


def damage(scores: Floats, levels: npt.NDArray[np.int8], errors: Sequence[float] = ERRORS) -> float:
    """The damage of these levels of all neurons, -1 for one that is left out."""
    of_level = np.array([*errors, 1.0])  # -1 is the last
    return float((scores * of_level[levels]).sum(dtype=np.float64))
