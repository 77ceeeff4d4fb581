"""Models in the layout of our own kernels, with a core set and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, core_session, edge
from streamed_llama import greedy, streamed
from test_edge_models import ATTENTION, make_adapter
from test_reference import relative_error, some_tokens

from coreinfer_edge import EdgeLLM
from coreinfer_edge._bundled.llama_cpp import LLAMA_FLASH_ATTN_TYPE_ENABLED
from coreinfer_edge.binding.core import context_memory
from coreinfer_edge.choose.divergence import Divergence
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run import needed_memory
from coreinfer_edge.run.load_plan import plan_memory

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

TEXT = (
    "A lighthouse is a tower that carries a lamp. Its light warns ships of rocks and shallow water,"
    " and tells them where they are. The first ones were fires on hills. Later fires were put on"
    " towers of stone, so that they could be seen from further away. In the nineteenth century a"
    " French engineer, Augustin Fresnel, made lenses of many rings of glass, which gather the light"
    " of a small lamp into a strong beam. A clockwork turned the lens, and every lighthouse flashed"
    " in a rhythm of its own. Today most of them work without a keeper."
)

# What rounding activations to 8 bits may change. ggml's scales are in half precision, and of 256
# values for the K types; ours in single, and of 32.
NEAR = 0.05


@pytest.fixture(scope="module")
def has_kernels(random_model: RandomModel) -> bool:
    with core_session(random_model("llama", "q4_1", shape="small"), packed=True) as session:
        return session.llama.packed_bytes > 0  # of Q4_0 there may be none: see is_fast_already


@pytest.mark.parametrize("at_once", [1, None])
@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "starcoder2"])
def test_logits_are_near_those_without(
    arch: str, type: str, at_once: int | None, random_model: RandomModel
) -> None:
    path, tokens = random_model(arch, type, shape="small"), some_tokens()
    logits, packed_bytes = {}, {}
    for packed in (False, True):
        with core_session(path, packed=packed) as session:
            packed_bytes[packed] = session.llama.packed_bytes
            n_ff = session.core.ffns[0].n_ff
            core = {0: np.arange(0, n_ff, 2), 2: np.arange(1, n_ff, 2)}
            logits[packed, "dense"] = session.run(tokens, at_once)
            logits[packed, "core"] = session.restart().use(core).run(tokens, at_once)
            everything = {i: np.arange(ffn.n_ff) for i, ffn in enumerate(session.core.ffns)}
            all_neurons = session.restart().use(everything).run(tokens, at_once)
            assert (all_neurons == logits[packed, "dense"]).all()
    for what in ("dense", "core"):
        assert relative_error(logits[True, what], logits[False, what])[1] < NEAR
        assert (logits[True, what] == logits[False, what]).all() == (packed_bytes[True] == 0)
    # what the core set itself changes
    assert relative_error(logits[True, "core"], logits[True, "dense"])[1] > 5 * NEAR


@pytest.mark.parametrize("type", ["q4_1", "q5_k", "q6_k"])
def test_an_embedding_that_is_the_output_too_is_looked_up_where_it_is_multiplied(
    type: str, random_model: RandomModel
) -> None:
    path, tokens = random_model("llama", type, shape="small", tied=True), some_tokens()
    embedding = read_header(path).tensors["token_embd.weight"].n_bytes
    logits, packed, weights = [], [], []
    for tied in (False, True):
        with core_session(path, packed=True, tied=tied) as session:
            logits.append(session.run(tokens))
            memory = context_memory(session.llama.ctx)
            packed.append(memory.packed)
            weights.append(memory.weights)
    assert (logits[0] == logits[1]).all()
    assert packed[0] == packed[1]
    if packed[0]:
        assert weights[0] == weights[1] + embedding


@pytest.mark.parametrize("at_once", [1, None])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
def test_attention_with_our_kernel_is_near_that_of_llama_cpp(
    arch: str, at_once: int | None, random_model: RandomModel, has_kernels: bool
) -> None:
    path, tokens = random_model(arch, "q4_1", shape="small"), some_tokens()
    logits = []
    for flash_attn in (False, True):
        with core_session(path, packed=True, flash_attn=flash_attn, type_k=1, type_v=1) as session:
            logits.append(session.run(tokens, at_once))
    assert relative_error(*logits)[1] < NEAR
    assert not has_kernels or (logits[0] != logits[1]).any()


@pytest.mark.parametrize(("options", "is_on"), [({}, True), ({"flash_attn": False}, False)])
def test_flash_attention_is_on_with_our_kernels_unless_it_is_set(
    options: dict[str, Any], is_on: bool, random_model: RandomModel, has_kernels: bool
) -> None:
    path = random_model("llama", "q4_1", shape="small")
    for repack, wanted in ((True, is_on and has_kernels), (False, False)):
        with EdgeLLM(path, n_ctx=256, repack=repack, **options) as llm:
            kind = llm.llama.context_params.flash_attn_type
            assert (kind == LLAMA_FLASH_ATTN_TYPE_ENABLED) == wanted


def test_an_adapter_of_attention_counts(random_model: RandomModel, tmp_path: Path) -> None:
    path, tokens = random_model("llama", "q4_0", n_layer=8), some_tokens()
    adapter = make_adapter(tmp_path / "adapter.gguf", path, ATTENTION)
    logits = {}
    for lora in (None, str(adapter)):
        for packed in (False, True):
            options = {"lora_path": lora} if lora else {}
            with core_session(path, packed=packed, **options) as session:
                core = {i: np.arange(0, session.core.ffns[i].n_ff, 2) for i in range(8)}
                logits[lora, packed] = session.use(core).run(tokens, 1)
    adapted = str(adapter)
    assert relative_error(logits[adapted, True], logits[adapted, False])[1] < NEAR
    assert relative_error(logits[adapted, True], logits[None, True])[1] > 5 * NEAR


@pytest.mark.parametrize("type", ["q4_0", "q8_0", "q4_k", "q6_k"])
def test_weights_that_stream_are_packed_the_same(type: str, random_model: RandomModel) -> None:
    path = random_model("llama", type, shape="small", n_ctx=512)
    whole, from_file = (streamed(path, on, packed=True, warmup=2) for on in (False, True))
    try:
        assert greedy(from_file) == greedy(whole)
        assert from_file.run.streamed_bytes > 0
    finally:
        whole.close()
        from_file.close()


@pytest.mark.parametrize("options", [{"refresh": 6}, {"density": "auto", "quality": 0.5}, {}])
def test_generation_goes_on_as_without(
    options: dict[str, Any], smollm2: Path, has_kernels: bool
) -> None:
    answers, packed = [], []
    for repack in (False, True):
        with edge(smollm2, warmup=2, repack=repack, levels=["full"], n_ctx=512, **options) as llm:
            answers.append(llm.generate("The history of Rome begins with", 40, temperature=0))
            assert llm.last is not None
            assert llm.last.density < 1
            packed.append(llm.last.packed_bytes)
    assert answers[0][:20] == answers[1][:20]
    assert packed[0] == 0
    assert (packed[1] > 0) == has_kernels


@pytest.mark.parametrize("options", [{"density": 1.0}, {"strategy": "dense"}])
def test_dense_stays_as_llama_cpp_has_it_unless_asked(
    options: dict[str, Any], smollm2: Path, has_kernels: bool
) -> None:
    scores = []
    for repack in ({}, {"repack": False}, {"repack": True}):
        with EdgeLLM(smollm2, n_ctx=512, logits_all=True, **repack, **options) as llm:
            continued(llm, some_tokens(), 24)
            scores.append(llm.llama.scores[: len(some_tokens())].copy())
    assert (scores[0] == scores[1]).all()
    assert (scores[0] == scores[2]).all() != has_kernels


def test_by_default_the_whole_model_is_multiplied_by_our_kernels(
    smollm2: Path, has_kernels: bool
) -> None:
    with EdgeLLM(smollm2, n_ctx=512) as llm, EdgeLLM(smollm2, n_ctx=512, density=1.0) as stock:
        ours = llm.generate("The history of Rome begins with", 40, temperature=0)
        theirs = stock.generate("The history of Rome begins with", 40, temperature=0)
        assert llm.last is not None
        assert stock.last is not None
        assert (llm.last.density, llm.last.strategy) == (1.0, "dense")
        assert (llm.last.packed_bytes > 0) == has_kernels
        assert llm.last.core_ffn_bytes == llm.last.full_ffn_bytes
        assert stock.last.packed_bytes == 0
    assert ours[:40] == theirs[:40]


def test_by_default_it_is_done_where_the_weights_have_room(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch, has_kernels: bool
) -> None:
    path = random_model("llama", "q4_1", shape="small")
    weights = sum(tensor.n_bytes for tensor in read_header(path).tensors.values())
    monkeypatch.setattr(needed_memory, "_ELSE", 0)
    monkeypatch.setattr(needed_memory, "_context_bytes", lambda *_: (0, 0))
    for available, fits in ((weights, True), (weights - 1, False)):
        monkeypatch.setattr(needed_memory, "available_bytes", lambda n=available: (n, "a test"))
        with EdgeLLM(path, n_ctx=256) as llm:
            assert (llm.llama.packed_bytes > 0) == (fits and has_kernels)


def test_a_budget_has_the_same_kernels(smollm2: Path, has_kernels: bool) -> None:
    plan = plan_memory(smollm2, "4GiB")
    with EdgeLLM(smollm2, memory="4GiB") as llm:
        assert (llm.llama.packed_bytes > 0) == has_kernels
        assert llm.plan is not None
        assert llm.plan.weights == plan.weights


def test_what_was_asked_for_and_does_nothing_is_warned_of(random_model: RandomModel) -> None:
    path = random_model("llama", "f16", shape="small")
    with pytest.warns(RuntimeWarning, match="repack does nothing here"):
        llm = edge(path, repack=True)
    with llm:
        llm.generate(some_tokens(), 4)
        assert llm.last is not None
        assert llm.last.packed_bytes == 0


def test_our_kernels_differ_from_llama_cpp_by_rounding_only(smollm2: Path) -> None:
    # Activations of 8 bits amplify any change in the order of summation: llama.cpp itself differs
    # by 0.002 nats between one token at a time and many.
    logits = []
    for packed in (False, True):
        with core_session(smollm2, n_ctx=512, packed=packed) as session:
            logits.append(session.run(session.llama.tokenize(TEXT.encode()), 1))
    divergence = Divergence()
    divergence.add(*logits)
    assert divergence.n_tokens > 100
    assert divergence.kl < 0.01
    assert divergence.agreement > 0.9


@pytest.mark.parametrize("options", [{}, {"density": 0.5}, {"repack": False}])
def test_a_density_can_be_set_later(options: dict[str, Any], smollm2: Path) -> None:
    with EdgeLLM(smollm2, n_ctx=512, **options) as llm:
        whole = []
        for density in (1.0, 0.5, None):
            llm.llama.density = density
            llm.generate(TEXT, 80, temperature=0)
            assert llm.last is not None
            assert (llm.last.density < 0.6) == (density == 0.5)
            if density != 0.5:
                whole.append(continued(llm, some_tokens(), 24))
    assert whole[0] == whole[1]


@pytest.mark.parametrize("arch", ["qwen3moe", "mamba"])
def test_by_default_a_model_without_a_dense_ffn_runs_as_ever(
    arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch)
    with EdgeLLM(path, n_ctx=256) as llm, EdgeLLM(path, n_ctx=256, strategy="dense") as dense:
        assert continued(llm, some_tokens(), 8) == continued(dense, some_tokens(), 8)


def test_an_option_of_core_sets_asks_for_a_density_of_its_own(smollm2: Path) -> None:
    for options in ({"strategy": "griffin"}, {"quality": 0.5}, {"layers": [0]}, {"refresh": 50}):
        with EdgeLLM(smollm2, n_ctx=512, **options) as llm:
            assert llm.llama.density == "auto"


def test_kernels_that_there_are_not_are_named(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COREINFER_KERNELS", "sse9")
    with pytest.raises(ArgumentError, match=r"'sse9': it must be one of avx512.*, avx2, .*none"):
        edge(random_model("llama"))


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_what_is_no_truth_value_is_refused(value: Any, random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match=r"repack is .*: it must be True, False or None"):
        EdgeLLM(random_model("llama"), repack=value)
