"""Choosing the core set: shares of the layers, scores, and the neurons kept."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer_edge.choose import BLOCK, FILL_PRIOR_TOKENS, choose, energy, layer_densities
from coreinfer_edge.core_context import Statistics

# --- layer_densities ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.3, 0.5, 0.75, 0.999, 1.0])
@pytest.mark.parametrize("n_layers", [12, 30])
def test_first_and_last_layer_stay_dense_and_the_others_share_the_rest_equally(
    n_layers: int, density: float
) -> None:
    densities = layer_densities(n_layers, density, (0, n_layers - 1))
    assert densities.mean() == pytest.approx(density)
    assert densities[0] == densities[-1] == 1.0
    assert np.ptp(densities[1:-1]) == 0
    assert density / 2 <= densities[1] <= density


def test_the_dense_layers_give_way_where_less_than_half_the_density_would_be_left() -> None:
    # 10 layers, 2 dense: at 1/3 the other 8 get (10/3 - 2) / 8 = 1/6, just half of it
    assert layer_densities(10, 0.334, (0, 9))[0] == 1.0
    np.testing.assert_array_equal(layer_densities(10, 0.333, (0, 9)), np.full(10, 0.333))


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.49, 0.5, 1.0])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5])
def test_the_mean_is_the_density_however_few_layers_there_are(
    n_layers: int, density: float
) -> None:
    densities = layer_densities(n_layers, density, (0, n_layers - 1))
    assert densities.shape == (n_layers,)
    assert densities.mean() == pytest.approx(density)
    assert ((densities > 0) & (densities <= 1)).all()


def test_dense_layers_named_twice_or_not_there_do_not_count() -> None:
    np.testing.assert_array_equal(
        layer_densities(12, 0.5, (0, 0, 11, 12, -1)), layer_densities(12, 0.5, (0, 11))
    )
    np.testing.assert_array_equal(layer_densities(12, 0.5, ()), np.full(12, 0.5))


# --- energy ---------------------------------------------------------------------------------------


def statistics_of(activations: list[np.ndarray]) -> Statistics:
    """``activations``: per FFN [n_tokens, n_ff]."""
    return Statistics(
        [a.sum(axis=0, dtype=np.float32) for a in activations],
        [(a**2).sum(axis=0, dtype=np.float32) for a in activations],
        np.array([len(a) for a in activations], dtype=np.float32),
    )


def test_energy_ranks_neurons_by_the_squares_they_bring_into_the_output() -> None:
    rng = np.random.default_rng(0)
    activations = [rng.normal(rng.normal(size=n), 1, size=(t, n)) for t, n in ((50, 7), (3, 4))]
    downs = [rng.normal(size=(5, a.shape[1])) for a in activations]
    norms = [(down**2).sum(axis=0).astype(np.float32) for down in downs]
    scores, fills = energy(statistics_of(activations), norms)
    for a, down, score, fill in zip(activations, downs, scores, fills, strict=True):
        brought = np.einsum("tn,on->ton", a, down)  # [n_tokens, n_out, n_ff]
        expected = (brought**2).sum(axis=(0, 1))
        np.testing.assert_allclose(score / score.max(), expected / expected.max(), rtol=1e-4)
        # The mean activation, drawn to zero while tokens are few.
        np.testing.assert_allclose(fill, a.sum(axis=0) / (len(a) + FILL_PRIOR_TOKENS), rtol=1e-4)
        assert score.dtype == fill.dtype == np.float32


def test_without_any_token_scores_and_fills_are_zero() -> None:
    scores, fills = energy(statistics_of([np.zeros((0, 6))]), [np.ones(6, dtype=np.float32)])
    np.testing.assert_array_equal(scores, [np.zeros(6)])
    np.testing.assert_array_equal(fills, [np.zeros(6)])


# --- choose ---------------------------------------------------------------------------------------


def test_the_neurons_with_the_highest_scores_are_kept_in_ascending_order() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.permutation(320).astype(np.float32) for _ in range(3)]
    fills = [rng.normal(size=320).astype(np.float32) for _ in range(3)]
    core = choose(scores, fills, [0.2, 0.5, 0.9])
    assert list(core) == [0, 1, 2]
    for i, n_kept in enumerate((64, 160, 288)):
        assert core[i].neurons.dtype == np.int32
        np.testing.assert_array_equal(core[i].neurons, np.flatnonzero(scores[i] >= 320 - n_kept))
        np.testing.assert_array_equal(core[i].fill, fills[i])


@pytest.mark.parametrize(
    ("n_ff", "density", "n_kept"),
    [
        (320, 1e-9, BLOCK),  # never none
        (320, 0.14, BLOCK),
        (320, 0.16, 2 * BLOCK),
        (330, 0.5, 160),
        (8192, 0.4, 3264),
        (64, 0.7, BLOCK),
    ],
)
def test_the_number_kept_is_the_nearest_multiple_of_the_block(
    n_ff: int, density: float, n_kept: int
) -> None:
    scores = np.arange(n_ff, dtype=np.float32)
    (kept,) = choose([scores], [scores], [density]).values()
    np.testing.assert_array_equal(kept.neurons, np.arange(n_ff - n_kept, n_ff))


@pytest.mark.parametrize(("n_ff", "density"), [(320, 1.0), (320, 0.96), (32, 0.1), (20, 0.5)])
def test_a_layer_that_would_keep_everything_stays_dense(n_ff: int, density: float) -> None:
    scores = np.arange(n_ff, dtype=np.float32)
    assert choose([scores], [scores], [density]) == {}


def test_equal_scores_still_give_as_many_different_neurons() -> None:
    scores = np.zeros(320, dtype=np.float32)
    (kept,) = choose([scores], [scores], [0.5]).values()
    assert len(set(kept.neurons.tolist())) == 160
    assert (np.diff(kept.neurons) > 0).all()
