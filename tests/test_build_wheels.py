"""What tools/build_wheels.py decides by itself. The wheels are tested by make test-aarch64."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "build_wheels.py"
LIB = "coreinfer_edge/_bundled/llama_cpp/lib"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wheels", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tool: ModuleType, tmp_path: Path) -> dict[str, bytes]:
    """The files of a wheel for aarch64, as they must be."""
    elf = b"\x7fELF".ljust(18, b"\0") + tool.MACHINES["aarch64"]
    names = ["coreinfer", "coreinfer-ggml", "coreinfer-ggml-base", "coreinfer-llama", "ggml-rpc"]
    names += [f"ggml-cpu-{name}" for name in tool.VARIANTS["aarch64"].split(";")]
    return {
        **{f"{LIB}/lib{name}.so": elf for name in names},
        "coreinfer_edge/_bundled/llama_cpp/__init__.py": b"",
        "coreinfer_edge/_bundled/convert/convert_hf_to_gguf.py": b"",
        "coreinfer_edge/_bundled/licenses/llama.cpp-and-ggml.txt": b"MIT",
    }


def written(files: dict[str, bytes], folder: Path, tag: str) -> Path:
    path = folder / f"coreinfer_edge-0.1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_wheel_as_it_must_be_passes(
    tool: ModuleType, wheel: dict[str, bytes], tmp_path: Path
) -> None:
    path = written(wheel, tmp_path, "py3-none-manylinux_2_28_aarch64")
    tool.check_wheel(path, "aarch64")


def test_a_wheel_for_this_machine_alone_or_one_python_is_refused(
    tool: ModuleType, wheel: dict[str, bytes], tmp_path: Path
) -> None:
    for tag in ("py3-none-linux_aarch64", "cp311-cp311-manylinux_2_28_aarch64"):
        with pytest.raises(SystemExit, match="tag"):
            tool.check_wheel(written(wheel, tmp_path, tag), "aarch64")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (f"{LIB}/libggml-cpu-armv8.0_1.so", None, "it has no"),
        (f"{LIB}/libgomp.so.1", b"", "not to be in it"),
        (f"{LIB}/libcoreinfer.so", b"\x7fELF".ljust(18, b"\0") + b"\x3e\x00", "another processor"),
        ("coreinfer_edge/_bundled/licenses/llama.cpp-and-ggml.txt", None, "licences"),
    ],
)
def test_a_wheel_with_a_file_missing_or_wrong_is_refused(
    tool: ModuleType,
    wheel: dict[str, bytes],
    tmp_path: Path,
    name: str,
    data: bytes | None,
    message: str,
) -> None:
    if data is None:
        del wheel[name]
    else:
        wheel[name] = data
    path = written(wheel, tmp_path, "py3-none-manylinux_2_28_aarch64")
    with pytest.raises(SystemExit, match=message):
        tool.check_wheel(path, "aarch64")


@pytest.mark.skipif(sys.platform != "linux", reason="the wheels are built on Linux")
@pytest.mark.parametrize(
    ("gcc", "zig"),
    [
        ("-march=armv8-a", "-mcpu=generic+v8a"),
        ("-march=armv8.2-a+dotprod+fp16", "-mcpu=generic+v8_2a+dotprod+fullfp16"),
        ("-march=armv8.6-a+i8mm+sve2", "-mcpu=generic+v8_6a+i8mm+sve2"),
        ("-mavx512f", "-mavx512f"),
        ("-DNAME=a b", "-DNAME=a b"),
    ],
)
def test_the_compiler_hands_options_to_zig_in_its_own_words(
    tool: ModuleType, tmp_path: Path, gcc: str, zig: str
) -> None:
    script = tmp_path / "clang"
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    text = tool.COMPILER.format(version="1", zig=echo, command="cc", arch="aarch64", glibc="2.28")
    script.write_text(text)
    out = subprocess.run(["sh", script, "-c", gcc, "x.c"], capture_output=True, text=True)
    options = out.stdout.splitlines()
    assert options == ["cc", "-target", "aarch64-linux-gnu.2.28", "-g0", "-c", zig, "x.c"]
