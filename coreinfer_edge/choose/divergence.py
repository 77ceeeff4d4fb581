"""How far the core graph's next-token distributions are from the dense graph's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coreinfer_edge.choose.statistics import Floats, Indices

ROWS_AT_ONCE = 8  # bounds the memory besides the logits

# The densities that "auto" chooses from.
AUTO_DENSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass
class Divergence:
    """Sums over tokens of how core differs from dense; the means are the properties.

    Attributes:
        n_tokens: number of tokens compared.
        kl_sum: Kullback-Leibler divergence from dense to core, in nats.
        n_agreed: tokens for which both rank the same next token first.
        dense_nll, core_nll: negative log-likelihood of the true next token, in nats.
    """

    n_tokens: int = 0
    kl_sum: float = 0.0
    n_agreed: int = 0
    dense_nll: float = 0.0
    core_nll: float = 0.0

    @property
    def kl(self) -> float:
        """Mean KL divergence in nats per token."""
        return self.kl_sum / max(1, self.n_tokens)

    @property
    def agreement(self) -> float:
        """Share of tokens with the same most likely next token."""
        return self.n_agreed / max(1, self.n_tokens)

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of core divided by that of dense."""
        return float(np.exp((self.core_nll - self.dense_nll) / max(1, self.n_tokens)))

    def add(self, dense: Floats, core: Floats, following: Indices | None = None) -> None:
        """Compare some tokens.

        Args:
            dense, core: logits [n_tokens, n_vocab].
            following: the tokens that truly follow [n_tokens], if perplexity is wanted.
        """
        for start in range(0, len(dense), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            p, q = _log_softmax(dense[part]), _log_softmax(core[part])
            self.n_tokens += len(p)
            self.kl_sum += float(np.einsum("tv,tv->", np.exp(p), p - q, dtype=np.float64))
            self.n_agreed += int((dense[part].argmax(1) == core[part].argmax(1)).sum())
            if following is not None:
                rows = np.arange(len(p))
                self.dense_nll -= float(p[rows, following[part]].sum())
                self.core_nll -= float(q[rows, following[part]].sum())


def smallest_density(
    estimate: Callable[[float], float], quality: float, least: float = 0.0
) -> tuple[float, float]:
    """The smallest density whose estimated KL divergence is at most ``quality``.

    A binary search over ``AUTO_DENSITIES``: it assumes that more neurons are never worse.

    Args:
        estimate: the KL divergence in nats that a density is estimated to cause.
        quality: the most it may be.
        least: the density must be above this.

    Returns:
        The density and its estimate; 1.0 and 0.0 if every estimate is too large.
    """
    density, kl = 1.0, 0.0
    candidates = [candidate for candidate in AUTO_DENSITIES if candidate > least]
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        estimated = estimate(candidates[middle])
        if estimated <= quality:
            density, kl, high = candidates[middle], estimated, middle
        else:
            low = middle + 1
    return density, kl


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64))
    return result
