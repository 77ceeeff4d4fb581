"""What counts as a dense FFN: the tensors of the file and the graph of llama.cpp agree."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from core_session import edge

from coreinfer_edge.binding.core import CoreContext
from coreinfer_edge.binding.load import llama_cpp
from coreinfer_edge.errors import UnsupportedModelError
from coreinfer_edge.measure.description import describe
from coreinfer_edge.model.ffn import NOT_DENSE, dense_ffn
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.load_plan import plan_memory

RandomModel = Callable[..., Path]
LAYERS, WIDTH, FFN_WIDTH, HEAD = 2, 64, 96, 16


def variant(
    source: Path,
    target: Path,
    arch: str = "llama",
    keys: Mapping[str, float] | None = None,
    tensors: Mapping[str, int] | None = None,
    without: str = "^$",
) -> Path:
    """A Llama as a model of another architecture, with more tensors in each layer.

    Args:
        tensors: names within a layer, and lengths; each tensor is ones.
        without: a pattern of the names of tensors to leave out.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, arch)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            key = name.replace("llama.", f"{arch}.")
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
    for name, value in (keys or {}).items():
        writer.add_float32(name, value)
    for tensor in reader.tensors:
        if not re.search(without, tensor.name):
            writer.add_tensor(tensor.name, tensor.data)
    for layer in range(LAYERS):
        for name, length in (tensors or {}).items():
            writer.add_tensor(f"blk.{layer}.{name}", np.ones(length, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture
def llama(random_model: RandomModel) -> Path:
    return random_model(
        "llama", n_layer=LAYERS, n_embd=WIDTH, n_ff=FFN_WIDTH, n_head=4, n_head_kv=4, tied=False
    )


def bitnet(llama: Path, folder: Path) -> Path:
    norms = {"attn_sub_norm.weight": WIDTH, "ffn_sub_norm.weight": FFN_WIDTH}
    path = folder / "bitnet.gguf"
    return variant(llama, path, "bitnet", tensors=norms, without=r"^output\.weight")


def apertus(llama: Path, folder: Path) -> Path:
    keys = {f"xielu.{name}": 0.5 for name in ("alpha_n", "alpha_p", "beta", "eps")}
    norms = {"attn_q_norm.weight": HEAD, "attn_k_norm.weight": HEAD}
    return variant(llama, folder / "apertus.gguf", "apertus", keys, norms, "ffn_gate")


def of_graph(path: Path) -> dict[int, int]:
    """Layers and widths of the FFNs that the library finds in llama.cpp's graph."""
    llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    try:
        core = CoreContext(llama.ctx, [path], 1)
    except UnsupportedModelError:
        llama.close()
        return {}
    found = {ffn.layer: ffn.n_ff for ffn in core.ffns}
    core.close()
    llama.close()
    return found


def of_file(path: Path) -> dict[int, int]:
    return {layer: ffn.width for layer, ffn in dense_ffn(read_header(path)).items()}


@pytest.mark.parametrize(
    "arch", ["llama", "gpt2", "gemma3", "qwen3", "phi3", "starcoder2", "opt", "qwen3moe", "mamba"]
)
def test_file_and_graph_agree_on_the_ffns_of_a_model(arch: str, random_model: RandomModel) -> None:
    path = random_model(arch)
    assert of_file(path) == of_graph(path)


def test_an_ffn_whose_products_are_scaled_is_dense_for_neither(llama: Path, tmp_path: Path) -> None:
    path = variant(llama, tmp_path / "scaled.gguf", tensors={"ffn_up.scale": 1})
    assert of_file(llama) == of_graph(llama) != {}
    assert of_file(path) == of_graph(path) == {}


@pytest.mark.parametrize("make", [bitnet, apertus])
def test_a_model_that_loading_refuses_has_neither_savings_nor_a_plan(
    make: Callable[[Path, Path], Path], llama: Path, tmp_path: Path
) -> None:
    path = make(llama, tmp_path)
    with pytest.raises(UnsupportedModelError, match="dense FFN"), edge(path, density=0.5):
        pass
    description = describe(path)
    assert description.densities == []
    assert NOT_DENSE[description.architecture] in description.note
    with pytest.raises(UnsupportedModelError, match=r"dense FFN.*strategy='dense'"):
        plan_memory(path, "1GiB", density=0.5)
    with edge(path, strategy="dense") as llm:
        assert llm.generate("the hat", max_tokens=4, temperature=0)
