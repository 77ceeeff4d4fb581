"""bench measures in turn, tells noise, and runs other engines in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coreinfer_edge.binding.load import BINDING_DIR
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.measure import speed as bench
from coreinfer_edge.measure.baselines import (
    Baseline,
    BaselineError,
    Wanted,
    check_fits,
    wanted_baselines,
)
from coreinfer_edge.measure.machine import read_bandwidth
from coreinfer_edge.measure.random_llama import cached_model
from coreinfer_edge.measure.speed import DENSE, EXACT, OUR_KERNELS, Plan, SpeedReport, SpeedRun
from coreinfer_edge.model.header import read_header
from coreinfer_edge.report import speed as bench_report
from coreinfer_edge.run.core_llama import CoreLlama
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

CORE = "core 0.5 (full,4,3,2)"
QUICK = Plan(
    densities=[0.5],
    prompt_tokens=16,
    tokens=12,
    contexts=[16, 32],
    rounds=2,
    repeats=0,
    warmup=2,
    threads=1,
)


@pytest.fixture(scope="module")
def model(random_model: RandomModel) -> Path:
    return random_model("llama", "q4_1", shape="small")


@pytest.fixture
def stock_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes started now, ``llama_cpp`` is the binding on an unpatched libllama."""
    stock = os.environ.get("COREINFER_STOCK_LIB")
    if stock is None:
        pytest.skip("COREINFER_STOCK_LIB names no libllama without our patches: use make test")
    monkeypatch.setenv("PYTHONPATH", str(BINDING_DIR.parent))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", stock)


@pytest.fixture(scope="module")
def report(model: Path) -> SpeedReport:
    return SpeedRun(model, QUICK, {}).measure()


def test_contestants_take_turns_and_are_told_the_round() -> None:
    seen: list[tuple[str, int]] = []
    contestants = {name: lambda i, name=name: seen.append((name, i)) for name in "ab"}
    bench.in_turn(2, contestants, lambda: None)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_spread_is_the_distance_of_the_quartiles_over_the_median() -> None:
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert bench.spread([7.0]) == 0


def test_speedup_is_the_median_over_rounds_so_that_a_slow_phase_does_not_count() -> None:
    assert bench.speedup([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2


def test_efficiency_is_over_dense_with_the_same_kernels() -> None:
    bursts = {DENSE: [8.0, 8.0], CORE: [2.0, 2.0]}
    assert bench.efficiency(bursts, CORE, bytes_ratio=2.0) == 2
    assert bench.efficiency({**bursts, OUR_KERNELS: [3.0, 3.0]}, CORE, bytes_ratio=2.0) == 0.75


@pytest.mark.parametrize(
    ("noise", "tries", "warned"), [([0.0], 1, False), ([1.0, 0.0], 2, False), ([1.0] * 3, 3, True)]
)
def test_what_is_noisy_is_measured_again_and_warned_of_if_it_stays_so(
    noise: list[float], tries: int, warned: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SETTLE_SECONDS", 0)
    run = SpeedRun(model, Plan(densities=[0.5], rounds=4, repeats=2, contexts=[]), {})
    calls = 0

    def act(i: int) -> float:
        nonlocal calls
        calls += 1
        return 1 + i * noise[(calls - 1) // 4]

    run._measured("this", {"a": act}, float)
    assert calls == 4 * tries
    assert run._warnings == (["this: spread 60%, measured 3 times"] if warned else [])


def test_the_report_has_every_contestant_and_what_it_read(report: SpeedReport, model: Path) -> None:
    engines = [DENSE, OUR_KERNELS, CORE, EXACT]
    assert [speed.engine for speed in report.answers] == engines
    dense, whole, core, _ = report.answers
    assert whole.density == 1
    assert whole.choose_seconds is None
    assert core.density == pytest.approx(0.5, abs=0.02)
    assert dense.choose_seconds is None
    assert core.choose_seconds is not None
    assert core.choose_seconds < core.answer_seconds
    for speed in report.answers:
        assert speed.first_token_seconds < speed.answer_seconds
        assert 0 < speed.peak_memory_bytes < report.machine.memory_bytes
    assert [(s.engine, s.context) for s in report.decoding] == [
        (engine, context) for context in (16, 32) for engine in (DENSE, OUR_KERNELS, CORE)
    ]
    n_bytes = [speed.bytes_per_token or 0 for speed in report.decoding]
    weights = sum(
        tensor.n_bytes
        for name, tensor in read_header(model).tensors.items()
        if name != "token_embd.weight"
    )
    # of the embedding one row; 4 layers, 2 * 4 heads of 32 values of 2 bytes for each token
    assert n_bytes[0] == pytest.approx(weights + 16 * 4 * 2 * 4 * 32 * 2, abs=200)
    assert n_bytes[3] - n_bytes[0] == 16 * 4 * 2 * 4 * 32 * 2
    for dense_speed, whole_speed, core_speed in (report.decoding[:3], report.decoding[3:]):
        assert whole_speed.bytes_ratio == 1
        assert core_speed.bytes_ratio == pytest.approx(
            (dense_speed.bytes_per_token or 0) / (core_speed.bytes_per_token or 1)
        )
        assert dense_speed.efficiency is whole_speed.efficiency is None
        assert (core_speed.efficiency or 0) > 0


def test_processor_time_does_not_count_the_time_that_others_take(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(**{**vars(QUICK), "contexts": [16], "answers": False, "processor_time": True})
    run, evaluate = SpeedRun(model, plan, {}), CoreLlama.eval

    def eval_with_pauses(self: CoreLlama, tokens: list[int]) -> None:
        time.sleep(0.05)
        evaluate(self, tokens)

    monkeypatch.setattr(CoreLlama, "eval", eval_with_pauses)
    report = run.measure()
    assert report.answers == []
    assert all(speed.tokens_per_second > 1 / 0.05 for speed in report.decoding)


def test_the_dense_row_is_measured_on_a_model_without_a_core_path(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    class Watched(bench.LlamaEngine):
        def answer(self, prompt: Sequence[int], n: int) -> Any:
            measured.append((self.llama.core is None, self.llama.density))
            return super().answer(prompt, n)

        def burst(self, n: int) -> float:
            measured.append((self.llama.core is None, 1.0))
            return super().burst(n)

    monkeypatch.setattr(bench, "LlamaEngine", Watched)
    plan = Plan([0.5], 16, 4, (16,), rounds=2, repeats=0, threads=1)
    SpeedRun(model, plan, {}).measure()
    # one answer before, two that count, and the bursts; core rows use another class
    assert len(measured) >= 6
    assert all(is_plain for is_plain, _ in measured)


def test_a_burst_leaves_the_context_as_it_was(model: Path) -> None:
    with EdgeLLM(model, 0.5, n_threads=1, n_ctx=64) as llm:
        own = bench._OwnEngine(llm.llama)
        own.fill(list(range(10, 26)))
        own.choose(0.5)
        own.core_burst(5)
        own.burst(5)
        assert llm.llama.n_tokens == 16
        after = logits_of_next(llm.llama)
        llm.llama.reset()
        llm.llama.eval(list(range(10, 26)))
        np.testing.assert_array_equal(after, logits_of_next(llm.llama))


def logits_of_next(llama: CoreLlama) -> Any:
    llama.eval([30])
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).copy()


def test_the_density_set_on_a_model_holds_from_the_next_run_on(model: Path) -> None:
    prompt = list(range(10, 40))

    def run(llama: CoreLlama) -> list[int]:
        return [
            token for token, _ in zip(llama.generate(prompt, temp=0.0), range(12), strict=False)
        ]

    options: dict[str, Any] = {"n_threads": 1, "n_ctx": 64, "warmup": 2}
    with EdgeLLM(model, strategy="dense", **options) as llm:
        dense = run(llm.llama)
    with EdgeLLM(model, 0.25, **options) as llm:
        core = run(llm.llama)
        assert llm.llama.run.density == pytest.approx(0.25, abs=0.02)
    assert core != dense
    with EdgeLLM(model, 0.5, **options) as llm:
        for density, expected in ((1.0, dense), (0.25, core), (1.0, dense)):
            llm.llama.density = density
            assert run(llm.llama) == expected
            assert llm.llama.run.density == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("density", [0, -1, 2, float("nan"), "x"])
def test_a_density_set_on_a_model_is_checked(density: Any, model: Path) -> None:
    with EdgeLLM(model, 0.5, n_threads=1, n_ctx=64) as llm:
        llm.llama.density = density
        with pytest.raises(ArgumentError, match=r"density is .*: it must be above 0"):
            llm.generate([10, 11], max_tokens=2)


def test_the_first_token_comes_before_the_choice_of_the_core_set(model: Path) -> None:
    with EdgeLLM(model, 0.5, warmup=2, n_threads=1, n_ctx=64) as llm:
        tokens = llm.llama.generate(list(range(10, 40)), temp=0.0)
        next(tokens)
        assert llm.llama.run.choose_seconds == 0
        for _ in range(4):
            next(tokens)
        assert llm.llama.run.choose_seconds > 0


@pytest.mark.usefixtures("stock_binding")
def test_llama_cpp_runs_unpatched_in_a_process_that_does_not_import_us(model: Path) -> None:
    with Baseline(Wanted("llama.cpp", model), 64, 1) as engine:
        answer = engine.answer(list(range(10, 26)), 8)
        assert 0 < answer["first"] < answer["last"]
        engine.fill(list(range(10, 26)))
        assert engine.burst(3) > 0
        assert engine.peak_memory > 0
        maps = Path(f"/proc/{engine._process.pid}/maps").read_text()
    assert "libcoreinfer.so" not in maps
    assert "libcoreinfer-llama" not in maps  # the stock library is on the same ggml
    assert os.environ["LLAMA_CPP_LIB_PATH"] in maps


@pytest.mark.usefixtures("stock_binding")
def test_other_engines_stand_beside_dense_in_the_report(model: Path) -> None:
    report = SpeedRun(model, QUICK, wanted_baselines(["llama.cpp"], model)).measure()
    assert report.missing == {}
    both = {"llama.cpp", "llama.cpp as stored"}
    assert both < {speed.engine for speed in report.answers}
    others = [speed for speed in report.decoding if speed.engine == "llama.cpp"]
    assert [speed.context for speed in others] == [16, 32]
    assert all(speed.efficiency is None for speed in others)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_answers_from_the_same_file(dtype: str, model: Path) -> None:
    pytest.importorskip("transformers")
    with Baseline(Wanted(f"transformers {dtype}", model), 64, 1) as engine:
        answer = engine.answer(list(range(10, 26)), 4)
        assert 0 < answer["first"] < answer["last"]
        engine.fill(list(range(10, 26)))
        assert engine.burst(3) > 0
        assert engine.burst(3) > 0


def test_an_engine_that_is_not_installed_is_named_with_its_pip_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # stands before any that is installed
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('No such module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(BaselineError, match="-m pip install llama-cpp-python"):
        Baseline(Wanted("llama.cpp", model), 64, 1)
    wanted = wanted_baselines(["llama.cpp"], model)
    report = SpeedRun(model, Plan(**{**vars(QUICK), "contexts": []}), wanted).measure()
    assert list(report.missing) == ["llama.cpp", "llama.cpp as stored"]
    assert len(report.answers) == 4


FAKE_LLAMA_CPP = """
class Llama:
    def __init__(self, path, **options):
        raise ValueError(sorted(options.items()))
"""


def test_options_of_an_engine_reach_it_and_stand_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(FAKE_LLAMA_CPP)
    (tmp_path / "llama_cpp" / "llama_cpp.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = wanted_baselines(["llama.cpp,flash_attn=true,mode=fast"], Path("m.gguf"))
    label = "llama.cpp flash_attn=true mode=fast"
    assert label in wanted
    with pytest.raises(BaselineError, match=r"\('flash_attn', True\), \('mode', 'fast'\)"):
        Baseline(wanted[label], 64, 1)


@pytest.mark.usefixtures("stock_binding")
def test_an_engine_whose_process_dies_is_an_error_that_says_so(model: Path) -> None:
    with Baseline(Wanted("llama.cpp", model), 64, 1) as engine:
        engine._process.kill()
        with pytest.raises(BaselineError, match="its process ended with status -9"):
            engine.fill([10])


def test_transformers_is_not_started_where_its_weights_would_not_fit() -> None:
    with pytest.raises(BaselineError, match="GiB to load"):
        check_fits("transformers float32", 10**13)
    check_fits("llama.cpp", 10**13)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["vllm"], "must be one of llama.cpp, transformers"),
        (["llama.cpp=."], "must be one of llama.cpp, transformers"),
        (["llama.cpp,fast"], "'fast' is not an option: give KEY=VALUE"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        wanted_baselines(names, Path("model.gguf"))


def test_a_python_that_is_none_is_refused() -> None:
    with pytest.raises(ArgumentError, match="--vs-python /no/such is not a program"):
        wanted_baselines(["llama.cpp"], Path("model.gguf"), "/no/such")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"densities": [1.0]}, "dense is measured anyway"),
        ({"strategy": "dense"}, "name another one"),
        ({"contexts": [4096]}, "give smaller --contexts"),
        ({"processor_time": True, "threads": 2}, "add --threads 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    changes: dict[str, Any], message: str, model: Path
) -> None:
    with pytest.raises(ArgumentError, match=message):
        SpeedRun(model, Plan(**{**vars(QUICK), **changes}), {})


def test_a_model_without_a_dense_ffn_is_refused(random_model: RandomModel) -> None:
    with pytest.raises(UnsupportedModelError, match="no layer has a dense FFN"):
        SpeedRun(random_model("mamba"), QUICK, {})


def test_the_plot_is_a_picture(report: SpeedReport, tmp_path: Path) -> None:
    bench_report.plot(report, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_read_at_a_speed_that_memory_can_have() -> None:
    assert 1e8 < read_bandwidth(1, n_bytes=2**26) < 1e13


def test_a_model_of_the_cache_is_made_once_and_progress_adds_up_to_its_bytes(
    tmp_path: Path,
) -> None:
    from contextlib import contextmanager

    written: list[int] = []

    @contextmanager
    def progress(total: int) -> Any:
        written.append(-total)
        yield written.append

    path = cached_model("small", "q4_0", tmp_path / "cache", progress)
    assert sum(written) == 0
    assert len(written) > 2
    made = path.stat().st_mtime_ns
    assert cached_model("small", "q4_0", tmp_path / "cache", progress) == path
    assert path.stat().st_mtime_ns == made
    with pytest.raises(ArgumentError, match="'2b' must be one of"):
        cached_model("2b", "q4_0", tmp_path, progress)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="name another folder"):
        cached_model("small", "q4_0", tmp_path / "file", progress)


def test_levels_can_be_given_and_name_the_row(model: Path) -> None:
    plan = Plan(**{**vars(QUICK), "contexts": [], "levels": ("full",)})
    report = SpeedRun(model, plan, {}).measure()
    assert report.levels == ("full",)
    assert report.answers[2].engine == "core 0.5 (full)"


def test_an_answer_that_ends_within_warm_up_is_not_called_one_of_a_core_set(model: Path) -> None:
    plan = Plan(**{**vars(QUICK), "contexts": [], "warmup": 64})
    row = SpeedRun(model, plan, {}).measure().answers[2]
    assert row.engine == f"{CORE}: all warm-up, dense"
    assert row.density == 1


def test_the_command_prints_tables_or_one_json_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coreinfer_edge.cli.main", "bench", "--shape", "small"]
    command += ["--cache", str(tmp_path), "--prompt-tokens", "16", "--tokens", "8"]
    command += ["--contexts", "16", "--rounds", "2", "--repeats", "0", "--density", "0.5"]
    command += ["--warmup", "1", "--threads", "1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Whole answers: 16 tokens of prompt, 8 of answer" in shown
    assert CORE in shown
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    assert report["answers"][2]["engine"] == CORE
    assert report["levels"] == ["full", 4, 3, 2]
    assert report["decoding"][2]["bytes_ratio"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model or --shape"),
        (["demo", "--shape", "1b"], "give a model or --shape"),
        (["demo", "--contexts", "x"], "numbers of tokens"),
        (["demo", "--density", "x"], "densities, with commas"),
        (["demo", "--plot", "speed.txt"], "must end in one of"),
        (["demo", "--vs", "vllm"], "must be one of"),
        (["--shape", "2b"], "must be one of"),
    ],
)
def test_arguments_that_cannot_be_end_the_command_with_one_message(
    arguments: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "coreinfer_edge.cli.main", "bench", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr
