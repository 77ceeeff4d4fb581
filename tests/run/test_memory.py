"""memory=: what is planned, that it holds, and that the answer is the same."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from control_group import ControlGroup, NoControlGroups, control_group
from streamed_llama import EXACT, assert_same_answer, greedy, streamed

from coreinfer_edge import EdgeLLM
from coreinfer_edge.errors import (
    ArgumentError,
    InsufficientMemoryError,
    ModelFileError,
    UnsupportedModelError,
)
from coreinfer_edge.run.memory_plan import LEAST_DENSITY
from coreinfer_edge.run.planning import parse_size
from coreinfer_edge.run.process_memory import available_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="weights are streamed on Linux only"),
]

MIB = 1 << 20
PROMPT = "The history of Rome begins with the founding of the city, which legend"
# Generates twice in a process of its own, and prints the plan and the figures.
SCRIPT = """
import dataclasses, json, sys
from coreinfer_edge import EdgeLLM
path, options = sys.argv[1], json.loads(sys.argv[2])
with EdgeLLM(path, n_threads=1, n_threads_batch=1, **options) as llm:
    n_vocab = llm.llama.n_vocab()
    calls = []
    for turn in range(2):
        prompt = [(7919 * i + turn) % (n_vocab - 300) + 260 for i in range(460)]
        llm.generate(prompt, max_tokens=40, temperature=0)
        calls.append(dataclasses.asdict(llm.last))
    plan = llm.plan.as_dict()
print(json.dumps({"plan": plan, "calls": calls}))
"""


def run_alone(path: Path, group: ControlGroup | None = None, **options: Any) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, str(path), json.dumps({"n_ctx": 512, **options})]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "check": False}
    if group is None:
        done = subprocess.run(command, text=True, **settings)
    else:
        done = group.run(command, **settings)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def named_memory(error: pytest.ExceptionInfo[InsufficientMemoryError]) -> int:
    """The bytes that a refusal says would be enough."""
    enough = re.search(r"memory of ([\d,]+ \w+)", str(error.value))
    assert enough is not None
    return parse_size(enough[1].replace(",", ""))


def budget_for(path: Path, **options: Any) -> int:
    """Enough for these options and no more, counted from what this process has right now."""
    gc.collect()  # models of earlier tests, if any wait for that
    with pytest.raises(InsufficientMemoryError) as refused:
        EdgeLLM(path, memory=MIB, **options)
    return named_memory(refused)


@pytest.fixture(scope="module")
def wide(random_model: Any) -> Path:
    return wide_model(random_model, tied=True)


def wide_model(random_model: Any, tied: bool) -> Path:
    """Mostly FFN, and with a vocabulary that counts."""
    path: Path = random_model(
        "llama",
        "q4_0",
        n_layer=10,
        n_embd=512,
        n_ff=6144,
        n_head=8,
        n_head_kv=4,
        n_vocab=16000,
        n_ctx=512,
        tied=tied,
    )
    return path


# --- the same answer -----------------------------------------------------------------------------


def test_the_answer_is_the_same_as_with_all_weights_in_memory(smollm2: Path) -> None:
    with EdgeLLM(smollm2, density=0.5, warmup=0, **EXACT) as llm:
        texts = [llm.generate(PROMPT, max_tokens=40, temperature=0)]
        texts.append(llm.generate(PROMPT + texts[0] + " Then", max_tokens=40, temperature=0))
    budget = budget_for(smollm2, density=0.5, **EXACT)
    with EdgeLLM(smollm2, density=0.5, memory=budget, **EXACT) as llm:
        assert llm.plan is not None
        assert llm.plan.streamed
        assert llm.generate(PROMPT, max_tokens=40, temperature=0) == texts[0]
        assert llm.last is not None
        assert llm.last.warmup_tokens == 0
        first = llm.last.streamed_bytes
        # a second turn streams again, and decodes with a core set again
        assert llm.generate(PROMPT + texts[0] + " Then", max_tokens=40, temperature=0) == texts[1]
        assert llm.last.streamed_bytes > 0
        assert llm.last.density < 0.6
    weights = sum(n for n in [llm.last.full_ffn_bytes])
    assert first == weights  # one pass, and no more


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "starcoder2"])
def test_every_kind_of_ffn_streams(arch: str, random_model: Any) -> None:
    path = random_model(arch, "q4_0", shape="small", n_ctx=512)
    assert_same_answer(path)


def test_an_adapter_of_the_embedding_goes_with_streaming(
    random_model: Any, wide: Path, tmp_path: Path
) -> None:
    path = wide_model(random_model, tied=False)
    shape = next(t.shape for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    n_embd, n_vocab = map(int, shape)
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for name, n in (("a", n_vocab), ("b", n_embd)):
        weights = rng.standard_normal((n, 4), dtype=np.float32)
        writer.add_tensor(f"token_embd.weight.lora_{name}", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with EdgeLLM(path, warmup=0, **EXACT) as llm:
        without = llm.generate(PROMPT, max_tokens=24, temperature=0)
    adapted = {"warmup": 0, "density": 0.5, "lora_path": tmp_path / "adapter.gguf", **EXACT}
    with EdgeLLM(path, **adapted) as llm:
        expected = llm.generate(PROMPT, max_tokens=24, temperature=0)
    with EdgeLLM(path, memory=budget_for(path, **adapted), **adapted) as llm:
        assert llm.plan is not None
        assert llm.plan.streamed
        assert llm.generate(PROMPT, max_tokens=24, temperature=0) == expected
    assert expected != without
    with pytest.raises(UnsupportedModelError, match="the embedding, which is the output"):
        EdgeLLM(wide, **adapted)  # where it is the output too, llama.cpp would end the process


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k", "q6_k", "iq4_nl"])
def test_every_kind_of_weights_streams(type: str, random_model: Any) -> None:
    path = random_model("llama", type, shape="small", n_ctx=512)
    assert_same_answer(path)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "griffin"},
        {"strategy": "stability"},
        {"warmup": 3},
        {"refresh": 8},
        {"density": "auto", "quality": 0.02},
        {"density": 0.99},
        {"n_ubatch": 16},
    ],
)
def test_what_evaluates_dense_streams_too(options: dict[str, Any], random_model: Any) -> None:
    path = random_model("llama", "q4_0", shape="small", n_ctx=512)
    whole, from_file = streamed(path, False, **options), streamed(path, True, **options)
    try:
        assert greedy(from_file) == greedy(whole)
        assert from_file.run.density == whole.run.density
        assert from_file.run.streamed_bytes > 0
    finally:
        whole.close()
        from_file.close()


def test_evaluating_by_hand_streams(random_model: Any) -> None:
    path = random_model("llama", "q4_0", shape="small", n_ctx=512)
    whole = streamed(path, False, logits_all=True)
    from_file = streamed(path, True, logits_all=True)
    try:
        for llama in (whole, from_file):
            llama.eval(list(range(4, 90)))
        assert (whole.scores[:86] == from_file.scores[:86]).all()
    finally:
        whole.close()
        from_file.close()


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"density": 0.4}, {"warmup": 0}])
@pytest.mark.parametrize("model", ["smollm2", "wide"])
def test_the_plan_holds(
    model: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(model)
    # too little for the whole model, which is dense without a density
    with_density, without = {"smollm2": (165, 150), "wide": (130, 100)}[model]
    budget = (with_density if options else without) * MIB
    result = run_alone(path, memory=budget, **options)
    plan = result["plan"]
    assert plan["streamed"]
    assert plan["total"] <= budget
    peak = max(call["peak_private_bytes"] for call in result["calls"])
    assert peak <= budget
    assert 0.9 * plan["total"] <= peak <= 1.05 * plan["total"], (peak, plan)
    for call in result["calls"]:
        assert call["streamed_bytes"] >= call["full_ffn_bytes"]
        assert call["major_faults"] * 100 <= call["completion_tokens"]


def test_what_fits_is_not_streamed(smollm2: Path) -> None:
    with EdgeLLM(smollm2, memory="4GiB", **EXACT) as llm:
        assert llm.plan is not None
        assert not llm.plan.streamed
        assert llm.plan.density == 1.0
        llm.generate(PROMPT, max_tokens=8)
        assert llm.last is not None
        assert llm.last.streamed_bytes == 0


def test_an_embedding_that_is_the_output_too_counts_once_in_our_layout(smollm2: Path) -> None:
    totals, packed = [], []
    for repack in (True, False):
        with EdgeLLM(smollm2, memory="4GiB", repack=repack, **EXACT) as llm:
            assert llm.plan is not None
            totals.append(llm.plan.total)
            packed.append(llm.llama.packed_bytes)
    if not packed[0]:
        pytest.skip("this processor has no kernels of ours")
    assert packed[1] == 0
    assert abs(totals[1] - totals[0]) < 8 * MIB


def test_an_option_of_core_sets_means_auto_where_the_model_fits(smollm2: Path) -> None:
    options: list[dict[str, Any]] = [
        {"strategy": "griffin"},
        {"quality": 0.3},
        {"refresh": 8},
        {"layers": [0]},
        {"warmup": 2},
        {"levels": ["full"]},
    ]
    for option in options:
        with EdgeLLM(smollm2, memory="4GiB", **EXACT, **option) as llm:
            assert llm.plan is not None
            assert not llm.plan.streamed
            assert llm.llama.density == "auto"
            llm.generate(PROMPT * 9, max_tokens=20, temperature=0)
            assert llm.last is not None
            assert llm.last.strategy == option.get("strategy", "energy")
            assert llm.last.estimated_kl is not None


def test_an_option_of_core_sets_needs_no_more_memory_than_none(wide: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"warmup": 0}, {"quality": 0.3}]
    plans = [run_alone(wide, memory=100 * MIB, **option)["plan"] for option in options]
    assert all(plan["streamed"] for plan in plans)
    densities = [plan["density"] for plan in plans]
    assert min(densities) > 0.8 * max(densities), densities
    assert max(densities) < 0.8


def test_without_a_density_the_largest_that_fits_is_taken(wide: Path) -> None:
    budget = budget_for(wide, **EXACT) + 4 * MIB
    with EdgeLLM(wide, memory=budget, **EXACT) as llm:
        plan = llm.plan
    assert plan is not None
    assert plan.streamed
    assert LEAST_DENSITY < plan.density < 0.8
    budget = budget_for(wide, **EXACT) + 4 * MIB  # something of the first stays
    with pytest.raises(InsufficientMemoryError) as refused:
        EdgeLLM(wide, memory=budget, density=0.95, **EXACT)
    assert "density=" in str(refused.value)


def test_the_memory_that_a_refusal_names_is_enough(wide: Path) -> None:
    with pytest.raises(InsufficientMemoryError) as refused:
        EdgeLLM(wide, memory=MIB, density=0.6, **EXACT)
    assert "n_ctx=" not in str(refused.value)
    with EdgeLLM(wide, memory=named_memory(refused), density=0.6, **EXACT) as llm:
        assert llm.plan is not None


def test_layers_that_stay_dense_leave_the_others_the_largest_density_that_fits(wide: Path) -> None:
    budget = budget_for(wide, layers=[0, -1], **EXACT) + 4 * MIB
    with EdgeLLM(wide, memory=budget, layers=[0, -1], **EXACT) as llm:
        assert llm.plan is not None
        assert llm.plan.streamed
        assert llm.plan.density > 0.2
        llm.generate([5, 6, 7], max_tokens=6)
        assert llm.last is not None
        assert llm.last.density == pytest.approx(llm.plan.density, abs=0.02)


def test_embeddings_go_with_a_budget(wide: Path) -> None:
    options = {name: value for name, value in EXACT.items() if "batch" not in name}
    options.update(embedding=True, n_threads_batch=1)
    with EdgeLLM(wide, memory=budget_for(wide, **options), **options) as llm:
        assert llm.plan is not None
        assert llm.generate([5, 6, 7], max_tokens=4) is not None


def test_auto_density_stays_within_what_fits(wide: Path) -> None:
    budget = budget_for(wide, **EXACT) + 4 * MIB
    poor = pytest.warns(RuntimeWarning, match="room for density .* and the text will suffer")
    with poor, EdgeLLM(wide, memory=budget, density="auto", quality=1e-9, **EXACT) as llm:
        assert llm.plan is not None
        assert llm.plan.streamed
        llm.generate([4 + i for i in range(60)], max_tokens=4, temperature=0)
        assert llm.last is not None
        assert llm.last.density <= llm.plan.density + 0.02


def test_what_cannot_fit_is_refused_with_figures_and_what_would(smollm2: Path) -> None:
    budget = budget_for(smollm2, density=0.5, n_ctx=2048) - 30 * MIB
    with pytest.raises(InsufficientMemoryError) as refused:
        EdgeLLM(smollm2, memory=budget, density=0.5, n_ctx=2048)
    message = str(refused.value)
    assert "does not fit into" in message
    assert "weights" in message
    assert "cache of 2048" in message
    assert "What would fit" in message
    assert "memory of" in message
    # the process has grown a little meanwhile
    with EdgeLLM(smollm2, memory=named_memory(refused) + 8 * MIB, density=0.5, n_ctx=2048) as llm:
        assert llm.plan is not None
        assert llm.plan.fits


def test_a_refusal_without_a_context_is_told_for_the_shortest(smollm2: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match="cache of 512 tokens"):
        EdgeLLM(smollm2, memory=8 * MIB)


def test_dense_in_too_little_memory_is_refused(smollm2: Path) -> None:
    budget = budget_for(smollm2, density=0.5, n_ctx=256)
    with pytest.raises(InsufficientMemoryError, match="does not fit into"):
        EdgeLLM(smollm2, memory=budget, density=1.0, n_ctx=256)


@pytest.mark.parametrize("option", [{"n_gpu_layers": 1}, {"use_mlock": True}])
@pytest.mark.filterwarnings("ignore:this build has no GPU")
def test_what_does_not_go_with_a_budget_is_refused(option: dict[str, Any], smollm2: Path) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(option))} does not go with memory"):
        EdgeLLM(smollm2, memory="1GiB", **option)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1.5GiB", 3 << 29),
        ("800MB", 800_000_000),
        ("800 m", 800_000_000),
        ("64KiB", 65536),
        ("123", 123),
        (123, 123),
        ("2g", 2_000_000_000),
    ],
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.2G", "1 GiBs", "0", 0, -5, 1.5, True, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ArgumentError, match="it must be a size like"):
        parse_size(text)


# --- files that do not stay as they are ----------------------------------------------------------


@pytest.fixture
def own_copy(wide: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(wide, tmp_path / "own.gguf"))


@pytest.mark.parametrize("when", ["before the prompt", "before the choice", "while decoding"])
def test_a_file_that_is_cut_is_an_error_that_says_so(when: str, own_copy: Path) -> None:
    budget = budget_for(own_copy, **EXACT)
    with EdgeLLM(own_copy, memory=budget, **EXACT) as llm:
        assert llm.plan is not None
        assert llm.plan.streamed
        if when == "before the prompt":
            os.truncate(own_copy, own_copy.stat().st_size // 2)
            with pytest.raises(ModelFileError, match=r"own\.gguf: ends at byte .* cut"):
                llm.generate([5, 6, 7], max_tokens=4)
        elif when == "while decoding":
            pieces = llm.llama.generate([5, 6, 7], temp=0.0)
            seen = {5, 6, 7, *(next(pieces) for _ in range(4))}
            assert 0 < llm.llama.run.density < 1
            os.truncate(own_copy, own_copy.stat().st_size // 2)
            new = next(token for token in range(8, 300) if token not in seen)
            with pytest.raises(ModelFileError, match=r"own\.gguf: .* cut"):
                pieces.send([new])  # the row of its embedding is not there yet
        else:
            pieces = llm.llama.generate([5, 6, 7], temp=0.0)
            next(pieces)
            os.truncate(own_copy, own_copy.stat().st_size // 2)
            with pytest.raises(ModelFileError, match=r"own\.gguf: ends at byte .* cut"):
                next(pieces)
        with pytest.raises(ModelFileError, match=r"own\.gguf: .* cut"):
            llm.generate([5, 6, 7], max_tokens=4)


def test_a_file_that_is_written_to_is_noticed(own_copy: Path) -> None:
    budget = budget_for(own_copy, **EXACT)
    with EdgeLLM(own_copy, memory=budget, **EXACT) as llm:
        llm.generate([5, 6, 7], max_tokens=4)
        with open(own_copy, "r+b") as file:
            file.seek(-4, 2)
            file.write(b"abcd")
        os.utime(own_copy)
        with pytest.raises(ModelFileError, match=r"own\.gguf: was written to since it was loaded"):
            llm.generate([8, 6, 7], max_tokens=4)


# --- control groups ------------------------------------------------------------------------------


@pytest.fixture
def group() -> Any:
    try:
        with control_group() as group:
            yield group
    except NoControlGroups as error:
        pytest.skip(str(error))


def test_in_a_control_group_the_budget_is_kept(smollm2: Path, group: ControlGroup) -> None:
    budget = 165 * MIB
    group.limit(budget)
    result = run_alone(smollm2, group, memory=budget)
    peak, planned = group.peak(), result["plan"]["total"]
    assert peak is not None
    assert 0.85 * planned <= peak <= budget
    for call in result["calls"]:
        assert call["major_faults"] * 100 <= call["completion_tokens"]


def test_auto_sees_the_limit_of_a_control_group(smollm2: Path, group: ControlGroup) -> None:
    group.limit(250 * MIB)
    result = run_alone(smollm2, group, memory="auto")
    plan = result["plan"]
    assert "control group" in plan["source"]
    assert 120 * MIB < plan["budget"] < 250 * MIB
    assert max(call["peak_private_bytes"] for call in result["calls"]) <= plan["budget"]


def test_available_memory_is_no_more_than_the_machine_has() -> None:
    available, source = available_bytes()
    assert available > 0
    assert source
