"""What doctor finds wrong, on devices made up for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.doctor.device import Device, Gpu, this_device
from coreinfer_edge.doctor.findings import Finding, findings
from coreinfer_edge.doctor.models import Prediction, Rates

GIB = 1 << 30
RATES = Rates(20e9, {"q4_0": 20e9}, 1e-5, disk=5e8)
RUNS = [Prediction("1B", "q4_0", GIB, "whole", 1.0)]


@pytest.fixture
def sound(tmp_path: Path) -> Device:
    """A device without faults."""
    return replace(
        this_device(tmp_path),
        instructions=["avx2", "fma"],
        our_kernels=["avx2"],
        kernels="avx2",
        ggml=["AVX2", "FMA"],
        cores=4,
        allowed_cores=4,
        cpu_quota=None,
        threads=(4, 4),
        memory_bytes=8 * GIB,
        available_bytes=6 * GIB,
        memory_limit="machine",
        swap_bytes=0,
        swap_used_bytes=0,
        load=0.1,
        gpus=[],
        seen_gpus=[],
    )


def found(device: Device, rates: Rates | None = RATES, models: Any = RUNS) -> list[Finding]:
    return findings(device, rates, models, 4)


def test_a_sound_device_has_no_findings(sound: Device) -> None:
    assert found(sound) == []
    assert found(sound, rates=None) == []


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        ({"instructions": ["avx2", "fma", "avx512_vnni"]}, "problem", "leaves out"),
        ({"instructions": ["asimd", "asimddp"], "ggml": ["NEON"]}, "problem", "asimddp"),
        ({"our_kernels": [], "kernels": "none"}, "problem", "none of our kernels"),
        (
            {"our_kernels": [], "kernels": "none", "instructions": ["asimd"], "ggml": ["NEON"]},
            "problem",
            "none of our kernels",
        ),
        (
            {"our_kernels": [], "kernels": "none", "instructions": ["avx"], "ggml": ["AVX"]},
            "advice",
            "no kernels of ours",
        ),
        ({"allowed_cores": 2}, "advice", "2 of 4 processors"),
        ({"cpu_quota": 1.5}, "advice", "the time of 1.5 processors"),
        ({"threads": (2, 4)}, "advice", "2 of 4 threads"),
        ({"threads": (8, 8)}, "advice", "8 are allowed"),
        ({"load": 3.2}, "advice", "wanted 3.2 processors of 4"),
        ({"throttled": 0x1}, "problem", "voltage"),
        ({"throttled": 0x40000}, "advice", "since the start"),
        ({"governor": "powersave", "driver": "cpufreq-dt"}, "problem", "powersave"),
        (
            {"frequency_hz": 1_000_000_000, "most_frequency_hz": 2_000_000_000},
            "problem",
            "1.0 of 2.0 GHz",
        ),
        ({"celsius": 84.0}, "advice", "84 °C"),
        ({"available_bytes": 100 << 20}, "problem", "only 100 MiB"),
        ({"available_bytes": GIB, "memory_limit": "control group"}, "advice", "a control group"),
        ({"available_bytes": GIB, "memory_limit": "address space"}, "advice", "address space"),
        ({"swap_bytes": GIB, "swap_used_bytes": GIB // 2}, "problem", "swapped out"),
        ({"seen_gpus": ["NVIDIA"]}, "problem", "NVIDIA"),
        ({"seen_gpus": ["Intel"]}, "advice", "GPU of Intel"),
        ({"gpus": [Gpu("CUDA0", "A card", GIB, 8 * GIB)]}, "advice", "1024 of 8192 MiB"),
    ],
)
def test_each_fault_is_found_and_alone(
    sound: Device, change: dict[str, Any], kind: str, what: str
) -> None:
    (finding,) = found(replace(sound, **change))
    assert (finding.kind, what in finding.what) == (kind, True), finding
    assert finding.do


def test_x86_has_a_governor_of_that_name_that_slows_nothing(sound: Device) -> None:
    assert found(replace(sound, governor="powersave", driver="intel_pstate")) == []


def test_kernels_that_the_environment_chose_are_a_problem_only_if_there_are_faster_ones(
    sound: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COREINFER_KERNELS", "avx2")
    assert found(sound) == []
    (finding,) = found(replace(sound, our_kernels=["avx512", "avx2"]))
    assert "COREINFER_KERNELS is avx2" in finding.what


def test_memory_that_is_too_slow_or_too_little_and_a_slow_card_are_found(sound: Device) -> None:
    (slow,) = found(sound, replace(RATES, memory=1e9))
    assert "1.0 GB/s" in slow.what
    (none,) = found(sound, models=[Prediction(s, "q4_0", GIB, "refused") for s in ("0.1B", "1B")])
    assert "no model of the table runs" in none.what
    (card,) = found(sound, replace(RATES, disk=20e6))
    assert (card.kind, "20 MB/s" in card.what) == ("advice", True)
    streams = Prediction("8B", "q4_0", 4 * GIB, "streams", 0.7, prompt_read_seconds=300.0)
    (card,) = found(sound, replace(RATES, disk=20e6), [*RUNS, streams])
    assert card.kind == "problem"
    assert "300 s" in card.what


def test_problems_come_before_advice(sound: Device) -> None:
    kinds = [f.kind for f in found(replace(sound, allowed_cores=2, throttled=1))]
    assert kinds == ["problem", "advice"]


def test_nothing_is_said_of_figures_where_nothing_was_measured(sound: Device) -> None:
    busy = replace(sound, load=10.5, threads=(2, 4))
    measured, quick = found(busy), found(busy, rates=None)
    assert [len(measured), len(quick)] == [2, 2]
    assert "the figures here were measured so" in measured[0].do
    assert "wanted 10.5 processors of 4: the figures here" in measured[1].what
    assert "figures" not in str(quick)
    assert findings(sound, None, RUNS, 2) == []
    (few,) = findings(sound, RATES, RUNS, 2)
    assert "the figures here have 2 threads" in few.what


def test_a_budget_that_is_absurd_is_told_as_such(sound: Device) -> None:
    refused = [Prediction(size, "q4_0", GIB, "refused") for size in ("0.1B", "1B")]
    (nothing,) = findings(sound, None, refused, 4, budget=1)
    assert nothing.what == "no model of the table runs in the 1 B of --memory"
    assert "6144 MiB are available" in nothing.do
    (much,) = findings(sound, None, RUNS, 4, budget=1 << 50)
    assert much.kind == "advice"
    assert "6144 MiB are available here: what is planned is for another device" in much.what
    assert findings(sound, None, RUNS, 4, budget=GIB) == []
