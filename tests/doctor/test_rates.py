"""What doctor measures: that it is of the right thing, not how fast it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from coreinfer_edge.doctor import rates
from coreinfer_edge.doctor.rates import YARDSTICKS, measure, measure_disk, read_bytes, yardstick

MIB = 1 << 20

ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere nothing reads past the page cache"
)


@pytest.mark.parametrize("type", YARDSTICKS)
def test_a_yardstick_has_about_the_bytes_that_it_is_to_have(type: str) -> None:
    for wanted in (32 * MIB, 100 * MIB):
        _, n_bytes = yardstick(type, wanted)
        assert n_bytes == pytest.approx(wanted, rel=0.05)


def test_what_is_read_is_beyond_the_cache_and_a_small_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    available = 8 << 30
    monkeypatch.setattr(rates, "available_bytes", lambda: (available, ""))
    assert read_bytes(0) == 32 * MIB
    assert read_bytes(20 * MIB) == 80 * MIB
    assert read_bytes(1 << 30) == 160 * MIB
    available = 80 * MIB
    assert read_bytes(1 << 30) == 10 * MIB


def test_every_rate_is_measured_and_nothing_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "read_bytes", lambda cache_bytes: 2 * MIB)
    monkeypatch.setattr(rates, "BURST_SECONDS", 0.001)
    monkeypatch.setattr(rates, "_memory_folder", lambda room: str(tmp_path))
    found = measure(1, 0)
    assert found.memory > 0
    assert set(found.weights) == set(YARDSTICKS)
    assert all(rate > 0 for rate in found.weights.values())
    assert found.layer_seconds > 0
    assert list(tmp_path.iterdir()) == []


def test_layers_that_were_slow_by_chance_make_no_weights_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "read_bandwidth", lambda threads, n_bytes: 1e9)
    monkeypatch.setattr(rates, "read_bytes", lambda cache_bytes: 32 * MIB)
    monkeypatch.setattr(
        rates, "_token_seconds", lambda shape, type, threads: 10.0 if type == "f32" else 0.5
    )
    found = measure(1, 0)
    assert found.entry_seconds == pytest.approx(0.0, abs=1e-4)
    assert all(50e6 < rate <= 32 * MIB / 0.24 for rate in found.weights.values())


@ON_LINUX
def test_the_disk_is_measured_by_the_model_without_a_change_to_it(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    content = os.urandom(3 * MIB + 17)
    model.write_bytes(content)
    found = measure_disk(model)
    assert found is not None
    assert found.file == "the model"
    assert found.bytes_per_second > 0
    assert model.read_bytes() == content


@ON_LINUX
def test_without_a_model_a_temporary_file_is_read_and_removed_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "_DISK_BYTES", 16 * MIB)
    monkeypatch.setattr(rates, "_file_system", lambda path: "ext4")
    folder = tmp_path / "cache" / "coreinfer-edge"
    monkeypatch.setattr(rates.platformdirs, "user_cache_path", lambda name: folder)
    found = measure_disk()
    assert found is not None
    assert found.file == "a temporary file"
    assert not folder.exists()


@ON_LINUX
def test_where_pages_cannot_be_passed_by_they_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(2 * MIB))
    real = os.open

    def without_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError("not here")
        return real(path, flags)

    monkeypatch.setattr(os, "open", without_direct)
    found = measure_disk(model)
    assert found is not None
    assert found.how == "page cache dropped"


def test_a_disk_that_can_neither_be_read_nor_written_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert measure_disk(tmp_path / "none") is None
    monkeypatch.setattr(rates, "_file_system", lambda path: "tmpfs")
    monkeypatch.setattr(rates, "_DISK_BYTES", 8 * MIB)
    monkeypatch.setattr(rates.platformdirs, "user_cache_path", lambda name: tmp_path)
    assert measure_disk() is None
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(rates.platformdirs, "user_cache_path", lambda name: file)
    monkeypatch.setattr(rates.tempfile, "gettempdir", lambda: str(tmp_path / "file" / "none"))
    assert measure_disk() is None
