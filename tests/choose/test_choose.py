"""Choosing the core set: shares of the layers, and the neurons kept."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer_edge.choose.chooser import (
    BLOCK,
    Chooser,
    best,
    choose,
    density_of,
    keep_what_serves,
    layer_densities,
    n_kept,
    spared,
)
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import CoreSet, Ffn, Statistics
from coreinfer_edge.choose.strategies import Scored
from coreinfer_edge.errors import ArgumentError, ModelFileError

# --- shares of the layers -------------------------------------------------------------------------


def test_layers_with_a_density_of_their_own_keep_it_and_the_others_share_the_rest() -> None:
    densities = layer_densities(4, 0.5, {1: 0.2, 3: 1.0})
    np.testing.assert_allclose(densities, [0.4, 0.2, 0.4, 1.0])
    np.testing.assert_array_equal(layer_densities(12, 0.5, {}), np.full(12, 0.5))


@pytest.mark.parametrize("density", [0.5, 0.4, 0.99])
def test_a_mean_that_the_layers_set_do_not_allow_is_refused(density: float) -> None:
    fixed = {0: 1.0, 1: 1.0} if density <= 0.5 else {0: 0.1, 1: 1.0}
    with pytest.raises(ArgumentError, match="cannot be the mean with 2 of 4 layers"):
        layer_densities(4, density, fixed)


@pytest.mark.parametrize("density", [0.3, 0.5, 0.75])
def test_the_first_and_the_last_layer_stay_dense_and_the_others_share_the_rest(
    density: float,
) -> None:
    densities = spared(range(30), 30, density)
    assert densities.mean() == pytest.approx(density)
    assert densities[0] == densities[-1] == 1.0
    assert np.ptp(densities[1:-1]) == 0
    assert 0.5 * density <= densities[1] <= density


def test_where_too_little_would_be_left_first_the_first_layer_gives_way_then_the_last() -> None:
    # 10 layers, 2 dense: at 1/3 the other 8 get (10/3 - 2) / 8 = 1/6, just half of it
    np.testing.assert_array_equal(spared(range(10), 10, 0.334)[[0, -1]], [1.0, 1.0])
    only_last = spared(range(10), 10, 0.333)
    assert only_last[-1] == 1.0
    assert np.ptp(only_last[:-1]) == 0
    assert only_last.mean() == pytest.approx(0.333)
    np.testing.assert_array_equal(spared(range(10), 10, 0.15), np.full(10, 0.15))


def test_the_layers_that_conversion_found_sensitive_stay_dense_instead_of_the_ends() -> None:
    sensitivity = np.array([0.02, 0.01, 0.02, 0.1, 0.02, 0.02, 0.02, 0.3], dtype=np.float32)
    densities = spared(range(8), 8, 0.5, sensitivity)
    np.testing.assert_array_equal(np.flatnonzero(densities == 1), [3, 7])
    assert densities.mean() == pytest.approx(0.5)
    # with less to share the most sensitive one alone
    np.testing.assert_array_equal(np.flatnonzero(spared(range(8), 8, 0.3, sensitivity) == 1), [7])


def test_a_model_whose_layers_matter_alike_keeps_the_same_of_all() -> None:
    alike = np.full(8, 0.02, dtype=np.float32)
    np.testing.assert_array_equal(spared(range(8), 8, 0.5, alike), np.full(8, 0.5))


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.49, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 6, 40])
def test_the_mean_is_the_density_however_few_layers_there_are(
    n_layers: int, density: float
) -> None:
    densities = spared(range(n_layers), n_layers, density)
    assert densities.shape == (n_layers,)
    assert densities.mean() == pytest.approx(density)
    assert ((densities > 0) & (densities <= 1)).all()


def test_ends_are_those_of_the_model_and_not_of_the_layers_that_have_a_dense_ffn() -> None:
    # as in a model whose other layers are of experts
    np.testing.assert_array_equal(spared(range(1, 30), 32, 0.5), np.full(29, 0.5))
    assert spared(range(1, 32), 32, 0.5)[-1] == 1.0


# --- choose ---------------------------------------------------------------------------------------


def test_the_neurons_with_the_highest_scores_are_kept_in_ascending_order() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.permutation(320).astype(np.float32) for _ in range(3)]
    fills = [rng.normal(size=320).astype(np.float32) for _ in range(3)]
    core = choose(Scored(scores, fills), [0.2, 0.5, 0.9])
    assert list(core) == [0, 1, 2]
    for i, kept in enumerate((64, 160, 288)):
        assert core[i].neurons.dtype == np.int32
        np.testing.assert_array_equal(core[i].neurons, np.flatnonzero(scores[i] >= 320 - kept))
        np.testing.assert_array_equal(core[i].fill, fills[i])


@pytest.mark.parametrize(
    ("n_ff", "density", "n_core"),
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
    n_ff: int, density: float, n_core: int
) -> None:
    scores = np.arange(n_ff, dtype=np.float32)
    (kept,) = choose(Scored([scores], [scores]), [density]).values()
    np.testing.assert_array_equal(kept.neurons, np.arange(n_ff - n_core, n_ff))


@pytest.mark.parametrize(("n_ff", "density"), [(320, 1.0), (320, 0.96), (32, 0.1), (20, 0.5)])
def test_a_layer_that_would_keep_everything_stays_dense(n_ff: int, density: float) -> None:
    scores = np.arange(n_ff, dtype=np.float32)
    assert choose(Scored([scores], [scores]), [density]) == {}


def test_of_equal_scores_the_first_neurons_are_kept() -> None:
    np.testing.assert_array_equal(best(np.zeros(320, dtype=np.float32), 160), np.arange(160))
    scores = np.array([1, 3, 2, 2, 5, 2, 0], dtype=np.float32)
    np.testing.assert_array_equal(best(scores, 4), [1, 2, 3, 4])


def test_without_fills_the_core_sets_have_none() -> None:
    (kept,) = choose(Scored([np.arange(64, dtype=np.float32)], None), [0.5]).values()
    assert kept.fill is None


def test_density_is_the_mean_share_over_the_layers_dense_ones_included() -> None:
    ffns = [Ffn(0, 64, 1), Ffn(1, 128, 1)]
    assert density_of({1: CoreSet(np.arange(32, dtype=np.int32), None)}, ffns) == 0.625
    assert density_of({}, ffns) == 1.0


@pytest.mark.parametrize("density", [0.2, 0.31, 0.45, 0.5, 0.777])
@pytest.mark.parametrize("n_ff", [1536, 330, 640])
def test_rounding_to_blocks_evens_out_over_the_layers(n_ff: int, density: float) -> None:
    densities = spared(range(30), 30, density)
    counts = n_kept([n_ff] * 30, densities)
    assert abs(sum(counts) - n_ff * densities.sum()) < 2 * BLOCK
    for kept, of_layer in zip(counts, densities, strict=True):
        assert abs(kept - of_layer * n_ff) <= BLOCK
        assert kept == n_ff or kept % BLOCK == 0


# --- keep_what_serves -----------------------------------------------------------------------------


def test_a_core_set_stays_unless_another_leaves_out_clearly_less() -> None:
    scores = np.array([10, 9, 1, 1.02], dtype=np.float32)
    now = {0: CoreSet(np.array([0, 1, 2], dtype=np.int32), None)}
    wanted = {0: CoreSet(np.array([0, 1, 3], dtype=np.int32), None)}
    scored = Scored([scores], None)
    # left out: 1.02 now, 1.0 then, so 2 % are saved
    assert keep_what_serves(now, wanted, scored, gain=0.05)[0] is now[0]
    assert keep_what_serves(now, wanted, scored, gain=0.01)[0] is wanted[0]


def test_a_core_set_of_another_size_or_of_a_layer_that_had_none_is_taken() -> None:
    scored = Scored([np.arange(4, dtype=np.float32)] * 2, None)
    now = {0: CoreSet(np.array([3], dtype=np.int32), None)}
    wanted = {i: CoreSet(np.array([2, 3], dtype=np.int32), None) for i in (0, 1)}
    assert keep_what_serves(now, wanted, scored, gain=0.5) == wanted


# --- Chooser --------------------------------------------------------------------------------------

FFNS = [Ffn(i, 320, 1) for i in range(10)]
NORMS = [np.ones(320, dtype=np.float32)] * 10


def chooser(strategy: str = "energy", prior: Prior | None = None, **options: object) -> Chooser:
    layers = options.pop("layers", None)
    return Chooser(strategy, FFNS, 10, NORMS, prior, layers)  # type: ignore[arg-type]


def some_prior(n_ff: int = 320) -> Prior:
    rng = np.random.default_rng(1)
    arrays = [rng.random(n_ff, dtype=np.float32) for _ in FFNS]
    return Prior(list(range(10)), 100, arrays, arrays, arrays, arrays)


def some_statistics() -> Statistics:
    rng = np.random.default_rng(2)
    sums = [rng.random(320, dtype=np.float32) for _ in FFNS]
    return Statistics(sums, sums, sums, sums, np.full(10, 50, dtype=np.float32))


def test_energy_keeps_the_ends_dense_and_the_published_rules_treat_all_layers_alike() -> None:
    assert chooser().densities(0.5)[[0, 9]].tolist() == [1.0, 1.0]
    for strategy in ("griffin", "stability"):
        np.testing.assert_array_equal(chooser(strategy).densities(0.5), np.full(10, 0.5))


def test_layers_are_numbered_as_in_the_model_and_from_the_end_with_a_minus() -> None:
    densities = chooser("griffin", layers={1: 1.0, -2: 0.3}).densities(0.5)
    assert densities[1] == 1.0
    assert densities[8] == 0.3
    assert densities.mean() == pytest.approx(0.5)


@pytest.mark.parametrize("layer", [10, -11, 1000])
def test_a_layer_that_the_model_does_not_have_is_refused(layer: int) -> None:
    with pytest.raises(ArgumentError, match=f"names layer {layer}"):
        chooser(layers={layer: 1.0})


def test_with_layers_set_the_density_must_leave_something_for_the_others() -> None:
    given = chooser(layers={0: 1.0, 1: 1.0, 2: 1.0})
    assert given.least_density == pytest.approx(0.3)
    with pytest.raises(ArgumentError, match="cannot be the mean"):
        given.densities(0.3)
    assert given.densities(0.31).mean() == pytest.approx(0.31)
    assert chooser().least_density == 0


@pytest.mark.parametrize(("strategy", "what"), [("static", "prior"), ("similarity", "clusters")])
def test_a_strategy_that_needs_calibration_says_so_where_there_is_none(
    strategy: str, what: str
) -> None:
    with pytest.raises(ArgumentError, match=f"needs the {what} of a calibration.*convert"):
        chooser(strategy)


def test_a_prior_without_clusters_does_not_serve_similarity() -> None:
    with pytest.raises(ArgumentError, match="needs the clusters"):
        chooser("similarity", some_prior())


def test_a_prior_of_another_model_is_refused() -> None:
    with pytest.raises(ModelFileError, match="do not fit the model"):
        chooser("energy", some_prior(n_ff=64))


def test_the_chosen_sets_have_the_density_asked_for() -> None:
    core = chooser("energy", some_prior()).choose(some_statistics(), 0.6)
    assert density_of(core, FFNS) == pytest.approx(0.6, abs=BLOCK / 320)
    assert sorted(core) == list(range(1, 9))
