"""What inspect says of the statistics in a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_prior import N_FF, N_LAYER, some_prior

from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.errors import ArgumentError
from coreinfer_edge.measure.description import StatisticsReport, describe
from coreinfer_edge.model.header import read_header
from coreinfer_edge.report.prior import plot, tables

RandomModel = Callable[..., Path]


def written(prior: Prior, model: Path, to: Path) -> Path:
    write_with_prior(read_header(model), prior, to / "out.gguf")
    return to / "out.gguf"


def report(path: Path) -> StatisticsReport:
    return describe(path).statistics


def test_energy_is_the_share_of_the_strongest_neurons(
    random_model: RandomModel, tmp_path: Path
) -> None:
    squares = np.ones(N_FF, dtype=np.float32)
    squares[::10] = 9  # a tenth of the neurons has half of it all
    norms = [np.ones(N_FF, dtype=np.float32)] * N_LAYER
    prior = replace(some_prior(), mean_square=[squares] * N_LAYER, down_norms=norms)
    statistics = describe(written(prior, random_model("llama"), tmp_path)).statistics
    for layer in statistics.layers:
        assert layer.energy == pytest.approx([0.5, 0.5 + 0.5 / 9, 0.5 + 1.5 / 9])
    assert statistics.tokens == 1000
    assert statistics.gradients
    assert statistics.clusters == 3
    assert statistics.expected_kl == [[0.25, 1.5], [0.5, 0.75]]
    assert statistics.gain == some_prior().gain


def test_a_layer_that_costs_more_than_twice_the_median_is_sensitive(
    random_model: RandomModel, tmp_path: Path
) -> None:
    sensitivity = np.array([0.3, 0.02, 0.03, 0.02], dtype=np.float32)
    path = written(replace(some_prior(), sensitivity=sensitivity), random_model("llama"), tmp_path)
    assert report(path).sensitive_layers == [0]


def test_statistics_that_are_ignored_or_damaged_are_a_note(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path = written(some_prior(), random_model("llama"), tmp_path)
    data = path.read_bytes()
    for key, reason in ((b"coreinfer.version", "version 2"), (b"coreinfer.tokens", "is 0")):
        at = data.index(key) + len(key) + 4  # behind the type
        value = (2 if b"version" in key else 0).to_bytes(4, "little")
        path.write_bytes(data[:at] + value + data[at + 4 :])
        statistics = report(path)
        assert reason in statistics.problem
        assert statistics.layers == []


def test_the_gain_is_told_for_text_like_and_unlike_the_calibration_text(
    random_model: RandomModel, tmp_path: Path
) -> None:
    statistics = report(written(some_prior(), random_model("llama"), tmp_path))
    said = " ".join(str(part) for part in tables(statistics))
    assert "1.000 and 0.750 on text like the calibration text" in said
    assert "1.500 and 1.250 on the reference of Python" in said
    without = replace(statistics, gain=None)
    assert not any("reference of Python" in str(part) for part in tables(without))


@pytest.mark.slow
def test_the_picture_is_drawn(random_model: RandomModel, tmp_path: Path) -> None:
    for optional in (True, False):
        folder = tmp_path / str(optional)
        folder.mkdir()
        statistics = report(written(some_prior(optional), random_model("llama"), folder))
        plot(statistics, folder / "plot.png")
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match="no statistics to plot"):
        plot(report(random_model("llama")), tmp_path / "plot.png")
