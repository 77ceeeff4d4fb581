"""The tool that puts the server under load, in small; make test-load is the same in large."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOOL = Path(__file__).resolve().parents[2] / "tools" / "load_server.py"


def test_a_crowd_that_hangs_up_gets_no_wrong_answer_and_leaves_nothing_open() -> None:
    arguments = ["--only", "crowd,many,cost", "--rounds", "1"]
    arguments += ["--clients", "8", "--seconds", "1", "--requests", "20"]
    done = subprocess.run(
        [sys.executable, str(TOOL), "demo", "--prompts", "8", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["different_answers"] == 8
    for part in ("crowd", "many"):
        assert result[part]["right"] > 0
        assert "wrong" not in result[part]
        assert not [name for name in result[part] if name.startswith("failed")]
        assert result[part]["exit_status"] == 143
        assert result[part]["log"] == []
    states = result["many"]["server"]
    assert max(state["threads"] for state in states) <= 4
    assert states[-1]["files"] <= states[0]["files"] + 8
    assert result["cost"]["first_token_ms"]["server"] > 0
    for way in ("streamed", "whole"):
        cost = result["cost"][way]
        rates = cost["server_tokens_per_second"], cost["edge_llm_tokens_per_second"]
        assert cost["ratio"] == rates[0] / rates[1] > 0
