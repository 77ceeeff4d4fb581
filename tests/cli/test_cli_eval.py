"""The commands eval and convert, as a person would run them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from coreinfer_edge.calibrate.convert import Conversion, check
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.cli.main import app
from coreinfer_edge.measure import quality as evaluate
from coreinfer_edge.model.header import read_header

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

TEXT = "The mill stood by the river, and nobody knew who had built it. " * 8


@pytest.fixture(scope="module")
def model(random_model: RandomModel) -> Path:
    return random_model("llama")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})


def run_eval(model: Path, text: Path, *arguments: object) -> Result:
    sizes = ("--windows", 2, "--prompt-tokens", 30, "--tokens", 12, "--threads", 1)
    return run("eval", model, "--text", text, *sizes, *arguments)


def json_of(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_refused(result: Result, *reasons: str) -> None:
    """One line that says why, and no traceback."""
    assert result.exit_code in (1, 2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    for reason in reasons:
        assert reason in " ".join(result.output.split())
    assert "Traceback" not in result.output


# --- eval -----------------------------------------------------------------------------------------


def test_eval_measures_all_densities_of_all_strategies(model: Path, text: Path) -> None:
    settings = ("--density", "0.3, 0.8,1", "--strategy", "energy,griffin")
    report = json_of(run_eval(model, text, *settings, "--json"))
    rows = report["qualities"]
    assert [(row["strategy"], row["density_asked"]) for row in rows] == [
        (strategy, density) for strategy in ("energy", "griffin") for density in (0.3, 0.8, 1.0)
    ]
    for row in rows:
        assert row["kl"]["low"] <= row["kl"]["mean"] <= row["kl"]["high"]
        assert (row["n_samples"], row["n_tokens"]) == (2, 24)
        assert (row["kl"]["mean"] < 1e-6) == (row["density_asked"] == 1)
    assert rows[0]["kl"]["mean"] > rows[1]["kl"]["mean"]


def test_eval_shows_a_line_for_each_setting(model: Path, text: Path) -> None:
    result = run_eval(model, text, "--density", "0.5,auto", "--quality", 2, "--estimate")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [[line[0], line[2]] for line in lines if line[:1] == ["energy"]] == [
        ["energy", "0.5"],
        ["energy", "auto"],
    ]
    assert "rank correlation of estimated and measured KL" in result.stdout


def test_eval_without_a_text_measures_on_the_dense_model_s_answers(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CHAT_PROMPTS", evaluate.CHAT_PROMPTS[:2])
    monkeypatch.setattr(
        evaluate.chat_samples, "__defaults__", (evaluate.CHAT_PROMPTS, lambda: None)
    )
    result = run("eval", smollm2, "--tokens", 20, "--warmup", 4, "--threads", 1, "--json")
    (row,) = json_of(result)["qualities"]
    assert (row["n_samples"], row["n_tokens"]) == (2, 40)
    assert 0 < row["kl"]["mean"] < 5
    options = ("--tokens", 20, "--warmup", 4, "--threads", 1, "--json", "--turns", 2)
    (second,) = json_of(run("eval", smollm2, *options))["qualities"]
    assert (second["n_samples"], second["n_tokens"]) == (2, 40)
    assert 0 < second["kl"]["mean"] < 5
    assert second["kl"] != row["kl"]


def test_eval_measures_second_turns_of_chats_alone(model: Path, text: Path) -> None:
    assert_refused(run_eval(model, text, "--turns", 2), "goes with neither --text nor --task")


def test_eval_takes_layers_and_refresh(model: Path, text: Path) -> None:
    plain, changed, refreshed = (
        json_of(run_eval(model, text, "--json", *options))["qualities"][0]["kl"]["mean"]
        for options in ((), ("--layers", "1"), ("--refresh", 4))
    )
    assert len({plain, changed, refreshed}) == 3


def test_eval_draws_a_plot(model: Path, text: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result = run_eval(
        model, text, "--density", "0.3,0.8", "--strategy", "energy,stability", "--plot", plot
    )
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_scores_a_task_by_rouge_l_against_references_and_dense(
    model: Path, tmp_path: Path
) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text(
        "".join(
            json.dumps({"prompt": prompt, "reference": "a mill by the river"}) + "\n"
            for prompt in ("The mill", "Nobody knew")
        )
    )
    options = ("--tokens", 8, "--warmup", 0, "--threads", 1)
    dense, half, whole = json_of(
        run("eval", model, "--task", task, "--density", "0.3,1", "--json", *options)
    )["task"]
    assert (dense["strategy"], dense["rouge_l_to_dense"], dense["n_items"]) == ("dense", 1.0, 2)
    assert half["density"] < 0.6
    assert whole["rouge_l"] == dense["rouge_l"]
    assert whole["rouge_l_to_dense"] == 1.0
    result = run("eval", model, "--task", task, *options)
    assert result.exit_code == 0
    assert "ROUGE-L" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--strategy", "magic"), "strategy is 'magic'"),
        (("--strategy", "dense"), "leave dense out"),
        (("--strategy", "static"), "needs the prior of a calibration"),
        (("--strategy", ","), "at least one density and one strategy"),
        (("--density", "abc"), "a number up to 1, or auto"),
        (("--density", "2"), "density is 2.0"),
        (("--layers", "0-5x"), "layers like 0-5,-1"),
        (("--layers", "3-1"), "3-1: the first layer comes before the last"),
        (("--layers", "7"), "names layer 7"),
        (("--plot", "plot.txt"), "must end in one of .png"),
        (("--plot", "no/such/plot.png"), "is not a folder"),
        (("--prompt-tokens", "5000"), "one window needs"),
        (("--task", "x.jsonl"), "--text or --task, not both"),
    ],
)
def test_eval_refuses_what_it_cannot_do(
    arguments: tuple[str, str], reason: str, model: Path, text: Path
) -> None:
    assert_refused(run_eval(model, text, *arguments), reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe", "not UTF-8"),
        (b"\n\n", "is empty: a task has"),
        (b'{"prompt": "a"}\n', "line 1"),
        (b'{"prompt": "a", "reference": "b"}\nnot json\n', "line 2"),
        (b"[1, 2]\n", "line 1"),
        (b'{"prompt": "a", "reference": 3}\n', "must be texts"),
        (b'{"prompt": "", "reference": "b"}\n', "must be texts"),
    ],
)
def test_eval_refuses_a_task_that_is_none(
    content: bytes | None, reason: str, model: Path, tmp_path: Path
) -> None:
    task = tmp_path / "task.jsonl"
    if content is not None:
        task.write_bytes(content)
    assert_refused(run("eval", model, "--task", task), "task.jsonl", reason)


def test_errors_with_json_are_json_too(model: Path, tmp_path: Path) -> None:
    result = run("eval", model, "--text", tmp_path / "none.txt", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "ArgumentError"


# --- convert --------------------------------------------------------------------------------------


def test_convert_writes_a_model_with_statistics_that_all_strategies_run_on(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    result = run(
        "convert", model, "-o", output, "--calibration", text, "--calibration-tokens", 128,
        "--clusters", 2, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert from_header(read_header(output)) is not None
    keys = json_of(run("inspect", output, "--json"))["coreinfer_keys"]
    assert "coreinfer.activation.mean" in keys
    strategies = "energy,static,similarity,griffin,stability"
    report = json_of(run_eval(output, text, "--strategy", strategies, "--json"))
    assert len(report["qualities"]) == 5
    again = run("convert", model, "-o", output, "--calibration", text)
    assert_refused(again, "exists", "--overwrite")


def test_convert_calibrates_on_text_of_the_model_s_own_if_given_none(
    smollm2: Path, tmp_path: Path
) -> None:
    result = run(
        "convert", smollm2, "-o", tmp_path / "out.gguf", "--calibration-tokens", 80,
        "--clusters", 0, "--threads", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    prior = from_header(read_header(tmp_path / "out.gguf"))
    assert prior is not None
    assert prior.n_tokens >= 64


def test_a_dry_run_tells_the_size_and_writes_nothing(
    model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.gguf"
    result = run("convert", model, "-o", output, "--calibration", text, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "MiB of tensors (unchanged)" in result.stdout
    assert not output.exists()
    options = ("--calibration-tokens", 128, "--clusters", 2, "--threads", 1)
    run("convert", model, "-o", output, "--calibration", text, *options)
    header = read_header(output)
    of_tensors = sum(tensor.n_bytes for tensor in header.tensors.values())
    said = check(Conversion(model, tmp_path / "other.gguf", calibration="", n_clusters=2))
    assert said.tensor_bytes == of_tensors
    grown = output.stat().st_size - model.stat().st_size
    assert said.statistics_bytes == pytest.approx(grown, rel=0.2, abs=2000)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_convert_that_is_cut_off_leaves_nothing(name: str, smollm2: Path, tmp_path: Path) -> None:
    command = "from coreinfer_edge.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "convert", smollm2, "-o", tmp_path / "out.gguf"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(getattr(signal, name))  # often in the midst of llama.cpp's log callback
    _, errors = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_a_type_is_for_a_hugging_face_model(model: Path, tmp_path: Path) -> None:
    refused = run("convert", model, "-o", tmp_path / "out.gguf", "--type", "q8_0")
    assert_refused(refused, "--type is for a Hugging Face model")
    refused = run("convert", model, "-o", tmp_path / "out.gguf", "--backend", "torch")
    assert_refused(refused, "use the native one")
    refused = run("convert", tmp_path, "-o", tmp_path / "out.gguf")
    assert_refused(refused, "is not a Hugging Face model")


def test_inspect_draws_the_statistics(model: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    options = ("--calibration-tokens", 128, "--clusters", 0, "--threads", 1)
    run("convert", model, "-o", output, "--calibration", text, *options)
    result = run("inspect", output, "--plot", tmp_path / "plot.svg")
    assert result.exit_code == 0, result.output
    assert "energy in top 10%" in result.stdout
    assert (tmp_path / "plot.svg").stat().st_size > 0
    assert_refused(run("inspect", model, "--plot", tmp_path / "no.svg"), "no statistics to plot")


def test_convert_refuses_before_it_begins_to_work(model: Path, text: Path, tmp_path: Path) -> None:
    for output, calibration, reason in (
        (model, text, "is the model itself"),
        (tmp_path / "no" / "out.gguf", text, "is not a folder"),
        (tmp_path / "out.gguf", tmp_path / "none.txt", "cannot be read"),
    ):
        assert_refused(run("convert", model, "-o", output, "--calibration", calibration), reason)
    (tmp_path / "short.txt").write_text("short")
    refused = run(
        "convert", model, "-o", tmp_path / "out.gguf", "--calibration", tmp_path / "short.txt"
    )
    assert_refused(refused, "it needs at least")
    assert not (tmp_path / "out.gguf").exists()


def test_eval_compares_core_sets_with_levels(random_model: RandomModel, text: Path) -> None:
    packable = random_model("llama", "q8_0", shape="small")
    options = ("--density", "0.5", "--levels", "full", "--levels", "full, 3,2")
    result = run_eval(packable, text, *options, "--json")
    if result.exit_code != 0:  # this processor has no kernels of ours
        assert "cannot have levels below full" in result.output
        return
    rows = json_of(result)["qualities"]
    assert [row["levels"] for row in rows] == [["full"], ["full", 3, 2]]
    assert all(row["density"] == pytest.approx(0.5, abs=0.03) for row in rows)
    shown = run_eval(packable, text, *options).stdout
    assert [line.split()[1] for line in shown.splitlines() if "energy" in line] == [
        "full",
        "full,3,2",
    ]


def test_eval_measures_uniform_low_bits_beside_core_sets(
    random_model: RandomModel, text: Path
) -> None:
    packable = random_model("llama", "q8_0", shape="small")
    options = ("--density", "0.4", "--uniform", "3,2", "--json")
    result = run_eval(packable, text, *options)
    if result.exit_code != 0:  # this processor has no kernels of ours
        assert "cannot have levels below full" in result.output
        return
    core, three, two = json_of(result)["qualities"]
    assert core["levels"] == ["full", 4, 3, 2]
    assert [three["strategy"], three["levels"]] == ["uniform", [3]]
    assert [two["strategy"], two["levels"]] == ["uniform", [2]]
    assert 0.4 < three["density"] < 0.45
    assert 0.28 < two["density"] < 0.33
    assert two["kl"]["mean"] > three["kl"]["mean"] > 0
    assert_refused(run_eval(packable, text, "--uniform", "full"), "takes 4, 3 and 2")


def test_quality_beside_densities_alone_is_refused(model: Path, text: Path) -> None:
    assert_refused(run_eval(model, text, "--density", "0.5", "--quality", 1), "keeps to")


def test_levels_that_there_are_not_are_refused_on_the_command_line(model: Path, text: Path) -> None:
    for levels in ("half", "full,5", "full,full", ""):
        result = run_eval(model, text, "--levels", levels)
        assert result.exit_code != 0
        assert "full" in result.output
        assert "Traceback" not in result.output
