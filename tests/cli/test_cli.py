"""The command: what it prints where, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coreinfer_edge.cli.option_names import with_option_names

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]
Done = subprocess.CompletedProcess[str]

COMMAND = [sys.executable, "-m", "coreinfer_edge.cli.main"]

# EdgeLLM's place taken by one that is quick and says what it was asked.
STUB = """
import sys, types, dataclasses, time
from coreinfer_edge import errors

@dataclasses.dataclass
class Figures:
    prompt_tokens: int = 3
    completion_tokens: int = 2
    warmup_tokens: int = 1
    strategy: str = "energy"
    density: float = 0.5
    estimated_kl: float = 0.125
    prefill_seconds: float = 0.1
    choose_seconds: float = 0.01
    decode_seconds: float = 0.2
    decode_tokens_per_second: float = float("nan")
    core_ffn_bytes: int = 1048576
    full_ffn_bytes: int = 2097152
    packed_bytes: int = 3145728
    peak_memory_bytes: int = 0
    finish_reason: str = "stop"
    context_full: bool = False
    seed: int = 4711
    core_tokens: int = 1
    passes: int = 0
    levels: tuple = ("full",)
    peak_private_bytes: int = 0

class EdgeLLM:
    last = plan = None
    llama = types.SimpleNamespace(why_no_chat=None)
    def __init__(self, path, **options):
        print("a library writes here", flush=True)
        self.options = options
        if path.name == "base":
            self.llama = types.SimpleNamespace(why_no_chat="no template: give chat_format=...")
        options["density"] = options.get("density") or 0.5
        if options["density"] > 1:
            raise errors.ArgumentError("density is 2.0, and must be within (0, 1]")
        if options["density"] == 0.125:
            raise RuntimeError("no\\nmore")
        if options["density"] == 0.375:
            raise errors.ArgumentError("chat_format='x' or n_ctx of /n_ctx.gguf: strategy='dense'")
        if options["density"] == 0.25:
            raise MemoryError
    def __enter__(self): return self
    def __exit__(self, *_): print("closed", file=sys.stderr)
    def stream(self, prompt, **sampling):
        ends = {"cut": ("length", False), "full": ("length", True), "left": (None, False)}
        self.last = Figures(3, 2, 1, "energy", 0.5, 0.125, 0.1, 0.01, 0.2, float("nan"), 1048576,
                            2097152, 3145728, 0, *ends.get(prompt, ("stop", False)))
        if prompt == "budget":
            self.plan = types.SimpleNamespace(memory_budget=172 << 20)
            self.last = dataclasses.replace(self.last, peak_private_bytes=161 << 20)
        if prompt == "slow":
            yield "slow"
            time.sleep(60)
        if prompt == "long":
            while True:
                yield "x" * 1000
        yield from [prompt, " ", repr(sorted(sampling.items()))]
    def generate(self, prompt, **sampling):
        return "".join(self.stream(prompt, **sampling))
    def chat(self, messages, stream, **sampling):
        self.last = Figures()
        if messages[-1]["content"] == "too long" or sum(len(m["content"]) for m in messages) > 99:
            raise errors.PromptTooLongError("the prompt is too long")
        yield from ["<", "|".join(m["content"] for m in messages), ">"]

module = types.ModuleType("coreinfer_edge.run.llm")
module.EdgeLLM, module.Figures = EdgeLLM, Figures
sys.modules["coreinfer_edge.run.llm"] = module
from coreinfer_edge.cli.main import main
main()
"""
STUBBED = [sys.executable, "-c", STUB]


def run(*args: str | Path, stdin: str = "", command: list[str] = COMMAND, **options: Any) -> Done:
    return subprocess.run(
        [*command, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def stubbed(*args: str | Path, stdin: str = "") -> Done:
    return run(*args, stdin=stdin, command=STUBBED)


def assert_one_error_line(done: Done, *words: str) -> None:
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line != "closed"]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


# --- generate ------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_the_figures_apart() -> None:
    done = stubbed("generate", "m.gguf", "hi")
    assert done.returncode == 0
    assert done.stdout == "a library writes here\nhi [('max_tokens', 256)]\n"
    assert "3 + 2 tokens" in done.stderr
    assert "FFN 1.0 of 2.0 MiB, our kernels, pre-fill 0.10 s" in done.stderr
    assert done.stderr.endswith("closed\n")


def test_the_figures_say_which_memory_they_mean() -> None:
    assert " peak resident memory 0 MiB, seed" in stubbed("generate", "m", "hi").stderr
    assert " peak private memory 161 of 172 MiB, seed" in stubbed("generate", "m", "budget").stderr


def test_generate_passes_the_sampling_options_that_were_given() -> None:
    numbers = ["--max-tokens", "7", "--temperature", "0", "--top-p", "0.9", "--top-k", "3"]
    done = stubbed("generate", "m.gguf", "hi", *numbers, "--stop", "a", "--stop", "b")
    given = {"max_tokens": 7, "temperature": 0.0, "top_p": 0.9, "top_k": 3, "stop": ["a", "b"]}
    assert repr(sorted(given.items())) in done.stdout


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_option_of_a_model_is_an_option_of_the_command(command: str) -> None:
    from coreinfer_edge.choose.strategies import STRATEGIES
    from coreinfer_edge.run.options import Options

    text = " ".join(run(command, "--help").stdout.split())
    for field in dataclasses.fields(Options):
        name = field.name.removeprefix("n_").replace("_", "-")
        assert f" --{name} " in text
    assert f": {', '.join(STRATEGIES)}; dense for none" in text


def test_generate_reads_its_prompt_from_a_file_or_standard_input(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("from\na file")
    assert "from\na file [" in stubbed("generate", "m", "--file", tmp_path / "prompt.txt").stdout
    assert "piped [" in stubbed("generate", "m", "-", stdin="piped").stdout
    assert "piped [" in stubbed("generate", "m", stdin="piped").stdout


def test_json_is_one_object_with_everything_else_on_standard_error() -> None:
    done = stubbed("generate", "m.gguf", "hi", "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert result["text"].startswith("hi ")
    assert result["model"] == "m.gguf"
    assert result["prompt_tokens"] == 3
    # JSON has no NaN.
    assert result["decode_tokens_per_second"] is None
    assert "a library writes here" in done.stderr


def test_an_error_is_one_line_and_one_json_object() -> None:
    done = stubbed("generate", "m", "hi", "--density", "2")
    assert_one_error_line(done, "density is 2.0")

    done = stubbed("generate", "m", "hi", "--density", "2", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "error": {"type": "ArgumentError", "message": "density is 2.0, and must be within (0, 1]"}
    }


def test_an_unexpected_error_has_no_traceback_unless_verbose() -> None:
    arguments = ["generate", "m", "hi", "--density", "0.125"]
    assert_one_error_line(stubbed(*arguments), "RuntimeError: no more", "--verbose")
    assert "Traceback" in stubbed(*arguments, "--verbose").stderr


def test_exhausted_memory_says_what_to_do() -> None:
    done = stubbed("generate", "m", "hi", "--density", "0.25", "--json")
    assert "out of memory: choose a smaller --ctx" in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "InsufficientMemoryError"


def test_an_unreadable_prompt_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.txt"
    assert_one_error_line(stubbed("generate", "m", "--file", missing), str(missing), "No such")
    (tmp_path / "bytes").write_bytes(b"\xff")
    assert_one_error_line(stubbed("generate", "m", "--file", tmp_path / "bytes"), "not UTF-8")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "m", "hi", "--file", "x"],
        ["generate", "m", "hi", "--max-tokens", "many"],
        ["generate", "m", "hi", "--warmup", "-3"],
        ["generate", "m", "hi", "--nonsense"],
        ["nonsense"],
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    done = stubbed(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""

    done = stubbed(*arguments, "--json")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["type"] == "UsageError"


def test_errors_name_options_and_no_arguments_of_python() -> None:
    done = stubbed("generate", "m", "hi", "--density", "0.375")
    assert_one_error_line(done, "--chat-format x or --ctx of /n_ctx.gguf: --strategy dense")


def test_an_answer_that_fails_prints_no_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    from coreinfer_edge.cli.output import print_pieces

    def failing(*pieces: str) -> Iterator[str]:
        yield from pieces
        raise ValueError("broken")

    for pieces, printed in (((), ""), (("half a",), "half a\n")):
        with pytest.raises(ValueError, match="broken"):
            print_pieces(failing(*pieces))
        assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("hi", "complete]"),
        ("cut", "cut at --max-tokens]"),
        ("full", "cut: the context is full, give a larger --ctx]"),
        ("left", "stopped]"),
    ],
)
def test_the_figures_tell_the_seed_and_why_the_answer_ended(prompt: str, told: str) -> None:
    assert f"seed 4711, {told}" in stubbed("generate", "m", prompt).stderr


def test_a_seed_of_minus_one_is_random_as_in_llama_cpp() -> None:
    assert stubbed("generate", "m", "hi", "--seed", "-1").returncode == 0
    assert stubbed("generate", "m", "hi", "--seed", "-2").returncode == 2


def test_a_grammar_is_read_from_a_file_and_a_schema_made_into_one(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text('root ::= "yes"')
    schema.write_text('{"enum": ["yes"]}')
    done = stubbed("generate", "m", "hi", "--grammar", grammar)
    assert "('grammar', 'root ::= \"yes\"')" in done.stdout
    done = stubbed("generate", "m", "hi", "--json-schema", schema)
    assert "root ::= " in done.stdout
    assert "yes" in done.stdout
    both = stubbed("generate", "m", "hi", "--grammar", grammar, "--json-schema", schema)
    assert both.returncode == 2
    schema.write_text("{")
    assert_one_error_line(
        stubbed("generate", "m", "hi", "--json-schema", schema), str(schema), "not JSON"
    )
    assert_one_error_line(stubbed("chat", "m", "--grammar", tmp_path), str(tmp_path))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [["generate", "m", "hi"], ["generate", "m", "hi", "--json"], ["--help"], ["--version"]],
)
def test_a_full_disk_behind_the_output_is_told_and_is_no_defect_of_ours(
    arguments: list[str],
) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*STUBBED, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == ["error: standard output cannot be written: No space left on device"]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX file descriptors")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_standard_stream_that_is_closed_is_no_traceback(number: int) -> None:
    done = subprocess.run(
        [*STUBBED, "generate", "m", "hi", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: os.close(number),
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if number == 1 else 0)
    assert ("cannot be written" in done.stderr) == (number == 1)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_generate_with_130() -> None:
    process = subprocess.Popen(
        [*STUBBED, "generate", "m", "slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    while process.stdout.read(4) != "slow":
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_who_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [*STUBBED, "generate", "m", "long"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 141
    assert err == b"closed\n"


# --- chat ----------------------------------------------------------------------------------------


def test_chat_answers_each_piped_line_with_all_before_it() -> None:
    done = stubbed("chat", "m", "--system", "S", stdin="one\n\ntwo\\\nmore\n/exit\nnever\n")
    assert done.returncode == 0
    assert "<S|one>\n<S|one|<S|one>|two\nmore>\n" in done.stdout
    assert "never" not in done.stdout


def test_chat_json_holds_the_whole_talk() -> None:
    done = stubbed("chat", "m", "--json", stdin="one\ntwo")
    result = json.loads(done.stdout)
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"] * 2
    assert result["messages"][1]["content"] == "<one>"
    assert result["completion_tokens"] == 2
    assert "<one>" in done.stderr


def test_chat_with_a_model_that_cannot_says_so_before_anything_is_typed() -> None:
    done = stubbed("chat", "base", stdin="")
    assert_one_error_line(done, "no template: give --chat-format NAME")


def test_chat_with_nothing_said_ends_well() -> None:
    done = stubbed("chat", "m")
    assert done.returncode == 0
    assert "<" not in done.stdout


def test_chat_with_too_long_a_message_piped_in_is_an_error() -> None:
    done = stubbed("chat", "m", stdin="too long\n")
    assert done.returncode == 1
    assert "error: the prompt is too long" in done.stderr


def test_chat_drops_the_oldest_turns_when_the_context_is_full() -> None:
    done = stubbed("chat", "m", "--system", "be kind", stdin="a" * 40 + "\n" + "b" * 40 + "\n")
    assert done.returncode == 0
    assert "the oldest turn is dropped" in done.stderr
    assert f"<be kind|{'b' * 40}>" in done.stdout
    arguments = ["chat", "m", "--system", "be kind", "--json"]
    done = stubbed(*arguments, stdin="a" * 40 + "\n" + "b" * 40 + "\n")
    talk = json.loads(done.stdout)["messages"]
    assert [len(m["content"]) for m in talk if m["role"] == "user"] == [40, 40]


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "en_US.UTF-8"])
def test_chat_answers_up_to_a_line_that_is_not_utf_8_and_says_so(locale: str) -> None:
    content = "one\nnaïve\n".encode() + b"caf\xe9\nnever\n"
    done = subprocess.run(
        [*STUBBED, "chat", "m"],
        input=content,
        capture_output=True,
        timeout=120,
        env={**os.environ, "LC_ALL": locale},
    )
    assert done.returncode == 1
    assert b"error: a message on standard input is not UTF-8 text\n" in done.stderr
    assert "<one|<one>|naïve>".encode() in done.stdout
    assert b"never" not in done.stdout


def chat_at_terminal(typed: bytes) -> tuple[str, str]:
    """What ``chat`` prints on standard output and on standard error."""
    import pty

    us, terminal = pty.openpty()
    process = subprocess.Popen(
        [*STUBBED, "chat", "m"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.write(us, typed)
    out, err = process.communicate(timeout=30)
    os.close(us)
    os.close(terminal)
    assert process.returncode == 0
    return out, err


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_chat_at_a_terminal_goes_on_after_errors_and_ends_with_ctrl_d() -> None:
    out, err = chat_at_terminal(b"too long\nhello\n\x04")
    assert "error: the prompt is too long" in err
    # The message that was too long is forgotten.
    assert "<hello>" in out


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_chat_at_a_terminal_goes_on_after_a_line_that_is_not_utf_8() -> None:
    out, err = chat_at_terminal(b"caf\xe9\nhello\n\x04")
    assert "error: a message on standard input is not UTF-8 text" in err
    assert "<hello>" in out


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_a_message_too_long_at_a_terminal_leaves_the_earlier_turns() -> None:
    out, err = chat_at_terminal(b"hello\ntoo long\nagain\n\x04")
    assert "error: the prompt is too long" in err
    assert "dropped" not in err
    assert "<hello|<hello>|again>" in out


# --- inspect, help, version ----------------------------------------------------------------------


def test_inspect_shows_tables_or_json(smollm2: Path) -> None:
    done = run("inspect", smollm2)
    assert done.returncode == 0
    assert "llama" in done.stdout
    assert "What density does" in done.stdout
    assert done.stderr == ""

    done = run("inspect", "demo", "--json")
    assert json.loads(done.stdout)["architecture"] == "llama"
    assert done.stderr == ""


def test_inspect_of_a_bad_file_is_one_error(tmp_path: Path) -> None:
    assert_one_error_line(run("inspect", tmp_path), str(tmp_path), "is a directory")
    (tmp_path / "x.gguf").write_bytes(b"<html>")
    done = run("inspect", tmp_path / "x.gguf", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "ModelFileError"


def test_help_lists_the_commands() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("generate", "chat", "inspect"):
        assert command in done.stdout


def test_help_loads_nothing_that_only_a_command_needs() -> None:
    script = (
        "import sys\n"
        "sys.argv = ['coreinfer-edge', '--help']\n"
        "from coreinfer_edge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in sys.argv[1:] + ['huggingface_hub',"
        " 'coreinfer_edge.measure.description'] if m in sys.modules])\n"
    )
    done = run(command=[sys.executable, "-c", script])
    assert done.stdout.splitlines()[-1] == "[]"


def test_version_is_shown() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("coreinfer-edge ")


# --- the real thing ------------------------------------------------------------------------------


def test_generates_with_a_real_model(smollm2: Path) -> None:
    arguments = ["--max-tokens", "8", "--temperature", "0", "--ctx", "256"]
    plain = run("generate", "demo", "The capital of France is", *arguments)
    assert plain.returncode == 0
    assert plain.stderr.count("\n") == 1
    done = run("generate", smollm2, "The capital of France is", *arguments, "--json")
    result = json.loads(done.stdout)
    assert done.stderr == ""
    assert result["text"].strip() == plain.stdout.strip()
    assert result["completion_tokens"] == 8


def test_generates_with_levels_of_precision(smollm2: Path) -> None:
    arguments = ["--max-tokens", "8", "--ctx", "256", "--warmup", "0", "--density", "0.6", "--json"]
    done = run("generate", smollm2, "The capital of France is", *arguments, "--levels", "full,3,2")
    result = json.loads(done.stdout)
    if done.returncode != 0:  # this processor has no kernels of ours
        assert "cannot have levels below full" in result["error"]["message"]
        return
    assert result["density"] == pytest.approx(0.6, abs=0.01)
    assert result["core_ffn_bytes"] == pytest.approx(0.6 * result["full_ffn_bytes"], rel=0.02)


def test_generates_exactly_within_a_budget(smollm2: Path) -> None:
    """Tokens a pass are among the figures of an exact answer."""
    arguments = ["The capital of France is", "--max-tokens", "8", "--ctx", "512", "--seed", "1"]
    options = ["--exact", "--density", "0.1", "--threads", "1"]
    refused = run("generate", smollm2, *arguments, *options, "--memory", "1MiB")
    needed = re.search(r"it needs ([\d,]+) MiB", refused.stderr)
    assert needed is not None
    budget = ["--memory", f"{int(needed[1]) + 4}MiB"]
    done = run("generate", smollm2, *arguments, *options, *budget)
    assert done.returncode == 0
    assert re.search(r"exact, \d\.\d\d tokens a pass, drafts of density 0\.1", done.stderr)
    whole = run("generate", smollm2, *arguments, "--threads", "1")
    assert done.stdout == whole.stdout


def test_chats_with_a_real_model(smollm2: Path) -> None:
    done = run("chat", smollm2, "--max-tokens", "8", "--ctx", "256", stdin="Hello!\nAnd you?\n")
    assert done.returncode == 0
    assert done.stderr.count("tok/s") == 2


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--density", "0"], "density"),
        (["--levels", "full,3", "--density", "1"], "levels"),
        (["--memory", "1GiB", "--gpu-memory", "1GiB"], "--gpu-memory"),
        (["--density", "nan"], "density"),
        (["--strategy", "magic"], "magic"),
        (["--ctx", "256"], "context"),
    ],
)
def test_arguments_that_cannot_be_are_one_error(
    smollm2: Path, options: list[str], what: str
) -> None:
    prompt = "many words " * 300
    assert_one_error_line(run("generate", smollm2, prompt, *options), what)


def test_a_file_cut_off_is_one_error_with_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2.read_bytes()[:5_000_000])
    done = run("generate", path, "hi")
    assert_one_error_line(done, str(path), "is cut off", "download it again")


def test_a_size_of_memory_that_is_none_names_the_option() -> None:
    assert with_option_names("memory is '50%': it must be a size").startswith("--memory is '50%'")
    assert with_option_names("memory is short") == "memory is short"
