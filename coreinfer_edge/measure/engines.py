"""The engines that ``coreinfer-edge bench`` compares, all with the same interface.

Run as a script, this file serves one engine to the process that started it. Each line on standard
input is a request in JSON, each line on standard output an answer. The other engine thus has its
own libraries. Nothing here may import coreinfer_edge, which sets how long OpenMP's threads spin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

# See ``use_clock``.
clock = time.perf_counter


class Answer(TypedDict):
    """Seconds from the start of a whole answer to its first and to its last token."""

    first: float
    last: float


class Engine:
    """A loaded model. Decoding is greedy, and goes on after an end-of-text token."""

    _filled: list[int]

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        """Evaluate a prompt from scratch, and generate ``n`` tokens after it."""
        tokens = self._generate(list(prompt))
        try:
            start = clock()
            next(tokens)
            first = clock() - start
            for _ in range(n - 1):
                next(tokens)
            return {"first": first, "last": clock() - start}
        finally:
            tokens.close()

    def fill(self, tokens: Sequence[int]) -> None:
        """Clear the context, and evaluate these tokens."""
        self._filled = list(tokens)
        self._evaluate(self._filled)

    def burst(self, n: int) -> float:
        """Generate ``n`` tokens after those of ``fill``, and remove them; seconds for each.

        One more token goes before them unmeasured: it builds the graph and wakes the threads.
        """
        try:
            token = self._next(self._filled[-1])
            start = clock()
            for _ in range(n):
                token = self._next(token)
            return (clock() - start) / n
        finally:
            self._keep(len(self._filled))

    def _generate(self, prompt: list[int]) -> Generator[int, Any, Any]:
        """Evaluate a prompt from scratch and generate tokens, beginning with the first ``next``."""
        raise NotImplementedError

    def _evaluate(self, tokens: list[int]) -> Any:
        """Clear the context, and evaluate these tokens."""
        raise NotImplementedError

    def _next(self, token: int) -> int:
        """Evaluate a token; the likeliest one after it."""
        raise NotImplementedError

    def _keep(self, n: int) -> None:
        """Remove all but the first ``n`` tokens from the context."""
        raise NotImplementedError


class LlamaEngine(Engine):
    """Any ``llama_cpp.Llama``: an unpatched one in another process, or ours in this process."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama

    def _generate(self, prompt: list[int]) -> Generator[int, Any, Any]:
        self.llama.reset()
        tokens: Generator[int, Any, Any] = self.llama.generate(prompt, temp=0.0)
        return tokens

    def _evaluate(self, tokens: list[int]) -> None:
        self.llama.reset()
        self._keep(0)
        self.llama.eval(tokens)

    def _next(self, token: int) -> int:
        self.llama.eval([token])
        return int(self.llama.sample(temp=0.0))

    def _keep(self, n: int) -> None:
        self.llama._ctx.kv_cache_seq_rm(-1, n, -1)
        self.llama.n_tokens = n


class TorchEngine(Engine):
    """transformers on torch, on the CPU. The GGUF's weights are dequantised to ``dtype``."""

    def __init__(self, path: str, dtype: str, threads: int | None, options: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging

        logging.disable_progress_bar()
        if threads:
            torch.set_num_threads(threads)
        self._torch, self._new_cache = torch, DynamicCache
        self._model = AutoModelForCausalLM.from_pretrained(
            str(Path(path).parent),
            gguf_file=Path(path).name,
            dtype=getattr(torch, dtype),
            **options,
        ).eval()
        self._cache: Any = None

    def _generate(self, prompt: list[int]) -> Generator[int, Any, Any]:
        token = self._evaluate(prompt)
        while True:
            yield token
            token = self._next(token)

    def _evaluate(self, tokens: list[int]) -> int:
        self._cache = self._new_cache()
        return self._after(tokens)

    def _next(self, token: int) -> int:
        return self._after([token])

    def _keep(self, n: int) -> None:
        self._cache.crop(n - self._cache.get_seq_length())

    def _after(self, tokens: list[int]) -> int:
        # Not around a generator: the mode belongs to the thread, and would leak out of it.
        with self._torch.inference_mode():
            result = self._model(
                input_ids=self._torch.tensor([tokens]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return int(result.logits[0, -1].argmax())


def use_clock(processor_time: bool) -> None:
    """Measure the seconds that this process computes, or the seconds that pass.

    The computed seconds hardly change on a busy machine, but add up over threads: use one thread.
    """
    global clock
    clock = time.process_time if processor_time else time.perf_counter


def load(
    engine: str,
    path: str,
    n_ctx: int,
    threads: int | None,
    processor_time: bool,
    options: dict[str, Any],
) -> Engine:
    """Load a model. An ImportError says that the engine's package is missing."""
    use_clock(processor_time)
    name, _, variant = engine.partition(" ")
    if name == "llama.cpp":
        import llama_cpp.llama_cpp as binding
        from llama_cpp import Llama

        if variant == "as stored":
            params = binding.llama_model_default_params()
            params.use_extra_bufts = False
            binding.llama_model_default_params = lambda: params
        given = {"n_threads": threads, "n_threads_batch": threads, **options}
        return LlamaEngine(Llama(path, n_ctx=n_ctx, verbose=False, **given))
    return TorchEngine(path, variant, threads, options)


def _serve(requests: Iterator[str], reply: Callable[[dict[str, Any]], None]) -> None:
    engine: Engine | None = None
    for line in requests:
        request = json.loads(line)
        what = request.pop("do")
        try:
            if what == "load":
                engine = load(**request)
                result: Any = None
            else:
                result = getattr(engine, what)(**request)
        except ImportError as error:
            reply({"missing": str(error)})
        # the process that asked reports any error of the engine's libraries
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
        else:
            reply({"result": result})


def main() -> None:
    # Libraries may print: the answers use a copy of standard output, and their text is diverted.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    _serve(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
