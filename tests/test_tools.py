"""The scripts over the package's own functions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_convert import TEXT

from coreinfer_edge.binding.core import kernels
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.model.header import read_header

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def run_tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", ["convert.py", "extract_stats.py", "bench_prior.py"])
def test_each_script_says_what_it_does(name: str) -> None:
    result = run_tool(name, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_the_scripts_give_the_statistics_that_the_file_carries(
    random_model: RandomModel, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    model, output = random_model("llama"), tmp_path / "out.gguf"
    options = ("--calibration", text, "--tokens", 128, "--clusters", 2, "--threads", 1)
    made = run_tool("convert.py", model, output, *options)
    assert made.returncode == 0, made.stderr
    prior = from_header(read_header(output))
    assert prior is not None
    for source, precision, more in ((output, 0.0, ()), (model, 2**-8, options)):
        result = run_tool("extract_stats.py", source, tmp_path / "stats.npz", *more)
        assert result.returncode == 0, result.stderr
        arrays = np.load(tmp_path / "stats.npz")
        assert arrays["tokens"] == prior.n_tokens
        for i, layer in enumerate(arrays["layers"]):
            np.testing.assert_allclose(arrays[f"{layer}.mean"], prior.mean[i], rtol=precision)
            assert arrays[f"{layer}.frequency"].shape[0] == 2


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    for name in ("convert.py", "extract_stats.py"):
        result = run_tool(name, tmp_path / "none.gguf", tmp_path / "out")
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert "does not exist" in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_document_has_the_devices_that_predictions_are_made_for() -> None:
    printed = run_tool("predict_devices.py")
    assert printed.returncode == 0, printed.stderr
    document = (TOOLS.parent / "docs" / "devices.md").read_text()
    sources = set(re.findall(r"^(\d+)\. \[", document, re.MULTILINE))
    rows = {tuple(row[:2]): row for row in map(cells, document.splitlines())}
    for row in map(cells, printed.stdout.splitlines()[2:]):
        of_document = rows[tuple(row[:2])]
        assert row[:4] == of_document[:4]
        assert row[3].rstrip("]").split("[")[1] in sources
        for model, told in zip(row[4:], of_document[4:], strict=True):
            assert re.match(r"no$|\d[\d.]* to \d", model)
            # a density depends on what Python takes here, and on threads; whole weights do not
            if not kernels()[0] or "at" in model or "at" in told:
                continue
            assert model == told


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]
