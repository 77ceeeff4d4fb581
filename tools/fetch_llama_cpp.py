"""Puts the pinned llama.cpp source, with our patches applied, into a folder of the build tree.

CMake runs this at configure time. The source comes out of the llama-cpp-python sdist, which pip
fetches from whatever index the user has configured; the sdist is kept in the user's cache folder.
A second run with the same source and patches does nothing, and a run with other patches touches
only the files that differ, so that little is compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST_NAME = f"llama_cpp_python-{VERSION}.tar.gz"

LLAMA_CPP = "vendor/llama.cpp"
# Patches of the binding are named so; the others are on llama.cpp.
BINDING = "binding-"
SGEMM = f"{LLAMA_CPP}/ggml/src/ggml-cpu/llamafile/sgemm.cpp"
# All that the build needs: 45 of the sdist's 180 MB.
WANTED = (
    "LICENSE.md",
    "llama_cpp",
    f"{LLAMA_CPP}/CMakeLists.txt",
    f"{LLAMA_CPP}/LICENSE",
    f"{LLAMA_CPP}/cmake",
    f"{LLAMA_CPP}/conversion",
    f"{LLAMA_CPP}/convert_hf_to_gguf.py",
    f"{LLAMA_CPP}/ggml",
    f"{LLAMA_CPP}/gguf-py/gguf",
    f"{LLAMA_CPP}/include",
    f"{LLAMA_CPP}/src",
    f"{LLAMA_CPP}/vendor",
)


class FetchError(Exception):
    """The source cannot be had as asked. The message is for the person who builds."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_hash(path: Path) -> None:
    """Raise FetchError unless the file is the sdist that this version of ours is made for."""
    if (found := sha256_of(path)) != SHA256:
        raise FetchError(
            f"{path} is not the expected llama-cpp-python {VERSION} sdist:"
            f" its SHA-256 is {found}, not {SHA256}. Remove the file and build again."
        )


def cache_dir() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "coreinfer-edge"


def download(folder: Path) -> Path:
    """Fetch the sdist into the folder with pip, which refuses a file with another hash."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes"]
    # pip asks a downloaded sdist for its metadata; without isolation that fetches nothing more.
    command += ["--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    # The options for our own CMake run are no business of the sdist's.
    env = {key: value for key, value in os.environ.items() if key != "CMAKE_ARGS"}
    # Standard input is closed: an index that asks for a password must fail, not wait.
    if subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False).returncode != 0:
        raise FetchError(
            f"pip could not fetch llama-cpp-python {VERSION} (its messages are above)."
            " Without a network, unpack that sdist and give its folder to CMake:"
            ' CMAKE_ARGS="-DCOREINFER_LLAMA_CPP_SOURCE=DIR" pip install .'
        )
    sdist = folder / SDIST_NAME
    if not sdist.is_file():
        raise FetchError(f"pip did not deliver {SDIST_NAME}")
    return sdist


def cached_sdist() -> Path:
    """The verified sdist in the user's cache folder, fetched if it is not there yet."""
    target = cache_dir() / SDIST_NAME
    if target.is_file():
        if sha256_of(target) == SHA256:
            return target
        print(f"{target} is damaged and will be fetched again", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Renaming inside one folder is atomic: two builds at once cannot spoil each other's file.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        sdist = download(Path(folder))
        check_hash(sdist)
        sdist.replace(target)
    return target


def is_wanted(path: PurePosixPath) -> bool:
    # A source folder may have been built in: no byte code and no libraries from there.
    built = "__pycache__" in path.parts or path.is_relative_to("llama_cpp/lib")
    return not built and any(path.is_relative_to(wanted) for wanted in WANTED)


def unpack(sdist: Path, target: Path) -> None:
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            data = archive.extractfile(member) if member.isfile() and is_wanted(path) else None
            if data is None or ".." in path.parts:
                continue
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            with data, (target / path).open("wb") as file:
                shutil.copyfileobj(data, file)


def wanted_files(source: Path) -> Iterable[PurePosixPath]:
    for wanted in WANTED:
        root = source / wanted
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            relative = PurePosixPath(path.relative_to(source).as_posix())
            if path.is_file() and is_wanted(relative):
                yield relative


def copy(source: Path, target: Path) -> None:
    for path in wanted_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def check_source_dir(source: Path) -> None:
    """Raise FetchError unless the folder is an unpacked sdist of the pinned version."""
    if not (source / LLAMA_CPP / "src").is_dir() or not (source / "llama_cpp").is_dir():
        raise FetchError(
            f"{source} is not an unpacked llama-cpp-python sdist: it has no {LLAMA_CPP}/src"
            " and llama_cpp. Unpack the sdist and give the folder that holds its PKG-INFO."
        )
    if f'__version__ = "{VERSION}"' not in (source / "llama_cpp" / "__init__.py").read_text():
        raise FetchError(f"{source} is not llama-cpp-python {VERSION}, which our patches are for")


def apply_patch(patch: Path, root: Path) -> None:
    """Apply one patch exactly as written, or raise FetchError that names it."""
    import patch_ng  # type: ignore[import-untyped, unused-ignore]

    refused = FetchError(
        f"the patch {patch.name} does not apply to the source of llama-cpp-python {VERSION}"
    )
    parsed = patch_ng.fromfile(str(patch))
    if not parsed or parsed.errors or parsed.warnings or not parsed.items:
        raise refused
    changed: dict[Path, bytes] = {}
    for item in parsed.items:
        old, new = (
            name.decode().removeprefix(side)
            for name, side in zip((item.source, item.target), ("a/", "b/"), strict=True)
        )
        path = root / (old if new == "/dev/null" else new)
        if not path.resolve().is_relative_to(root.resolve()):
            raise refused
        # patch-ng overwrites a file that the patch says is new.
        if (old == "/dev/null") == path.exists():
            raise refused
        changed[path] = path.read_bytes() if path.exists() else b""
    if not parsed.apply(root=str(root), fuzz=False):
        raise refused
    # patch-ng counts a file that already has the change as a success.
    if any(path.is_file() and path.read_bytes() == before for path, before in changed.items()):
        raise refused


def leading_comment(path: Path) -> str:
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("//"):
            break
        lines.append(line.removeprefix("//").removeprefix(" "))
    return "\n".join(lines) + "\n"


def collect_licenses(root: Path) -> None:
    """Gather the licences of everything that gets compiled or copied into the package."""
    folder = root / "licenses"
    folder.mkdir()
    shutil.copyfile(root / "LICENSE.md", folder / "llama-cpp-python.txt")
    shutil.copyfile(root / LLAMA_CPP / "LICENSE", folder / "llama.cpp-and-ggml.txt")
    (folder / "llamafile-sgemm.txt").write_text(leading_comment(root / SGEMM))


def replace_changed(new: Path, target: Path) -> None:
    """Make target equal to new, leaving files alone that already are, times included."""
    files = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    for path in list(target.rglob("*")):
        if path.is_file() and path.relative_to(target) not in files:
            path.unlink()
    for path in files:
        old = target / path
        if old.is_file() and old.read_bytes() == (new / path).read_bytes():
            continue
        old.parent.mkdir(parents=True, exist_ok=True)
        (new / path).replace(old)


def prepare(
    output: Path,
    patches: list[Path],
    source: Path | None = None,
    fetch: Callable[[], Path] = cached_sdist,
) -> bool:
    """Put the patched source into ``output``. Returns False if it was already there."""
    stamp = output.parent / f"{output.name}.stamp"
    # The script itself takes part: it decides what is unpacked.
    lines = [f"script {sha256_of(Path(__file__))}"]
    if source is None or source.is_file():
        lines.append(f"sdist {SHA256}")
    elif source.is_dir():
        check_source_dir(source)
        for path in wanted_files(source):
            stat = (source / path).stat()
            lines.append(f"{source / path} {stat.st_size} {stat.st_mtime_ns}")
    else:
        raise FetchError(f"COREINFER_LLAMA_CPP_SOURCE: {source} does not exist")
    lines += [f"patch {patch.name} {sha256_of(patch)}" for patch in patches]
    key = "\n".join(lines)
    if output.is_dir() and stamp.is_file() and stamp.read_text() == key:
        return False

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        new = Path(folder)
        if source is not None and source.is_dir():
            copy(source, new)
        else:
            if source is not None:
                check_hash(source)
            unpack(source or fetch(), new)
        collect_licenses(new)
        for patch in patches:
            print(f"applying {patch.name}", flush=True)
            apply_patch(patch, new if patch.name.startswith(BINDING) else new / LLAMA_CPP)
        stamp.unlink(missing_ok=True)
        replace_changed(new, output)
    stamp.write_text(key)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack and patch the pinned llama.cpp source.")
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    parser.add_argument("--patches", type=Path, help="folder with *.patch, applied in name order")
    parser.add_argument("--source", type=Path, help="unpacked sdist or its .tar.gz: no network")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    patches = sorted(args.patches.glob("*.patch")) if args.patches else []
    source = args.source.expanduser().resolve() if args.source else None
    try:
        prepare(args.output.resolve(), patches, source)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
