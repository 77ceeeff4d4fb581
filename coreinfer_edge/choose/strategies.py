"""The strategies: each scores all neurons of all FFNs.

A strategy sees the statistics of the tokens so far, the prior, and the norms of the columns of
``ffn_down``. ``choose`` decides how many neurons each layer keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import Extra, Floats, Statistics

# The paper's alpha: the share of a token's positive neurons that are its core neurons.
TOP_SHARE = 0.4

# The variance of the logarithm of a neuron's mean square after one token; after n tokens it is this
# divided by n. Activations have heavy tails: a normal distribution would have 2.
TOKEN_VARIANCE = 20.0

# The prior counts as at most this many tokens, even if prompt and prior agree.
MOST_PRIOR_TOKENS = 2048.0

# Neurons far below the mean do not matter, but their logarithms would dominate the comparison of
# prompt and prior. So this part of the mean is added to all.
_FLOOR = 0.01

# Without a prior, a mean over few tokens is uncertain. It is shrunk towards zero as if this many
# tokens of zero activation had been seen too.
FILL_PRIOR_TOKENS = 8.0


@dataclass(frozen=True)
class Evidence:
    """The input of a strategy.

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
        scores: neurons with higher scores are kept first, per FFN [n_ff].
        fills: the values that replace the neurons left out, per FFN [n_ff]; None for zero.
    """

    scores: list[Floats]
    fills: list[Floats] | None


def stability(evidence: Evidence) -> Scored:
    """The paper's stability-guided rule (arXiv 2410.18311, section 4.2).

    The core neurons of a token are the top alpha (``TOP_SHARE``) of the neurons with positive
    activation. The core neurons of a sentence are those that are core neurons of the most tokens.
    """
    return Scored(evidence.statistics.top, None)


def similarity(evidence: Evidence) -> Scored:
    """The paper's similarity-guided rule (arXiv 2410.18311, section 4.3), for short prompts.

    The core set is that of the nearest cluster of calibration texts. Nearness is the cosine of how
    often each neuron is a core neuron of a token, in the cluster and in the prompt.
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


def prior_weight(seen: Floats, known: Floats, n_tokens: float) -> float:
    """The number of tokens that the prior counts as in one FFN (empirical Bayes).

    The prompt's mean squares differ from the prior's for two reasons: few tokens are uncertain
    (``TOKEN_VARIANCE`` / n), and the prompt is another kind of text. The difference that the first
    reason does not explain is the variance between texts. The best weight of the prior is the
    variance of a token divided by the variance between texts. A prior of the same kind of text
    weighs hundreds of tokens, a prior of another kind a few.

    The table has the share of energy that density 0.5 leaves out over the next 128 tokens after 256
    tokens, mean of the middle layers of Gemma 3 270M, for WikiText-2 and Python code:

    | prompt, prior | none | 128 tokens | 1024 tokens | this rule |
    |---|---:|---:|---:|---:|
    | WikiText, WikiText | 0.0861 | 0.0816 | 0.0847 | 0.0818 |
    | WikiText, code | 0.0861 | 0.0887 | 0.1038 | 0.0862 |
    | code, code | 0.0753 | 0.0717 | 0.0724 | 0.0721 |
    | code, WikiText | 0.0753 | 0.0781 | 0.0945 | 0.0750 |

    Args:
        seen: mean squares of the prompt, up to a factor [n_ff].
        known: mean squares of the prior, up to a factor [n_ff].
        n_tokens: the number of equally weighted tokens of the prompt.

    Returns:
        The weight, at most MOST_PRIOR_TOKENS; MOST_PRIOR_TOKENS if the prompt has no tokens.
    """
    if n_tokens <= 0 or not seen.any() or not known.any():
        return MOST_PRIOR_TOKENS
    ratio = np.log(seen + _FLOOR * seen.mean()) - np.log(known + _FLOOR * known.mean())
    between = float(np.var(ratio, dtype=np.float64)) - TOKEN_VARIANCE / n_tokens
    return TOKEN_VARIANCE / max(between, TOKEN_VARIANCE / MOST_PRIOR_TOKENS)


def energy(evidence: Evidence) -> Scored:
    """The size of a neuron's contribution to the output of its FFN. Our rule, and the default.

    The score is the mean squared activation times the norm of the column of ffn_down. The mean is
    the geometric mean of two: the plain mean square, and the mean square of activations scaled to
    norm 1 (as in GRIFFIN). So no single token with a huge activation decides. ``prior_weight`` sets
    the weight of the prior. The fill is the mean activation.

    In the score the prior's tokens weigh 1, like the prompt's, whatever the warm-up tokens weigh.
    In the fill they keep their share of the weight. KL at densities 0.5 and 0.8 (SmolLM2, 12 chat
    prompts, 64 tokens of warm-up and 64 more): no prior 0.714 and 0.185; a prior of generated
    answers with its share in both 0.684 and 0.213, in the fill alone 0.693 and 0.181.

    Energy would take the squared norm. The plain norm is better where a norm follows the FFN
    (Gemma), because a column's length then says less. KL at densities 0.5 and 0.8 with the
    exponents 0, 1 and 2 of the norm (WikiText-2, 256 tokens of prompt and 64 more, no prior): Gemma
    3 270M 0.854, 0.868, 0.909 and 0.272, 0.250, 0.261 (5 windows); SmolLM2 0.687, 0.665, 0.660 and
    0.184, 0.175, 0.179 (4 windows).

    If the prior has gradients, the square root of norm times mean squared gradient replaces the
    norm. The gradient says how much the output of the FFN matters to the model's own next tokens.
    """
    seen, prior = evidence.statistics, evidence.prior
    n_effective = seen.n_effective
    scores, fills = [], []
    for i, squared_norms in enumerate(evidence.down_norms):
        n = seen.n_tokens[i]
        total, square, normalized = seen.sum[i], seen.sum_sq[i], seen.normalized_sq[i]
        weight = np.sqrt(squared_norms)
        # without tokens even a prior that conversion found of no use is better than nothing
        if prior is not None and (n == 0 or prior.most_tokens != 0):
            known = np.sqrt(prior.mean_square[i] * prior.normalized_mean_square[i])
            tokens = prior_weight(np.sqrt(square * normalized), known, float(n_effective[i]))
            if prior.most_tokens:
                tokens = min(tokens, prior.most_tokens)
            n_prior = np.float32(tokens)
            square = square + n_prior * prior.mean_square[i]
            normalized = normalized + n_prior * prior.normalized_mean_square[i]
            # weighting the tokens seen does not make their mean more certain
            n_fill = np.float32(tokens * (n / n_effective[i] if n else 1.0))
            fill = (total + n_fill * prior.mean[i]) / (n + n_fill)
            if prior.gradient is not None:
                weight = np.sqrt(squared_norms * prior.gradient[i])
        else:
            fill = total / (n + np.float32(FILL_PRIOR_TOKENS))
        scores.append(np.sqrt(square * normalized) * weight)
        fills.append(fill)
    return Scored(scores, fills)


class Strategy(NamedTuple):
    """How a strategy is used.

    Attributes:
        score: the rule itself.
        extra: the statistics that it needs besides sums and sums of squares.
        needs: the part of the prior that it requires: ``""``, ``"prior"`` or ``"clusters"``.
        spares: whether the layers that matter most stay dense, unless the user sets ``layers``.
    """

    score: Callable[[Evidence], Scored]
    extra: Extra
    needs: str
    spares: bool


STRATEGIES = {
    "energy": Strategy(energy, Extra(normalized=True), "", spares=True),
    "stability": Strategy(stability, Extra(top_share=TOP_SHARE), "", spares=False),
    "similarity": Strategy(similarity, Extra(top_share=TOP_SHARE), "clusters", spares=False),
    "griffin": Strategy(griffin, Extra(normalized=True), "", spares=False),
    "static": Strategy(static, Extra(), "prior", spares=True),
}
