"""The statistics of a model's neurons, and the core set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]

# The precisions of a neuron in a core set: as the model stores it, and in formats of few bits. The
# library numbers them in this order (enum coreinfer_level).
Level = Literal["full", 4, 3, 2]
LEVELS: tuple[Level, ...] = ("full", 4, 3, 2)

# The squared error of a neuron's output at each of LEVELS, relative to its square; of a neuron left
# out it is 1. These are of our own kernels' formats; a device has others, and the library knows
# them. tools/measure_levels.py measures the errors of the weights. A full neuron's column of down
# is rounded when it is gathered, in types of four bits.
ERRORS = (0.003, 0.01, 0.05, 0.22)

# Compact tensors are padded to this many neurons, so fewer save nothing. The number is the
# library's (coreinfer_constants.block): a test compares them, since choosing imports no library.
BLOCK = 32


def level_names(levels: Sequence[Level]) -> str:
    """Levels as the command line takes them."""
    return ",".join(map(str, levels))


class Ffn(NamedTuple):
    """One dense FFN of the model.

    Attributes:
        layer: number of the layer (block) it belongs to.
        n_ff: number of neurons.
        n_bytes: bytes of its weights in the model.
        neuron_bytes: bytes of a neuron of each level in a core set; 0 for a level that it cannot
            have.
        errors: as ERRORS, where the core set is.
        block: neurons of a level below full come in multiples of this.
    """

    layer: int
    n_ff: int
    n_bytes: int
    neuron_bytes: tuple[float, ...] = ()
    errors: tuple[float, ...] = ERRORS
    block: int = BLOCK


class Extra(NamedTuple):
    """The statistics to collect besides the sum and the sum of squares.

    Attributes:
        normalized: collect ``normalized_sq``.
        top_share: collect ``top``, counting this share of a token's positive neurons as its
            largest, in (0, 1]; 0 to collect none.
        active: collect ``active``.
    """

    normalized: bool = False
    top_share: float = 0.0
    active: bool = False


@dataclass(frozen=True)
class Statistics:
    """Sums over tokens of the activation, the input of ffn_down, per FFN.

    Attributes:
        sum: activation, per FFN [n_ff].
        sum_sq: its square, per FFN [n_ff].
        normalized_sq: its square after each token's activation is scaled to norm 1, per FFN
            [n_ff]; 0 unless collected.
        top: number of tokens for which the neuron was among the largest positive ones, per FFN
            [n_ff]; 0 unless collected.
        n_tokens: number of tokens [n_ffn].
        active: number of tokens for which the neuron was not zero, per FFN [n_ff]; empty unless
            collected.
        squared_weights: sum over tokens of the square of their weight [n_ffn]; None if each
            weighs 1.
    """

    sum: list[Floats]
    sum_sq: list[Floats]
    normalized_sq: list[Floats]
    top: list[Floats]
    n_tokens: Floats
    active: list[Floats] = field(default_factory=list)
    squared_weights: Floats | None = None

    @property
    def n_effective(self) -> Floats:
        """The number of equally weighted tokens that would make the means as certain [n_ffn].

        (sum w)^2 / sum w^2 for tokens of weight w; 0 without any.
        """
        squares = np.maximum(self._squares, np.float32(1e-30))
        result: Floats = np.square(self.n_tokens) / squares
        return result

    @property
    def _squares(self) -> Floats:
        return self.n_tokens if self.squared_weights is None else self.squared_weights

    @property
    def activation_sparsity(self) -> Floats:
        """Share of the activations that are exactly zero, as with ReLU [n_ffn]."""
        n_active = [a.sum(dtype=np.float64) / len(a) for a in self.active]
        return (1 - np.array(n_active) / self.n_tokens).astype(np.float32)

    def plus(self, other: Statistics, weight: float) -> Statistics:
        """The sum of these statistics and ``weight`` times those of other tokens."""
        scale = np.float32(weight)

        def sums(a: list[Floats], b: list[Floats]) -> list[Floats]:
            return [x + scale * y for x, y in zip(a, b, strict=True)]

        return Statistics(
            sums(self.sum, other.sum),
            sums(self.sum_sq, other.sum_sq),
            sums(self.normalized_sq, other.normalized_sq),
            sums(self.top, other.top),
            self.n_tokens + scale * other.n_tokens,
            sums(self.active, other.active) if self.active and other.active else [],
            self._squares + scale * scale * other._squares,
        )

    def without(self, part: Statistics) -> Statistics:
        """These statistics minus those of some of their tokens.

        An FFN that has no more tokens than ``part`` stays as it is.
        """
        known = self.n_tokens > part.n_tokens

        def less(a: list[Floats], b: list[Floats], least: float) -> list[Floats]:
            return [
                np.maximum(x - y, np.float32(least)) if more else x
                for x, y, more in zip(a, b, known, strict=True)
            ]

        return Statistics(
            less(self.sum, part.sum, -np.inf),
            less(self.sum_sq, part.sum_sq, 0.0),
            less(self.normalized_sq, part.normalized_sq, 0.0),
            less(self.top, part.top, 0.0),
            np.where(known, self.n_tokens - part.n_tokens, self.n_tokens),
            less(self.active, part.active, 0.0) if self.active and part.active else [],
            np.where(known, np.maximum(self._squares - part._squares, 0), self._squares),
        )


class CoreSet(NamedTuple):
    """The neurons that an FFN keeps.

    Attributes:
        neurons: their indices, ascending [n_core].
        fill: the value that replaces each other neuron [n_ff]; None for zero.
        levels: the level of each neuron, as an index of LEVELS [n_core]; None: all in full.
    """

    neurons: Indices
    fill: Floats | None
    levels: npt.NDArray[np.uint8] | None = None
