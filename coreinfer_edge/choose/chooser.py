"""Chooses the core set: how many neurons each layer keeps, and which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import CoreSet, Extra, Ffn, Floats, Statistics
from coreinfer_edge.choose.strategies import STRATEGIES, Evidence, Scored
from coreinfer_edge.errors import ArgumentError

# Compact tensors are padded to this many neurons, so fewer save nothing. The number is the
# library's (coreinfer_constants.block): a test compares them, since choosing imports no library.
BLOCK = 32

# A layer whose halving costs more than this many times the median is sensitive.
SENSITIVE = 2.0

Densities = npt.NDArray[np.float64]


def layer_densities(n_ffn: int, density: float, fixed: Mapping[int, float]) -> Densities:
    """Share a density out among the layers, so that it is their mean.

    Args:
        n_ffn: number of layers with a dense FFN.
        density: fraction of neurons to keep over all of them, in (0, 1].
        fixed: the densities of some FFNs by index; the others share the rest equally.

    Returns:
        The fraction of neurons to keep, per FFN [n_ffn].

    Raises:
        ArgumentError: the others would have to keep no neurons, or more than they have.
    """
    share = _share_of_others(n_ffn, density, fixed)
    n_others = n_ffn - len(fixed)
    if n_others and not 0 < share <= 1 + 1e-9:
        taken = sum(fixed.values())
        raise ArgumentError(
            f"density {density:g} cannot be the mean with {len(fixed)} of {n_ffn} layers fixed by"
            f" the argument layers: it must be above {taken / n_ffn:.2f} and at most"
            f" {(taken + n_others) / n_ffn:.2f}"
        )
    densities = np.full(n_ffn, min(share, 1.0), dtype=np.float64)
    for i, of_layer in fixed.items():
        densities[i] = of_layer
    return densities


def _share_of_others(n_ffn: int, density: float, fixed: Mapping[int, float]) -> float:
    n_others = n_ffn - len(fixed)
    return (density * n_ffn - sum(fixed.values())) / n_others if n_others else 0.0


def spared(
    layers: Sequence[int], n_layers: int, density: float, sensitivity: Floats | None = None
) -> Densities:
    """Share a density out so that the layers which matter most stay dense.

    If conversion measured the model, those are the layers whose halving costs more than SENSITIVE
    times the median; else the last and the first. They become dense one by one, the most sensitive
    first, while the others keep at least half the density.

    The last layer matters because llama.cpp computes it only for the last token of a prompt, so its
    statistics are of a single token. The first layer matters in models whose embedding is small
    compared with the output of the first FFN.

    KL at densities 0.5 and 0.8 on WikiText-2, 256 tokens of prompt and 64 more, no prior:

    | dense | SmolLM2 (4 windows) | Gemma 3 270M (5 windows) |
    |---|---|---|
    | both | 0.645, 0.183 | 0.826, 0.219 |
    | the first alone | 0.792, 0.284 | 1.003, 0.258 |
    | the last alone | 0.876, 0.285 | 0.751, 0.207 |
    | both, their neighbours at 1.3 times the density | 0.665, 0.175 | 0.868, 0.250 |

    Args:
        layers: number of the layer of each FFN [n_ffn].
        n_layers: number of layers of the model, those without a dense FFN included.
        density: the mean of the densities, in (0, 1].
        sensitivity: KL divergence from dense to a model that keeps half of this FFN [n_ffn]; None
            where not measured.

    Returns:
        The fraction of neurons to keep, per FFN [n_ffn].
    """
    if sensitivity is None:
        first = [layers.index(end) for end in (n_layers - 1, 0) if end in layers]
    else:
        order = np.argsort(-sensitivity, kind="stable").tolist()
        first = [i for i in order if sensitivity[i] > SENSITIVE * np.median(sensitivity)]
    dense = dict.fromkeys(first, 1.0)
    while dense and not density / 2 <= _share_of_others(len(layers), density, dense) <= 1:
        dense.popitem()
    return layer_densities(len(layers), density, dense)


def n_kept(widths: Sequence[int], densities: Sequence[float] | Densities) -> list[int]:
    """How many neurons each FFN keeps: whole blocks, at least one.

    The next layers compensate for the rounding of a layer, so that over all layers the error is
    less than a block.

    Args:
        widths: number of neurons, per FFN.
        densities: fraction to keep, per FFN.
    """
    result = []
    owed = 0.0
    for width, density in zip(widths, densities, strict=True):
        wanted = density * width
        kept = round((wanted + owed) / BLOCK) * BLOCK
        kept = width if density >= 1 else min(width, max(BLOCK, kept))
        owed = max(-BLOCK / 2, min(BLOCK / 2, owed + wanted - kept))
        result.append(kept)
    return result


def best(scores: Floats, n: int) -> npt.NDArray[np.int32]:
    """The ``n`` neurons with the highest scores, ascending [n]; of equal scores the first."""
    least = np.partition(scores, -n)[-n]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)[: n - len(above)]
    return np.sort(np.concatenate([above, equal])).astype(np.int32)


def choose(scored: Scored, densities: Sequence[float] | Densities) -> dict[int, CoreSet]:
    """Keep the neurons with the highest scores in each layer.

    Args:
        scored: scores and fills of a strategy.
        densities: fraction of neurons to keep, per FFN.

    Returns:
        Core sets by index of the FFN; an FFN that stays dense is not among them.
    """
    core = {}
    counts = n_kept([len(score) for score in scored.scores], densities)
    for i, (score, n_keep) in enumerate(zip(scored.scores, counts, strict=True)):
        if n_keep < len(score):
            fill = None if scored.fills is None else scored.fills[i]
            core[i] = CoreSet(best(score, n_keep), fill)
    return core


def density_of(core: Mapping[int, CoreSet], ffns: Sequence[Ffn]) -> float:
    """Fraction of neurons kept, averaged over the layers."""
    shares = [len(core[i].neurons) / ffn.n_ff if i in core else 1.0 for i, ffn in enumerate(ffns)]
    return sum(shares) / len(shares)


class Chooser:
    """Chooses core sets for one model by one strategy.

    Args:
        strategy: one of ``strategies.STRATEGIES``.
        ffns: the FFNs of the model.
        n_layers: number of layers of the model, those without a dense FFN included.
        down_norms: squared norms of the columns of ffn_down, per FFN [n_ff]; or a function that
            reads them, called when neurons are first scored.
        prior: statistics from calibration, if the model has them.
        layers: densities of some layers by number, negative ones from the end; None for the
            strategy's own.

    Raises:
        ArgumentError: the strategy needs a prior, or a layer does not exist.
        ModelFileError: the prior is of another model.
    """

    def __init__(
        self,
        strategy: str,
        ffns: Sequence[Ffn],
        n_layers: int,
        down_norms: list[Floats] | Callable[[], list[Floats]],
        prior: Prior | None,
        layers: Mapping[int, float] | None,
    ) -> None:
        self._strategy = STRATEGIES[strategy]
        if prior is not None:
            prior.check_fits(ffns)
        have = {"": True, "prior": prior is not None, "clusters": bool(prior and prior.clusters)}
        if not have[self._strategy.needs]:
            raise ArgumentError(
                f"strategy {strategy!r} needs the {self._strategy.needs} of a calibration, which"
                " the model file does not have: add it with coreinfer-edge convert"
            )
        self._ffns = ffns
        self._norms = down_norms
        self._prior = prior
        self._n_layers = n_layers
        self._spares = layers is None and self._strategy.spares
        self._fixed = self._by_ffn(layers or {})

    @property
    def extra(self) -> Extra:
        """The statistics that the strategy needs besides sums and sums of squares."""
        return self._strategy.extra

    def _by_ffn(self, layers: Mapping[int, float]) -> dict[int, float]:
        n_layers = self._n_layers
        index = {ffn.layer: i for i, ffn in enumerate(self._ffns)}
        fixed = {}
        for layer, density in layers.items():
            if not -n_layers <= layer < n_layers:
                raise ArgumentError(
                    f"layers names layer {layer}: the model has {n_layers} (0 to {n_layers - 1})"
                )
            if layer % n_layers in index:  # a layer of experts has no dense FFN
                fixed[index[layer % n_layers]] = density
        return fixed

    def densities(self, density: float) -> Densities:
        """The fraction of neurons to keep, per FFN, for a mean density."""
        if self._spares:
            sensitivity = None if self._prior is None else self._prior.sensitivity
            layers = [ffn.layer for ffn in self._ffns]
            return spared(layers, self._n_layers, density, sensitivity)
        return layer_densities(len(self._ffns), density, self._fixed)

    @property
    def least_density(self) -> float:
        """The mean density must be above this, given the layers set by the user."""
        return sum(self._fixed.values()) / len(self._ffns)

    def scored(self, statistics: Statistics) -> Scored:
        """The scores of all neurons, given the statistics of the tokens so far."""
        if callable(self._norms):
            self._norms = self._norms()
        return self._strategy.score(Evidence(statistics, self._prior, self._norms))

    def choose(self, statistics: Statistics, density: float) -> dict[int, CoreSet]:
        """The core sets for a mean density, by index of the FFN."""
        return choose(self.scored(statistics), self.densities(density))


def keep_what_serves(
    now: Mapping[int, CoreSet], wanted: dict[int, CoreSet], scored: Scored, gain: float
) -> dict[int, CoreSet]:
    """Replace a layer's core set only if the new one leaves out clearly less.

    Args:
        now: the core sets in use.
        wanted: the best ones by the new scores.
        scored: the new scores.
        gain: a change must reduce the score left out by this part.

    Returns:
        For each FFN of ``wanted``, either its core set or the one in use.
    """
    result = {}
    for i, core in wanted.items():
        score = scored.scores[i]
        left_out = float(score.sum())
        kept = now.get(i)
        if kept is not None and len(kept.neurons) == len(core.neurons):
            left_now = left_out - float(score[kept.neurons].sum())
            left_then = left_out - float(score[core.neurons].sum())
            if left_then > (1 - gain) * left_now:
                core = kept
        result[i] = core
    return result
