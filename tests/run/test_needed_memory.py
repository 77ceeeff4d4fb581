"""What cannot fit into memory is refused before it is loaded, by the limit that holds here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from control_group import NoControlGroups, control_group

from coreinfer_edge.choose.chooser import spared
from coreinfer_edge.errors import InsufficientMemoryError
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run import needed_memory, process_memory
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.needed_memory import core_set_bytes, fitting_context

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]
MIB = 1 << 20


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(mebibytes: int) -> None:
        monkeypatch.setattr(
            needed_memory, "available_bytes", lambda: (mebibytes * MIB, "the test's limit")
        )

    return set_to


def test_a_context_that_was_asked_for_is_refused_with_the_limit_where_it_cannot_fit(
    smollm2: Path, available: Callable[[int], None]
) -> None:
    available(600)
    with pytest.raises(
        InsufficientMemoryError,
        match=r"40000 tokens.* 883 MiB for its cache.*600 MiB .*the test's limit.*smaller n_ctx",
    ):
        EdgeLLM(smollm2, n_ctx=40_000)


def test_evaluating_a_full_context_counts_as_its_cache_does(smollm2: Path) -> None:
    # in a control group of 400 MiB, of which Python has 36, this was killed; in one of 450 not
    header = read_header(smollm2)
    for left, fits in ((364, False), (414, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(needed_memory, "available_bytes", lambda n=left: (n * MIB, "a test"))
            if fits:
                assert fitting_context(header, 8000, {}) == 8000
                continue
            with pytest.raises(InsufficientMemoryError):
                fitting_context(header, 8000, {})
            assert fitting_context(header, 8000, {"n_ubatch": 64}) == 8000
            assert fitting_context(header, 8000, {"flash_attn": True}) == 8000


def test_the_default_context_is_shorter_where_memory_is_short_and_says_so(
    smollm2: Path, available: Callable[[int], None]
) -> None:
    available(120)
    with pytest.warns(RuntimeWarning, match="the context is 2048 tokens instead of 4096.*n_ctx"):
        llm = EdgeLLM(smollm2, density=1.0)
    with llm:
        assert llm.llama.n_ctx() == 2048
        assert llm.generate("Hello", max_tokens=2)
    available(20)
    with pytest.raises(InsufficientMemoryError, match="a context of 512 tokens"):
        EdgeLLM(smollm2)


def test_weights_that_are_not_mapped_and_a_core_set_must_fit_too(
    smollm2: Path, available: Callable[[int], None]
) -> None:
    header = read_header(smollm2)
    available(120)
    assert fitting_context(header, 512, {}) == 512
    with pytest.raises(InsufficientMemoryError):
        fitting_context(header, 512, {"use_mmap": False})
    with pytest.raises(InsufficientMemoryError, match="smaller density"):
        fitting_context(header, 512, {}, core_bytes=100 * MIB)
    assert core_set_bytes(header, 1.0) == core_set_bytes(header, "auto") == 0
    assert 7 * MIB < core_set_bytes(header, 0.5) < 9 * MIB
    n_ffn = sum(layer.weight_bytes for layer in dense_ffn(header).values())
    for n_dense in range(21):  # of 30 layers; more of them would leave the others too little
        others = spared(range(30), 30, 0.5, np.float32(np.arange(30) >= 30 - n_dense))
        assert core_set_bytes(header, 0.5) <= 1.01 * n_ffn * others[others < 1].sum() / 30


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
@pytest.mark.parametrize("mebibytes", [200, 400, 600, 800])
def test_a_limit_on_the_address_space_is_one_clear_error_or_an_answer(
    smollm2: Path, mebibytes: int
) -> None:
    command = f"ulimit -v {mebibytes * 1024}; exec {sys.executable} -m coreinfer_edge.cli.main"
    done = subprocess.run(
        ["sh", "-c", f"{command} generate {smollm2} Hi --max-tokens 4 --warmup 1 --threads 2"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == len(errors) <= 1, done.stderr
    assert all("memory" in line or "address space" in line for line in errors)
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="control groups")
def test_a_context_beyond_the_limit_of_a_control_group_is_an_error_and_no_kill(
    smollm2: Path,
) -> None:
    command = [sys.executable, "-m", "coreinfer_edge.cli.main", "generate", str(smollm2), "Hi"]
    try:
        with control_group() as group:
            group.limit(600 * MIB)
            done = group.run([*command, "--ctx", "40000"], capture_output=True, timeout=120)
    except NoControlGroups as error:
        pytest.skip(str(error))
    assert done.returncode == 1, done.stderr
    assert "of memory are available (the control group" in done.stderr
    assert "smaller --ctx" in done.stderr


def test_where_the_system_tells_no_memory_nothing_is_refused_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_proc() -> None:
        raise FileNotFoundError("/proc/meminfo")

    monkeypatch.setattr(process_memory.psutil, "virtual_memory", no_proc)
    monkeypatch.setattr(process_memory, "_OWN_GROUPS", tmp_path / "none")
    available, source = process_memory.available_bytes()
    assert available > 0
    assert source


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX folders")
def test_a_device_without_a_folder_for_temporary_files_generates(smollm2: Path) -> None:
    script = (
        "import sys, tempfile\n"
        "def none(*_, **__): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        "tempfile.gettempdir = tempfile.mkdtemp = tempfile._get_default_tempdir = none\n"
        "from coreinfer_edge import EdgeLLM\n"
        "with EdgeLLM(sys.argv[1], n_ctx=64) as llm:\n"
        "    print(llm.generate('Hello', max_tokens=4, grammar='root ::= \"yes\"'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "yes\n"), done.stderr
