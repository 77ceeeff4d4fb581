"""The benchmarks of the single steps run, and their comparison finds what became slower."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
COMPARE = [sys.executable, str(FOLDER / "compare.py")]


def result(**medians: float) -> dict[str, Any]:
    benchmarks = [
        {"name": name, "stats": {"min": 0.9 * median, "median": median, "iqr": 0.0, "data": []}}
        for name, median in medians.items()
    ]
    return {"processor": "some", "date": "2026-01-01", "benchmarks": benchmarks}


def test_every_benchmark_runs_once_on_a_small_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", str(FOLDER), "--benchmark-disable"]
    command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    command += ["-p", "no:cacheprovider"]
    environment = {**os.environ, "COREINFER_BENCHMARK": "quick"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]


def test_the_saved_baseline_names_the_benchmarks_that_there_are() -> None:
    saved = json.loads((FOLDER / "baseline.json").read_text())
    names = {benchmark["name"].split("[")[0] for benchmark in saved["benchmarks"]}
    source = (FOLDER / "bench_core_path.py").read_text()
    assert names == set(re.findall(r"^def (bench_\w+)", source, re.MULTILINE))


def test_what_became_slower_is_named_first_and_ends_with_status_1(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(result(a=1.0, b=1.0, c=1.0)))
    (tmp_path / "new.json").write_text(json.dumps(result(a=1.1, b=1.3, c=0.5, d=1.0)))
    command = [*COMPARE, str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()[1:]
    assert lines[0].split()[0] == "1.30x"
    assert [line for line in lines if "SLOWER" in line] == [lines[0]]
    assert "new" in lines[-1]
    command[-1] = command[-2]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_trimmed_result_has_no_single_rounds(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result(a=1.0)))
    subprocess.run([*COMPARE, "--trim", str(path)], check=True)
    assert json.loads(path.read_text())["benchmarks"][0]["stats"].keys() == {"min", "median", "iqr"}
