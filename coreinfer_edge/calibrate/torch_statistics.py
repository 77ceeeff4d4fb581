"""Collects the statistics of FFN neurons in a Hugging Face model, with torch and transformers.

The same statistics as the native collector's, and gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreinfer_edge.calibrate.torch_model import LAYER, import_torch, load_model
from coreinfer_edge.choose.statistics import Ffn, Floats, Statistics
from coreinfer_edge.errors import UnsupportedModelError

# The module that a neuron's activation goes into: Llama and most since (down_proj), OPT and Phi
# (fc2), GPT-2 and StarCoder (c_proj), GPT-NeoX, Falcon and BLOOM (dense_4h_to_h).
_DOWN = re.compile(
    LAYER + r"(?:\.(?:mlp|feed_forward|ffn))?\.(?:down_proj|fc2|c_proj|dense_4h_to_h)"
)


class TorchStatistics:
    """The statistics of a Hugging Face model, window by window.

    Memory holds the model, if it fits, and the activations of one window. A model that does not fit
    is streamed; memory then holds the activations of one layer and the inputs of the others.

    Args:
        folder: the folder of the model.
        ffns: the FFNs of its GGUF.
        top_share: share of a token's positive neurons that count as its largest.
        sentence: tokens that are added up together.
        seed: the seed of the labels that are sampled for the gradients.
        width: tokens of the longest window.

    Raises:
        InsufficientMemoryError: the model does not fit.
        MissingPackageError: torch, transformers or accelerate is not installed.
        ModelFileError: transformers cannot load the model.
        UnsupportedModelError: its FFNs are not found, or differ from those of the GGUF.
    """

    def __init__(
        self,
        folder: Path,
        ffns: Sequence[Ffn],
        top_share: float,
        sentence: int,
        seed: int,
        width: int,
    ) -> None:
        self._torch, _ = import_torch("statistics with gradients")
        self._model = load_model(folder, sum(ffn.n_ff for ffn in ffns), width)
        self._modules = self._find(ffns)
        self._top_share = top_share
        self._sentence = sentence
        self._generator = self._torch.Generator().manual_seed(seed)
        self._gradient = [np.zeros(ffn.n_ff, dtype=np.float64) for ffn in ffns]
        self._n_tokens = 0

    def _find(self, ffns: Sequence[Ffn]) -> list[Any]:
        """The down module of each FFN."""
        found = {
            int(match["layer"]): module
            for name, module in self._model.named_modules()
            if (match := _DOWN.fullmatch(name))
        }
        for ffn in ffns:
            weight = getattr(found.get(ffn.layer), "weight", None)
            if weight is None or ffn.n_ff not in weight.shape:
                raise UnsupportedModelError(
                    f"layer {ffn.layer} of this {type(self._model).__name__} has no FFN of"
                    f" {ffn.n_ff} neurons that the torch back end finds: use the native one"
                )
        return [found[ffn.layer] for ffn in ffns]

    def run(self, tokens: Sequence[int]) -> list[Statistics]:
        """Evaluate one window; the statistics of each of its sentences."""
        torch = self._torch
        sums: dict[int, list[list[Floats]]] = {}

        def watch(i: int) -> Any:
            def hook(_: Any, arguments: tuple[Any, ...]) -> None:
                act = arguments[0]
                if not act.requires_grad:  # the first FFN: nothing before it needs a gradient
                    act.requires_grad_(True)
                if i not in sums:  # a streamed layer runs again in the backward pass
                    sums[i] = self._sums(act.detach())
                    act.register_hook(lambda gradient: self._add_gradient(i, gradient))

            return hook

        handles = [m.register_forward_pre_hook(watch(i)) for i, m in enumerate(self._modules)]
        try:
            logits = self._model(torch.tensor([list(tokens)]), use_cache=False).logits[0].float()
            log_p = torch.log_softmax(logits, dim=-1)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=self._generator)
            # The gradients of the labels are independent with mean 0, so the square of their sum
            # is on average the sum of their squares.
            log_p.gather(1, labels).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        self._n_tokens += len(tokens)
        n_tokens = np.full(len(self._modules), self._sentence, dtype=np.float32)
        result = []
        for of_sentence in zip(*(sums[i] for i in range(len(self._modules))), strict=True):
            total, square, normalized, top, active = map(list, zip(*of_sentence, strict=True))
            result.append(Statistics(total, square, normalized, top, n_tokens, active))
        return result

    def _add_gradient(self, i: int, gradient: Any) -> None:
        """Add the gradient of an FFN's activations in one window [..., n_ff]."""
        squares = gradient.reshape(-1, gradient.shape[-1]).double().square()
        self._gradient[i] += squares.sum(0).numpy()

    def _sums(self, act: Any) -> list[list[Floats]]:
        """The sums of ``Statistics`` over an FFN's activations [..., n_ff], by sentence."""
        x = act.reshape(-1, self._sentence, act.shape[-1]).float()
        squares = x.square()
        norms = squares.sum(2, keepdim=True).clamp_min(np.finfo(np.float32).tiny)
        ordered = x.sort(dim=2, descending=True).values
        n_top = ((x > 0).sum(2, keepdim=True) * self._top_share).ceil().long()
        least = ordered.gather(2, (n_top - 1).clamp_min(0))
        top = (x >= least) & (x > 0)
        parts = (x, squares, squares / norms, top.float(), (x != 0).float())
        kinds = [part.sum(1).numpy() for part in parts]
        return [list(of_sentence) for of_sentence in zip(*kinds, strict=True)]

    def gradient(self) -> list[Floats]:
        """Mean squared gradient of the windows so far, per FFN [n_ff]."""
        return [(total / self._n_tokens).astype(np.float32) for total in self._gradient]
