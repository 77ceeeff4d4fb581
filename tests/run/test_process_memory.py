"""What a process may have of memory, by control groups made of files like the system's."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from coreinfer_edge.run import process_memory
from coreinfer_edge.run.process_memory import available_bytes

MIB = 1 << 20


class Groups:
    """A hierarchy of control groups of one version, with this process in ``/outer/inner``."""

    def __init__(self, version: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._version = version
        self._root = folder / "cgroup" if version == 2 else folder / "cgroup" / "memory"
        own = folder / "own"
        own.write_text(
            "0::/outer/inner\n" if version == 2 else "5:cpu:/x\n4:blkio,memory:/outer/inner\n"
        )
        monkeypatch.setattr(process_memory, "_CGROUPS", folder / "cgroup")
        monkeypatch.setattr(process_memory, "_OWN_GROUPS", own)

    def add(self, name: str, limit: str, used: int, cached: int) -> Path:
        group = self._root / name
        group.mkdir(parents=True, exist_ok=True)
        v2 = self._version == 2
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(f"{limit}\n")
        (group / ("memory.current" if v2 else "memory.usage_in_bytes")).write_text(f"{used}\n")
        total = "" if v2 else "total_"
        fields = {"anon": 1, f"{total}inactive_file": cached // 4, f"{total}active_file": cached}
        fields[f"{total}active_file"] -= cached // 4
        lines = [f"{key} {value}\n" for key, value in fields.items()]
        (group / "memory.stat").write_text("".join(lines))
        return group


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("narrower", ["outer", "outer/inner"])
def test_the_narrowest_control_group_says_what_is_left_and_the_page_cache_gives_way(
    version: int, narrower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = Groups(version, tmp_path, monkeypatch)
    found = {
        name: groups.add(name, str((40 if name == narrower else 50) * MIB), 30 * MIB, 8 * MIB)
        for name in ("outer", "outer/inner")
    }
    assert available_bytes() == (18 * MIB, f"the control group {found[narrower]}")


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_that_is_full_leaves_nothing(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(version, tmp_path, monkeypatch).add("outer/inner", str(40 * MIB), 50 * MIB, 0)
    assert available_bytes()[0] == 0


@pytest.mark.parametrize(("version", "no_limit"), [(1, "9223372036854771712"), (2, "max")])
def test_without_a_limit_it_is_the_machine(
    version: int, no_limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Groups(version, tmp_path, monkeypatch).add("outer/inner", no_limit, 50 * MIB, 0)
    available, source = available_bytes()
    assert source == "the memory of this machine"
    assert 0 < available <= psutil.virtual_memory().total
