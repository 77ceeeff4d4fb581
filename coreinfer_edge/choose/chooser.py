"""Chooses the core set: how many neurons each layer keeps, and which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from coreinfer_edge.choose.levels import Spending, damage, spend
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import (
    BLOCK,
    LEVELS,
    CoreSet,
    Extra,
    Ffn,
    Floats,
    Level,
    Statistics,
)
from coreinfer_edge.choose.strategies import STRATEGIES, Evidence, Scored
from coreinfer_edge.errors import ArgumentError

# A layer whose halving costs more than this many times the median is sensitive.
SENSITIVE = 2.0

# Of a layer's damage a neuron counts as at most this many times the mean. Some layers have a neuron
# with a hundred times the score of any other, and it alone would stand for the layer.
MOST_OF_MEAN = 4.0

# A level below full is as good as dense for a layer that is spared, if it takes this much less.
MUCH_LESS = 0.75

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
    layers: Sequence[int],
    n_layers: int,
    density: float,
    sensitivity: Floats | None = None,
    enough: Sequence[float] | None = None,
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
        enough: the part of its bytes that is as good as dense, per FFN; None for all of them.

    Returns:
        The fraction of neurons to keep, per FFN [n_ffn].
    """
    if sensitivity is None:
        first = [layers.index(end) for end in (n_layers - 1, 0) if end in layers]
    else:
        order = np.argsort(-sensitivity, kind="stable").tolist()
        first = [i for i in order if sensitivity[i] > SENSITIVE * np.median(sensitivity)]
    dense = {i: 1.0 if enough is None else max(enough[i], density) for i in first}
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


def choose_levels(
    scored: Scored,
    shares: Sequence[tuple[Sequence[int], float]],
    ffns: Sequence[Ffn],
    levels: Sequence[Level],
    losses: Floats | None = None,
) -> dict[int, CoreSet]:
    """Give the neurons levels, for a part of the bytes of their layers.

    Args:
        scored: the scores and the fills of a strategy.
        shares: FFNs that share their bytes, and the fraction of these to read.
        ffns: the FFNs of the model.
        levels: the levels that a neuron can have.
        losses: the measured loss if this FFN alone has few bits, up to a factor [n_ffn]. It says
            how FFNs share bytes; without it they are alike.

    Returns:
        The core sets by the index of the FFN; a dense FFN is not among them.
    """
    core: dict[int, CoreSet] = {}
    owed = 0.0
    for members, share in shares:
        if share >= 1:
            continue
        wanted = share * sum(ffns[i].n_bytes for i in members) + owed
        of_each, taken = _spent(scored, list(members), wanted, ffns, levels, losses)
        for i, level in of_each.items():
            kept = np.flatnonzero(level >= 0).astype(np.int32)
            fill = None if scored.fills is None else scored.fills[i]
            core[i] = CoreSet(kept, fill, level[kept].astype(np.uint8))
        # rounding to blocks is made good by the next layers
        most = ffns[members[0]].block * max(ffns[members[0]].neuron_bytes) / 2
        owed = float(np.clip(wanted - taken, -most, most))
    return core


def _spent(
    scored: Scored,
    members: list[int],
    wanted: float,
    ffns: Sequence[Ffn],
    levels: Sequence[Level],
    losses: Floats | None,
) -> tuple[dict[int, npt.NDArray[np.int8]], float]:
    """The levels of the neurons of those FFNs that do not stay dense, and all bytes taken.

    A dense FFN has no damage at all, and a core set of all its neurons in full has some. So the
    FFNs for which that is worth the price of its bytes become dense, one by one.
    """
    of_dense = 0.0
    while True:
        layers = [
            Spending(
                scored.scores[i],
                ffns[i].neuron_bytes,
                _weight(scored.scores[i], 1.0 if losses is None else float(losses[i])),
                ffns[i].errors,
            )
            for i in members
        ]
        results, price = spend(
            layers, levels, wanted - of_dense, max(ffns[i].block for i in members)
        )
        sizes_now = [
            float(_bytes_by_level(ffns[i])[of].sum())
            for i, of in zip(members, results, strict=True)
        ]
        best_gain, best_i = price, -1
        for i, layer, of, size in zip(members, layers, results, sizes_now, strict=True):
            more = max(ffns[i].n_bytes - size, 1.0)
            gain = layer.weight * damage(layer.scores, of, layer.errors) / more
            affordable = of_dense + ffns[i].n_bytes <= wanted
            # halves are hardly better than the 8 bits of a full neuron, and twice as much
            is_near = ffns[i].neuron_bytes[0] * ffns[i].n_ff > MUCH_LESS * ffns[i].n_bytes
            if "full" in levels and affordable and is_near and gain > best_gain:
                best_gain, best_i = gain, i
        if best_i < 0:
            return dict(zip(members, results, strict=True)), of_dense + sum(sizes_now)
        members.remove(best_i)
        of_dense += ffns[best_i].n_bytes
        if not members:
            return {}, of_dense


def _bytes_by_level(ffn: Ffn) -> npt.NDArray[np.float64]:
    """The bytes of a neuron by the index of its level; -1, the last, is left out."""
    return np.array([*ffn.neuron_bytes, 0.0])


def _weight(scores: Floats, loss: float) -> float:
    """What a score is multiplied with so that those of a layer add up to its loss."""
    total = np.minimum(scores, MOST_OF_MEAN * scores.mean()).sum(dtype=np.float64)
    return loss / float(total) if total > 0 else 1.0


def core_bytes(core: CoreSet, ffn: Ffn) -> float:
    """The bytes of an FFN's weights with a core set, by the levels of its neurons."""
    levels = np.zeros(len(core.neurons), np.uint8) if core.levels is None else core.levels
    return float(np.array(ffn.neuron_bytes)[levels].sum())


def density_of(core: Mapping[int, CoreSet], ffns: Sequence[Ffn]) -> float:
    """The fraction of the bytes if neurons have levels, or the layers' mean of the neurons kept."""
    if any(of_ffn.levels is not None for of_ffn in core.values()):
        all_bytes = sum(ffn.n_bytes for ffn in ffns)
        left_out = sum(ffns[i].n_bytes - core_bytes(core[i], ffns[i]) for i in core)
        return 1 - left_out / all_bytes
    left = sum(1 - len(of_ffn.neurons) / ffns[i].n_ff for i, of_ffn in core.items())
    return 1 - left / len(ffns)


def settled_levels(levels: Sequence[Level] | None, ffns: Sequence[Ffn]) -> tuple[Level, ...]:
    """These levels; all that the neurons of every FFN can have if None.

    Raises:
        ArgumentError: the neurons cannot have one of them.
    """

    def can(ffn: Ffn, level: Level) -> bool:
        return level == "full" or ffn.neuron_bytes[LEVELS.index(level)] > 0

    if levels is None:
        return tuple(level for level in LEVELS if all(can(ffn, level) for ffn in ffns))
    for ffn in ffns:
        if not all(can(ffn, level) for level in levels):
            raise ArgumentError(
                f"the neurons of layer {ffn.layer} cannot have levels below full: on the CPU these"
                " need our own kernels (x86 with AVX2, 64-bit ARM) and a type of weights that the"
                " kernels have, on a GPU rows of a multiple of 256 weights (of 64 for 2 bits, of 32"
                " for 4): leave levels out"
            )
    return tuple(levels)


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
        levels: the levels that neurons can have; None for all that those of every FFN can.

    Attributes:
        levels: the same, settled.

    Raises:
        ArgumentError: the strategy needs a prior, a layer does not exist, or the neurons cannot
            have the levels.
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
        levels: Sequence[Level] | None = ("full",),
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
        self.levels = settled_levels(levels, ffns)
        self._ffns = ffns
        self._norms = down_norms
        self._prior = prior
        self._n_layers = n_layers
        self._spares = layers is None and self._strategy.spares
        # how the layers share bytes, if conversion measured it
        self._losses = prior.low_bits_loss if prior and self._strategy.spares else None
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
            enough = None if self.levels == ("full",) else list(map(self._enough, self._ffns))
            return spared(layers, self._n_layers, density, sensitivity, enough)
        return layer_densities(len(self._ffns), density, self._fixed)

    def _enough(self, ffn: Ffn) -> float:
        """The part of an FFN's bytes with which it is as good as dense."""
        if 4 not in self.levels:
            return 1.0
        share = ffn.neuron_bytes[LEVELS.index(4)] * ffn.n_ff / ffn.n_bytes
        return share if share < MUCH_LESS else 1.0

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
        """The core sets for a mean density, by the index of the FFN."""
        return self.core_sets(self.scored(statistics), density)

    def core_sets(self, scored: Scored, density: float) -> dict[int, CoreSet]:
        """The core sets for a mean density, given the scores, by the index of the FFN."""
        if self.levels == ("full",):
            return choose(scored, self.densities(density))
        return choose_levels(scored, self._shares(density), self._ffns, self.levels, self._losses)

    def _shares(self, density: float) -> list[tuple[list[int], float]]:
        """The FFNs that share bytes, and the fraction that they have of theirs."""
        n = len(self._ffns)
        if self._losses is None:
            return [([i], of) for i, of in enumerate(self.densities(density))]
        layer_densities(n, density, self._fixed)  # refuses what cannot be
        others = [i for i in range(n) if i not in self._fixed]
        shares = [([i], of) for i, of in self._fixed.items()]
        if others:
            shares.append((others, _share_of_others(n, density, self._fixed)))
        return shares


def keep_what_serves(
    now: Mapping[int, CoreSet], wanted: dict[int, CoreSet], scored: Scored, gain: float
) -> dict[int, CoreSet]:
    """Keep a layer's core set unless another one does clearly less damage.

    Args:
        now: the core sets in force.
        wanted: the best core sets by the new scores.
        scored: the new scores.
        gain: the part of the damage that a change must save.

    Returns:
        For each FFN of ``wanted`` either that core set or the one in force.
    """
    result = {}
    for i, core in wanted.items():
        score = scored.scores[i]
        kept = now.get(i)
        # layers that share bytes have a few more or less each time
        if kept is not None and np.abs(sizes(kept) - sizes(core)).max() <= len(score) // 20:
            before, after = (damage(score, _of_all(of, len(score))) for of in (kept, core))
            if after > (1 - gain) * before:
                core = kept
        result[i] = core
    return result


def sizes(core: CoreSet) -> npt.NDArray[np.int64]:
    """The number of neurons of each of LEVELS [n_levels]."""
    levels = np.zeros(len(core.neurons), dtype=np.uint8) if core.levels is None else core.levels
    return np.bincount(levels, minlength=len(LEVELS)).astype(np.int64)


def _of_all(core: CoreSet, n_ff: int) -> npt.NDArray[np.int8]:
    """The level of each neuron, -1 for one that is left out [n_ff]."""
    levels = np.full(n_ff, -1, dtype=np.int8)
    levels[core.neurons] = 0 if core.levels is None else core.levels
    return levels
