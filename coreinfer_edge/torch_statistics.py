"""Collects the statistics of FFN neurons in a Hugging Face model, with torch and transformers.

What the native collector sees in a GGUF, and besides that gradients.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from coreinfer_edge.core_context import Ffn, Floats, Statistics
from coreinfer_edge.errors import (
    InsufficientMemoryError,
    MissingPackageError,
    ModelFileError,
    UnsupportedModelError,
)

# The module that a neuron's activation goes into: Llama and most since (down_proj), OPT and Phi
# (fc2), GPT-2 and StarCoder (c_proj), GPT-NeoX, Falcon and BLOOM (dense_4h_to_h).
_DOWN = re.compile(
    r"(?:.*\.)?(?:layers|h|blocks)\.(?P<layer>\d+)"
    r"(?:\.(?:mlp|feed_forward|ffn))?\.(?:down_proj|fc2|c_proj|dense_4h_to_h)"
)


def import_torch(why: str) -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
        MissingPackageError: they are not installed.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"{why} needs torch and transformers ({error}): pip install 'coreinfer-edge[convert]'"
        ) from error
    return torch, transformers


class TorchStatistics:
    """The statistics of a Hugging Face model, window by window.

    Memory holds the model and the activations of one window. It computes in float32 if the model
    fits twice into the memory available then, and in the type of the checkpoint otherwise.

    Args:
        folder: of the model.
        ffns: those of its GGUF.
        top_share: how many of a token's positive neurons count as its largest.
        sentence: tokens that are added up together.
        seed: of the labels that are sampled for the gradients.

    Raises:
        MissingPackageError: torch or transformers are not installed.
        ModelFileError: transformers cannot load the model.
        UnsupportedModelError: its FFNs are not found, or are not those of the GGUF.
    """

    def __init__(
        self, folder: Path, ffns: Sequence[Ffn], top_share: float, sentence: int, seed: int
    ) -> None:
        self._torch, transformers = import_torch("statistics with gradients")
        n_bytes = sum(4 * ffn.n_bytes for ffn in ffns)  # at least: the checkpoint may hold less
        n_bytes = max(n_bytes, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
        fits = 4 * n_bytes < psutil.virtual_memory().available
        try:
            self._model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=self._torch.float32 if fits else "auto", attn_implementation="eager"
            )
        except MemoryError as error:
            raise InsufficientMemoryError(
                f"{folder} does not fit into memory: use the native back end"
            ) from error
        except Exception as error:  # transformers raises whatever its parts raise
            reason = " ".join(str(error).split())
            raise ModelFileError(
                f"transformers cannot load {folder} ({reason[:300]}): check the folder, or use the"
                " native back end"
            ) from error
        self._model.eval().requires_grad_(False)
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
        seen: list[Any] = [None] * len(self._modules)

        def watch(i: int) -> Any:
            def hook(_: Any, arguments: tuple[Any, ...]) -> None:
                act = arguments[0]
                if not act.requires_grad:  # the first: nothing before it asks for a gradient
                    act.requires_grad_(True)
                act.retain_grad()
                seen[i] = act

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
        n_sentences = len(tokens) // self._sentence
        sums: list[list[list[Floats]]] = [[] for _ in range(n_sentences)]
        for i, act in enumerate(seen):
            n_ff = act.shape[-1]
            self._gradient[i] += act.grad.reshape(-1, n_ff).double().square().sum(0).numpy()
            x = act.detach().reshape(n_sentences, self._sentence, n_ff).float()
            for of_sentence, of_ffn in zip(sums, self._sums(x), strict=True):
                of_sentence.append(of_ffn)
        self._n_tokens += len(tokens)
        n_tokens = np.full(len(seen), self._sentence, dtype=np.float32)
        result = []
        for of_sentence in sums:
            total, square, normalized, top, active = map(list, zip(*of_sentence, strict=True))
            result.append(Statistics(total, square, normalized, top, n_tokens, active))
        return result

    def _sums(self, x: Any) -> Iterator[list[Floats]]:
        """Of activations [n_sentences, n_tokens, n_ff]: by sentence what ``Statistics`` holds."""
        squares = x.square()
        norms = squares.sum(2, keepdim=True).clamp_min(np.finfo(np.float32).tiny)
        ordered = x.sort(dim=2, descending=True).values
        n_top = ((x > 0).sum(2, keepdim=True) * self._top_share).ceil().long()
        least = ordered.gather(2, (n_top - 1).clamp_min(0))
        top = (x >= least) & (x > 0)
        parts = (x, squares, squares / norms, top.float(), (x != 0).float())
        kinds = [part.sum(1).numpy() for part in parts]
        return (list(of_sentence) for of_sentence in zip(*kinds, strict=True))

    def gradient(self) -> list[Floats]:
        """Mean squared gradient of the windows so far, per FFN [n_ff]."""
        return [(total / self._n_tokens).astype(np.float32) for total in self._gradient]
