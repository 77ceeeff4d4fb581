"""The options of a model: one object, checked in one place."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from coreinfer_edge.choose.statistics import LEVELS, Level
from coreinfer_edge.choose.strategies import STRATEGIES
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.run.arguments import check_density, check_quality, is_share
from coreinfer_edge.run.sampling import given_seed

# The KL divergence that density="auto" keeps to: at 0.1 nats a reader sees no difference.
QUALITY = 0.1

# The density that ``exact`` drafts with, where the user gives none and no plan sets one.
DRAFT_DENSITY = 0.5


@dataclass(frozen=True)
class Options:
    """How a model is to run, as a user says it. ``EdgeLLM`` describes each option."""

    density: float | Literal["auto"] | None = None
    strategy: str | None = None
    warmup: int | Literal["auto"] = "auto"
    memory: int | str | None = None
    n_ctx: int | None = None
    seed: int | None = None
    quality: float | None = None
    layers: Iterable[int] | Mapping[int, float] | None = None
    refresh: int | None = None
    repack: bool | None = None
    levels: Sequence[Level] | None = None
    gpu_memory: int | str | Sequence[int | str] | None = None
    exact: bool = False

    def settled(self) -> SettledOptions:
        """These options with the defaults filled in.

        Raises:
            ArgumentError: one is outside its range, or two do not go together.
        """
        self.check()
        density = self.density
        if isinstance(density, Real):
            density = float(density)
        if self.implies_auto:
            density = "auto"
        strategy = "energy" if self.strategy is None else self.strategy
        if density == 1.0:
            strategy = "dense"
        settled = SettledOptions(
            density,
            strategy,
            self.warmup,
            self.memory,
            self.n_ctx,
            given_seed(self.seed),
            QUALITY if self.quality is None else self.quality,
            _layer_densities(self.layers, density),
            self.refresh,
            False if self.repack is None and strategy == "dense" else self.repack,
            None if self.levels is None else tuple(self.levels),
            self.gpu_memory,
            self.exact,
        )
        if settled.sets_once:
            settled.check_once()
        return settled

    def check(self) -> None:
        """Refuse an option outside its range.

        Raises:
            ArgumentError: says which, and what it may be.
        """
        if self.density is not None:
            check_density(self.density)
        strategies = (*STRATEGIES, "dense")
        if self.strategy is not None and self.strategy not in strategies:
            raise ArgumentError(
                f"strategy is {self.strategy!r}: it must be one of {', '.join(strategies)}"
            )
        if self.strategy == "dense" and self.density not in (None, 1.0):
            raise ArgumentError(
                f"strategy 'dense' runs the whole model, and density {self.density!r} a part of"
                " it: leave one out"
            )
        if self.warmup != "auto" and not _is_whole(self.warmup, 0):
            raise ArgumentError(
                f"warmup is {self.warmup!r}: it must be 'auto' or a number of tokens"
            )
        if self.n_ctx is not None and not (_is_whole(self.n_ctx, 1) and self.n_ctx < 2**31):
            raise ArgumentError(
                f"n_ctx is {self.n_ctx!r}: it must be a number of tokens from 1 to 2147483647"
            )
        if self.quality is not None:
            check_quality(self.quality)
            if self.density not in (None, "auto") or self._is_whole:
                raise ArgumentError(
                    "quality is what density='auto' keeps to, and a density is given: leave one out"
                )
        if self.refresh is not None and not _is_whole(self.refresh, 1):
            raise ArgumentError(
                f"refresh is {self.refresh!r}: it must be None or a number of tokens"
            )
        if self.repack is not None and not isinstance(self.repack, bool):
            raise ArgumentError(f"repack is {self.repack!r}: it must be True, False or None")
        if not isinstance(self.exact, bool):
            raise ArgumentError(f"exact is {self.exact!r}: it must be True or False")
        others = (self.density == "auto", self.quality is not None, self.refresh is not None)
        if self.exact and any(others):
            raise ArgumentError(
                "exact loses nothing, and its core set follows the text: leave density='auto',"
                " quality and refresh out"
            )
        if self.exact and self._is_whole:
            raise ArgumentError(
                "exact drafts with a core set, and the whole model (density 1, strategy 'dense')"
                " has none: leave one out"
            )
        self._check_levels()
        if self.memory is not None:
            from coreinfer_edge.run.planning import parse_size

            if self.memory != "auto":
                parse_size(self.memory)
        if self.gpu_memory is not None:
            from coreinfer_edge.run.gpu_budget import parse_budgets

            parse_budgets(self.gpu_memory)

    @property
    def implies_auto(self) -> bool:
        """Whether a density of ``"auto"`` follows from other options, and is not given."""
        if self.density is not None or self.strategy == "dense" or self.exact:
            return False
        given = (self.strategy, self.quality, self.layers, self.refresh, self.levels)
        return self.warmup != "auto" or any(option is not None for option in given)

    @property
    def levels_below_full(self) -> bool:
        """Whether levels below full were asked for."""
        return self.levels is not None and tuple(self.levels) != ("full",)

    @property
    def sets_once(self) -> bool:
        """Whether the prompt changes nothing: the levels are set when the model is loaded."""
        is_static = self.strategy == "static" and not self.exact
        return is_static and self.levels_below_full and self.density != "auto"

    def check_once(self) -> None:
        """Refuse what would change levels that are set once.

        Raises:
            ArgumentError: says which.
        """
        for name, value in (("refresh", self.refresh), ("warmup", self.warmup)):
            if value not in (None, "auto", 0):
                raise ArgumentError(
                    f"{name} does not go with levels that are set once, when the model is loaded,"
                    " as strategy 'static' does: leave it out, or choose another strategy"
                )

    def _check_levels(self) -> None:
        levels = self.levels
        if levels is None:
            return
        if (
            isinstance(levels, str)
            or not isinstance(levels, Sequence)
            or not levels
            or any(level not in LEVELS or isinstance(level, float) for level in levels)
            or len(set(levels)) < len(levels)
        ):
            raise ArgumentError(
                f"levels is {levels!r}: it must be a list of some of 'full', 4, 3 and 2 (bits)"
            )
        if self._is_whole and self.levels_below_full:
            raise ArgumentError(
                "levels are of a core set, and density 1 or strategy 'dense' has none: leave levels"
                " out, or give a density below 1"
            )

    @property
    def _is_whole(self) -> bool:
        return self.density == 1.0 or self.strategy == "dense"


@dataclass(frozen=True)
class SettledOptions(Options):
    """Options with the defaults filled in.

    ``density`` is None for the whole model, or with ``memory`` for as much as fits. ``repack`` is
    None for our kernels if there is memory for the weights, which cannot stay mapped then.
    ``levels`` is None for all that the neurons can have.
    """

    strategy: str = "energy"
    quality: float = QUALITY
    layers: dict[int, float] | None = None


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _layer_densities(
    layers: Iterable[int] | Mapping[int, float] | None, density: float | str | None
) -> dict[int, float] | None:
    """The option ``layers`` as densities by layer; a list names those that stay dense."""
    if layers is None:
        return None
    try:
        pairs = layers.items() if isinstance(layers, Mapping) else ((i, 1.0) for i in layers)
        result = {operator.index(layer): share for layer, share in pairs}
    except TypeError as error:
        raise ArgumentError(
            f"layers is {layers!r}: it must be a list of layer numbers, or a dict from layer"
            " numbers to densities"
        ) from error
    for layer, share in result.items():
        if not is_share(share):
            raise ArgumentError(
                f"layers gives layer {layer} the density {share!r}: it must be above 0 and at most"
                " 1 (1 is dense)"
            )
    if density == "auto" and any(share < 1 for share in result.values()):
        raise ArgumentError("with density='auto' layers can only name layers that stay dense")
    return result
