"""The random models are what llama.cpp loads, tokenises with and generates from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import make_random_gguf as models
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray

from coreinfer_edge.measure import random_llama

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "make_random_gguf.py"

RandomModel = Callable[..., Path]
LlamaLogits = Callable[[Path, Sequence[int]], NDArray[np.float32]]


def types_of(path: Path) -> dict[str, T]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors}


def greedy_tokens(path: Path, n: int = 24) -> list[int]:
    from coreinfer_edge._bundled.llama_cpp import Llama

    llama = Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    tokens: list[int] = []
    try:
        for token in llama.generate(llama.tokenize(b"the man", special=True), temp=0.0):
            tokens.append(token)
            if len(tokens) == n:
                return tokens
        raise AssertionError("generate ended by itself")
    finally:
        llama.close()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", models.ARCHS)
def test_every_architecture_runs_in_llama_cpp_with_a_likeliest_token_that_depends_on_the_text(
    arch: str, tied: bool, random_model: RandomModel, llama_logits: LlamaLogits
) -> None:
    logits = llama_logits(random_model(arch, tied=tied), list(range(10, 50)))
    assert 2 < logits.std() < 4
    likeliest = set(logits.argmax(axis=1).tolist())
    assert len(likeliest) > 10
    assert not likeliest & set(range(len(random_llama.CONTROL_TOKENS)))


@pytest.mark.parametrize("arch", models.ARCHS)
def test_every_architecture_generates_in_llama_cpp_without_ending_by_itself(
    arch: str, random_model: RandomModel
) -> None:
    assert greedy_tokens(random_model(arch))


@pytest.mark.parametrize("type", models.TYPES)
def test_every_type_generates_in_llama_cpp_and_holds_for_all_matrices(
    type: str, random_model: RandomModel
) -> None:
    path = random_model("phi3", type, shape="small")
    assert len(set(greedy_tokens(path))) > 3
    for name, tensor_type in types_of(path).items():
        assert tensor_type == (T.F32 if "norm" in name else models.TYPES[type][0]), name


@pytest.mark.parametrize(
    ("type", "n_ff", "up", "down"),
    [
        ("q4_k", 160, T.Q5_0, T.Q5_0),
        ("q5_k", 256, T.Q5_1, T.Q5_K),
        ("q6_k", 96, T.Q8_0, T.Q8_0),
        ("q4_0", 80, T.Q4_0, T.F16),
        ("iq4_nl", 80, T.IQ4_NL, T.F16),
    ],
)
def test_rows_that_are_no_multiple_of_the_block_fall_back_as_in_llama_cpp(
    type: str, n_ff: int, up: T, down: T, random_model: RandomModel
) -> None:
    path = random_model("llama", type, n_ff=n_ff)
    types = types_of(path)
    assert types["blk.0.ffn_up.weight"] == up
    assert types["blk.0.ffn_down.weight"] == down
    assert greedy_tokens(path, 2)


def test_single_tensors_can_have_another_type(random_model: RandomModel) -> None:
    types = types_of(random_model("llama", "q4_0", tensor_types={"ffn_down": "q8_0"}))
    assert types["blk.2.ffn_down.weight"] == T.Q8_0
    assert types["blk.2.ffn_up.weight"] == T.Q4_0


def test_any_text_survives_the_tokenizer_and_starts_with_bos(random_model: RandomModel) -> None:
    from coreinfer_edge._bundled.llama_cpp import Llama

    llama = Llama(str(random_model()), vocab_only=True, verbose=False)
    for text in ("the cat and the hat", "Grüße, 世界 🙂\t\n  x", ""):
        tokens = llama.tokenize(text.encode())
        assert tokens[0] == llama.token_bos()
        assert llama.detokenize(tokens[1:], prev_tokens=tokens[:1]).decode() == text
    assert llama.metadata["tokenizer.chat_template"] == random_llama.CHAT_TEMPLATE


def test_the_same_seed_gives_the_same_file_and_another_seed_another(tmp_path: Path) -> None:
    first, same, other = (
        models.make_random_gguf(tmp_path / f"{i}.gguf", seed=seed).read_bytes()
        for i, seed in enumerate((3, 3, 4))
    )
    assert first == same
    assert first != other


def test_the_same_seed_gives_the_same_weights_in_every_type(random_model: RandomModel) -> None:
    name = "blk.1.ffn_up.weight"
    exact, rounded = (
        next(t for t in gguf.GGUFReader(random_model("llama", type)).tensors if t.name == name)
        for type in ("f32", "q8_0")
    )
    error = exact.data - gguf.quants.dequantize(rounded.data, T.Q8_0)
    assert np.abs(error).max() < 0.01 * np.abs(exact.data).max()


@pytest.mark.parametrize("type", ["f32", "q4_0", "q4_k"])
def test_large_tensors_cut_from_a_pool_have_no_equal_rows_and_generate(
    type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_llama.Weights, "SMALL", 0)
    monkeypatch.setattr(random_llama.Weights, "POOL", 1 << 17)  # the embedding comes round twice
    path = models.make_random_gguf(tmp_path / "m.gguf", type=type, shape="small", n_vocab=1000)
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name in ("token_embd.weight", "blk.1.ffn_down.weight"):
            assert len(np.unique(tensor.data, axis=0)) == len(tensor.data)
    tokens = greedy_tokens(path)
    assert len(set(tokens)) > 3
    assert not set(tokens) & set(range(len(random_llama.CONTROL_TOKENS)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"arch": "bert"}, "unknown architecture 'bert'"),
        ({"type": "q1_x"}, "unknown type 'q1_x'"),
        ({"shape": "2b"}, "unknown shape '2b'"),
        ({"n_vocab": 100}, "n_vocab 100 is below"),
        ({"n_layer": 0}, "n_layer 0 is below 1"),
        ({"n_ff": -64}, "n_ff -64 is below 1"),
        ({"n_head": 3}, "no multiple of n_head 3"),
        ({"n_head_kv": 3}, "no multiple of n_head_kv 3"),
        ({"arch": "qwen3", "bias": True}, "no biases"),
        ({"arch": "gpt2", "bias": False}, "always has biases"),
        ({"arch": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"arch": "qwen3", "hidden_act": "relu"}, "only of llama"),
        ({"arch": "phi3", "head_dim": 32}, "heads of n_embd / n_head"),
        ({"arch": "qwen3moe", "n_expert": 1}, "n_expert_used 2"),
    ],
)
def test_a_model_that_llama_cpp_would_refuse_is_refused(
    sizes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        models.make_random_gguf(tmp_path / "m.gguf", **sizes)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(random_llama.Weights, "chunks", fail)
    with pytest.raises(OSError, match="no space left"):
        models.make_random_gguf(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_the_script_writes_a_file_and_says_its_size(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "m.gguf"), "--arch", "qwen3", "--type", "f16", "--n-ff", "96"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"{tmp_path / 'm.gguf'}: 0.")
    assert types_of(tmp_path / "m.gguf")["blk.0.ffn_gate.weight"] == T.F16
