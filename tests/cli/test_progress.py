"""What a command says of its progress where standard error is a file or a pipe."""

from __future__ import annotations

import pytest

from coreinfer_edge.cli import output


def test_a_pipe_gets_a_line_at_first_and_one_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with output.progress_bar("measuring", 40) as advance:
        for _ in range(40):
            now += output.LINE_SECONDS / 10
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "measuring ...",
        *(
            f"measuring: {n} of 40 after {output.LINE_SECONDS * n / 10:.0f} s"
            for n in range(10, 41, 10)
        ),
    ]
