"""Spending bytes on levels of precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from coreinfer_edge.choose.chooser import (
    Chooser,
    choose_levels,
    core_bytes,
    density_of,
    keep_what_serves,
)
from coreinfer_edge.choose.levels import Spending, damage
from coreinfer_edge.choose.levels import spend as spend_on
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import (
    BLOCK,
    ERRORS,
    LEVELS,
    CoreSet,
    Ffn,
    Level,
    Statistics,
)
from coreinfer_edge.choose.strategies import Scored
from coreinfer_edge.errors import ArgumentError

BYTES = (10.0, 8.0, 7.0, 5.0)  # of a neuron, as LEVELS
ALL: tuple[Level, ...] = ("full", 3, 2)


def spend(
    scores: np.ndarray, neuron_bytes: Sequence[float], levels: Sequence[Level], n: float, block: int
) -> np.ndarray:
    """On one layer."""
    return spend_on([Spending(scores, neuron_bytes)], levels, n, block)[0][0]


def least_damage(scores: np.ndarray, levels: Sequence[Level], n_bytes: float, block: int) -> float:
    """The least damage of all choices of whole blocks that take at most these bytes."""
    blocks = np.sort(scores)[::-1].reshape(-1, block).sum(axis=1)
    options = [(0.0, 1.0), *((BYTES[i], ERRORS[i]) for i in map(LEVELS.index, levels))]
    return min(
        float(sum(score * error for score, (_, error) in zip(blocks, chosen, strict=True)))
        for chosen in itertools.product(options, repeat=len(blocks))
        if sum(of for of, _ in chosen) * block <= n_bytes
    )


@pytest.mark.parametrize("levels", [ALL, ("full",), (3,), ("full", 2), (3, 2), LEVELS])
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
    assert set(of_each.tolist()) == {-1, 0, 2, 3}
    error = np.array([*ERRORS, 1.0])[of_each]
    assert (np.diff(error[np.argsort(-scores)]) >= 0).all()


def test_something_is_kept_of_any_layer_and_nothing_is_left_out_where_there_are_bytes() -> None:
    scores = np.zeros(100, dtype=np.float32)
    assert (spend(scores, BYTES, ALL, 0.0, block=32) >= 0).sum() == 32
    assert (spend(scores, BYTES, ALL, 1e9, block=32) == 0).all()


def test_a_level_that_costs_more_than_a_better_one_is_not_used() -> None:
    scores = np.arange(64, dtype=np.float32)
    of_each = spend(scores, (4.0, 4.5, 5.0, 3.0), ALL, 200.0, block=32)
    assert 2 not in of_each


FFNS = [Ffn(i, 320, 3200, BYTES) for i in range(4)]


def some_scores() -> Scored:
    rng = np.random.default_rng(3)
    return Scored([rng.exponential(size=320).astype(np.float32) for _ in FFNS], None)


def test_the_layers_together_take_the_bytes_of_the_density() -> None:
    densities = [1.0, 0.5, 0.62, 0.37]
    core = choose_levels(some_scores(), [([i], d) for i, d in enumerate(densities)], FFNS, ALL)
    assert list(core) == [1, 2, 3]
    for of_ffn in core.values():
        assert of_ffn.levels is not None
        assert (np.diff(of_ffn.neurons) > 0).all()
        assert len(of_ffn.levels) == len(of_ffn.neurons)
    taken = 3200 + sum(core_bytes(core[i], FFNS[i]) for i in core)
    assert taken == pytest.approx(3200 * sum(densities), abs=BLOCK * 5)
    assert density_of(core, FFNS) == pytest.approx(taken / 12800)


def test_layers_share_bytes_by_what_few_bits_cost_them() -> None:
    rng = np.random.default_rng(5)
    scored = Scored([rng.exponential(size=320).astype(np.float32)] * 4, None)
    everything = [(range(4), 0.6)]
    alike = choose_levels(scored, everything, FFNS, ALL, np.ones(4, np.float32))
    bytes_alike = [core_bytes(alike[i], FFNS[i]) for i in range(4)]
    assert max(bytes_alike) - min(bytes_alike) <= BLOCK * 5
    losses = np.array([1, 10, 1, 1], dtype=np.float32)
    core = choose_levels(scored, everything, FFNS, ALL, losses)
    taken = [core_bytes(core[i], FFNS[i]) if i in core else 3200.0 for i in range(4)]
    assert taken[1] > 1.2 * max(taken[0], taken[2], taken[3])
    assert sum(taken) == pytest.approx(0.6 * 4 * 3200, abs=BLOCK * 5)


def test_a_layer_that_bears_no_rounding_becomes_dense_at_the_price_of_the_others() -> None:
    losses = np.array([1, 1, 100, 1], dtype=np.float32)
    core = choose_levels(some_scores(), [(range(4), 0.8)], FFNS, ALL, losses)
    assert set(core) == {0, 1, 3}
    assert density_of(core, FFNS) == pytest.approx(0.8, abs=0.02)
    few = choose_levels(some_scores(), [(range(4), 0.2)], FFNS, ALL, losses)
    assert set(few) == {0, 1, 2, 3}


def test_one_neuron_with_a_huge_score_does_not_take_the_bytes_of_its_layer_away() -> None:
    rng = np.random.default_rng(6)
    scores = [rng.exponential(size=320).astype(np.float32) for _ in range(4)]
    scores[2][7] = 1e4
    core = choose_levels(Scored(scores, None), [(range(4), 0.5)], FFNS, ALL, np.ones(4, np.float32))
    taken = [core_bytes(core[i], FFNS[i]) for i in range(4)]
    assert taken[2] > 0.8 * min(taken[0], taken[1], taken[3])


def test_measured_losses_take_the_place_of_layers_that_are_spared() -> None:
    rng = np.random.default_rng(7)
    mean = [rng.exponential(size=320).astype(np.float32) for _ in FFNS]
    norms = [np.ones(320, dtype=np.float32)] * 4
    prior = Prior([0, 1, 2, 3], 1000, mean, mean, mean, norms)
    without = Chooser("static", FFNS, 4, norms, prior, None, ALL)
    losses = np.array([1, 1, 1, 1], dtype=np.float32)
    measured = replace(prior, low_bits_loss=losses)
    shared = Chooser("static", FFNS, 4, norms, measured, None, ALL)
    fixed = Chooser("static", FFNS, 4, norms, measured, {0: 1.0, 1: 0.3}, ALL)
    nothing = Statistics([], [], [], [], np.zeros(0, np.float32))
    assert set(without.choose(nothing, 0.8)) == {1, 2}
    assert set(shared.choose(nothing, 0.8)) == {0, 1, 2, 3}
    core = fixed.choose(nothing, 0.8)
    assert 0 not in core
    assert core_bytes(core[1], FFNS[1]) == pytest.approx(0.3 * 3200, abs=BLOCK * 5)
    for of in (without, shared, fixed):
        assert density_of(of.choose(nothing, 0.8), FFNS) == pytest.approx(0.8, abs=0.02)


def test_of_rich_weights_spared_layers_have_four_bits_and_no_layer_stays_as_it_is() -> None:
    rich = [Ffn(i, 320, 320 * 32, (17.0, 9.0, 7.0, 5.0)) for i in range(4)]
    norms = [np.ones(320, dtype=np.float32)] * 4
    chooser = Chooser("energy", rich, 4, norms, None, None, None)
    assert chooser.levels == LEVELS
    core = chooser.core_sets(some_scores(), 0.25)
    assert set(core) == {0, 1, 2, 3}
    assert core_bytes(core[0], rich[0]) == pytest.approx(9 * 320, abs=BLOCK * 9)
    assert density_of(core, rich) == pytest.approx(0.25, abs=0.02)
    # with bytes for all neurons in full there is nothing more to read
    assert density_of(chooser.core_sets(some_scores(), 0.95), rich) == pytest.approx(17 / 32)


def test_without_levels_given_neurons_have_all_that_every_layer_can() -> None:
    norms = [np.ones(320, dtype=np.float32)] * 2
    poor = [Ffn(0, 320, 3200, BYTES), Ffn(1, 320, 3200, (10.0, 0.0, 0.0, 0.0))]
    assert Chooser("energy", FFNS, 4, norms * 2, None, None, None).levels == LEVELS
    assert Chooser("energy", poor, 2, norms, None, None, None).levels == ("full",)


def test_levels_that_the_neurons_cannot_have_are_refused() -> None:
    ffns = [Ffn(0, 320, 3200, BYTES), Ffn(1, 320, 3200, (10.0, 0.0, 0.0, 0.0))]
    norms = [np.ones(320, dtype=np.float32)] * 2
    Chooser("energy", ffns, 2, norms, None, None, ["full"])
    with pytest.raises(ArgumentError, match="layer 1 cannot have levels below full"):
        Chooser("energy", ffns, 2, norms, None, None, ["full", 2])


def test_a_core_set_with_levels_stays_unless_another_does_clearly_less_damage() -> None:
    scores = np.array([10, 9, 8.9, 1], dtype=np.float32)
    neurons = np.array([0, 1, 2], dtype=np.int32)
    now = {0: CoreSet(neurons, None, np.array([0, 3, 2], dtype=np.uint8))}
    wanted = {0: CoreSet(neurons, None, np.array([0, 2, 3], dtype=np.uint8))}
    scored = Scored([scores], None)
    assert keep_what_serves(now, wanted, scored, gain=0.05)[0] is now[0]
    assert keep_what_serves(now, wanted, scored, gain=0.001)[0] is wanted[0]
    more = {0: CoreSet(neurons, None, np.array([0, 0, 2], dtype=np.uint8))}
    assert keep_what_serves(now, more, scored, gain=0.9)[0] is more[0]


def test_a_core_set_stays_also_if_its_layer_has_a_few_bytes_more_or_less() -> None:
    scores = np.random.default_rng(8).exponential(size=640).astype(np.float32)
    scored = Scored([scores], None)
    some, more, many = (
        choose_levels(scored, [([0], share)], [Ffn(0, 640, 6400, BYTES)], ALL)
        for share in (0.5, 0.51, 0.7)
    )
    assert keep_what_serves(some, more, scored, gain=0.5)[0] is some[0]
    assert keep_what_serves(some, many, scored, gain=0.5)[0] is many[0]
