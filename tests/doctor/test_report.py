"""The whole report: what it says of a model, and what it keeps to itself."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.doctor import report as of_report
from coreinfer_edge.doctor.models import Rates
from coreinfer_edge.doctor.report import examine
from coreinfer_edge.errors import ArgumentError, InsufficientMemoryError, UnsupportedModelError
from coreinfer_edge.model.header import read_header
from coreinfer_edge.report.doctor import render

RandomModel = Callable[..., Path]

RATES = Rates(20e9, {"q4_0": 10e9, "q4_k": 8e9, "q8_0": 16e9}, 1e-5, 1e-9)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates without measuring them."""
    monkeypatch.setattr(of_report, "measure", lambda threads, cache_bytes: RATES)
    monkeypatch.setattr(of_report, "measure_disk", lambda model=None: None)


def shown(report: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_quick_measures_nothing_and_tells_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(of_report, "measure", fails)
    monkeypatch.setattr(of_report, "measure_disk", fails)
    report = examine(quick=True)
    assert report.rates is report.disk is None
    assert {model.tokens_per_second for model in report.models} == {None}
    assert "GB/s" not in shown(report)


@pytest.mark.usefixtures("measured")
def test_models_in_general_have_a_row_each_with_speed(random_model: RandomModel) -> None:
    report = examine(memory="3GiB")
    text = shown(report)
    assert re.search(r"0\.1B q4_0 +72 MiB +whole +4,096", text)
    assert re.search(r"70B q8_0 +69.8 GiB +refused", text)
    assert any(model.tokens_per_second for model in report.models)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("arch", ["llama", "mamba", "qwen3moe"])
def test_a_model_is_planned_and_tried_beside_its_prediction(
    arch: str, random_model: RandomModel
) -> None:
    report = examine(read_header(random_model(arch, "q8_0")), threads=1)
    assert report.model is not None
    assert report.models == []
    assert report.model.prediction.runs == "whole"
    assert report.model.trial is not None
    assert report.model.trial.measured > 0
    assert f"{report.model.trial.measured:.1f} tok/s" in shown(report)
    plan = report.as_dict()["model"]["plan"]
    assert plan["total"] <= plan["budget"]
    assert "source" not in plan


@pytest.mark.usefixtures("measured")
def test_a_model_that_does_not_decode_is_reported_as_such(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_model("llama", "q8_0")

    def fails(*_: Any) -> None:
        raise RuntimeError(f"llama_decode of {path} returned -1")

    monkeypatch.setattr(of_report, "best_token_seconds", fails)
    report = examine(read_header(path), threads=1)
    assert report.model is not None
    assert report.model.trial is None
    assert report.model.refusal == "it does not run: llama_decode of the model returned -1"


def test_a_model_whose_trial_would_take_long_is_not_tried(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch, measured: None
) -> None:
    slow = replace(RATES, layer_seconds=1.0)
    monkeypatch.setattr(of_report, "measure", lambda threads, cache_bytes: slow)
    report = examine(read_header(random_model("llama", "q8_0")), threads=1)
    assert report.model is not None
    assert report.model.trial is None


@pytest.mark.usefixtures("measured")
def test_a_model_that_does_not_fit_is_refused_with_what_would_fit(
    random_model: RandomModel,
) -> None:
    path = random_model("llama", "q8_0")
    report = examine(read_header(path), memory="30MiB")
    assert report.model is not None
    assert report.model.plan is None
    assert report.model.prediction.runs == "refused"
    assert "What would fit: " in report.model.refusal
    assert str(path) not in report.model.refusal
    assert "Refused: the model does not fit" in shown(report)


@pytest.mark.usefixtures("measured")
def test_without_the_memory_to_measure_the_rest_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(threads: int, cache_bytes: int) -> None:
        raise InsufficientMemoryError("no")

    monkeypatch.setattr(of_report, "measure", fails)
    report = examine(memory="100MiB")
    assert report.rates is None
    assert report.device.processor in shown(report)


@pytest.mark.usefixtures("measured")
def test_what_is_wrong_with_the_arguments_is_an_error(random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match="memory is 'much'"):
        examine(memory="much")
    header = read_header(random_model("llama"))
    with pytest.raises(UnsupportedModelError):
        examine(replace(header, architecture="none"))


@pytest.mark.slow
def test_the_json_has_no_path_no_name_of_a_user_or_host_and_no_secret(
    random_model: RandomModel, tmp_path: Path
) -> None:
    folder = tmp_path / "private-folder"
    folder.mkdir()
    model = folder / "private-name.gguf"
    model.write_bytes(random_model("llama", "q8_0").read_bytes())
    secret = "s3cret-of-somebody"
    environment = {**os.environ, "COREINFER_API_KEY": secret, "MY_OWN": secret, "OMP_X": secret}
    for arguments in ([str(model)], [str(model), "--memory", "30MiB"], []):
        command = [sys.executable, "-m", "coreinfer_edge.cli.main", "doctor", *arguments]
        done = subprocess.run(
            [*command, "--quick", "--json"], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
        private = [secret, "private-", str(tmp_path), os.getcwd(), sys.prefix, "/sys/fs", "/home"]
        private += [name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 3]
        assert [word for word in private if word in done.stdout] == []


@pytest.mark.slow
def test_the_command_says_what_it_does_on_standard_error_and_errors_in_one_line(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "coreinfer_edge.cli.main", "doctor"]
    done = subprocess.run([*command, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "looking at the device ..." in done.stderr
    assert "What it can run" in done.stdout
    wrong = [str(tmp_path / "none.gguf"), "--json"]
    done = subprocess.run([*command, *wrong], capture_output=True, text=True)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "ModelFileError"
    assert "Traceback" not in done.stderr
