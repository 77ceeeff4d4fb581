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

from coreinfer_edge.binding.core import Device
from coreinfer_edge.doctor import report as of_report
from coreinfer_edge.doctor.device import Gpu
from coreinfer_edge.doctor.models import Rates
from coreinfer_edge.doctor.report import examine
from coreinfer_edge.errors import (
    ArgumentError,
    InsufficientMemoryError,
    NativeError,
    UnsupportedModelError,
)
from coreinfer_edge.model.header import read_header
from coreinfer_edge.report.doctor import render
from coreinfer_edge.run.gpu_budget import budget_of
from coreinfer_edge.run.gpu_host_plan import HostPlan
from coreinfer_edge.run.gpu_plan import DevicePlan, GpuPlan

RandomModel = Callable[..., Path]

HOST = "ann.example:50052"
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
@pytest.mark.parametrize(
    ("error", "why"),
    [
        (InsufficientMemoryError("no room"), "no room"),
        (NativeError("no backend"), "no backend"),
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_where_measuring_fails_the_reason_and_the_rest_are_told_all_the_same(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(threads: int, cache_bytes: int) -> None:
        raise error

    monkeypatch.setattr(of_report, "measure", fails)
    steps: list[str] = []
    report = examine(memory="100MiB", step=steps.append)
    assert any("nothing was measured" in step and why in step for step in steps)
    assert report.rates is None
    assert report.device.processor in shown(report)


@pytest.mark.usefixtures("measured")
def test_what_is_wrong_with_the_arguments_is_an_error(random_model: RandomModel) -> None:
    with pytest.raises(ArgumentError, match="memory is 'much'"):
        examine(memory="much")
    header = read_header(random_model("llama"))
    with pytest.raises(UnsupportedModelError):
        examine(replace(header, architecture="none"))


@pytest.mark.usefixtures("measured")
def test_the_plan_for_gpus_says_nothing_of_who_lends_them(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [
        Device(f"{kind}0", of, 1 << 30, 1 << 30) for kind, of in (("CUDA", "A card"), ("RPC", HOST))
    ]
    sources = [budget_of("auto", server).source for server in servers]
    assert sources == ["free on A card", "free on RPC0"]
    on_device = DevicePlan("CUDA0", 1, HOST, 1, 0, 0, 0, 0, 0, 0)
    on_host = HostPlan(1, HOST, *[0] * 9)
    plan = GpuPlan((on_device, on_device), 2, "host", ("full",), 1.0, 512, 32, on_host)
    monkeypatch.setattr(of_report, "plan_gpu_memory", lambda *_: plan)
    gpu = Gpu("CUDA0", "A card", 1 << 30, 1 << 30)
    device = replace(of_report.this_device(), gpus=[gpu])
    monkeypatch.setattr(of_report, "this_device", lambda: device)
    made = examine(read_header(random_model("llama", "q8_0")), quick=True).as_dict()
    assert made["model"]["gpu_plan"]["devices"][0]["budget"] == 1
    assert HOST not in json.dumps(made)


def test_no_message_names_a_file_of_the_model_its_folder_or_a_control_group(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [Path("/sys/fs/cgroup/ann's: tasks (old)"), Path("/sys/fs/cgroup")]
    monkeypatch.setattr(of_report, "control_groups", lambda controller: groups)
    header = read_header(random_model("llama", "q8_0"))
    other = Path("/ann/models/m-2-of-2.gguf")
    header = replace(header, path=Path("m.gguf"), files=(header.path, other))
    message = f"{header.files[0]} and {other} in {other.parent} (the control group {groups[0]}): no"
    assert of_report.without_names(message, header) == (
        "the model and the model in its folder (a control group): no"
    )
    assert of_report.without_names("m.gguf is at fault.", header) == "the model is at fault."


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
