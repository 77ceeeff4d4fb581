"""What doctor says of models that are not there, held against llama.cpp's own count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coreinfer_edge.choose.statistics import Level
from coreinfer_edge.doctor import models
from coreinfer_edge.doctor.models import (
    SIZES,
    Prediction,
    Rates,
    absent_header,
    predict,
    predictions,
    tokens_per_second,
)
from coreinfer_edge.errors import MemoryBudgetError
from coreinfer_edge.measure.description import bytes_read_by_type, describe
from coreinfer_edge.measure.random_llama import Shape, add_metadata, new_writer, typed_tensors
from coreinfer_edge.model.header import GGUFHeader, read_header
from coreinfer_edge.run import absent_model
from coreinfer_edge.run.absent_model import AbsentModel
from coreinfer_edge.run.load_plan import plan_memory
from coreinfer_edge.run.memory_plan import RESERVE, MemoryPlanner
from coreinfer_edge.run.planning import PlanRequest

GB = 1e9
RATES = Rates(20 * GB, {"q4_0": 10 * GB, "q4_k": 8 * GB, "q8_0": 16 * GB}, 1e-5)
SMALL = {
    "tied": Shape(4, 768, 2048, 12, 4, 4096, 4096, tied=True),
    "with an output": Shape(3, 1024, 2816, 8, 8, 2048, 4096),
}


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As doctor's own: one that runs all tests has more memory than some devices."""
    monkeypatch.setattr(absent_model, "private_bytes", lambda: 60 << 20)


@pytest.fixture(params=SMALL)
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(SIZES, name, SMALL[name])
    return name


def hollow(path: Path, shape: Shape, type: str) -> GGUFHeader:
    """A file with a header, and holes in place of weights."""
    writer = new_writer(path, "llama", shape, type)
    add_metadata(writer, shape)
    specs = typed_tensors(shape, type)
    for spec in specs:
        writer.add_tensor_info(
            spec.name, spec.shape, np.dtype(np.float32), spec.n_bytes, raw_dtype=spec.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    file = writer.fout[0]
    file.truncate(file.tell() + sum(spec.n_bytes + 64 for spec in specs))
    writer.close()
    assert writer.path is not None
    return read_header(writer.path.rename(path))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_model_that_is_not_there_takes_what_llama_cpp_counts_for_one_that_is(
    shape: str, streamed: bool, packed: bool, tmp_path: Path
) -> None:
    there = hollow(tmp_path / "there.gguf", SIZES[shape], "q4_0")
    for n_ctx in (500, 2048):
        arguments = {"model_path": str(there.path), "n_ctx": n_ctx, "packed": packed}
        arguments |= {"tied": there.is_tied, "n_threads": 1, "n_threads_batch": 1}
        planner = MemoryPlanner(
            PlanRequest(header=there, llama_kwargs=arguments, levels=("full",)), "4GiB"
        )
        absent = AbsentModel(absent_header(shape, "q4_0"), streamed, arguments)
        with planner._unloaded(streamed) as unloaded:
            assert not isinstance(unloaded, AbsentModel)
            assert absent.n_vocab == unloaded.n_vocab
            for n_batch in (32, 512):
                ours, real = absent.memory(n_batch), unloaded.memory(n_batch)
                assert ours.cache == real.cache
                assert ours.weights == pytest.approx(real.weights, rel=0.01)
                assert ours.compute == pytest.approx(real.compute, rel=0.05)


def test_the_plan_of_a_model_that_is_not_there_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("absent_model", "memory_plan"):  # what Python takes differs between two plans
        monkeypatch.setattr(f"coreinfer_edge.run.{module}.private_bytes", lambda: 40 << 20)
    monkeypatch.setitem(SIZES, "wide", Shape(6, 1024, 12288, 8, 2, 2048, 4096))
    there = hollow(tmp_path / "x.gguf", SIZES["wide"], "q4_0")
    decided = set()
    for budget in (400, 230, 160, 130, 65):
        plans = []
        for header in (there, absent_header("wide", "q4_0")):
            try:
                plan = plan_memory(header, budget << 20, n_threads_batch=1)
                plans.append((plan.streamed, plan.density, plan.n_ctx))
            except MemoryBudgetError:
                plans.append((None, 0.0, 0))
        (real, density, n_ctx), ours = plans
        assert ours == (real, pytest.approx(density, abs=0.02), n_ctx)
        decided.add(real)
    assert decided == {True, False, None}


@pytest.mark.parametrize("levels", [("full",), ("full", 4, 3, 2)])
def test_a_plan_takes_the_largest_density_that_there_is_room_for(
    levels: Sequence[Level],
) -> None:
    header = absent_header("1B", "q4_k_m")
    arguments = {"model_path": "", "n_ctx": 512, "n_threads_batch": 1}
    planner = MemoryPlanner(
        PlanRequest(header=header, llama_kwargs=arguments, levels=levels), "1GiB"
    )
    plan = planner._streamed_plans()[0]
    sizes = {density: planner._core_bytes(density) for density in planner._possible}
    for room in range(0, 700 << 20, 7 << 20):
        with_room = replace(plan, budget=int((room + plan._fixed + 1) / (1 - RESERVE)) + 1)
        fitting = [density for density, size in sizes.items() if size <= with_room.room]
        assert planner._density_for(with_room) == max(fitting, default=min(sizes))


def test_speed_is_bytes_over_rates_and_what_layers_and_the_vocabulary_take() -> None:
    header = absent_header("1B", "q4_0")
    read = bytes_read_by_type(header)
    assert sum(read.values()) == describe(header, densities=[1.0]).densities[0].read_bytes_per_token
    plain = tokens_per_second(header, {"q4_0": 1e9}, 0, RATES)
    assert plain == pytest.approx(1 / (0.1 + 16 * 1e-5))
    with_cache = tokens_per_second(header, {"q4_0": 1e9, "f32": 2e9}, 2e9, RATES)
    assert with_cache == pytest.approx(1 / (0.1 + 0.1 + 0.1 + 16 * 1e-5))
    entries = Rates(20 * GB, {}, 0.0, entry_seconds=1e-6)
    assert tokens_per_second(header, {}, 0, entries) == pytest.approx(1 / (128256 * 1e-6))
    assert tokens_per_second(header, read, 0, None) is None


@pytest.mark.parametrize(
    ("type", "rate"),
    [
        ("q4_1", 10),
        ("q5_0", 10),
        ("q4_K", 8),
        ("q6_K", 8),
        ("iq4_xs", 8),
        ("q8_0", 16),
        ("f16", 20),
    ],
)
def test_a_type_that_was_not_measured_has_the_rate_of_a_similar_one(type: str, rate: int) -> None:
    assert RATES.of(type) == rate * GB


@pytest.mark.usefixtures("small_process")
def test_what_is_larger_than_a_refused_model_is_refused_without_a_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned: list[str] = []

    def counted(*arguments: object) -> Prediction:
        planned.append(f"{arguments[3]} {arguments[4]}")
        return predict(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "predict", counted)
    found = list(predictions(RATES, "400MiB"))
    assert [(m.size, m.type) for m in found] == [(s, t) for s in SIZES for t in models.TYPES]
    assert found[0].runs == "whole"
    assert found[-1].runs == "refused"
    assert found[-1].tokens_per_second is None
    refused = [f"{m.size} {m.type}" for m in found if m.runs == "refused"]
    smallest = next(name for name in refused if name.endswith(models.TYPES[0]))
    assert planned[-1] == smallest
    assert {m.runs for m in found} == {"whole", "streams", "refused"}


@pytest.mark.usefixtures("small_process")
def test_a_core_set_that_streams_reads_less_and_is_faster_than_the_whole_model() -> None:
    header = absent_header("1B", "q8_0")
    whole = predict(header, RATES, "4GiB")
    streams = predict(header, Rates(RATES.memory, RATES.weights, 1e-5, disk=1e8), "900MiB")
    assert (whole.runs, streams.runs) == ("whole", "streams")
    assert streams.bytes_per_token < whole.bytes_per_token
    assert streams.tokens_per_second is not None
    assert whole.tokens_per_second is not None
    assert streams.tokens_per_second > whole.tokens_per_second
    ffn = sum(t.n_bytes for t in header.tensors.values() if ".ffn_" in t.name and t.type != "f32")
    assert streams.prompt_read_seconds == pytest.approx(2 * ffn / 1e8)
    assert whole.prompt_read_seconds == 0
