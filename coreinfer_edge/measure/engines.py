"""The engines that ``coreinfer-edge bench`` compares, all driven in the same way.

Run as a script, this file serves one engine to the process that started it: a JSON object a line on
standard input, an answer on standard output. So another engine works on libraries of its own, and
nothing here may import coreinfer_edge: that would make ``llama_cpp`` mean ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

# See ``use_clock``.
clock = time.perf_counter


class Answer(TypedDict):
    """Seconds from the start of a whole answer: to its first token, and to its last."""

    first: float
    last: float


class Engine(Protocol):
    """A loaded model. All tokens are greedy, and an end-of-text token does not end an answer."""

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        """Evaluate a prompt from scratch, and generate ``n`` tokens after it."""

    def fill(self, tokens: Sequence[int]) -> None:
        """Forget everything, and evaluate these tokens."""

    def burst(self, n: int) -> float:
        """Generate ``n`` tokens after those of ``fill``, and forget them; seconds for each.

        One token more goes before them unmeasured: it builds the graph, and wakes the threads.
        """


def _timed_answer(tokens: Iterator[Any], n: int) -> Answer:
    start = clock()
    next(tokens)
    first = clock() - start
    for _ in range(n - 1):
        next(tokens)
    return {"first": first, "last": clock() - start}


def _timed_burst(step: Callable[[], Any], n: int) -> float:
    step()
    start = clock()
    for _ in range(n):
        step()
    return (clock() - start) / n


class LlamaEngine:
    """Any ``llama_cpp.Llama``: an unpatched one in a process of its own, or ours in this one."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        self._filled: list[int] = []

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        self.llama.reset()
        tokens = self.llama.generate(list(prompt), temp=0.0)
        try:
            return _timed_answer(tokens, n)
        finally:
            tokens.close()

    def fill(self, tokens: Sequence[int]) -> None:
        self._filled = list(tokens)
        self.llama.reset()
        self._forget(0)
        self.llama.eval(self._filled)

    def burst(self, n: int) -> float:
        token = self._filled[-1]

        def step() -> None:
            nonlocal token
            self.llama.eval([token])
            token = self.llama.sample(temp=0.0)

        try:
            return _timed_burst(step, n)
        finally:
            self._forget(len(self._filled))

    def _forget(self, n_left: int) -> None:
        self.llama._ctx.kv_cache_seq_rm(-1, n_left, -1)
        self.llama.n_tokens = n_left


class TorchEngine:
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
        self._filled: list[int] = []

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        return _timed_answer(self._generate(prompt), n)

    def fill(self, tokens: Sequence[int]) -> None:
        self._filled = list(tokens)
        self._cache = self._new_cache()
        self._next(self._filled)

    def burst(self, n: int) -> float:
        token = self._filled[-1]

        def step() -> None:
            nonlocal token
            token = self._next([token])

        try:
            return _timed_burst(step, n)
        finally:
            self._cache.crop(-(n + 1))

    def _generate(self, prompt: Sequence[int]) -> Iterator[int]:
        self._cache = self._new_cache()
        token = self._next(prompt)
        while True:
            yield token
            token = self._next([token])

    def _next(self, tokens: Sequence[int]) -> int:
        # not around a generator: inference mode is the thread's, and would leak out of it
        with self._torch.inference_mode():
            result = self._model(
                input_ids=self._torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return int(result.logits[0, -1].argmax())


class OnnxEngine:
    """onnxruntime-genai, on a folder that its model builder has made."""

    def __init__(self, path: str, n_ctx: int, threads: int | None, options: dict[str, Any]) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        if threads:
            options = {"intra_op_num_threads": threads, **options}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og = og
        self._model = og.Model(config)
        self._n_ctx = n_ctx
        self._generator: Any = None
        self._n_filled = 0

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        return _timed_answer(self._generate(prompt), n)

    def fill(self, tokens: Sequence[int]) -> None:
        self._generator = self._new_generator()
        self._generator.append_tokens(list(tokens))
        self._generator.generate_next_token()
        self._n_filled = len(tokens)

    def burst(self, n: int) -> float:
        try:
            return _timed_burst(self._generator.generate_next_token, n)
        finally:
            # it can only go on from tokens given anew
            last = int(self._generator.get_sequence(0)[self._n_filled - 1])
            self._generator.rewind_to(self._n_filled - 1)
            self._generator.append_tokens([last])
            self._generator.generate_next_token()

    def _generate(self, prompt: Sequence[int]) -> Iterator[None]:
        generator = self._new_generator()
        generator.append_tokens(list(prompt))
        while True:
            generator.generate_next_token()
            yield

    def _new_generator(self) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=self._n_ctx, min_length=self._n_ctx)
        return self._og.Generator(self._model, params)


class OpenVinoEngine:
    """openvino-genai, on a folder that optimum-intel has made. It only gives whole answers."""

    def __init__(self, path: str, threads: int | None, options: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        if threads:
            options = {"INFERENCE_NUM_THREADS": threads, **options}
        self._openvino, self._genai = openvino, openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(path, "CPU", **options)
        self._filled: list[int] = []

    def answer(self, prompt: Sequence[int], n: int) -> Answer:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = n
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        times: list[float] = []
        running = self._genai.StreamingStatus.RUNNING

        class Streamer(self._genai.StreamerBase):  # type: ignore[name-defined,misc]
            """Notes when each token is there. A function would be given text, and that late."""

            def write(self, _: Any) -> Any:
                times.append(clock() - start)
                return running

            def end(self) -> None:
                pass

        inputs, streamer = self._inputs(prompt), Streamer()
        start = clock()
        self._pipeline.generate(inputs, config, streamer)
        return {"first": times[0], "last": times[-1]}

    def fill(self, tokens: Sequence[int]) -> None:
        self._filled = list(tokens)

    def burst(self, n: int) -> float:
        times = self.answer(self._filled, n + 1)
        return (times["last"] - times["first"]) / n

    def _inputs(self, prompt: Sequence[int]) -> Any:
        import numpy as np

        ids = np.array([list(prompt)], dtype=np.int64)
        tensor = self._openvino.Tensor
        return self._genai.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids)))


def use_clock(processor_time: bool) -> None:
    """Count the seconds that this process computes, or those that pass.

    The former are nearly the same on a busy machine, but add up over threads: use only one.
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
    """Load a model; what it needs is imported now, and an ImportError says that it is missing."""
    use_clock(processor_time)
    name, _, variant = engine.partition(" ")
    if name == "llama.cpp":
        import llama_cpp

        if variant == "as stored":
            params = llama_cpp.llama_model_default_params()
            params.use_extra_bufts = False
            llama_cpp.llama_cpp.llama_model_default_params = lambda: params
        given = {"n_threads": threads, "n_threads_batch": threads, **options}
        return LlamaEngine(llama_cpp.Llama(path, n_ctx=n_ctx, verbose=False, **given))
    if name == "transformers":
        return TorchEngine(path, variant, threads, options)
    if name == "onnxruntime-genai":
        return OnnxEngine(path, n_ctx, threads, options)
    return OpenVinoEngine(path, threads, options)


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
        # whatever another's library raises is for the one who asked to report
        except Exception as error:
            reply({"error": f"{type(error).__name__}: {error}"})
        else:
            reply({"result": result})


def main() -> None:
    # Libraries print where they like: the answers go out on a copy, their words to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    _serve(iter(sys.stdin.readline, ""), reply)


if __name__ == "__main__":
    main()
