"""Core sets whose neurons have levels of precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, core_session, edge
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from reference import Reference
from test_reference import relative_error, some_tokens

from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding.core import rounded
from coreinfer_edge.choose.statistics import LEVELS, CoreSet
from coreinfer_edge.errors import ArgumentError

RandomModel = Callable[..., Path]

# What rounding activations to 8 bits may change.
NEAR = 0.05


@pytest.fixture(scope="module")
def model(random_model: RandomModel) -> Path:
    return random_model("llama", "q8_0", shape="small")


@pytest.fixture(scope="module")
def has_kernels(model: Path) -> bool:
    with core_session(model, packed=True) as session:
        return session.core.ffns[0].neuron_bytes[1] > 0


@pytest.fixture(scope="module", autouse=True)
def _needs_kernels(has_kernels: bool, request: pytest.FixtureRequest) -> None:
    if not has_kernels:
        pytest.skip("levels need our own kernels, which this processor has not")


def mixed(n_ff: int, seed: int) -> CoreSet:
    """Some neurons of each level, none of which has a multiple of 32."""
    rng = np.random.default_rng(seed)
    level = rng.choice([-1, 0, 1, 2, 3], n_ff, p=[0.2, 0.1, 0.2, 0.2, 0.3])
    kept = np.flatnonzero(level >= 0)
    return CoreSet(kept.astype(np.int32), None, level[kept].astype(np.uint8))


def by_level(core: CoreSet, level: int) -> NDArray[np.integer[Any]]:
    assert core.levels is not None
    return core.neurons[core.levels == level]


def held(core: CoreSet, reference: Reference, i: int) -> None:
    """Let a layer of the reference have the weights that the core set holds of its neurons."""
    for name in ("gate", "up"):
        weights = reference.weight(f"blk.{i}.ffn_{name}")
        for level in range(1, len(LEVELS)):
            for row in by_level(core, level):
                weights[row] = rounded(LEVELS[level], weights[row].astype(np.float32))
    down = reference.weight(f"blk.{i}.ffn_down")
    for level in range(len(LEVELS)):
        neurons = by_level(core, level)
        if not len(neurons):
            continue
        kept = np.zeros((len(down), -(-len(neurons) // 32) * 32), dtype=np.float32)
        kept[:, : len(neurons)] = down[:, neurons]
        if level == 0:
            kept = dequantize(quantize(kept, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
        else:
            kept = np.stack([rounded(LEVELS[level], row) for row in kept])
        down[:, neurons] = kept[:, : len(neurons)]


@pytest.mark.parametrize("at_once", [1, None])
def test_logits_are_those_of_the_reference_with_the_same_weights(
    at_once: int | None, model: Path
) -> None:
    tokens = some_tokens()
    with core_session(model, packed=True) as session:
        core = {i: mixed(session.core.ffns[i].n_ff, i) for i in (0, 2, 3)}
        session.core.set_core(core)
        session.core.use_core(True)
        logits = session.run(tokens, at_once)
    reference, of_file = Reference(model), Reference(model)
    for i, of_ffn in core.items():
        held(of_ffn, reference, i)
    kept = {i: of_ffn.neurons for i, of_ffn in core.items()}
    assert relative_error(logits, reference.logits(tokens, kept))[1] < NEAR
    assert relative_error(logits, of_file.logits(tokens, kept))[1] > 3 * NEAR


def test_rounding_to_a_level_changes_a_row_as_little_as_its_bits_allow() -> None:
    row = np.random.default_rng(0).normal(size=1056).astype(np.float32)
    errors = [float(((rounded(level, row) - row) ** 2).mean()) for level in (4, 3, 2)]
    assert 0.001 < errors[0] < 0.005 < 0.01 < errors[1] < 0.025 < errors[2] < 0.1
    with pytest.raises(ArgumentError, match="31 weights"):
        rounded(3, row[:31])


@pytest.mark.parametrize("levels", [["full", 4, 3, 2], [3], [2, "full"], [4], None])
def test_an_answer_with_levels_reads_the_bytes_of_the_density(
    levels: list[Any], model: Path
) -> None:
    with edge(model, density=0.5, levels=levels, warmup=0, repack=None) as llm:
        tokens = continued(llm, some_tokens(), 12)
        figures = llm.llama.run
        dense = sum(ffn.n_bytes for ffn in llm.llama.core.ffns)  # type: ignore[union-attr]
        assert figures.core_tokens > 0
        assert figures.density == pytest.approx(0.5, abs=0.03)
        assert figures.core_bytes == pytest.approx(figures.density * dense, rel=0.03)
        assert continued(llm, some_tokens(), 12) == tokens


def test_full_alone_is_the_core_set_as_it_was(model: Path) -> None:
    answers = []
    for options in ({"levels": ["full"]}, {"levels": ("full",)}):
        with edge(model, density=0.5, warmup=0, repack=True, **options) as llm:
            answers.append((continued(llm, some_tokens(), 12), llm.llama.run.density))
    assert answers[0] == answers[1]


def test_levels_are_what_a_core_set_has_where_our_kernels_hold_the_weights(model: Path) -> None:
    with edge(model, density=0.5, warmup=0, repack=None) as llm:
        llm.generate("the hat", max_tokens=6, temperature=0)
        assert llm.last is not None
        assert llm.last.levels == LEVELS
        assert llm.last.density == pytest.approx(0.5, abs=0.03)
        llm.generate("the hat", max_tokens=1, temperature=0)
        assert llm.last.levels == ()  # the only token is the prompt's


@pytest.mark.parametrize("options", [{"repack": False}, {"repack": False, "memory": "8GB"}])
def test_elsewhere_the_default_is_to_keep_or_drop_and_says_so(
    options: dict[str, Any], model: Path
) -> None:
    with edge(model, **{"density": 0.5, "warmup": 0, "repack": None, **options}) as llm:
        llm.generate("the hat", max_tokens=6, temperature=0)
        assert llm.last is not None
        assert llm.last.levels == ("full",)


def test_types_that_no_kernel_has_are_kept_or_dropped_by_default(random_model: RandomModel) -> None:
    with edge(random_model("llama", "f32"), density=0.5, warmup=0, repack=None) as llm:
        llm.generate("the hat", max_tokens=6, temperature=0)
        assert llm.last is not None
        assert llm.last.levels == ("full",)


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_weights_of_16_bits_can_have_levels(type_: str, random_model: RandomModel) -> None:
    path = random_model("llama", type_, shape="small")
    tokens = {}
    for density in (0.25, 0.99):
        with edge(path, density=density, warmup=0, repack=None) as llm:
            tokens[density] = continued(llm, some_tokens(), 12)
            # eight bits are all that a neuron can have, and the end layers have no more than that
            assert llm.llama.run.density == pytest.approx(min(density, 0.52), abs=0.02)
            assert llm.llama.run.levels == LEVELS
    with edge(path, density=1.0) as llm:
        dense = continued(llm, some_tokens(), 12)
    assert tokens[0.99][:3] == dense[:3]


def test_levels_or_a_quality_that_would_be_ignored_are_refused(model: Path) -> None:
    for whole in ({"density": 1.0}, {"strategy": "dense"}):
        with pytest.raises(ArgumentError, match="levels are of a core set"):
            EdgeLLM(model, levels=["full", 3], **whole)  # type: ignore[arg-type]
        EdgeLLM(model, levels=["full"], **whole).close()  # type: ignore[arg-type]
    for given in ({"density": 0.5}, {"density": 1.0}, {"strategy": "dense"}):
        with pytest.raises(ArgumentError, match="quality is what density='auto' keeps to"):
            EdgeLLM(model, quality=0.5, **given)  # type: ignore[arg-type]


def test_refreshing_and_an_estimated_density_work_with_levels(model: Path) -> None:
    with edge(model, density="auto", quality=0.5, levels=["full", 3, 2], refresh=8) as llm:
        continued(llm, some_tokens() * 4, 60)
        figures = llm.llama.run
        assert figures.refreshes > 0
        assert 0 < figures.density <= 1
        assert figures.estimated_kl is not None


@pytest.mark.parametrize(
    "levels", [[], ["half"], [5], ["full", "full"], [3.0], "full", 3, ["3"], [["full"]]]
)
def test_levels_that_make_no_sense_are_refused(levels: Any, model: Path) -> None:
    with pytest.raises(ArgumentError, match="levels is"):
        EdgeLLM(model, density=0.5, levels=levels)


def test_types_that_no_kernel_has_can_have_no_levels(random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match="cannot have levels below full"):
        EdgeLLM(random_model("llama", "f32"), density=0.5, levels=["full", 3])
