"""Files made to kill the process: each is refused, or runs, and none ends by a signal.

Every trial is a process of its own, forked from one that has the libraries loaded already.
"""

from __future__ import annotations

import math
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

RandomModel = Callable[..., Path]

# Reads paths, and answers each with how a child ended that checked, loaded and ran it.
SERVER = """
import os, resource, signal, sys, time
import coreinfer_edge.binding.load
import llama_cpp
from coreinfer_edge.errors import CoreInferError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.model.loadable import check_loadable
from coreinfer_edge.measure.description import describe

TEXTS = [bytes(range(1, 256)), b"<|im_start|> the \\xf0\\x9f\\x98\\x80\\n"]

def trial(path):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    try:
        header = read_header(path)
        describe(path)
        check_loadable(header)
    except CoreInferError:
        return 1
    except BaseException:
        return 3
    try:
        llm = llama_cpp.Llama(path, n_ctx=64, n_batch=32, n_threads=1, verbose=False)
        for text in TEXTS:
            llm.detokenize(llm.tokenize(text, special=True))
        llm.create_completion("hi the " * 6, max_tokens=2, seed=1)
    except Exception:
        return 2
    return 0

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(trial(line.rstrip("\\n")))
    deadline = time.monotonic() + 20
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
RUNS, REFUSED, REFUSED_BY_LLAMA, UNEXPECTED = 0, 1, 2, 3


class Server:
    """Tries files, one after the other."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )

    def trial(self, path: Path) -> int:
        """How it ended: one of the codes above, or a negative signal number."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server() -> Any:
    server = Server()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait(timeout=30)


# --- files that are wrong in one place -----------------------------------------------------------

Value = int | float | str | Sequence[int] | Sequence[str]
_CODES = {"u8": (0, "B"), "u16": (2, "H"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f")}
_CODES |= {"bool": (7, "?"), "u64": (10, "Q"), "f64": (12, "d")}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: str, value: Any) -> bytes:
    if kind == "str":
        return text(key) + struct.pack("<I", 8) + text(value)
    if kind == "str[]":
        items = b"".join(text(item) for item in value)
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + items
    if kind.endswith("[]"):
        number, code = _CODES[kind[:-2]]
        items = struct.pack(f"<{len(value)}{code}", *value)
        return text(key) + struct.pack("<IIQ", 9, number, len(value)) + items
    number, code = _CODES[kind]
    return text(key) + struct.pack(f"<I{code}", number, value)


def rewrite(
    source: Path,
    target: Path,
    pairs: dict[str, bytes] | None = None,
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
    without: str = "",
    alignment: int = 32,
    shapes: dict[str, Callable[[list[int]], list[int]]] | None = None,
) -> Path:
    """A copy of a GGUF with other metadata, tensor types and shapes, valid in its form."""
    reader = gguf.GGUFReader(source)
    keys = {
        key: b"".join(part.tobytes() for part in field.parts)
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    keys |= pairs or {}
    tensors = [t for t in reader.tensors if t.name != without]
    head = b"GGUF" + struct.pack("<Iqq", 3, len(tensors), len(keys)) + b"".join(keys.values())
    data = b""
    for tensor in tensors:
        kind = (types or {}).get(tensor.name, tensor.tensor_type)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        shape = [int(n) for n in tensor.shape]
        if tensor.name in (shapes or {}):
            shape = (shapes or {})[tensor.name](shape)
        n_bytes = math.prod(shape) // block * size
        head += text(tensor.name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, len(data))
        data += (tensor.data.tobytes() * 8)[:n_bytes]
        data += bytes(-len(data) % alignment)
    target.write_bytes(head + bytes(-len(head) % alignment) + data)
    return target


# Each of these ends stock llama.cpp by a signal, or never ends.
METADATA = [
    ("llama", "llama.block_count", "u32", 0),
    ("llama", "llama.block_count", "u32", 513),
    ("llama", "llama.nextn_predict_layers", "u32", 9),
    ("llama", "llama.attention.layer_norm_rms_epsilon", "f32", -1.0),
    ("llama", "llama.attention.layer_norm_rms_epsilon", "f32", float("nan")),
    ("starcoder2", "starcoder2.attention.layer_norm_epsilon", "f32", -1.0),
    ("llama", "llama.attention.head_count_kv", "u32[]", [2, 0, 2, 2]),
    ("gemma3", "gemma3.attention.head_count_kv", "u32[]", [2, 0, 2, 2]),
    ("gpt2", "gpt2.attention.key_length", "u32", 32),
    ("phi3", "phi3.attention.key_length", "u32", 0),
    ("llama", "llama.expert_count", "u32", 4),
    ("llama", "llama.expert_count", "u32", 5000),
    ("llama", "llama.expert_used_count", "u32", 4),
    ("llama", "llama.expert_group_count", "u32", 4),
    ("qwen3moe", "qwen3moe.expert_used_count", "u32", 0),
    ("qwen3moe", "qwen3moe.expert_used_count", "u32", 5),
    ("llama", "llama.rope.scaling.type", "str", "abc"),
    ("qwen3", "qwen3.rope.dimension_count", "u32", 6),
    ("phi3", "phi3.rope.dimension_count", "u32", 0),
    ("phi3", "phi3.rope.dimension_count", "u32", 3),
    ("phi3", "phi3.rope.dimension_count", "u32", 64),
    ("gemma3", "gemma3.attention.sliding_window", "u32", 2**31),
    ("gemma3", "gemma3.attention.sliding_window_pattern", "u32", 1),
    ("opt", "opt.attention.key_length", "u32", 32),
    ("opt", "opt.attention.layer_norm_epsilon", "f32", -1.0),
    ("llama", "tokenizer.ggml.tokens", "str[]", ["a"] * 320),
    ("llama", "tokenizer.ggml.tokens", "str[]", []),
    ("llama", "tokenizer.ggml.model", "str", "llama"),
    ("llama", "tokenizer.ggml.model", "str", "no_vocab"),
    ("llama", "tokenizer.ggml.model", "str", "rwkv"),
]


@pytest.mark.parametrize(("arch", "key", "kind", "value"), METADATA)
def test_metadata_that_llama_cpp_dies_of_is_refused(
    server: Server,
    random_model: RandomModel,
    tmp_path: Path,
    arch: str,
    key: str,
    kind: str,
    value: Value,
) -> None:
    path = rewrite(random_model(arch), tmp_path / "m.gguf", {key: pair(key, kind, value)})
    assert server.trial(path) == REFUSED


def test_two_tokens_that_differ_after_a_zero_byte_are_refused(
    server: Server, random_model: RandomModel, tmp_path: Path
) -> None:
    tokens = [f"t{i}" for i in range(318)] + ["a\0b", "a\0c"]
    key = "tokenizer.ggml.tokens"
    path = rewrite(random_model(), tmp_path / "m.gguf", {key: pair(key, "str[]", tokens)})
    assert server.trial(path) == REFUSED


def test_a_beginning_token_that_is_not_there_is_refused(
    server: Server, random_model: RandomModel, tmp_path: Path
) -> None:
    tokens = "tokenizer.ggml.tokens"
    bos = "tokenizer.ggml.bos_token_id"
    pairs = {tokens: pair(tokens, "str[]", ["a", "b"]), bos: pair(bos, "u32", 7)}
    assert server.trial(rewrite(random_model(), tmp_path / "m.gguf", pairs)) == REFUSED


@pytest.mark.parametrize("alignment", [1, 8, 16])
def test_an_alignment_that_cannot_be_mapped_is_refused(
    server: Server, random_model: RandomModel, tmp_path: Path, alignment: int
) -> None:
    pairs = {"general.alignment": pair("general.alignment", "u32", alignment)}
    path = rewrite(random_model(), tmp_path / "m.gguf", pairs, alignment=alignment)
    assert server.trial(path) == REFUSED


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("token_embd.weight", "I32"),
        ("blk.1.attn_q.weight", "I8"),
        ("blk.1.ffn_down.weight", "F64"),
        ("output.weight", "Q8_1"),
        ("blk.1.attn_norm.weight", "F16"),
        ("blk.1.ffn_norm.weight", "Q8_0"),
    ],
)
def test_tensor_types_that_no_kernel_takes_are_refused(
    server: Server, random_model: RandomModel, tmp_path: Path, tensor: str, kind: str
) -> None:
    types = {tensor: gguf.GGMLQuantizationType[kind]}
    assert server.trial(rewrite(random_model(), tmp_path / "m.gguf", types=types)) == REFUSED


def test_a_layer_without_attention_is_refused(
    server: Server, random_model: RandomModel, tmp_path: Path
) -> None:
    path = rewrite(random_model("phi3"), tmp_path / "m.gguf", without="blk.1.attn_qkv.weight")
    assert server.trial(path) == REFUSED


def test_what_is_rewritten_without_a_change_runs(
    server: Server, random_model: RandomModel, tmp_path: Path
) -> None:
    assert server.trial(rewrite(random_model(), tmp_path / "m.gguf")) == RUNS


# --- random damage -------------------------------------------------------------------------------


def damage(data: bytearray, header: int, rng: random.Random) -> bytes:
    """Change the header in one to three places, or drop or double a piece of it."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(4, header)
        choice = rng.random()
        if choice < 0.4:
            data[at] = rng.randrange(256)
        elif choice < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        elif choice < 0.8:
            n = rng.choice([4, 8])
            value = rng.choice([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
            data[at : at + n] = value.to_bytes(8, "little")[:n]
        elif choice < 0.9:
            del data[at : at + rng.randint(1, 40)]
        else:
            data[at:at] = data[at : at + rng.randint(1, 40)]
    return bytes(data)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "gpt2", "opt", "phi3"])
def test_random_damage_to_the_header_never_kills_the_process(
    server: Server, random_model: RandomModel, tmp_path: Path, arch: str
) -> None:
    """COREINFER_FUZZ_TRIALS sets the number of trials, and COREINFER_FUZZ_SEED their seed."""
    whole = random_model(arch, n_layer=2).read_bytes()
    header = len(whole) - sum(
        t.n_bytes for t in gguf.GGUFReader(random_model(arch, n_layer=2)).tensors
    )
    seed = int(os.environ.get("COREINFER_FUZZ_SEED", "0"))
    path = tmp_path / "damaged.gguf"
    endings: dict[int, int] = {}
    for i in range(int(os.environ.get("COREINFER_FUZZ_TRIALS", "40"))):
        path.write_bytes(damage(bytearray(whole), header, random.Random(f"{arch} {seed} {i}")))
        ending = server.trial(path)
        endings[ending] = endings.get(ending, 0) + 1
        name = signal.Signals(-ending).name if ending < 0 else ending
        assert ending in (RUNS, REFUSED, REFUSED_BY_LLAMA), f"{arch}, seed {seed}, {i}: {name}"
    assert endings[REFUSED] > 0
