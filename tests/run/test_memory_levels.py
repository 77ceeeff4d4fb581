"""memory= with levels: set once or chosen for each prompt, and what that takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from streamed_llama import EXACT, greedy, streamed
from test_memory import MIB, PROMPT, budget_for, run_alone, wide_model
from with_prior import with_prior

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.core import has_kernels
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.choose.statistics import LEVELS as LEVELS_HERE
from coreinfer_edge.errors import ArgumentError, InsufficientMemoryError, MemoryBudgetError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.load_plan import plan_memory
from coreinfer_edge.run.memory_plan import ONCE_DENSITY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="weights are streamed on Linux only"),
    pytest.mark.skipif(not has_kernels(), reason="levels need our own kernels"),
]

LEVELS: dict[str, Any] = {"levels": ["full", 3, 2]}


@pytest.fixture(scope="module")
def plain(random_model: Any) -> Path:
    return wide_model(random_model, tied=True)


@pytest.fixture(scope="module")
def wide(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_prior(plain, tmp_path_factory.mktemp("levels") / "wide.gguf")


@pytest.mark.parametrize(
    ("options", "set_once"),
    [
        ({"density": 0.8}, True),
        ({"density": 0.6}, False),
        ({"density": 0.4, "strategy": "static"}, True),
        ({"density": 0.8, "strategy": "energy"}, False),
    ],
)
def test_the_plan_says_how_levels_are_set_and_holds(
    options: dict[str, Any], set_once: bool, wide: Path
) -> None:
    result = run_alone(wide, memory=125 * MIB, **LEVELS, **options)
    plan = result["plan"]
    assert (plan["set_once"], plan["streamed"]) == (set_once, not set_once)
    assert plan["total"] <= plan["budget"] == 125 * MIB
    peak = max(call["peak_private_bytes"] for call in result["calls"])
    assert peak <= plan["budget"]
    assert 0.9 * plan["total"] <= peak <= 1.05 * plan["total"], (peak, plan)
    for call in result["calls"]:
        assert call["set_once"] == set_once
        assert call["density"] == pytest.approx(options["density"], abs=0.01)
        assert call["core_ffn_bytes"] <= plan["core"]
        assert (call["streamed_bytes"] == 0) == set_once
        assert call["major_faults"] * 100 <= call["completion_tokens"]


def test_without_a_density_levels_are_set_once_where_much_fits(wide: Path) -> None:
    most = budget_for(wide, density=0.99, strategy="static", **LEVELS, **EXACT)
    seen = set()
    for budget in (most - 4 * MIB, most - 28 * MIB):
        with EdgeLLM(wide, memory=budget, **LEVELS, **EXACT) as llm:
            plan = llm.plan
            assert plan is not None
            assert not plan.whole
            assert plan.set_once == (plan.density >= ONCE_DENSITY)
            assert llm.generate(PROMPT, max_tokens=8, temperature=0)
            assert llm.last is not None
            assert llm.last.set_once == plan.set_once
            assert llm.last.density == pytest.approx(plan.density, abs=0.01)
            seen.add(plan.set_once)
    assert seen == {True, False}


def test_levels_of_a_prompt_are_the_same_with_weights_in_the_file(plain: Path) -> None:
    whole, from_file = (
        streamed(plain, is_streamed, packed=True, **LEVELS) for is_streamed in (False, True)
    )
    try:
        assert greedy(from_file) == greedy(whole)
        assert from_file.run.density == whole.run.density == pytest.approx(0.5, abs=0.01)
        assert from_file.run.streamed_bytes > 0
    finally:
        whole.close()
        from_file.close()


def test_levels_of_all_bytes_are_the_model_and_nothing_is_read_for_a_prompt(wide: Path) -> None:
    prior = from_header(read_header(wide))
    options = {"strategy": "static", "prior": prior, "packed": True, **LEVELS}
    once = streamed(wide, True, density=1.0, set_once=True, **options)
    whole = streamed(wide, False, density=1.0, **options)
    try:
        assert greedy(once) == greedy(whole)
        assert once.run.set_once
        assert once.run.streamed_bytes == 0
        assert once.run.density == 1.0
    finally:
        once.close()
        whole.close()


def test_without_statistics_levels_are_never_set_once(plain: Path) -> None:
    budget = budget_for(plain, density=0.7, **LEVELS, **EXACT)
    plan = plan_memory(plain, budget, 0.7, **LEVELS, **EXACT)
    assert plan.streamed
    assert not plan.set_once
    with pytest.raises(ArgumentError, match="needs the prior"):
        EdgeLLM(plain, memory=120 * MIB, density=0.7, strategy="static", **LEVELS, **EXACT)


def test_what_is_refused_names_what_fits_with_levels_set_once(wide: Path) -> None:
    options = {**LEVELS, **EXACT, "strategy": "static"}
    enough = budget_for(wide, density=0.9, **options)
    with pytest.raises(MemoryBudgetError, match="density=") as refused:
        EdgeLLM(wide, memory=enough - 12 * MIB, density=0.9, **options)
    assert "reading FFN weights" not in str(refused.value)
    with pytest.raises(InsufficientMemoryError):
        plan_memory(wide, MIB, 0.9, "static", n_ctx=512, **LEVELS)
    enough = budget_for(wide, density=0.7, **options)
    with pytest.raises(ArgumentError, match="refresh does not go with levels"):
        EdgeLLM(wide, memory=enough, refresh=8, **options)


def test_inspect_says_that_levels_are_set_once(wide: Path) -> None:
    from typer.testing import CliRunner

    from coreinfer_edge.cli.main import app

    budget = budget_for(wide, density=0.8, strategy="energy", n_ctx=512, **LEVELS) + 8 * MIB
    arguments = ["inspect", str(wide), "--memory", str(budget), "--ctx", "512", "--density", "0.8"]
    arguments += ["--levels", "full,3,2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "levels set once" in " ".join(done.output.split())
    done = CliRunner().invoke(app, [*arguments, "--strategy", "energy", "--json"])
    plan = json.loads(done.stdout)["plan"]
    assert (plan["set_once"], plan["streamed"], plan["levels"]) == (False, True, ["full", 3, 2])


def test_all_levels_are_the_default_where_weights_have_our_layout(wide: Path) -> None:
    for repack, levels in ((None, LEVELS_HERE), (False, ("full",))):
        budget = budget_for(wide, density=0.9, repack=repack, **EXACT)
        with EdgeLLM(wide, memory=budget, density=0.9, repack=repack, **EXACT) as llm:
            assert llm.plan is not None
            assert llm.plan.levels == levels
            assert llm.plan.set_once == (levels != ("full",))
            llm.generate(PROMPT, max_tokens=4, temperature=0)
            assert llm.last is not None
            assert llm.last.levels == levels
