"""One llama.cpp context with a core context on it, as the tests of the core path drive it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference import Core, Fill

from coreinfer_edge._bundled.llama_cpp import GGML_TYPE_F32
from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.llama import Llama
from coreinfer_edge.choose.statistics import CoreSet
from coreinfer_edge.run.llm import EdgeLLM

Logits = NDArray[np.float32]


class CoreSession:
    """A model evaluated by hand, token after token or in batches.

    The KV cache is F32 and flash attention off, so that nothing is rounded that need not be.
    One thread is the fastest on models this small.
    """

    def __init__(self, path: Path, files: Sequence[Path] | None = None, **options: Any) -> None:
        self.llama = Llama(
            **{
                "model_path": str(path),
                "n_ctx": 256,
                "n_threads": 1,
                "n_threads_batch": 1,
                "logits_all": True,
                "flash_attn": False,
                "type_k": GGML_TYPE_F32,
                "type_v": GGML_TYPE_F32,
                "verbose": False,
                **options,
            },
        )
        self.core = CoreContext(
            self.llama.ctx, files or [path], n_threads=1, packed=self.llama.packed
        )

    def restart(self) -> CoreSession:
        """Go back to position 0."""
        self.llama.reset()
        return self

    def run(self, tokens: Sequence[int], at_once: int | None = None) -> Logits:
        """Evaluate the next tokens, some at once (default: all); their logits."""
        start = self.llama.n_tokens
        step = at_once or len(tokens)
        for i in range(0, len(tokens), step):
            self.llama.eval(tokens[i : i + step])
        logits: Logits = self.llama.scores[start : self.llama.n_tokens].copy()
        return logits

    def use(self, core: Core, fill: Fill | None = None) -> CoreSession:
        """Go on with a core set."""
        self.core.set_core(core_sets(core, fill))
        self.core.use_core(True)
        return self

    def close(self) -> None:
        self.llama.close()
        self.core.close()


@contextmanager
def core_session(
    path: Path, files: Sequence[Path] | None = None, **options: Any
) -> Iterator[CoreSession]:
    session = CoreSession(path, files, **options)
    try:
        yield session
    finally:
        session.close()


def core_sets(core: Core, fill: Fill | None = None) -> Mapping[int, CoreSet]:
    """Those of the reference in the form that CoreContext takes."""
    sets = {}
    for i, neurons in core.items():
        values = None if fill is None or i not in fill else fill[i].astype(np.float32)
        sets[i] = CoreSet(np.sort(neurons).astype(np.int32), values)
    return sets


def edge(path: Path, **options: Any) -> EdgeLLM:
    """An EdgeLLM with a core set and the same care for exact results."""
    return EdgeLLM(
        path,
        **{
            "density": None if options.get("strategy") == "dense" else 0.5,
            "repack": False,
            "n_threads": 1,
            "n_threads_batch": 1,
            "flash_attn": False,
            "type_k": GGML_TYPE_F32,
            "type_v": GGML_TYPE_F32,
            **options,
        },
    )


def continued(llm: EdgeLLM, prompt: Sequence[int], n: int) -> list[int]:
    """The next ``n`` tokens, greedy."""
    steps = llm.llama.generate(list(prompt), temp=0.0)
    tokens = [token for _, token in zip(range(n), steps, strict=False)]
    steps.close()
    return tokens
