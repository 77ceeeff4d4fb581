"""EdgeLLM: what is dense, what is decoded with the core set, and what happens at the edges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, edge
from reference import Reference
from test_reference import some_tokens

from coreinfer_edge.binding.core import CoreContext, has_device
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.chooser import choose, spared
from coreinfer_edge.choose.statistics import BLOCK, Statistics
from coreinfer_edge.choose.strategies import Evidence, energy
from coreinfer_edge.errors import ArgumentError, ModelFileError, PromptTooLongError
from coreinfer_edge.run.figures import Figures
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.session import (
    WARMUP_LEAST,
    WARMUP_MOST,
    WARMUP_TARGET,
    WARMUP_WEIGHT,
)

RandomModel = Callable[..., Path]

N_LAYER, N_FF = 8, 160  # enough layers for the first and the last to stay dense at density 0.5


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=N_LAYER, n_ff=N_FF)


@pytest.fixture
def llm(model: Path) -> Iterator[EdgeLLM]:
    with edge(model, warmup=0) as llm:
        yield llm


def last(llm: EdgeLLM) -> Figures:
    assert llm.last is not None
    return llm.last


# --- the core path as a whole ---------------------------------------------------------------------


def assert_greedy_with_core_of_prompt_and_warmup(
    path: Path, prompt: Sequence[int], continuation: Sequence[int], warmup: int, density: float
) -> None:
    """The reference, with the core set that prompt and warm-up choose, takes the same tokens."""
    model = Reference(path)
    tokens, n_dense = [*prompt, *continuation], len(prompt) + warmup
    activations = [a.astype(np.float32) for a in model.activations(tokens[:n_dense])]
    activations[-1] = activations[-1][len(prompt) - 1 :]  # where logits are asked for
    # how often each token counts
    weights = [np.where(np.arange(len(a)) < len(a) - warmup, 1, WARMUP_WEIGHT) for a in activations]
    weights = [weight[:, None].astype(np.float32) for weight in weights]
    both = list(zip(weights, activations, strict=True))
    statistics = Statistics(
        [(w * a).sum(axis=0) for w, a in both],
        [(w * a**2).sum(axis=0) for w, a in both],
        [(w * a**2 / (a**2).sum(axis=1, keepdims=True)).sum(axis=0) for w, a in both],
        [np.zeros(a.shape[1], dtype=np.float32) for a in activations],
        np.array([w.sum() for w in weights], dtype=np.float32),
    )
    norms = [
        (model.weight(f"blk.{i}.ffn_down") ** 2).sum(axis=0).astype(np.float32)
        for i in range(model.n_layer)
    ]
    scored = energy(Evidence(statistics, None, norms))
    chosen = choose(scored, spared(range(model.n_layer), model.n_layer, density))
    core = {i: kept.neurons for i, kept in chosen.items()}
    fill = {i: kept.fill for i, kept in chosen.items() if kept.fill is not None}
    logits = model.logits(tokens[:-1], core, fill, core_from=n_dense)
    assert logits.argmax(axis=1)[len(prompt) - 1 :].tolist() == list(continuation)
    dense = model.logits(tokens[:-1])
    assert dense.argmax(axis=1)[len(prompt) - 1 :].tolist() != list(continuation)


@pytest.mark.parametrize(
    ("arch", "n_prompt", "warmup", "density"),
    [
        ("llama", 40, 0, 0.5),
        ("llama", 40, 5, 0.5),
        ("llama", 1, 8, 0.4),
        ("llama", 100, 0, 0.1),  # so low that all layers are alike
        ("phi3", 40, 3, 0.5),
        ("starcoder2", 40, 3, 0.5),
    ],
)
def test_greedy_tokens_are_those_of_the_reference_with_the_core_set_of_the_prompt_and_warm_up(
    arch: str, n_prompt: int, warmup: int, density: float, random_model: RandomModel
) -> None:
    path = random_model(arch, n_layer=N_LAYER)
    prompt = some_tokens(n_prompt)
    with edge(path, density=density, warmup=warmup) as llm:
        tokens = continued(llm, prompt, 24)
    assert_greedy_with_core_of_prompt_and_warmup(path, prompt, tokens, warmup, density)


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 64), (64, 16), (32, 32)])
def test_a_prompt_of_several_batches_and_ubatches_chooses_the_same_core_set(
    n_batch: int, n_ubatch: int, model: Path
) -> None:
    prompt = some_tokens(150)
    with edge(model, warmup=2, n_batch=n_batch, n_ubatch=n_ubatch) as llm:
        tokens = continued(llm, prompt, 12)
    assert_greedy_with_core_of_prompt_and_warmup(model, prompt, tokens, 2, 0.5)


# --- warm-up and figures --------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "n_tokens"), [(0, 10), (4, 10), (20, 10), (9, 10), (10, 11)])
def test_warm_up_is_the_number_of_tokens_decoded_dense_before_the_core_set(
    warmup: int, n_tokens: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen_at: list[int] = []
    set_core = CoreContext.set_core

    def spy(core: CoreContext, sets: Any) -> None:
        chosen_at.append(llm.llama.n_tokens)
        set_core(core, sets)

    monkeypatch.setattr(CoreContext, "set_core", spy)
    with edge(model, warmup=warmup) as llm:
        continued(llm, some_tokens(30), n_tokens)
    # One token fewer is evaluated than there are.
    assert chosen_at == ([30 + warmup] if warmup < n_tokens - 1 else [])


@pytest.mark.parametrize("n_prompt", [1, 30, 90, 200])
def test_auto_warm_up_is_long_for_short_prompts_and_short_for_long_ones(
    n_prompt: int, model: Path
) -> None:
    with edge(model) as llm:
        llm.generate(some_tokens(n_prompt), max_tokens=80, temperature=0)
        expected = max(WARMUP_LEAST, min(WARMUP_MOST, WARMUP_TARGET - n_prompt))
        assert last(llm).warmup_tokens == expected


def test_figures_tell_what_the_call_took(random_model: RandomModel) -> None:
    n_ff = 640
    path = random_model("llama", "q8_0", n_layer=N_LAYER, n_ff=n_ff)
    with edge(path, warmup=5) as llm:
        assert llm.last is None
        prompt = some_tokens(50)
        llm.generate(prompt, max_tokens=20, temperature=0, logit_bias=only_ascii(llm))
        figures = last(llm)
        full = sum(tensor.n_bytes for tensor in ffn_tensors(path))
    assert figures.prompt_tokens == 50
    assert figures.completion_tokens == 20
    assert figures.warmup_tokens == 5
    assert figures.strategy == "energy"
    assert figures.density == pytest.approx(0.5, abs=BLOCK / 2 / n_ff)
    assert figures.full_ffn_bytes == full
    # The fill of the layers with a core set stands in a bias of n_embd 4-byte floats.
    expected = figures.density * full + (N_LAYER - 2) * 64 * 4
    assert figures.core_ffn_bytes == pytest.approx(expected)
    assert figures.prefill_seconds > 0
    assert figures.choose_seconds > 0
    assert figures.decode_seconds > 0
    assert figures.decode_tokens_per_second == pytest.approx(19 / figures.decode_seconds)
    assert figures.core_tokens_per_second > 0
    assert figures.peak_memory_bytes > 10 * 2**20


def ffn_tensors(path: Path) -> list[Any]:
    import gguf

    return [t for t in gguf.GGUFReader(path).tensors if ".ffn_" in t.name and "norm" not in t.name]


def only_ascii(llm: EdgeLLM) -> dict[int, float]:
    """A logit bias against bytes of longer characters, which the binding completes on its own."""
    long = range(0x80, 0x100)
    return {
        token: -100.0
        for token in range(llm.llama.n_vocab())
        if any(byte in long for byte in llm.llama.detokenize([token])) or token < 4
    }


@pytest.mark.parametrize("options", [{"density": 1.0}, {"strategy": "dense"}])
def test_figures_of_a_dense_call_say_so(options: dict[str, Any], model: Path) -> None:
    with edge(model, **options) as llm:
        assert llm.strategy == "dense"
        llm.generate(some_tokens(10), max_tokens=8, temperature=0)
        figures = last(llm)
    assert figures.strategy == "dense"
    assert figures.density == 1.0
    assert figures.warmup_tokens == 0
    assert figures.choose_seconds == 0
    assert figures.core_tokens_per_second == 0
    assert figures.core_ffn_bytes == figures.full_ffn_bytes > 0


def test_figures_of_a_call_that_ends_within_the_warm_up_are_those_of_a_dense_one(
    model: Path,
) -> None:
    with edge(model, warmup=50) as llm:
        llm.generate(some_tokens(10), max_tokens=8, temperature=0)
        figures = last(llm)
    assert figures.density == 1.0
    assert figures.core_tokens_per_second == 0
    assert figures.core_ffn_bytes == figures.full_ffn_bytes
    assert figures.warmup_tokens == figures.completion_tokens - 1


# --- prompts --------------------------------------------------------------------------------------


def test_an_empty_prompt_starts_from_the_beginning_of_text(llm: EdgeLLM) -> None:
    empty = llm.generate("", max_tokens=12, temperature=0)
    assert last(llm).prompt_tokens == 1
    assert last(llm).density < 1
    assert empty == llm.generate([llm.llama.token_bos()], max_tokens=12, temperature=0)
    assert llm.generate([], max_tokens=12, temperature=0) == empty


def test_a_one_token_prompt_works(llm: EdgeLLM) -> None:
    assert llm.generate([50], max_tokens=12, temperature=0)
    assert last(llm).prompt_tokens == 1
    assert last(llm).density < 1


def test_a_prompt_may_be_given_as_tokens(llm: EdgeLLM) -> None:
    text = llm.generate("the hat", max_tokens=12, temperature=0)
    tokens = llm.llama.tokenize(b"the hat", special=True)
    assert llm.generate(tokens, max_tokens=12, temperature=0) == text
    assert llm.generate(np.array(tokens), max_tokens=12, temperature=0) == text
    assert llm.generate(tuple(tokens), max_tokens=12, temperature=0) == text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, -1], "token -1 is none of the model's 320 tokens"),
        ([320], "token 320 is none"),
        ([10**12], "token 1000000000000 is none"),
        ([1.5], "text or a list of token numbers"),
        (["the"], "text or a list of token numbers"),
        (None, "text or a list of token numbers"),
        ("no\ud800text", "holds what is no text"),
    ],
)
def test_a_prompt_that_is_none_is_refused_and_the_model_stays_usable(
    prompt: Any, message: str, llm: EdgeLLM
) -> None:
    before = llm.generate("the hat", max_tokens=8, temperature=0)
    with pytest.raises(ArgumentError, match=message):
        llm.generate(prompt)
    with pytest.raises(ArgumentError, match=message):
        list(llm.stream(prompt))
    assert llm.generate("the hat", max_tokens=8, temperature=0) == before


def test_the_low_level_generate_refuses_an_empty_prompt(llm: EdgeLLM) -> None:
    with pytest.raises(ArgumentError, match="no tokens"):
        next(llm.llama.generate([]))


# --- the context ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [100, 256])  # llama.cpp rounds the first up
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_generation_stops_at_the_end_of_the_context(
    density: float, n_ctx: int, model: Path
) -> None:
    prompt = some_tokens(60)
    with edge(model, density=density, warmup=2, n_ctx=n_ctx) as llm:
        options: dict[str, Any] = {"temperature": 0, "logit_bias": only_ascii(llm)}
        text = llm.generate(prompt, max_tokens=None, **options)
        assert last(llm).prompt_tokens + last(llm).completion_tokens == n_ctx
        assert llm.generate(prompt, max_tokens=None, **options) == text
        assert "".join(llm.stream(prompt, max_tokens=10**6, **options)) == text


def test_a_character_that_the_context_cuts_off_is_no_error(model: Path) -> None:
    with edge(model, warmup=0, n_ctx=64) as llm:
        lead = next(t for t in range(4, 320) if llm.llama.detokenize([t]) == b"\xf0")
        text = llm.generate(some_tokens(50), max_tokens=None, logit_bias={lead: 100.0})
        assert text == ""
        assert len(llm.generate(some_tokens(20), max_tokens=8, temperature=0)) > 0


@pytest.mark.parametrize("n_ctx", [100, 256])
def test_a_prompt_that_fills_the_context_is_refused_and_the_model_stays_usable(
    n_ctx: int, model: Path
) -> None:
    with edge(model, n_ctx=n_ctx) as llm:
        for n in (n_ctx, n_ctx + 1, 300):
            with pytest.raises(PromptTooLongError, match=f"prompt of {n} tokens .* of {n_ctx}"):
                llm.generate([50] * n)
        with pytest.raises(PromptTooLongError, match="larger n_ctx"):
            list(llm.stream("the man " * 300))
        with pytest.raises(PromptTooLongError, match="larger n_ctx"):
            llm.chat([{"role": "user", "content": "the man " * 300}])
        llm.generate([50] * (n_ctx - 1), max_tokens=8, temperature=0)
        assert last(llm).prompt_tokens == n_ctx - 1
        assert last(llm).completion_tokens >= 1


def test_the_default_context_is_the_models_own_up_to_a_limit(random_model: RandomModel) -> None:
    for trained, expected in ((300, 300), (512, 512), (100_000, 4096)):
        with edge(random_model("llama", n_ctx=trained)) as llm:
            assert len(llm.llama.input_ids) == expected


# --- one call after, beside or within another -----------------------------------------------------


def test_two_models_in_one_process_do_not_disturb_each_other(
    model: Path, random_model: RandomModel
) -> None:
    other = random_model("phi3", n_layer=N_LAYER)
    alone = []
    for path in (model, other):
        with edge(path, warmup=3) as llm:
            alone.append("".join(llm.stream("the hat", max_tokens=30, temperature=0)))
    with edge(model, warmup=3) as first, edge(other, warmup=3) as second:
        texts = ["", ""]
        streams = [a.stream("the hat", max_tokens=30, temperature=0) for a in (first, second)]
        ended = 0
        while ended < 2:
            ended = 0
            for i, stream in enumerate(streams):
                piece = next(stream, None)
                texts[i] += piece or ""
                ended += piece is None
        assert last(first).density < 1 > last(second).density
    assert texts == alone


def test_a_model_works_from_other_threads(model: Path) -> None:
    results: dict[int, Any] = {}

    def in_thread(i: int, work: Callable[[], Any]) -> None:
        def run() -> None:
            results[i] = work()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with edge(model, warmup=2) as llm:
        expected = llm.generate("the hat", max_tokens=20, temperature=0)
        in_thread(0, lambda: llm.generate("the hat", max_tokens=20, temperature=0))
        in_thread(1, lambda: llm.generate("a man", max_tokens=20, temperature=0))
        in_thread(2, lambda: llm.generate("the hat", max_tokens=20, temperature=0))
        assert results[0] == expected
    in_thread(3, lambda: edge(model, warmup=2))
    with results[3] as llm:
        assert llm.generate("the hat", max_tokens=20, temperature=0) == expected


def test_a_stream_is_over_once_another_call_has_begun(model: Path) -> None:
    with edge(model, warmup=2) as llm:
        stream = llm.stream("the cat", max_tokens=20, temperature=0)
        next(stream)
        alone = llm.generate("the hat", max_tokens=20, temperature=0)
        with pytest.raises(ArgumentError, match="another call"):
            list(stream)
        assert llm.generate("the hat", max_tokens=20, temperature=0) == alone


def test_calls_from_several_threads_take_turns(model: Path) -> None:
    prompts = ["first of all", "and a second", "third, not last", "here is the end"]
    with edge(model, warmup=2) as llm:
        expected = [llm.generate(prompt, max_tokens=20, temperature=0) for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = pool.map(
                lambda prompt: llm.generate(prompt, max_tokens=20, temperature=0), prompts
            )
            assert list(answers) == expected


def test_generate_points_to_stream(llm: EdgeLLM) -> None:
    with pytest.raises(ArgumentError, match=r"EdgeLLM\.stream"):
        llm.generate("the hat", stream=True)


def test_an_empty_stop_text_stops_nothing(llm: EdgeLLM) -> None:
    free = llm.generate("the hat", max_tokens=8, temperature=0)
    assert free
    assert llm.generate("the hat", max_tokens=8, temperature=0, stop=["", "never"]) == free


def test_the_packaged_model_goes_by_its_name(smollm2: Path) -> None:
    with EdgeLLM("demo", n_ctx=256) as llm:
        assert Path(llm.llama.model_path) == smollm2


def test_gpu_layers_without_a_gpu_backend_are_warned_about(model: Path) -> None:
    if has_device():
        pytest.skip("this build has a GPU backend")
    with pytest.warns(RuntimeWarning, match="sees no GPU"):
        edge(model, n_gpu_layers=99).close()


def test_a_stream_dropped_half_way_does_not_disturb_the_next_call(model: Path) -> None:
    for taken in (1, 3, 9):  # within the warm-up and after it
        with edge(model, warmup=3) as llm, edge(model, warmup=3) as fresh:
            stream = llm.stream([7, 8, 9], max_tokens=60, temperature=0)
            for _ in range(taken):
                next(stream)
            del stream
            prompt = some_tokens(20)
            assert continued(llm, prompt, 20) == continued(fresh, prompt, 20)


def test_a_stream_kept_half_way_does_not_disturb_the_next_call(model: Path) -> None:
    with edge(model, warmup=3) as llm, edge(model, warmup=3) as fresh:
        stream = llm.stream([7, 8, 9], max_tokens=60, temperature=0)
        for _ in range(9):
            next(stream)
        prompt = some_tokens(20)
        expected = fresh.generate(prompt, max_tokens=20, temperature=0)
        assert llm.generate(prompt, max_tokens=20, temperature=0) == expected
        stream.close()  # type: ignore[attr-defined]
        again = llm.generate(prompt, max_tokens=20, temperature=0)
        assert again == fresh.generate(prompt, max_tokens=20, temperature=0)


def test_a_prompt_broken_off_while_it_is_evaluated_is_not_taken_for_one_that_was(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = llama_cpp.Llama.eval

    def interrupted(llama: llama_cpp.Llama, tokens: Sequence[int]) -> None:
        raise KeyboardInterrupt

    prompt = some_tokens(30)
    with edge(model, warmup=0) as llm, edge(model, warmup=0) as fresh:
        continued(llm, [300, *some_tokens(10)], 5)
        monkeypatch.setattr(llama_cpp.Llama, "eval", interrupted)
        with pytest.raises(KeyboardInterrupt):
            continued(llm, prompt, 20)
        monkeypatch.setattr(llama_cpp.Llama, "eval", evaluate)
        assert continued(llm, prompt, 20) == continued(fresh, prompt, 20)


def test_evaluating_by_hand_after_a_call_is_dense(model: Path) -> None:
    tokens = some_tokens(20)
    with edge(model, warmup=0, logits_all=True) as llm:
        llama = llm.llama
        llama.eval(tokens)
        before = llama.scores[:20].copy()
        llm.generate(some_tokens(30), max_tokens=10, temperature=0)
        assert last(llm).density < 1
        llama.reset()
        llama.eval(tokens)
        np.testing.assert_array_equal(llama.scores[:20], before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_embeddings_after_a_call_are_dense(model: Path) -> None:
    with edge(model, warmup=0, embedding=True) as llm:
        before = llm.llama.embed("the hat")
        text = llm.generate(some_tokens(30), max_tokens=10, temperature=0)
        assert last(llm).density < 1
        assert llm.llama.embed("the hat") == before
        assert llm.generate(some_tokens(30), max_tokens=10, temperature=0) == text


def test_a_core_set_that_cannot_be_gathered_is_an_error_and_the_next_call_tries_again(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_core = CoreContext.set_core

    def failing(core: CoreContext, sets: Any) -> None:
        set_core(core, {})
        raise ModelFileError("cut off")

    prompt = some_tokens(30)
    with edge(model, warmup=2) as llm, edge(model, warmup=2) as fresh:
        expected = fresh.generate(prompt, max_tokens=10, temperature=0)
        with monkeypatch.context() as patched:
            patched.setattr(CoreContext, "set_core", failing)
            with pytest.raises(ModelFileError, match="cut off"):
                llm.generate(prompt, max_tokens=10, temperature=0)
        assert last(llm).density == 1.0
        assert llm.generate(prompt, max_tokens=10, temperature=0) == expected
        assert last(llm).density < 1.0


# --- closing --------------------------------------------------------------------------------------


def test_closing_can_be_done_twice_and_using_it_afterwards_is_refused(model: Path) -> None:
    with edge(model) as llm:
        llm.generate("the hat", max_tokens=4)
        llm.close()
        llm.close()
    uses: list[Callable[[], Any]] = [
        lambda: llm.generate("the hat"),
        lambda: next(llm.stream("the hat")),
        lambda: llm.chat([{"role": "user", "content": "hello"}]),
        lambda: llm.llama,
    ]
    for use in uses:
        with pytest.raises(ArgumentError, match="closed"):
            use()
    assert last(llm).completion_tokens > 0


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_closing_during_a_stream_ends_the_stream_with_an_error(density: float, model: Path) -> None:
    llm = edge(model, density=density, warmup=0)
    stream = llm.stream("the hat", max_tokens=200, temperature=0, logit_bias=only_ascii(llm))
    next(stream)
    llm.close()
    with pytest.raises(ArgumentError, match="closed"):
        list(stream)


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density is 0: it must be above 0 and at most 1"),
        ({"density": -0.5}, "density is -0.5"),
        ({"density": 1.01}, "density is 1.01"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": float("inf")}, "density is inf"),
        ({"density": "half"}, "density is 'half'"),
        ({"density": True}, "density is True"),
        ({"strategy": "magic"}, "strategy is 'magic': it must be one of energy, stability"),
        ({"strategy": 1}, "strategy is 1"),
        ({"strategy": "dense", "density": 0.5}, "'dense' runs the whole model.*leave one out"),
        ({"strategy": "dense", "density": "auto"}, "'dense' runs the whole model.*leave one out"),
        ({"exact": True, "density": 1}, "exact drafts with a core set.*leave one out"),
        ({"exact": True, "strategy": "dense"}, "exact drafts with a core set.*leave one out"),
        ({"warmup": -1}, "warmup is -1: it must be 'auto' or a number of tokens"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"warmup": "some"}, "warmup is 'some'"),
        ({"warmup": True}, "warmup is True"),
        ({"memory": "much"}, "memory is 'much': it must be a size"),
        ({"n_ctx": 0}, "n_ctx is 0: it must be a number of tokens from 1"),
        ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": 2**31}, "n_ctx is 2147483648"),
        ({"n_ctx": "many"}, "n_ctx is 'many'"),
        ({"n_ctx": True}, "n_ctx is True"),
        ({"n_cxt": 512}, "n_cxt is no argument of EdgeLLM or of llama_cpp.Llama"),
        ({"no_alloc": True}, "no_alloc is no argument of EdgeLLM"),
        ({"model_path": "x"}, "model_path is no argument"),
        ({"kwargs": {}}, "kwargs is no argument"),
        ({"files": []}, "files is no argument"),
        ({"vocab_only": True}, "vocab_only"),
    ],
)
def test_an_argument_outside_what_it_may_be_is_refused(
    options: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        EdgeLLM(model, **options)


def test_an_unknown_sampling_argument_is_refused(llm: EdgeLLM) -> None:
    with pytest.raises(ArgumentError, match="temperatur"):
        llm.generate("the hat", temperatur=0.5)
