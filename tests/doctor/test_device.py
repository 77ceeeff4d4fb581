"""What doctor reads off a system made of files, of a Raspberry Pi, of a container, of a phone."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from coreinfer_edge.binding import core
from coreinfer_edge.doctor import device as of_device
from coreinfer_edge.doctor.device import ggml_features, this_device
from coreinfer_edge.run import process_memory

MIB = 1 << 20

PI_4 = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n\nSerial\t\t: 10000000deadbeef\n"
    "Model\t\t: Raspberry Pi 4 Model B Rev 1.4\n",
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/meminfo": "MemTotal:        3884360 kB\nSwapTotal:        102396 kB\nSwapFree: 2396 kB\n",
    "proc/loadavg": "0.52 0.40 0.31 1/203 4711\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver": "cpufreq-dt\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1500000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "32K\n",
    "sys/devices/system/cpu/cpu0/cache/index2/size": "1M\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "61322\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
    "sys/class/drm/card0/device/vendor": "0x8086\n",
}


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.usefixtures("arm")
def test_a_raspberry_pi_is_described_from_its_files(tmp_path: Path) -> None:
    found = this_device(tree(tmp_path, PI_4))
    assert found.board == "Raspberry Pi 4 Model B Rev 1.4"
    assert found.processor == "Cortex-A72"
    assert found.instructions == ["asimd"]
    assert found.memory_bytes == 3884360 * 1024
    assert (found.swap_bytes, found.swap_used_bytes) == (102396 * 1024, 100000 * 1024)
    assert found.cache_bytes == MIB
    assert (found.governor, found.driver) == ("powersave", "cpufreq-dt")
    assert (found.frequency_hz, found.most_frequency_hz) == (1_500_000_000, 1_800_000_000)
    assert found.celsius == pytest.approx(61.322)
    assert found.throttled == 0x50005
    assert found.load == 0.52
    assert found.seen_gpus == ["Intel"]


def test_a_system_that_shows_nothing_is_described_all_the_same(tmp_path: Path) -> None:
    found = this_device(tmp_path)
    assert found.processor
    assert found.instructions == []
    assert (found.board, found.governor, found.cache_bytes) == ("", "", 0)
    assert found.celsius is found.throttled is found.load is found.frequency_hz is None
    assert found.threads[1] >= 1


def test_a_system_whose_files_may_not_be_read_or_make_no_sense_is_described_all_the_same(
    tmp_path: Path,
) -> None:
    nonsense = dict.fromkeys(PI_4, "what?\n")
    (tree(tmp_path, nonsense) / "proc/cpuinfo").unlink()
    (tmp_path / "proc/cpuinfo").mkdir()  # reading it fails, as where permission is missing
    found = this_device(tmp_path)
    assert found.throttled is found.celsius is found.load is None
    assert found.cache_bytes == 0


@pytest.mark.usefixtures("arm")
def test_an_emulator_that_shows_its_host_adds_no_instructions(tmp_path: Path) -> None:
    host = "processor : 0\nmodel name : A host\nflags : fpu avx2 fma\n"
    assert this_device(tree(tmp_path, {"proc/cpuinfo": host})).instructions == []


@pytest.mark.usefixtures("arm")
def test_instructions_are_those_that_all_cores_have(tmp_path: Path) -> None:
    big_little = (
        "processor: 0\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\nCPU part : 0xd05\n\n"
        "processor: 4\nFeatures : fp asimd asimddp i8mm\nCPU implementer : 0x41\nCPU part : 0xfff\n"
    )
    found = this_device(tree(tmp_path, {"proc/cpuinfo": big_little}))
    assert found.instructions == ["asimd", "asimddp"]
    assert found.processor == "Cortex-A55, Arm part 0xfff"


@pytest.mark.parametrize("version", [1, 2])
def test_a_fraction_of_a_processor_and_the_limit_of_a_group_are_told_without_its_name(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    mount = tmp_path / "cgroup"
    if version == 2:
        own.write_text("0::/user-alice.slice\n")
        files = {
            "user-alice.slice/cpu.max": "150000 100000\n",
            "user-alice.slice/memory.max": f"{64 * MIB}\n",
            "user-alice.slice/memory.current": f"{14 * MIB}\n",
            "user-alice.slice/memory.stat": "inactive_file 0\nactive_file 0\n",
        }
    else:
        own.write_text("5:cpu:/alice\n4:memory:/alice\n")
        files = {
            "cpu/alice/cpu.cfs_quota_us": "150000\n",
            "cpu/alice/cpu.cfs_period_us": "100000\n",
            "memory/alice/memory.limit_in_bytes": f"{64 * MIB}\n",
            "memory/alice/memory.usage_in_bytes": f"{14 * MIB}\n",
            "memory/alice/memory.stat": "total_inactive_file 0\ntotal_active_file 0\n",
        }
    tree(mount, files)
    monkeypatch.setattr(process_memory, "_CGROUPS", mount)
    monkeypatch.setattr(process_memory, "_OWN_GROUPS", own)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    found = this_device(tmp_path)
    assert found.cpu_quota == 1.5
    assert found.threads == (2, 2)
    assert (found.available_bytes, found.memory_limit) == (50 * MIB, "control group")
    assert "alice" not in repr(found)


def test_the_features_of_the_backend_are_those_that_are_on() -> None:
    line = "CUDA : ARCHS = 900 | CPU : SSE3 = 1 | AVX2 = 0 | SVE_CNT = 32 | OPENMP = 1 | "
    assert ggml_features(line) == ["SSE3", "SVE_CNT", "OPENMP"]
    assert ggml_features("CPU : AVX = 1 | CUDA : ARCHS = 900 | ") == ["AVX"]
    assert ggml_features("") == []


def test_the_kernels_in_use_are_those_that_the_library_names() -> None:
    here, chosen = core.kernels()
    assert chosen in (*here, "none")
    assert set(here) < set(core.constants().kernels.decode().split())


def test_the_address_of_a_device_on_another_machine_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = [core.Device("RPC0", "192.168.4.7:50052", 1, 2), core.Device("CUDA0", "A card", 3, 4)]
    monkeypatch.setattr(of_device, "devices", lambda: there)
    gpus = this_device(tmp_path).gpus
    assert [gpu.description for gpu in gpus] == ["", "A card"]
    assert "192.168" not in repr(gpus)
