"""How many threads start by default where a container, or a mask, takes processors away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from coreinfer_edge.run import process_memory
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.processors import allowed_processors, default_threads

RandomModel = Callable[..., Path]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 16 processors, all of which this process may use."""
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def quota(version: int, folder: Path, patch: pytest.MonkeyPatch, **groups: str) -> None:
    """Control groups ``/outer/inner`` with these quotas, microseconds of each 100000."""
    mount = folder / "cgroup" if version == 2 else folder / "cgroup" / "cpu,cpuacct"
    own = folder / "own"
    own.write_text(
        "0::/outer/inner\n" if version == 2 else "4:memory:/x\n5:cpu,cpuacct:/outer/inner\n"
    )
    patch.setattr(process_memory, "_CGROUPS", folder / "cgroup")
    patch.setattr(process_memory, "_OWN_GROUPS", own)
    for name, limit in groups.items():
        group = mount / ("outer/inner" if name == "inner" else "outer")
        group.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (group / "cpu.max").write_text(f"{limit} 100000\n")
        else:
            (group / "cpu.cfs_quota_us").write_text("-1" if limit == "max" else limit)
            (group / "cpu.cfs_period_us").write_text("100000\n")


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("inner", "outer", "allowed"),
    [
        ("250000", "max", 3),
        ("max", "200000", 2),
        ("50000", "400000", 1),
        ("max", "max", 16),
        ("none of it", "max", 16),
    ],
)
def test_the_narrowest_quota_says_how_many_processors_there_are(
    version: int,
    inner: str,
    outer: str,
    allowed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quota(version, tmp_path, monkeypatch, inner=inner, outer=outer)
    assert allowed_processors() == allowed
    assert default_threads() == (min(8, allowed), allowed)


def test_processors_that_this_process_may_not_use_get_no_threads(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota(2, tmp_path, monkeypatch, inner="max", outer="max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert default_threads() == (3, 3)


def test_a_model_starts_no_more_threads_than_are_allowed(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_model: RandomModel
) -> None:
    quota(2, tmp_path, monkeypatch, inner="200000", outer="max")
    with EdgeLLM(random_model("llama"), n_ctx=64) as llm:
        assert (llm.llama.n_threads, llm.llama.n_threads_batch) == (2, 2)
    with EdgeLLM(random_model("llama"), n_ctx=64, n_threads=3, n_threads_batch=4) as llm:
        assert (llm.llama.n_threads, llm.llama.n_threads_batch) == (3, 4)
