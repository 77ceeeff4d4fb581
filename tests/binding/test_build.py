"""The build: the llama.cpp source it prepares, and the package that comes out of it."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from coreinfer_edge.binding import core
from coreinfer_edge.binding import load as native
from coreinfer_edge.errors import NativeError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(native.__file__).parents[1]

PATCH = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -1,3 +1,3 @@
 one
-two
+{}
 three
"""


@pytest.fixture(scope="module")
def fetch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch", ROOT / "tools" / "fetch_llama_cpp.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def upstream(fetch: ModuleType, tmp_path: Path) -> Path:
    """A source folder with one line or two of everything that the build takes from upstream."""
    root = tmp_path / "upstream"
    files = {
        "LICENSE.md": "MIT\n",
        "llama_cpp/__init__.py": f'__version__ = "{fetch.VERSION}"\n',
        f"{fetch.LLAMA_CPP}/LICENSE": "MIT\n",
        f"{fetch.LLAMA_CPP}/src/llama-graph.cpp": "one\ntwo\nthree\n",
        f"{fetch.LLAMA_CPP}/src/llama.cpp": "four\n",
        fetch.SGEMM: "// Permission is granted\n\nint x;\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def write_patch(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def run_python(
    code: str, *arguments: str, path: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(PACKAGE.parent)])}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=env | variables, capture_output=True, text=True, check=False)


def test_patches_are_applied_to_a_copy(fetch: ModuleType, upstream: Path, tmp_path: Path) -> None:
    patch = write_patch(tmp_path, "0001-two.patch", PATCH.format("2"))
    assert fetch.prepare(tmp_path / "out", [patch], upstream)
    graph = f"{fetch.LLAMA_CPP}/src/llama-graph.cpp"
    assert (tmp_path / "out" / graph).read_text() == "one\n2\nthree\n"
    assert (upstream / graph).read_text() == "one\ntwo\nthree\n"


def test_a_patch_of_the_binding_is_applied_to_the_binding(
    fetch: ModuleType, upstream: Path, tmp_path: Path
) -> None:
    (upstream / "llama_cpp" / "llama.py").write_text("one\ntwo\nthree\n")
    text = PATCH.format("2").replace("src/llama-graph.cpp", "llama_cpp/llama.py")
    patch = write_patch(tmp_path, "binding-0001-two.patch", text)
    assert fetch.prepare(tmp_path / "out", [patch], upstream)
    assert (tmp_path / "out" / "llama_cpp" / "llama.py").read_text() == "one\n2\nthree\n"

    write_patch(tmp_path, patch.name, text.replace("+2", "+II"))
    assert fetch.prepare(tmp_path / "out", [patch], upstream)
    assert (tmp_path / "out" / "llama_cpp" / "llama.py").read_text() == "one\nII\nthree\n"


def test_a_second_run_touches_nothing_and_a_new_patch_only_its_files(
    fetch: ModuleType, upstream: Path, tmp_path: Path
) -> None:
    patch = write_patch(tmp_path, "0001-two.patch", PATCH.format("2"))
    source = tmp_path / "out" / fetch.LLAMA_CPP / "src"
    fetch.prepare(tmp_path / "out", [patch], upstream)
    for file in source.iterdir():
        os.utime(file, (1, 1))

    assert not fetch.prepare(tmp_path / "out", [patch], upstream)
    assert {file.stat().st_mtime for file in source.iterdir()} == {1}

    write_patch(tmp_path, "0001-two.patch", PATCH.format("II"))
    assert fetch.prepare(tmp_path / "out", [patch], upstream)
    assert (source / "llama-graph.cpp").read_text() == "one\nII\nthree\n"
    assert (source / "llama-graph.cpp").stat().st_mtime > 1
    assert (source / "llama.cpp").stat().st_mtime == 1


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(PATCH.format("2").replace(" three", " drei"), id="other context"),
        pytest.param(PATCH.format("2").replace("-1,3 +1,3", "-2,3 +2,3"), id="other lines"),
        pytest.param(PATCH.format("2").replace("llama-graph", "no-such-file"), id="no such file"),
        pytest.param(PATCH.replace("-two\n+{}", "-2\n+two"), id="already applied"),
        pytest.param("--- /dev/null\n+++ b/src/llama.cpp\n@@ -0,0 +1 @@\n+x\n", id="file exists"),
        pytest.param(PATCH.format("2").replace("src/", "../../../"), id="outside the source"),
        pytest.param("not a patch\n", id="not a patch"),
        pytest.param("", id="empty"),
    ],
)
def test_a_patch_that_does_not_apply_is_refused_with_its_name(
    fetch: ModuleType, upstream: Path, tmp_path: Path, text: str
) -> None:
    patch = write_patch(tmp_path, "0007-odd.patch", text)
    with pytest.raises(fetch.FetchError, match=r"0007-odd\.patch"):
        fetch.prepare(tmp_path / "out", [patch], upstream)
    # The next build must not take the folder for a finished one.
    with pytest.raises(fetch.FetchError, match=r"0007-odd\.patch"):
        fetch.prepare(tmp_path / "out", [patch], upstream)


def test_a_file_with_a_wrong_hash_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / fetch.SDIST_NAME
    sdist.write_bytes(b"something else")
    with pytest.raises(fetch.FetchError, match="SHA-256"):
        fetch.prepare(tmp_path / "out", [], sdist)


def test_a_damaged_file_in_the_cache_is_fetched_again(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache" / fetch.SDIST_NAME
    cached.parent.mkdir()
    cached.write_bytes(b"cut o")

    def download(folder: Path) -> Path:
        (folder / fetch.SDIST_NAME).write_bytes(b"")
        return Path(folder / fetch.SDIST_NAME)

    monkeypatch.setattr(fetch, "cache_dir", lambda: cached.parent)
    monkeypatch.setattr(fetch, "download", download)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    monkeypatch.setattr(fetch, "SHA256", empty)
    assert fetch.cached_sdist() == cached
    assert cached.read_bytes() == b""


@pytest.mark.parametrize("missing", ["llama_cpp", "version"])
def test_a_source_folder_of_something_else_is_refused(
    fetch: ModuleType, upstream: Path, tmp_path: Path, missing: str
) -> None:
    if missing == "version":
        (upstream / "llama_cpp" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    else:
        (upstream / "llama_cpp").rename(upstream / "other")
    with pytest.raises(fetch.FetchError, match="llama-cpp-python"):
        fetch.prepare(tmp_path / "out", [], upstream)


def test_the_package_holds_every_library_and_no_link_header_or_build_file() -> None:
    files = [path for path in (PACKAGE / "_bundled").rglob("*") if not path.is_dir()]
    libraries = {path.stem.removeprefix("lib") for path in native.LIB_DIR.iterdir()}
    assert {f"coreinfer-{name}" for name in ("llama", "ggml", "ggml-base")} <= libraries
    assert "coreinfer" in libraries
    assert any("ggml-cpu" in name for name in libraries)
    assert not [path for path in files if path.is_symlink()]
    allowed = {".py", ".pyc", ".typed", ".txt", ".so", ".dylib", ".dll"}
    assert {path.suffix or path.name for path in files} <= allowed


def test_the_package_carries_the_licences_of_what_it_bundles() -> None:
    folder = PACKAGE / "_bundled" / "licenses"
    names = {"llama-cpp-python", "llama.cpp-and-ggml", "llamafile-sgemm"}
    assert {path.stem for path in folder.iterdir()} == names
    for path in folder.iterdir():
        assert "Permission is hereby granted" in path.read_text()


def test_importing_the_package_leaves_llama_cpp_to_others(tmp_path: Path) -> None:
    code = (
        "import sys, coreinfer_edge; print([m for m in sys.modules if m.startswith('llama_cpp')])"
    )
    result = run_python(code, path=tmp_path)
    assert result.stdout == "[]\n", result.stderr


def test_the_bundled_binding_can_be_installed_as_llama_cpp(tmp_path: Path) -> None:
    code = (
        "import coreinfer_edge; coreinfer_edge.install_as_llama_cpp(); import llama_cpp;"
        "from llama_cpp.llama_grammar import LlamaGrammar;"
        "print(llama_cpp.__file__, LlamaGrammar is llama_cpp.LlamaGrammar);"
        "coreinfer_edge.install_as_llama_cpp()"
    )
    result = run_python(code, path=tmp_path)
    assert result.stdout == f"{native.BINDING_DIR / '__init__.py'} True\n", result.stderr
    assert result.returncode == 0, result.stderr


def test_sources_without_a_build_use_the_one_of_the_installed_package(
    smollm2: Path, tmp_path: Path
) -> None:
    # as Python started in a clone after `pip install .`
    clone = shutil.copytree(
        PACKAGE, tmp_path / "coreinfer_edge", ignore=shutil.ignore_patterns("_bundled")
    )
    code = (
        f"import sys; sys.path.append({str(PACKAGE.parent)!r});"
        "import coreinfer_edge; print(coreinfer_edge.__file__);"
        f"print(coreinfer_edge.EdgeLLM({str(smollm2)!r}, n_ctx=64).generate('Hello', 2))"
    )
    result = run_python(code, path=tmp_path)
    assert result.stdout.splitlines()[0] == str(clone / "__init__.py"), result.stderr
    assert len(result.stdout.splitlines()) > 1, result.stderr


def test_another_llama_cpp_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    code = "import llama_cpp, coreinfer_edge; coreinfer_edge.install_as_llama_cpp()"
    result = run_python(code, path=tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "LibraryConflictError" in last
    assert str(tmp_path / "llama_cpp") in last


@pytest.fixture(scope="module")
def other_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama_cpp and its libraries under the names that llama-cpp-python gives them.

    The libraries are ours, so that all of their functions have the names that ours have.
    """
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(native.BINDING_DIR, folder / "llama_cpp", ignore=shutil.ignore_patterns("lib"))
    (folder / "lib").mkdir()
    for path in native.LIB_DIR.glob("libcoreinfer-*.so"):
        library = re.sub(
            rb"libcoreinfer-([a-z-]+)\.so\0",
            lambda name: b"lib" + name[1] + b".so\0" + bytes(len("coreinfer-")),
            path.read_bytes(),
        )
        (folder / "lib" / path.name.replace("coreinfer-", "")).write_bytes(library)
    return folder


BESIDE = """
import sys
path, libraries = sys.argv[1:]
options = dict(n_ctx=64, n_threads=1, n_threads_batch=1)
other = llama_cpp.Llama(path, verbose=False, **options)

def answer():
    answers = other.create_completion("Hello", max_tokens=8, temperature=0.0)["choices"]
    return answers[0]["text"]

theirs = answer()
with coreinfer_edge.EdgeLLM(path, density=1.0, **options) as llm:
    assert llm.generate("Hello", max_tokens=8, temperature=0.0) == theirs
with coreinfer_edge.EdgeLLM(path, density=0.3, warmup=0, **options) as llm:
    llm.generate("Hello", max_tokens=8, temperature=0.0)
    assert llm.last.density < 0.5, llm.last
assert answer() == theirs
maps = open("/proc/self/maps").read()
for name in ("llama", "ggml", "ggml-base"):
    assert f"{libraries}/lib{name}.so" in maps
    assert f"/libcoreinfer-{name}.so" in maps
print("side by side")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="makes libraries for Linux")
@pytest.mark.parametrize("order", ["llama_cpp, coreinfer_edge", "coreinfer_edge, llama_cpp"])
def test_another_llama_cpp_works_in_the_same_process(
    order: str, other_llama_cpp: Path, smollm2: Path
) -> None:
    libraries = str(other_llama_cpp / "lib")
    result = run_python(
        f"import {order}\n" + BESIDE,
        str(smollm2),
        libraries,
        path=other_llama_cpp,
        LLAMA_CPP_LIB_PATH=libraries,
    )
    assert result.stdout == "side by side\n", result.stderr
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="makes libraries for Linux")
def test_libraries_whose_functions_would_take_the_place_of_ours_are_reported(
    other_llama_cpp: Path, tmp_path: Path
) -> None:
    foreign = str(other_llama_cpp / "lib" / "libggml-base.so")
    code = f"import ctypes; ctypes.CDLL({foreign!r}, ctypes.RTLD_GLOBAL);"
    code += "from coreinfer_edge import EdgeLLM"
    result = run_python(code, path=tmp_path)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "LibraryConflictError" in last
    assert "RTLD_GLOBAL" in last


@pytest.mark.parametrize(("mine", "shown"), [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_threads_that_wait_spin_briefly_unless_the_user_says_otherwise(
    mine: dict[str, str], shown: str
) -> None:
    # by default OpenMP spins for long, on the processor that the thread waited for may need
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = "import os, coreinfer_edge.binding.load; print(os.environ.get('GOMP_SPINCOUNT'))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | mine | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in result.stderr:
        pytest.skip("this build has no GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{shown}'" in result.stderr
    # other libraries and child processes are not concerned
    assert result.stdout.strip() == mine.get("GOMP_SPINCOUNT", "None")


@pytest.mark.skipif(sys.platform != "linux", reason="names of libraries are those of Linux")
def test_libraries_load_on_android_which_python_calls_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "android")
    load = native.llama_cpp._ctypes_extensions.load_shared_library
    assert load("coreinfer-ggml-base", native.LIB_DIR)


def test_a_library_of_another_version_is_named_whatever_functions_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older = SimpleNamespace(coreinfer_api_version=lambda: core.API_VERSION - 1)
    monkeypatch.setattr(native, "load_library", lambda name: older)
    with pytest.raises(NativeError, match=f"has interface {core.API_VERSION - 1}, the package"):
        core._library.__wrapped__()


def test_the_logger_has_its_level_again_where_no_backend_can_be_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def count() -> int:
        return 0

    def fails(folder: bytes) -> None:
        raise OSError("no such function")

    ggml = SimpleNamespace(ggml_backend_reg_count=count, ggml_backend_load_all_from_path=fails)
    monkeypatch.setattr(native, "load_library", lambda name: ggml)
    caplog.set_level(logging.INFO, "llama-cpp-python")
    with pytest.raises(OSError, match="no such function"):
        native._load_backends()
    assert logging.getLogger("llama-cpp-python").level == logging.INFO
