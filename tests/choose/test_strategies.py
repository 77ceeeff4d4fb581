"""Each strategy against its definition, written out plainly over recorded activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from core_session import core_session
from numpy.typing import NDArray
from reference import Reference
from test_reference import some_tokens

from coreinfer_edge.choose.chooser import best
from coreinfer_edge.choose.prior import Clusters, Prior
from coreinfer_edge.choose.statistics import Extra, Floats, Statistics
from coreinfer_edge.choose.strategies import (
    FILL_PRIOR_TOKENS,
    MOST_PRIOR_TOKENS,
    TOKEN_VARIANCE,
    TOP_SHARE,
    Evidence,
    energy,
    griffin,
    prior_weight,
    similarity,
    stability,
    static,
)

RandomModel = Callable[..., Path]
Array = NDArray[np.float64]


def some_activations(n_tokens: int = 40) -> list[Array]:
    """Of two FFNs [n_tokens, n_ff]; one token is a hundred times as strong as the others."""
    rng = np.random.default_rng(0)
    activations = [rng.normal(rng.normal(size=n), 1, size=(n_tokens, n)) for n in (50, 70)]
    for of_ffn in activations:
        of_ffn[0] *= 100
    return activations


def core_neurons_of_token(activation: Array) -> list[int]:
    """Definition 1 of the paper: the top alpha of the neurons with positive activation."""
    positive = [i for i, value in enumerate(activation) if value > 0]
    n_top = math.ceil(TOP_SHARE * len(positive))
    return sorted(positive, key=lambda i: -activation[i])[:n_top]


def core_neurons_of_sentence(activations: Array, n_core: int) -> list[int]:
    """Definition 2 of the paper: those that are core neurons of the most tokens."""
    count = [0] * activations.shape[1]
    for activation in activations:
        for i in core_neurons_of_token(activation):
            count[i] += 1
    return sorted(sorted(range(len(count)), key=lambda i: -count[i])[:n_core])


def statistics_of(activations: list[Array]) -> Statistics:
    tops = []
    for of_ffn in activations:
        top = np.zeros(of_ffn.shape[1], dtype=np.float32)
        for activation in of_ffn:
            top[core_neurons_of_token(activation)] += 1
        tops.append(top)

    def single(arrays: list[Array]) -> list[Floats]:
        return [array.astype(np.float32) for array in arrays]

    return Statistics(
        single([a.sum(axis=0) for a in activations]),
        single([(a**2).sum(axis=0) for a in activations]),
        single([(a**2 / (a**2).sum(axis=1, keepdims=True)).sum(axis=0) for a in activations]),
        tops,
        np.array([len(a) for a in activations], dtype=np.float32),
    )


def evidence(
    activations: list[Array], prior: Prior | None = None, norms: list[Floats] | None = None
) -> Evidence:
    ones = [np.ones(a.shape[1], dtype=np.float32) for a in activations]
    return Evidence(statistics_of(activations), prior, norms or ones)


def prior_of(activations: list[Array], clusters: Clusters | None = None) -> Prior:
    seen = statistics_of(activations)
    n = len(activations[0])
    means = [[x / np.float32(n) for x in kind] for kind in (seen.sum, seen.sum_sq)]
    normalized = [x / np.float32(n) for x in seen.normalized_sq]
    ones = [np.ones(a.shape[1], dtype=np.float32) for a in activations]
    return Prior([0, 1], n, means[0], means[1], normalized, ones, clusters)


# --- stability ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("n_core", [32, 64, 128])
def test_stability_chooses_the_paper_s_core_neurons_of_recorded_activations(
    arch: str, n_core: int, random_model: RandomModel
) -> None:
    path, tokens = random_model(arch), some_tokens(60)
    with core_session(path) as session:
        session.core.collect(True, Extra(top_share=TOP_SHARE))
        session.run(tokens)
        statistics = session.core.statistics()
    scored = stability(Evidence(statistics, None, []))
    assert scored.fills is None
    for score, activations in zip(scored.scores, Reference(path).activations(tokens), strict=True):
        expected = core_neurons_of_sentence(activations, n_core)
        assert best(score, n_core).tolist() == expected


# --- griffin --------------------------------------------------------------------------------------


def test_griffin_is_the_norm_over_tokens_of_each_token_s_activation_at_norm_one() -> None:
    activations = some_activations()
    scored = griffin(evidence(activations))
    assert scored.fills is None
    for score, of_ffn in zip(scored.scores, activations, strict=True):
        normalized = np.array([token / np.linalg.norm(token) for token in of_ffn])
        expected = np.linalg.norm(normalized, axis=0)
        np.testing.assert_allclose(np.sqrt(score), expected, rtol=1e-5)


# --- similarity -----------------------------------------------------------------------------------


def some_clusters() -> Clusters:
    rng = np.random.default_rng(3)
    return Clusters([rng.integers(0, 256, (4, n), dtype=np.uint8) for n in (50, 70)], TOP_SHARE)


@pytest.mark.parametrize("nearest", range(4))
def test_similarity_takes_the_core_neurons_of_the_cluster_that_the_prompt_is_most_like(
    nearest: int,
) -> None:
    clusters = some_clusters()
    given = evidence(some_activations(), prior_of(some_activations(), clusters))
    rng = np.random.default_rng(nearest)
    top = [
        frequency[nearest] / np.float32(20) + rng.random(frequency.shape[1], dtype=np.float32)
        for frequency in clusters.frequency
    ]
    scored = similarity(replace(given, statistics=replace(given.statistics, top=top)))
    assert scored.fills is None
    for score, frequency in zip(scored.scores, clusters.frequency, strict=True):
        np.testing.assert_array_equal(score, frequency[nearest])


def test_similarity_is_not_drawn_to_a_cluster_whose_neurons_are_all_frequent() -> None:
    ramp = np.arange(50, dtype=np.uint8)
    clusters = Clusters([np.stack([np.full(50, 255, dtype=np.uint8), ramp])] * 2, TOP_SHARE)
    activations = [a[:, :50] for a in some_activations()]
    given = evidence(activations, prior_of(activations, clusters))
    like_ramp = [np.arange(50, dtype=np.float32)] * 2
    scored = similarity(replace(given, statistics=replace(given.statistics, top=like_ramp)))
    np.testing.assert_array_equal(scored.scores[0], ramp)


# --- energy and static ----------------------------------------------------------------------------


def test_energy_is_the_geometric_mean_of_plain_and_normalised_squares_times_the_norm() -> None:
    rng = np.random.default_rng(4)
    activations = some_activations()
    norms = [rng.random(a.shape[1], dtype=np.float32) for a in activations]
    scored = energy(evidence(activations, norms=norms))
    assert scored.fills is not None
    for i, of_ffn in enumerate(activations):
        plain = (of_ffn**2).mean(axis=0)
        normalized = np.mean([token**2 / (token @ token) for token in of_ffn], axis=0)
        expected = np.sqrt(plain * normalized) * np.sqrt(norms[i]) * len(of_ffn)
        np.testing.assert_allclose(scored.scores[i], expected, rtol=1e-4)
        fill = of_ffn.sum(axis=0) / (len(of_ffn) + FILL_PRIOR_TOKENS)
        np.testing.assert_allclose(scored.fills[i], fill, rtol=1e-4, atol=1e-6)


def test_the_prior_counts_in_energy_as_so_many_tokens_more() -> None:
    known, prompt = some_activations(64), some_activations(10)
    prior = replace(prior_of(known), most_tokens=0.5)
    scored = energy(evidence(prompt, prior))
    together = statistics_of(prompt).plus(statistics_of(known), 0.5 / len(known[0]))
    expected = energy(Evidence(together, None, [np.ones(n, dtype=np.float32) for n in (50, 70)]))
    assert scored.fills is not None
    for i, score in enumerate(scored.scores):
        np.testing.assert_allclose(score, expected.scores[i], rtol=1e-4)
        mean = together.sum[i] / together.n_tokens[i]
        np.testing.assert_allclose(scored.fills[i], mean, rtol=1e-3, atol=1e-5)


def test_a_prior_like_the_prompt_weighs_much_and_one_of_another_kind_little() -> None:
    rng = np.random.default_rng(1)
    known = rng.lognormal(0, 0.5, size=4000)
    few = rng.normal(0, np.sqrt(TOKEN_VARIANCE / 256), size=4000)  # what 256 tokens leave uncertain
    alike = prior_weight(known * np.exp(few), known, 256)
    unlike = prior_weight(known * np.exp(few + rng.normal(0, 1, size=4000)), known, 256)
    assert alike > 500
    # the variance of a token over that between the texts, which is 1
    assert unlike == pytest.approx(TOKEN_VARIANCE, rel=0.2)


def test_the_weight_of_the_prior_does_not_depend_on_scale_and_has_a_limit() -> None:
    rng = np.random.default_rng(2)
    seen, known = rng.lognormal(size=(2, 500)).astype(np.float32)
    assert prior_weight(1000 * seen, known, 99) == pytest.approx(prior_weight(seen, known, 99))
    assert prior_weight(known, known, 99) == MOST_PRIOR_TOKENS
    assert prior_weight(np.zeros_like(known), known, 0) == MOST_PRIOR_TOKENS


def test_neurons_that_are_never_active_do_not_decide_what_the_prior_weighs() -> None:
    rng = np.random.default_rng(3)
    known = rng.lognormal(size=500).astype(np.float32)
    known[:100] = 0
    seen = known.copy()
    seen[50:100] = 1e-9
    assert prior_weight(seen, known, 256) > MOST_PRIOR_TOKENS / 2


def test_a_prior_that_conversion_found_of_no_use_changes_nothing_but_is_there_for_static() -> None:
    prompt = some_activations(10)
    useless = replace(prior_of(some_activations(64)), most_tokens=0.0)
    with_it, without = energy(evidence(prompt, useless)), energy(evidence(prompt))
    assert with_it.fills is not None
    assert without.fills is not None
    for i in range(2):
        np.testing.assert_array_equal(with_it.scores[i], without.scores[i])
        np.testing.assert_array_equal(with_it.fills[i], without.fills[i])
        assert static(evidence(prompt, useless)).scores[i].any()


def test_where_tokens_weigh_more_the_prior_keeps_its_share_in_the_fill_but_not_in_the_score() -> (
    None
):
    seen = statistics_of(some_activations(40))
    prior = prior_of(some_activations(64))
    ones = [np.ones(n, dtype=np.float32) for n in (50, 70)]
    once = energy(Evidence(seen, prior, ones))
    # the same tokens, each with the weight 16: the same means, as certain as before
    heavy = replace(seen.plus(seen, 15.0), squared_weights=256 * seen.n_tokens)
    scored = energy(Evidence(heavy, prior, ones))
    without = energy(Evidence(seen, None, ones))
    np.testing.assert_allclose(heavy.n_effective, seen.n_tokens, rtol=1e-6)
    assert scored.fills is not None
    assert once.fills is not None
    for i in range(2):
        np.testing.assert_allclose(scored.fills[i], once.fills[i], rtol=1e-3, atol=1e-5)
        own = without.scores[i]
        assert np.abs(scored.scores[i] / 16 - own).max() < np.abs(once.scores[i] - own).max() / 5


def test_the_effective_number_of_tokens_is_less_where_some_weigh_more() -> None:
    prompt, answer = statistics_of(some_activations(40)), statistics_of(some_activations(10))
    np.testing.assert_array_equal(prompt.n_effective, [40, 40])
    weighted = prompt.plus(answer, 16.0)
    np.testing.assert_allclose(weighted.n_effective, 200**2 / (40 + 256 * 10))
    np.testing.assert_allclose(prompt.plus(answer, 1.0).without(answer).n_effective, 40)


def test_one_token_with_a_huge_activation_does_not_decide_alone() -> None:
    steady = np.full((100, 2), (1.0, 0.1))
    steady[0] = (1.0, 5.0)  # the second neuron has 26 units of plain energy, the first 100
    wild = steady.copy()
    wild[0] = (1.0, 11.0)  # 122 against 100
    for activations in (steady, wild):
        (score,) = energy(evidence([activations])).scores
        assert score[0] > score[1]


def test_without_any_token_and_prior_scores_and_fills_are_zero() -> None:
    scored = energy(evidence([np.zeros((0, 6))]))
    np.testing.assert_array_equal(scored.scores, [np.zeros(6)])
    np.testing.assert_array_equal(scored.fills, [np.zeros(6)])


def test_static_is_the_energy_of_the_prior_whatever_the_prompt() -> None:
    known = some_activations(64)
    one = static(evidence(some_activations(10), prior_of(known)))
    other = static(evidence([2 * a[::-1] for a in some_activations(20)], prior_of(known)))
    assert one.fills is not None
    assert other.fills is not None
    for i, of_ffn in enumerate(known):
        np.testing.assert_array_equal(one.scores[i], other.scores[i])
        np.testing.assert_allclose(one.fills[i], of_ffn.mean(axis=0), rtol=1e-3, atol=1e-5)


def test_energy_goes_by_norms_and_gradients_alike_where_the_prior_has_them() -> None:
    activations = some_activations()
    prior = prior_of(some_activations())
    gradient = [np.linspace(0.1, 2, a.shape[1], dtype=np.float32) for a in activations]
    norms = [np.linspace(3, 1, a.shape[1], dtype=np.float32) for a in activations]
    plain = energy(evidence(activations, prior, norms))
    weighted = energy(evidence(activations, replace(prior, gradient=gradient), norms))
    for i, scores in enumerate(weighted.scores):
        expected = plain.scores[i] * np.sqrt(gradient[i])
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
        np.testing.assert_array_equal(weighted.fills[i], plain.fills[i])  # type: ignore[index]
