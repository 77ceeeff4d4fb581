"""The ways to tell which neurons matter: each scores all neurons of all FFNs.

A strategy sees the statistics of the tokens so far, the prior, and the norms of the columns of
``ffn_down``; what is kept of each layer is up to ``choose``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from coreinfer_edge.core_context import Extra, Floats, Statistics
from coreinfer_edge.prior import Prior

# The paper's alpha: how many of a token's positive neurons are its core neurons.
TOP_SHARE = 0.4

# The prior counts as so many tokens of the prompt.
PRIOR_TOKENS = 1024.0

# Without a prior, a mean over few tokens says little: it is shrunk towards zero as if this many
# tokens of zero activation had been seen too.
FILL_PRIOR_TOKENS = 8.0


@dataclass(frozen=True)
class Evidence:
    """What a strategy goes by.

    Attributes:
        statistics: of the tokens so far.
        prior: None if the model has none.
        down_norms: squared norms of the columns of ffn_down, per FFN [n_ff].
    """

    statistics: Statistics
    prior: Prior | None
    down_norms: list[Floats]


class Scored(NamedTuple):
    """The result of a strategy.

    Attributes:
        scores: the higher, the sooner a neuron is kept, per FFN [n_ff].
        fills: what stands for the neurons left out, per FFN [n_ff]; None for zero.
    """

    scores: list[Floats]
    fills: list[Floats] | None


def stability(evidence: Evidence) -> Scored:
    """The paper's stability-guided rule (arXiv 2410.18311, section 4.2).

    The core neurons of a token are the top alpha (``TOP_SHARE``) of those with positive
    activation, those of a sentence the ones that are so for the most tokens.
    """
    return Scored(evidence.statistics.top, None)


def similarity(evidence: Evidence) -> Scored:
    """The paper's similarity-guided rule (arXiv 2410.18311, section 4.3), for short prompts.

    The core set is that of the cluster of calibration texts whose core neurons are the most like
    the prompt's (cosine of how often each neuron is a core neuron of a token).
    """
    assert evidence.prior is not None
    assert evidence.prior.clusters is not None
    frequency = evidence.prior.clusters.frequency
    product = np.zeros(len(frequency[0]))
    square = np.zeros(len(frequency[0]))
    for of_clusters, of_prompt in zip(frequency, evidence.statistics.top, strict=True):
        known = of_clusters.astype(np.float32)
        product += known @ of_prompt
        square += np.einsum("kn,kn->k", known, known)
    nearest = int(np.argmax(product / np.sqrt(np.maximum(square, 1.0))))
    return Scored([of_clusters[nearest].astype(np.float32) for of_clusters in frequency], None)


def griffin(evidence: Evidence) -> Scored:
    """GRIFFIN (arXiv 2404.01365, section 4.2): norm over tokens of the normalised activation."""
    return Scored(evidence.statistics.normalized_sq, None)


def static(evidence: Evidence) -> Scored:
    """The prior alone, scored and filled as ``energy`` does: the same core set for every prompt."""
    assert evidence.prior is not None
    nothing = [np.zeros_like(norms) for norms in evidence.down_norms]
    no_tokens = np.zeros(len(nothing), dtype=np.float32)
    empty = Statistics(nothing, nothing, nothing, nothing, no_tokens)
    return energy(Evidence(empty, evidence.prior, evidence.down_norms))


def energy(evidence: Evidence) -> Scored:
    """The energy that a neuron brings into the output of its FFN. Ours, and the default.

    Mean squared activation times squared norm of the column of ffn_down. The mean is the geometric
    one of the plain mean square and that of activations scaled to norm 1 (as GRIFFIN has it), so
    that no single token with a huge activation decides. The prior counts as ``PRIOR_TOKENS``
    tokens. Fill is the mean activation.

    Where the prior has gradients, the norm gives way to its geometric mean with the mean squared
    gradient: what the output of the FFN is worth to the model's own next tokens.
    """
    seen, prior = evidence.statistics, evidence.prior
    scores, fills = [], []
    for i, norms in enumerate(evidence.down_norms):
        n = seen.n_tokens[i]
        total, square, normalized = seen.sum[i], seen.sum_sq[i], seen.normalized_sq[i]
        if prior is not None:
            n_prior = np.float32(PRIOR_TOKENS)
            square = square + n_prior * prior.mean_square[i]
            normalized = normalized + n_prior * prior.normalized_mean_square[i]
            fill = (total + n_prior * prior.mean[i]) / (n + n_prior)
        else:
            fill = total / (n + np.float32(FILL_PRIOR_TOKENS))
        weight = norms
        if prior is not None and prior.gradient is not None:
            weight = np.sqrt(norms * prior.gradient[i])
        scores.append(np.sqrt(square * normalized) * weight)
        fills.append(fill)
    return Scored(scores, fills)


class Strategy(NamedTuple):
    """How a strategy is used.

    Attributes:
        score: the rule itself.
        extra: the statistics that it needs besides sums and sums of squares.
        needs: what of the prior it cannot do without: ``""``, ``"prior"`` or ``"clusters"``.
        ends_first: whether the layers at both ends keep more, unless the user says otherwise.
    """

    score: Callable[[Evidence], Scored]
    extra: Extra
    needs: str
    ends_first: bool


STRATEGIES = {
    "energy": Strategy(energy, Extra(normalized=True), "", ends_first=True),
    "stability": Strategy(stability, Extra(top_share=TOP_SHARE), "", ends_first=False),
    "similarity": Strategy(similarity, Extra(top_share=TOP_SHARE), "clusters", ends_first=False),
    "griffin": Strategy(griffin, Extra(normalized=True), "", ends_first=False),
    "static": Strategy(static, Extra(), "prior", ends_first=True),
}
