"""EdgeLLM with models that have no dense FFN, with LoRA adapters, and without enough memory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from core_session import continued, core_session, edge
from make_random_gguf import make_random_gguf
from reference import Reference
from test_reference import F32_TOLERANCE, relative_error, some_tokens

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.choose.statistics import Statistics
from coreinfer_edge.errors import InsufficientMemoryError, ModelFileError, UnsupportedModelError
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

# --- no dense FFN ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["qwen3moe", "mamba"])
def test_a_model_without_a_dense_ffn_is_refused_with_a_way_out_that_works(
    arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch)
    with pytest.raises(UnsupportedModelError, match=f"{path.name}.*dense FFN.*strategy='dense'"):
        edge(path)
    for options in ({"strategy": "dense"}, {"density": 1.0}):
        with edge(path, **options) as llm:
            assert llm.generate("the hat", max_tokens=12, temperature=0)
            assert llm.last is not None
            assert llm.last.density == 1.0
            assert llm.last.core_ffn_bytes == llm.last.full_ffn_bytes


# --- LoRA -----------------------------------------------------------------------------------------

ATTENTION = ("blk.1.attn_q.weight", "blk.2.attn_v.weight", "blk.5.attn_output.weight")
FFN = ("blk.1.attn_q.weight", "blk.3.ffn_up.weight")
RANK, ALPHA = 4, 8.0


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=8)


def make_adapter(out: Path, model: Path, names: tuple[str, ...], **other: Any) -> Path:
    """A LoRA adapter with random weights for these tensors."""
    rng = np.random.default_rng(5)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(model).tensors}
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(other.get("general_type", "adapter"))
    writer.add_string("adapter.type", other.get("adapter_type", "lora"))
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name in names:
        n_cols, n_rows = shapes[name]
        a = rng.standard_normal((RANK, n_cols + other.get("extra", 0))) / np.sqrt(n_cols)
        b = rng.standard_normal((n_rows, RANK))
        writer.add_tensor(f"{name}.lora_a", a.astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def merged(out: Path, model: Path, adapter: Path, scale: float = 1.0) -> Path:
    """The F32 model with the adapter added to its weights."""
    shutil.copyfile(model, out)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(out, "r+").tensors}
    parts = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter).tensors}
    for name in {name.rsplit(".", 1)[0] for name in parts}:
        tensors[name][:] += scale * ALPHA / RANK * parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"]
    return out


def test_core_logits_with_an_adapter_of_attention_are_those_of_the_merged_model(
    model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter.gguf", model, ATTENTION)
    whole = merged(tmp_path / "merged.gguf", model, adapter)
    tokens, n_ff = some_tokens(), Reference(model).n_ff
    core = {i: np.arange(i, n_ff, 3) for i in range(8)}
    with core_session(model, lora_path=str(adapter)) as session:
        actual = session.use(core).run(tokens)
    assert relative_error(actual, Reference(whole).logits(tokens, core))[0] < F32_TOLERANCE
    assert relative_error(actual, Reference(model).logits(tokens, core))[1] > 0.05


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_an_adapter_of_attention_with_a_core_set_generates_what_the_merged_model_does(
    scale: float, model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter.gguf", model, ATTENTION)
    whole = merged(tmp_path / "merged.gguf", model, adapter, scale)
    with (
        edge(model, lora_path=adapter, lora_scale=scale, warmup=2) as adapted,
        edge(whole, warmup=2) as expected,
        edge(model, warmup=2) as without,
    ):
        tokens = continued(adapted, some_tokens(), 24)
        assert adapted.llama.run.density < 1
        assert tokens == continued(expected, some_tokens(), 24)
        assert tokens != continued(without, some_tokens(), 24)


def test_an_adapter_of_the_ffn_is_refused_with_a_core_set_and_works_dense(
    model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter.gguf", model, FFN)
    whole = merged(tmp_path / "merged.gguf", model, adapter)
    with pytest.raises(
        UnsupportedModelError, match=r"adapter\.gguf changes FFN weights \(blk\.3\.ffn_up.*'dense'"
    ):
        edge(model, lora_path=str(adapter))
    with (
        edge(model, lora_path=str(adapter), strategy="dense") as adapted,
        edge(whole, strategy="dense") as expected,
    ):
        assert continued(adapted, some_tokens(), 24) == continued(expected, some_tokens(), 24)


def test_an_adapter_of_the_ffn_works_by_default_where_there_is_no_core_set(
    random_model: RandomModel, tmp_path: Path
) -> None:
    model = random_model("llama", "q4_0", shape="small")
    adapter = make_adapter(tmp_path / "adapter.gguf", model, ("blk.1.ffn_up.weight",))
    options = {"lora_path": str(adapter), "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
    with EdgeLLM(model, **options) as llm, EdgeLLM(model, density=1.0, **options) as stock:
        assert continued(llm, some_tokens(), 1) == continued(stock, some_tokens(), 1)
        for density in (0.5, "auto"):
            llm.llama.density = density
            with pytest.raises(UnsupportedModelError, match="changes FFN weights"):
                llm.generate("the hat", max_tokens=4)
        llm.llama.density = None
        llm.generate("the hat", max_tokens=4)
    for refused in ({"density": "auto"}, {"quality": 0.2}, {"memory": "4GiB"}):
        with pytest.raises(UnsupportedModelError, match="changes FFN weights"):
            EdgeLLM(model, **options, **refused)


@pytest.mark.parametrize("strategy", ["energy", "dense"])
def test_what_is_no_adapter_or_not_of_this_model_is_refused(
    strategy: str, model: Path, random_model: RandomModel, tmp_path: Path
) -> None:
    (tmp_path / "text.gguf").write_text("no adapter")
    cut = make_adapter(tmp_path / "cut.gguf", model, ATTENTION)
    cut.write_bytes(cut.read_bytes()[:-1000])
    other = random_model("llama", n_layer=2)
    for path, message in (
        (tmp_path / "missing.gguf", "missing.gguf does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "text.gguf", "text.gguf is not a GGUF"),
        (cut, "cut.gguf"),
        (other, "is no LoRA adapter"),
        (make_adapter(tmp_path / "1.gguf", model, ATTENTION, extra=64), "incorrect shape"),
        (make_adapter(tmp_path / "2.gguf", model, ATTENTION, adapter_type="magic"), "adapter.type"),
    ):
        with pytest.raises(ModelFileError, match=message):
            edge(model, lora_path=str(path), strategy=strategy)
    adapter = make_adapter(tmp_path / "3.gguf", model, ATTENTION)
    with pytest.raises(ModelFileError, match=f"{other.name} cannot be loaded: .*wrong base model"):
        edge(other, lora_path=str(adapter), strategy=strategy)


# --- memory ---------------------------------------------------------------------------------------


def test_a_context_that_no_memory_holds_is_refused(model: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"of 2147483647 tokens .* smaller n_ctx"):
        edge(model, n_ctx=2**31 - 1)


def test_statistics_that_memory_does_not_hold_end_a_call_and_leave_the_model_usable(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(core: CoreContext) -> Statistics:
        raise MemoryError("Unable to allocate 3.00 KiB")

    with edge(model, warmup=0) as llm:
        before = llm.generate("the hat", max_tokens=12, temperature=0)
        with monkeypatch.context() as patched:
            patched.setattr(CoreContext, "statistics", exhausted)
            with pytest.raises(InsufficientMemoryError, match=r"out of memory: .* smaller n_ctx"):
                llm.generate("the hat", max_tokens=12, temperature=0)
        assert llm.generate("the hat", max_tokens=12, temperature=0) == before


# With a limit on this process's own address space, so in another process.
LIMITED = """
import json, resource, sys
from coreinfer_edge import EdgeLLM
from coreinfer_edge.errors import CoreInferError

def leave(n_bytes):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = (used + n_bytes, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, limits)

def attempt(work):
    try:
        return work()
    except CoreInferError as error:
        return [type(error).__name__, str(error)]

def model(**options):
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, **options}
    return EdgeLLM(sys.argv[1], 0.5, warmup=0, **options)

def generate(llm):
    text = llm.generate("the hat", max_tokens=12, temperature=0)
    return [text, llm.last.density]

results = {}
leave(1 << 20)
results["file"] = attempt(model)
leave(256 << 20)
results["context"] = attempt(lambda: model(n_ctx=1 << 18))
leave(1 << 33)
with model() as llm:
    results["before"] = generate(llm)
llm = model()
next(llm.llama.generate([50, 60]))  # what a first evaluation allocates
leave(0)
results["gather"] = attempt(lambda: generate(llm))
leave(1 << 33)
results["after"] = attempt(lambda: generate(llm))
print(json.dumps(results))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux counts it")
def test_exhausted_memory_is_an_error_while_loading_and_while_gathering_that_passes(
    tmp_path: Path,
) -> None:
    path = make_random_gguf(tmp_path / "model.gguf", shape="small", n_layer=8)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)],
        # glibc would otherwise find room in what it has kept or reserved for threads.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for name, message in (
        ("file", r"model\.gguf cannot be mapped"),
        ("context", r"not enough memory to run .*model\.gguf .* smaller n_ctx"),
        ("gather", "out of memory|no memory for"),
    ):
        kind, text = results[name]
        assert kind == "InsufficientMemoryError", text
        assert re.search(message, text)
    assert results["after"] == results["before"]
    assert results["after"][1] < 1
