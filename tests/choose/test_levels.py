"""Spending bytes on levels of precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from coreinfer_edge.choose.chooser import (
    BLOCK,
    Chooser,
    choose_levels,
    core_bytes,
    density_of,
    keep_what_serves,
)
from coreinfer_edge.choose.levels import ERRORS, damage, spend
from coreinfer_edge.choose.statistics import LEVELS, CoreSet, Ffn, Level
from coreinfer_edge.choose.strategies import Scored
from coreinfer_edge.errors import ArgumentError

BYTES = (10.0, 7.0, 5.0)  # of a neuron, as LEVELS
ALL: tuple[Level, ...] = ("full", 3, 2)


def least_damage(scores: np.ndarray, levels: Sequence[Level], n_bytes: float, block: int) -> float:
    """The least damage of all choices of whole blocks that take at most these bytes."""
    blocks = np.sort(scores)[::-1].reshape(-1, block).sum(axis=1)
    options = [(0.0, 1.0), *((BYTES[i], ERRORS[i]) for i in map(LEVELS.index, levels))]
    return min(
        float(sum(score * error for score, (_, error) in zip(blocks, chosen, strict=True)))
        for chosen in itertools.product(options, repeat=len(blocks))
        if sum(of for of, _ in chosen) * block <= n_bytes
    )


@pytest.mark.parametrize("levels", [ALL, ("full",), (3,), ("full", 2), (3, 2)])
@pytest.mark.parametrize("seed", range(5))
def test_no_other_choice_of_the_bytes_does_less_damage(seed: int, levels: Sequence[Level]) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.exponential(size=12).astype(np.float32)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        of_each = spend(scores, BYTES, levels, share * 120, block=2)
        assert {LEVELS[i] for i in of_each if i >= 0} <= set(levels)
        spent = float(np.array([*BYTES, 0.0])[of_each].sum())
        least = least_damage(scores, levels, spent, block=2)
        assert damage(scores, of_each) == pytest.approx(least, rel=1e-5)


def test_the_bytes_spent_are_within_half_a_step_of_what_there_is() -> None:
    scores = np.random.default_rng(0).exponential(size=330).astype(np.float32)
    for n_bytes in (400.0, 1000.0, 2000.0, 3000.0):
        of_each = spend(scores, BYTES, ALL, n_bytes, block=32)
        spent = float(np.array([*BYTES, 0.0])[of_each].sum())
        assert abs(spent - n_bytes) <= 32 * 5 / 2


def test_neurons_that_matter_more_have_no_lower_level() -> None:
    scores = np.random.default_rng(1).exponential(size=320).astype(np.float32)
    of_each = spend(scores, BYTES, ALL, 1600, block=32)
    assert set(of_each.tolist()) == {-1, 0, 1, 2}
    error = np.array([*ERRORS, 1.0])[of_each]
    assert (np.diff(error[np.argsort(-scores)]) >= 0).all()


def test_something_is_kept_of_any_layer_and_nothing_is_left_out_where_there_are_bytes() -> None:
    scores = np.zeros(100, dtype=np.float32)
    assert (spend(scores, BYTES, ALL, 0.0, block=32) >= 0).sum() == 32
    assert (spend(scores, BYTES, ALL, 1e9, block=32) == 0).all()


def test_a_level_that_costs_more_than_a_better_one_is_not_used() -> None:
    scores = np.arange(64, dtype=np.float32)
    of_each = spend(scores, (4.0, 5.0, 3.0), ALL, 200.0, block=32)
    assert 1 not in of_each


FFNS = [Ffn(i, 320, 3200, BYTES) for i in range(4)]


def some_scores() -> Scored:
    rng = np.random.default_rng(3)
    return Scored([rng.exponential(size=320).astype(np.float32) for _ in FFNS], None)


def test_the_layers_together_take_the_bytes_of_the_density() -> None:
    densities = [1.0, 0.5, 0.62, 0.37]
    core = choose_levels(some_scores(), densities, FFNS, ALL)
    assert list(core) == [1, 2, 3]
    for of_ffn in core.values():
        assert of_ffn.levels is not None
        assert (np.diff(of_ffn.neurons) > 0).all()
        assert len(of_ffn.levels) == len(of_ffn.neurons)
    taken = 3200 + sum(core_bytes(core[i], FFNS[i]) for i in core)
    assert taken == pytest.approx(3200 * sum(densities), abs=BLOCK * 5)
    assert density_of(core, FFNS) == pytest.approx(taken / 12800)


def test_levels_that_the_neurons_cannot_have_are_refused() -> None:
    ffns = [Ffn(0, 320, 3200, BYTES), Ffn(1, 320, 3200, (10.0, 0.0, 0.0))]
    norms = [np.ones(320, dtype=np.float32)] * 2
    Chooser("energy", ffns, 2, norms, None, None, ["full"])
    with pytest.raises(ArgumentError, match="layer 1 cannot have levels below full"):
        Chooser("energy", ffns, 2, norms, None, None, ["full", 2])


def test_a_core_set_with_levels_stays_unless_another_does_clearly_less_damage() -> None:
    scores = np.array([10, 9, 8.9, 1], dtype=np.float32)
    neurons = np.array([0, 1, 2], dtype=np.int32)
    now = {0: CoreSet(neurons, None, np.array([0, 2, 1], dtype=np.uint8))}
    wanted = {0: CoreSet(neurons, None, np.array([0, 1, 2], dtype=np.uint8))}
    scored = Scored([scores], None)
    assert keep_what_serves(now, wanted, scored, gain=0.05)[0] is now[0]
    assert keep_what_serves(now, wanted, scored, gain=0.001)[0] is wanted[0]
    more = {0: CoreSet(neurons, None, np.array([0, 0, 1], dtype=np.uint8))}
    assert keep_what_serves(now, more, scored, gain=0.9)[0] is more[0]
