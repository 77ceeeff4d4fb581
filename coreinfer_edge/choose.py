"""Chooses the core set: how many neurons each layer keeps, and which."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from coreinfer_edge.core_context import CoreSet, Floats, Statistics

# Compact tensors are padded to this many neurons (the block of their types), so fewer save nothing.
BLOCK = 32

# A mean over few tokens says little: fill is shrunk towards zero as if this many tokens of zero
# activation had been seen too.
FILL_PRIOR_TOKENS = 8.0


def layer_densities(
    n_layers: int, density: float, dense_layers: Collection[int]
) -> npt.NDArray[np.float64]:
    """Share a density out among the layers, so that it is their mean.

    Args:
        n_layers: number of layers with a dense FFN.
        density: fraction of neurons to keep over all layers, in (0, 1].
        dense_layers: layers to keep whole. They give way, and all layers become equal, where
            less than half the density would be left for each of the others.

    Returns:
        The fraction of neurons to keep, per layer [n_layers].
    """
    densities = np.full(n_layers, density, dtype=np.float64)
    whole = [layer for layer in set(dense_layers) if 0 <= layer < n_layers]
    n_others = n_layers - len(whole)
    share = (density * n_layers - len(whole)) / n_others if n_others else 0.0
    if share >= density / 2:
        densities[:] = share
        densities[whole] = 1.0
    return densities


def n_kept(n_ff: int, density: float) -> int:
    """How many of an FFN's neurons are kept at a density: the nearest number of whole blocks."""
    return min(n_ff, max(BLOCK, round(density * n_ff / BLOCK) * BLOCK))


def energy(
    statistics: Statistics, down_norms: Sequence[Floats]
) -> tuple[list[Floats], list[Floats]]:
    """Score neurons by the energy that they bring into the output of the FFN.

    Mean squared activation times squared norm of the column of ffn_down. Ours; near to GRIFFIN
    (arXiv 2404.01365), which normalises each token and leaves the column out.

    Args:
        statistics: of the tokens so far.
        down_norms: squared norms of the columns of ffn_down, per FFN [n_ff].

    Returns:
        Scores, and as fill the mean activation; per FFN [n_ff] each.
    """
    scores, fills = [], []
    for i, norms in enumerate(down_norms):
        scores.append(statistics.sum_sq[i] * norms)
        fills.append(statistics.sum[i] / (statistics.n_tokens[i] + FILL_PRIOR_TOKENS))
    return scores, fills


def choose(
    scores: Sequence[Floats], fills: Sequence[Floats], densities: Sequence[float]
) -> dict[int, CoreSet]:
    """Keep the neurons with the highest scores in each layer.

    Args:
        scores: per FFN [n_ff].
        fills: what stands for the neurons left out, per FFN [n_ff].
        densities: fraction of neurons to keep, per FFN.

    Returns:
        Core sets by index of the FFN; an FFN that stays dense is not among them.
    """
    core = {}
    for i, (score, fill, density) in enumerate(zip(scores, fills, densities, strict=True)):
        n_keep = n_kept(len(score), density)
        if n_keep < len(score):
            best = np.argpartition(score, -n_keep)[-n_keep:]
            core[i] = CoreSet(np.sort(best).astype(np.int32), fill)
    return core
