"""What plans for main memory and for GPUs have in common: what they are asked, and how they try."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from coreinfer_edge.binding.core import loading
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.chooser import Chooser
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import Ffn, Level
from coreinfer_edge.errors import ArgumentError, InsufficientMemoryError, UnsupportedModelError
from coreinfer_edge.model.chat_templates import CheckedLlama
from coreinfer_edge.model.ffn import dense_ffn, why_not_dense
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.session import AUTO_TOKENS

# Left to the system of what is available ("auto"): other programs, and the page cache, want some.
AUTO_MARGIN = 0.1

# Tokens that a graph evaluates at once, the most first, if the user does not say.
BATCHES = (2048, 1024, 512, 256, 128, 64, 32)
DEFAULT_BATCH = 512
# Without a density to keep to, its buffers may have this part of the budget.
COMPUTE_PART = 0.1

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS.update({f"{unit}i": 1024 ** (i + 1) for i, unit in enumerate("kmgt")})


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A model to plan for, and how it is to run.

    Attributes:
        header: of the model.
        llama_kwargs: arguments of ``llama_cpp.Llama``, ``model_path`` and ``n_ctx`` among them.
        density: what the user wants, None for as much as fits.
        strategy: how the core set is chosen; ``"dense"`` for none.
        layers: densities of some layers by number.
        prior: statistics from calibration, if the model has them.
        levels: the precisions that neurons can have; None leaves it to the plan for GPUs, which
            knows where each layer is computed.
        exact: whether the core set drafts, and dense passes verify.
    """

    header: GGUFHeader
    llama_kwargs: Mapping[str, Any]
    density: float | Literal["auto"] | None = None
    strategy: str = "energy"
    layers: Mapping[int, float] | None = None
    prior: Prior | None = None
    levels: Sequence[Level] | None = None
    exact: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether the model runs without core sets: as asked, or because it has no dense FFN.

        Raises:
            UnsupportedModelError: it has none, and a density is asked for.
        """
        if self.strategy == "dense":
            return True
        if dense_ffn(self.header):
            return False
        if self.density is not None:
            raise UnsupportedModelError(
                f"no layer has a dense FFN that a core set can stand for"
                f" ({why_not_dense(self.header)})"
            )
        return True

    @property
    def is_adapted(self) -> bool:
        """Whether a LoRA adapter changes it."""
        return bool(self.llama_kwargs.get("lora_path"))

    @property
    def n_outputs(self) -> int:
        """Tokens whose logits are asked for at once, 0 for all."""
        wanting_all = ("logits_all", "embedding", "draft_model")
        if any(self.llama_kwargs.get(name) for name in wanting_all):
            return 0
        return AUTO_TOKENS if self.density == "auto" else 1

    def chooser(self) -> Chooser:
        """What shares a density out over the layers, of a model that is not loaded."""
        ffn = dense_ffn(self.header)
        ffns = [Ffn(layer, of_layer.width, 0) for layer, of_layer in ffn.items()]
        n_layers = max(self.header.n_layers, max(ffn) + 1)
        return Chooser(self.strategy, ffns, n_layers, [], self.prior, self.layers)

    def batches(self, most: int) -> list[int]:
        """Tokens to evaluate at once that a plan tries, the most first; the one given, if any."""
        n_ctx = int(self.llama_kwargs["n_ctx"])
        if given := self.llama_kwargs.get("n_ubatch") or self.llama_kwargs.get("n_batch"):
            return [min(given, n_ctx)]
        return [n for n in BATCHES if n <= min(most, max(BATCHES[-1], n_ctx))]


@contextmanager
def trial_context(llama: CheckedLlama, n_batch: int) -> Iterator[int]:
    """A ``llama_context *`` that evaluates so many tokens at once, beside the model's own."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = min(params.n_seq_max, n_batch)  # more would be an assertion
    with loading(llama.packed, llama.tied):  # without data llama.cpp asks where weights may go
        context = llama_cpp.llama_init_from_model(llama.model, params)
    if not context:
        raise InsufficientMemoryError(
            f"llama.cpp makes no context of {params.n_ctx} tokens: give a smaller n_ctx"
        )
    try:
        yield context
    finally:
        llama_cpp.llama_free(context)


def parse_size(size: int | str, argument: str = "memory") -> int:
    """A number of bytes: an int, or text like ``"1.5GiB"``, ``"800MB"``, ``"800M"``.

    Raises:
        ArgumentError: it is none.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]i?)?b?)", size.strip().lower())
        n_bytes = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    else:
        n_bytes = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if n_bytes <= 0:
        raise ArgumentError(
            f"{argument} is {size!r}: it must be a size like '1.5GiB' or '800MB', a number of"
            " bytes, or 'auto'"
        )
    return n_bytes


def mebibytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.0f} MiB"
