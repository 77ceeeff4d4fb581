"""The folders of the package: imports go one way, and choosing knows no llama.cpp."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import coreinfer_edge
from coreinfer_edge import errors

PACKAGE = Path(__file__).resolve().parents[1] / "coreinfer_edge"

# Each may import those before it.
FOLDERS = (
    "errors",
    "choose",
    "binding",
    "model",
    "run",
    "calibrate",
    "measure",
    "doctor",
    "report",
    "serve",
    "cli",
    "__init__",
)


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts]


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path) -> Iterator[str]:
    """The modules that a module imports, or imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "coreinfer_edge":
            yield from (f"coreinfer_edge.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def imported(path: Path) -> Iterator[str]:
    """The folders that a module imports from."""
    for name in imported_names(path):
        package, *rest = name.split(".")
        if package == "coreinfer_edge" and rest:
            yield rest[0] if (PACKAGE / rest[0]).is_dir() or rest[0] in FOLDERS else "__init__"


def test_every_module_is_in_a_folder_with_a_place_in_the_order() -> None:
    assert {folder(path) for path in modules()} == set(FOLDERS)


def test_imports_between_folders_go_one_way() -> None:
    upward = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in modules()
        for other in imported(path)
        if FOLDERS.index(other) > FOLDERS.index(folder(path))
    ]
    assert upward == []


def test_only_the_binding_folder_imports_the_bundled_package() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        for name in imported_names(path)
        if folder(path) != "binding"
        and (name.split(".")[0] == "llama_cpp" or name.startswith("coreinfer_edge._bundled"))
    }
    # an engine that bench compares with is a llama_cpp that the user has installed
    assert found == {"measure/engines.py"}


def test_the_architecture_names_every_patch() -> None:
    table = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE))
    assert {patch.stem for patch in (PACKAGE.parent / "patches").glob("*.patch")} <= named


def test_the_package_exports_every_error_that_it_raises() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and "Error" in name
    }
    assert "ArgumentError" in defined
    assert defined <= set(coreinfer_edge.__all__)
