"""The measure of quality, against its definition in double precision."""

from __future__ import annotations

import numpy as np
import pytest

from coreinfer_edge.choose.divergence import (
    AUTO_DENSITIES,
    ROWS_AT_ONCE,
    Divergence,
    smallest_density,
)


def probabilities(logits: np.ndarray) -> np.ndarray:
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exact / exact.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("n_tokens", [1, ROWS_AT_ONCE, 3 * ROWS_AT_ONCE + 1])
def test_the_figures_are_those_of_their_definitions(n_tokens: int) -> None:
    rng = np.random.default_rng(n_tokens)
    dense = rng.normal(0, 4, (n_tokens, 500)).astype(np.float32)
    core = dense + rng.normal(0, 1, dense.shape).astype(np.float32)
    following = rng.integers(0, 500, n_tokens, dtype=np.int32)
    measured = Divergence()
    half = n_tokens // 2  # several calls add up
    measured.add(dense[:half], core[:half], following[:half])
    measured.add(dense[half:], core[half:], following[half:])

    p, q = probabilities(dense), probabilities(core)
    rows = np.arange(n_tokens)
    assert measured.n_tokens == n_tokens
    assert measured.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-5)
    assert measured.agreement == np.mean(p.argmax(axis=1) == q.argmax(axis=1))
    ratio = np.exp(np.log(p[rows, following] / q[rows, following]).mean())
    assert measured.perplexity_ratio == pytest.approx(ratio, rel=1e-5)


def test_equal_logits_do_not_differ() -> None:
    logits = np.random.default_rng(0).normal(0, 9, (20, 300)).astype(np.float32)
    measured = Divergence()
    measured.add(logits, logits.copy(), np.zeros(20, dtype=np.int32))
    assert (measured.kl, measured.agreement, measured.perplexity_ratio) == (0, 1, 1)


def test_logits_that_rule_tokens_out_do_not_make_it_infinite() -> None:
    logits = np.full((2, 10), -1e30, dtype=np.float32)
    logits[:, 3] = 5
    measured = Divergence()
    measured.add(logits, logits)
    assert measured.kl == 0


def estimates(needed: float, seen: list[float]) -> object:
    def estimate(density: float) -> float:
        seen.append(density)
        return 0.1 if density >= needed else 2.0

    return estimate


@pytest.mark.parametrize("needed", [*AUTO_DENSITIES, 0.0, 2.0])
@pytest.mark.parametrize("least", [0.0, 0.35, 0.9, 0.95])
def test_the_smallest_density_that_will_do_is_found_in_few_trials(
    needed: float, least: float
) -> None:
    seen: list[float] = []
    density, kl = smallest_density(estimates(needed, seen), 0.5, least)  # type: ignore[arg-type]
    fit = [d for d in AUTO_DENSITIES if d >= needed and d > least]
    assert density == (min(fit) if fit else 1.0)
    assert kl == (0.1 if fit else 0.0)
    assert len(seen) <= 4
    assert all(d > least for d in seen)
