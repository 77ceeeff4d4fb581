"""Decoding with packed copies of the weights, with a core set and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, core_session, edge
from test_edge_models import ATTENTION, make_adapter
from test_reference import relative_error, some_tokens

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.choose.divergence import Divergence
from coreinfer_edge.errors import ArgumentError, InsufficientMemoryError
from coreinfer_edge.run import core_llama

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
    with core_session(random_model("llama", "q4_0", shape="small")) as session:
        session.core.repack(True)
        return session.core.repack_bytes > 0


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "starcoder2"])
def test_logits_are_near_those_without(
    arch: str, type: str, random_model: RandomModel, has_kernels: bool
) -> None:
    path, tokens = random_model(arch, type, shape="small"), some_tokens()
    with core_session(path) as session:
        n_ff = session.core.ffns[0].n_ff
        core = {0: np.arange(0, n_ff, 2), 2: np.arange(1, n_ff, 2)}
        dense = session.restart().use({}).run(tokens, 1)
        without = session.restart().use(core).run(tokens, 1)
        session.core.repack(True)
        repacked = session.restart().use({}).run(tokens, 1)
        beside = session.restart().use(core).run(tokens, 1)
        assert (session.restart().use({}).run(tokens) == session.restart().run(tokens)).all()
        session.core.use_repacked(False)
        assert (session.restart().use({}).run(tokens, 1) == dense).all()
        session.core.repack(False)
        assert (session.restart().use(core).run(tokens, 1) == without).all()
    assert relative_error(repacked, dense)[1] < NEAR
    assert relative_error(beside, without)[1] < NEAR
    assert relative_error(dense, without)[1] > 5 * NEAR  # what the core set itself changes
    assert (repacked == dense).all() != has_kernels
    assert (beside == without).all() != has_kernels


def test_an_adapter_of_attention_counts(random_model: RandomModel, tmp_path: Path) -> None:
    path, tokens = random_model("llama", "q4_0", n_layer=8), some_tokens()
    adapter = make_adapter(tmp_path / "adapter.gguf", path, ATTENTION)
    logits = {}
    for lora in (None, str(adapter)):
        for on in (False, True):
            with core_session(path, **({"lora_path": lora} if lora else {})) as session:
                session.core.repack(on)
                core = {i: np.arange(0, session.core.ffns[i].n_ff, 2) for i in range(8)}
                logits[lora, on] = session.restart().use(core).run(tokens, 1)
    adapted = str(adapter)
    assert relative_error(logits[adapted, True], logits[adapted, False])[1] < NEAR
    assert relative_error(logits[adapted, True], logits[None, True])[1] > 5 * NEAR


@pytest.mark.parametrize("options", [{"refresh": 6}, {"density": "auto", "quality": 0.5}, {}])
def test_generation_goes_on_as_without(
    options: dict[str, Any], smollm2: Path, has_kernels: bool
) -> None:
    answers, copied = [], []
    for repack in (False, True):
        with edge(smollm2, warmup=2, repack=repack, n_ctx=512, **options) as llm:
            answers.append(llm.generate("The history of Rome begins with", 40, temperature=0))
            assert llm.last is not None
            assert llm.last.density < 1
            copied.append(llm.last.repacked_bytes)
    assert answers[0][:20] == answers[1][:20]
    assert copied[0] == 0
    assert (copied[1] > 0) == has_kernels


@pytest.mark.parametrize("options", [{"density": 1.0}, {"strategy": "dense"}])
def test_dense_stays_as_llama_cpp_has_it(options: dict[str, Any], smollm2: Path) -> None:
    tokens = []
    for repack in (False, True):
        with edge(smollm2, repack=repack, n_ctx=512, **options) as llm:
            tokens.append(continued(llm, some_tokens(), 24))
            tokens.append(llm.llama.scores[: len(some_tokens())].tolist())
    assert tokens[:2] == tokens[2:]


@pytest.mark.parametrize(("use_mmap", "times"), [(True, 2), (False, 1)])
def test_by_default_it_is_done_where_the_model_has_room_once_more(
    use_mmap: bool, times: int, random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama", "q4_0", shape="small")
    tried: list[bool] = []
    repack = core_llama.CoreContext.repack
    monkeypatch.setattr(
        core_llama.CoreContext, "repack", lambda self, on: (tried.append(on), repack(self, on))
    )
    enough = times * path.stat().st_size  # mapped, it is in memory that counts as available
    for available in (enough, enough - 1):
        monkeypatch.setattr(core_llama, "available_bytes", lambda n=available: (n, "a test"))
        EdgeLLM(path, n_ctx=256, use_mmap=use_mmap).close()
    assert tried == [True]


def test_copies_that_were_asked_for_and_do_nothing_are_warned_of(random_model: RandomModel) -> None:
    path = random_model("llama", "f16", shape="small")
    with pytest.warns(RuntimeWarning, match="repack does nothing here"):
        llm = edge(path, repack=True)
    with llm:
        llm.generate(some_tokens(), 4)
        assert llm.last is not None
        assert llm.last.repacked_bytes == 0


def test_by_default_the_whole_model_is_multiplied_by_our_kernels(
    smollm2: Path, has_kernels: bool
) -> None:
    with EdgeLLM(smollm2, n_ctx=512) as llm, EdgeLLM(smollm2, n_ctx=512, density=1.0) as stock:
        ours = llm.generate("The history of Rome begins with", 40, temperature=0)
        theirs = stock.generate("The history of Rome begins with", 40, temperature=0)
        assert llm.last is not None
        assert stock.last is not None
        assert (llm.last.density, llm.last.strategy) == (1.0, "dense")
        assert (llm.last.repacked_bytes > 0) == has_kernels
        assert llm.last.core_ffn_bytes == llm.last.full_ffn_bytes
        assert stock.last.repacked_bytes == 0
    assert ours[:60] == theirs[:60]


def test_our_kernels_differ_from_llama_cpp_by_rounding_only(smollm2: Path) -> None:
    # Activations of 8 bits amplify any change in the order of summation: llama.cpp itself differs
    # by 0.002 nats between one token at a time and many.
    divergence = Divergence()
    with core_session(smollm2, n_ctx=512) as session:
        tokens = session.llama.tokenize(TEXT.encode())
        dense = session.run(tokens, 1)
        session.core.repack(True)
        divergence.add(dense, session.restart().run(tokens, 1))
    assert divergence.n_tokens > 100
    assert divergence.kl < 0.01
    assert divergence.agreement > 0.9


def test_a_density_of_1_set_later_leaves_the_copies_aside(smollm2: Path) -> None:
    with EdgeLLM(smollm2, n_ctx=512) as llm, EdgeLLM(smollm2, n_ctx=512, density=1.0) as stock:
        llm.generate(some_tokens(), 8, temperature=0)
        llm.llama.density = 1.0
        llm.llama.reset()
        assert continued(llm, some_tokens(), 24) == continued(stock, some_tokens(), 24)
        n = llm.llama.n_tokens
        assert (llm.llama.scores[:n] == stock.llama.scores[:n]).all()


def test_evaluating_by_hand_goes_by_the_density_and_not_by_the_run_before(
    smollm2: Path, has_kernels: bool
) -> None:
    with EdgeLLM(smollm2, density=0.5, n_ctx=256) as llm:
        llama = llm.llama

        def by_hand() -> Any:
            llama.reset()
            llama.eval(some_tokens(10))
            llama.eval([5])
            return np.array(llama_cpp.llama_get_logits_ith(llama.ctx, -1)[: llama.n_vocab()])

        copies = by_hand()
        llama.density = 1.0
        llm.generate("x", max_tokens=2, temperature=0)
        without = by_hand()
        llama.density = 0.5
        np.testing.assert_array_equal(by_hand(), copies)
        assert (without != copies).any() == has_kernels


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


def test_without_memory_for_the_copies_the_default_goes_without(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: object, on: bool) -> None:
        raise InsufficientMemoryError("no room")

    monkeypatch.setattr(core_llama.CoreContext, "repack", no_room)
    path = random_model("llama", "q4_0", shape="small")
    with EdgeLLM(path, n_ctx=256) as llm:
        llm.generate(some_tokens(), 4)
    with pytest.raises(InsufficientMemoryError, match="no room"):
        EdgeLLM(path, n_ctx=256, repack=True)


def test_kernels_that_there_are_not_are_named(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COREINFER_KERNELS", "sse9")
    known = "'sse9': it must be one of avx512vnni, avx512, avxvnni, avx2, none"
    with pytest.raises(ArgumentError, match=known):
        edge(random_model("llama"))


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_what_is_no_truth_value_is_refused(value: Any, random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match=r"repack is .*: it must be True, False or None"):
        EdgeLLM(random_model("llama"), repack=value)
