"""What ``describe`` says of models."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from core_session import edge
from rich.console import Console
from test_prior import some_prior

from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.choose.statistics import BLOCK
from coreinfer_edge.errors import ModelFileError
from coreinfer_edge.measure.description import ModelDescription, describe
from coreinfer_edge.model.header import read_header
from coreinfer_edge.report.inspect import render

RandomModel = Callable[..., Path]


def shown(description: ModelDescription) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(description))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_describes_smollm2(smollm2: Path) -> None:
    d = describe(smollm2)
    assert d.architecture == "llama"
    assert (d.layers, d.embedding_length, d.vocabulary) == (30, 576, 49152)
    assert d.context_length == 8192
    assert d.parameters == 134_515_008
    assert d.ffn_widths == [1536] * 30
    assert d.ffn_types == {"up": {"q4_1": 30}, "gate": {"q4_1": 30}, "down": {"q4_1": 30}}
    assert d.note == ""
    assert d.coreinfer_keys == []


def test_every_byte_of_the_tensors_belongs_to_one_part(smollm2: Path) -> None:
    parts = describe(smollm2).bytes_by_part
    assert sum(parts.values()) == sum(int(t.n_bytes) for t in gguf.GGUFReader(smollm2).tensors)
    assert parts["ffn"] == 30 * 3 * 576 * 1536 // 32 * 20
    assert parts["output"] == 0


def test_density_one_reads_everything_of_a_tied_model(smollm2: Path) -> None:
    d = describe(smollm2)
    dense = d.densities[-1]
    assert dense.density == 1.0
    assert dense.ratio_to_dense == 1.0
    assert dense.ffn_bytes == d.bytes_by_part["ffn"]
    # Its embedding is its output matrix, and read whole.
    assert dense.read_bytes_per_token == sum(d.bytes_by_part.values())


def test_an_untied_model_reads_one_row_of_its_embedding(random_model: RandomModel) -> None:
    d = describe(random_model("llama", tied=False))
    parts = d.bytes_by_part
    assert parts["output"] > 0
    read = d.densities[-1].read_bytes_per_token
    assert read == sum(parts.values()) - parts["embedding"] + 64 * 4


def test_density_is_the_mean_over_the_layers(smollm2: Path) -> None:
    d = describe(smollm2, densities=[0.5], levels=["full"])
    kept = d.densities[0].ffn_bytes / d.bytes_by_part["ffn"]
    # Each layer keeps whole blocks of neurons, the nearest number of them.
    assert kept == pytest.approx(0.5, abs=BLOCK / 2 / d.ffn_widths[0])


def test_ffn_bytes_are_those_that_decoding_smollm2_reads(smollm2: Path) -> None:
    assert_ffn_bytes_are_those_of_decoding(smollm2)


@pytest.mark.parametrize(
    ("arch", "type_", "sizes"),
    [
        ("llama", "q6_k", {"shape": "small"}),  # columns are q8_0
        ("llama", "q4_k", {"shape": "small"}),  # columns are q4_0
        ("phi3", "q8_0", {"n_ff": 192}),  # gate and up in one
        ("starcoder2", "f16", {}),  # biases, no gate
    ],
)
def test_ffn_bytes_are_those_that_decoding_reads(
    random_model: RandomModel, arch: str, type_: str, sizes: dict[str, Any]
) -> None:
    assert_ffn_bytes_are_those_of_decoding(random_model(arch, type_, n_layer=8, **sizes))


def assert_ffn_bytes_are_those_of_decoding(path: Path) -> None:
    (cost,) = describe(path, densities=[0.5], levels=["full"]).densities
    with edge(path, density=0.5, warmup=0, levels=["full"]) as llm:
        llm.generate("the hat and the rest", max_tokens=8, temperature=0)
        assert llm.last is not None
        assert llm.last.density < 0.6
        assert cost.ffn_bytes == llm.last.core_ffn_bytes


@pytest.mark.parametrize("type_", ["q4_k", "q6_k", "q8_0", "f16"])
def test_the_levels_described_are_those_that_decoding_has(
    random_model: RandomModel, type_: str
) -> None:
    path = random_model("llama", type_, n_layer=8, shape="small")
    d = describe(path, densities=[0.5])
    with edge(path, density=0.5, warmup=0, repack=None) as llm:
        llm.generate("the hat and the rest", max_tokens=8, temperature=0)
        assert llm.last is not None
        assert llm.last.levels == tuple(d.levels)
        in_use = llm.last.density * llm.last.full_ffn_bytes
        assert d.densities[0].ffn_bytes == pytest.approx(in_use, rel=0.03)


def test_statistics_show_the_levels_of_each_layer(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path = tmp_path / "with.gguf"
    write_with_prior(read_header(random_model("llama", "q8_0")), some_prior(), path)
    d = describe(path, levels_density=0.5)
    if d.levels == ["full"]:
        pytest.skip("levels need our own kernels, which this processor has not")
    for layer in d.layer_levels:
        assert sum(layer.neurons) + layer.left_out == d.ffn_widths[layer.layer]
    assert sum(layer.neurons[-1] for layer in d.layer_levels) > 0
    assert "Neurons by level at density 0.5" in shown(d)
    alone = describe(path, levels_density=0.5, levels=["full"]).layer_levels
    assert sum(layer.left_out for layer in alone) == pytest.approx(320, abs=64)


@pytest.mark.parametrize("arch", ["gpt2", "phi3", "starcoder2"])
def test_costs_fall_with_density_without_a_gate_and_with_a_fused_one(
    random_model: RandomModel, arch: str
) -> None:
    d = describe(random_model(arch))
    assert d.ffn_widths == [160] * 4
    assert "gate" not in d.ffn_types
    costs = [cost.ffn_bytes for cost in d.densities]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1] == d.bytes_by_part["ffn"]


def test_a_mixture_of_experts_is_noted(random_model: RandomModel) -> None:
    d = describe(random_model("qwen3moe"))
    assert d.experts == 4
    assert d.bytes_by_part["experts"] > 0
    assert d.densities == []
    assert "mixture of experts" in d.note
    assert "can only run dense" in shown(d)


def test_a_state_space_model_is_noted(random_model: RandomModel) -> None:
    d = describe(random_model("mamba"))
    assert "it has no FFN" in d.note


def test_lists_our_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("coreinfer.version", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    d = describe(tmp_path / "m.gguf")
    assert d.coreinfer_keys == ["coreinfer.version"]
    assert "coreinfer.version" in shown(d)


def test_the_description_survives_json(smollm2: Path) -> None:
    d = describe(smollm2)
    assert json.loads(json.dumps(d.as_dict())) == d.as_dict()


def test_a_name_out_of_the_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_name("[red]\x1b[2Jx")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    text = shown(describe(tmp_path / "m.gguf"))
    assert "[red]\N{REPLACEMENT CHARACTER}[2Jx" in text


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match="cut off"):
        describe(tmp_path / "x.gguf")
