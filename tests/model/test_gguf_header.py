"""Reading headers, and what is said of files that are none, or not whole."""

from __future__ import annotations

import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from coreinfer_edge.binding.log import LINES_KEPT, _on_line, captured_log
from coreinfer_edge.errors import ModelFileError, UnsupportedModelError
from coreinfer_edge.model.header import GGUFArray, read_header
from coreinfer_edge.model.loadable import check_loadable

RandomModel = Callable[..., Path]


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=2)


def refusal(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def write(path: Path, *parts: bytes) -> Path:
    path.write_bytes(b"".join(parts))
    return path


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def start(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<Iqq", version, n_tensors, n_keys)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3", "qwen3moe"])
def test_agrees_with_the_reader_of_gguf_py(random_model: RandomModel, arch: str) -> None:
    path = random_model(arch, "q8_0")
    header = read_header(path)
    expected = gguf.GGUFReader(path)

    assert header.architecture == arch
    assert header.version == 3
    assert header.file_size == path.stat().st_size
    assert list(header.metadata) == [k for k in expected.fields if not k.startswith("GGUF.")]
    for key, value in header.metadata.items():
        contents = expected.fields[key].contents()
        if isinstance(value, GGUFArray):
            values = value.read()
            if value.type == "str":
                assert [s.decode() for s in values] == contents
            else:
                assert list(values) == contents
        else:
            assert value == contents
    assert list(header.tensors) == [t.name for t in expected.tensors]
    for tensor in expected.tensors:
        ours = header.tensors[tensor.name]
        assert ours.type.lower() == tensor.tensor_type.name.lower()
        assert ours.shape == tuple(tensor.shape)
        assert ours.n_elements == tensor.n_elements
        assert (ours.offset, ours.n_bytes) == (tensor.data_offset, tensor.n_bytes)


def test_reads_smollm2(smollm2: Path) -> None:
    header = read_header(smollm2)
    assert header.get("llama.block_count") == 30
    assert header.n_layers == 30
    assert header.value_types["llama.rope.freq_base"] == "f32"
    assert header.get("tokenizer.ggml.tokens").length == 49152
    assert header.get("nothing") is None
    assert header.get("nothing", 7) == 7
    check_loadable(header)


def test_arrays_of_numbers_come_as_numpy(smollm2: Path) -> None:
    types = read_header(smollm2).get("tokenizer.ggml.token_type").read()
    assert types.dtype == np.int32
    assert types.shape == (49152,)


def test_leaves_the_log_callback_as_it_was(
    model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from coreinfer_edge.binding.load import llama_cpp

    # A Llama(verbose=False) of an earlier test has silenced the binding for the whole process.
    monkeypatch.setattr(logging.getLogger("llama-cpp-python"), "level", logging.DEBUG)
    read_header(model)
    broken = write(model.with_name("broken.gguf"), start(1, 1), ARCHITECTURE, text(b"x" * 99))
    with pytest.raises(ModelFileError):
        read_header(broken)
    assert capfd.readouterr().err == ""
    llama_cpp.llama_model_load_from_file(b"/nowhere", llama_cpp.llama_model_default_params())
    # The binding's callback prints, as before.
    assert "/nowhere" in capfd.readouterr().err


def test_reads_a_file_whose_name_is_not_ascii(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "modèle 模型.gguf"
    shutil.copy(model, path)
    assert read_header(path).architecture == "llama"


# --- not a file to read --------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "does not exist: check the path" in refusal(tmp_path / "none.gguf")


def test_a_file_within_a_file_is_missing(model: Path) -> None:
    assert "does not exist" in refusal(model / "none.gguf")


def test_a_directory_is_refused_with_the_models_in_it(tmp_path: Path) -> None:
    assert "is a directory: name the .gguf file in it" in refusal(tmp_path)
    (tmp_path / "a.gguf").touch()
    assert "it has a.gguf" in refusal(tmp_path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "is empty: download it again" in refusal(write(tmp_path / "x.gguf"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device here")
def test_a_device_is_refused() -> None:
    assert "not a regular file" in refusal(Path("/dev/zero"))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be read here")
def test_a_file_without_permission_is_refused(model: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(model, tmp_path / "secret.gguf"))
    path.chmod(0)
    assert "may not be read" in refusal(path)


def test_a_name_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(ModelFileError, match="check the path"):
        read_header("a\0b.gguf")


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (struct.pack("<Q", 60) + b'{"__metadata__":{}}', "safetensors"),
        (b"PK\x03\x04" + bytes(40), "PyTorch"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"tjgg\x03\0\0\0", "before GGUF"),
        (b"\x1f\x8b\x08\0", "unpacked"),
        (bytes(4096), "never finished"),
        (b'{"error": "x"}', "JSON"),
        (b"Entry not found", "'Entry not found'"),
        (b"\x01\x02\x03\x04\x05", r"b'\x01\x02\x03\x04'"),
    ],
)
def test_says_what_a_file_seems_to_be_instead(tmp_path: Path, contents: bytes, what: str) -> None:
    message = refusal(write(tmp_path / "x.gguf", contents))
    assert "is not a GGUF file" in message
    assert what in message


@pytest.mark.parametrize(
    ("version", "what"),
    [(0, "big-endian"), (1, "convert the model again"), (4, "update"), (3 << 24, "big-endian")],
)
def test_other_versions_are_refused(tmp_path: Path, version: int, what: str) -> None:
    path = write(tmp_path / "x.gguf", start(0, 1, version), ARCHITECTURE)
    assert what in refusal(path)


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    pair = text(b"general.name") + struct.pack("<I", 8) + text(b"x")
    assert "general.architecture" in refusal(write(tmp_path / "x.gguf", start(0, 1), pair))


# --- cut off or absurd ---------------------------------------------------------------------------


def test_a_file_cut_off_anywhere_is_refused(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    data = min(t.offset for t in read_header(model).tensors.values())
    lengths = {*range(1, 200), *range(200, data, 97), data - 1, data, data + 1}
    lengths |= {*range(data, len(whole), len(whole) // 50)} | {len(whole) - 1}
    path = tmp_path / "cut.gguf"
    for length in sorted(lengths, reverse=True):
        if length == max(lengths):
            path.write_bytes(whole[:length])
        os.truncate(path, length)
        message = refusal(path)
        assert f"is cut off: it has {length:,} bytes" in message
        assert message.endswith("download it again")


def test_says_how_many_bytes_of_data_are_missing(model: Path, tmp_path: Path) -> None:
    whole = model.read_bytes()
    last = list(read_header(model).tensors.values())[-1]
    path = write(tmp_path / "cut.gguf", whole[: last.offset + last.n_bytes - 1000])
    assert f"so 1,000 are missing (from tensor {last.name} on)" in refusal(path)


@pytest.mark.parametrize("n", [-1, 2**40, 2**63 - 1])
def test_absurd_counts_are_refused(tmp_path: Path, n: int) -> None:
    assert f"claims {n:,} tensors" in refusal(write(tmp_path / "x.gguf", start(n, 1), ARCHITECTURE))
    assert f"claims {n:,} metadata keys" in refusal(
        write(tmp_path / "x.gguf", start(0, n), ARCHITECTURE)
    )


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (struct.pack("<IQ", 8, 2**62), f"string length {2**62} exceeds"),
        (struct.pack("<IIQ", 9, 8, 2**62), f"array of {2**62} elements exceeds"),
        (struct.pack("<IIQ", 9, 8, 2**21), "cut off"),
        (struct.pack("<IIQ", 9, 4, 2**62), f"array of {2**62} elements exceeds"),
        (struct.pack("<IIQ", 9, 12, 2**29), "bytes of header"),
        (struct.pack("<IIQ", 9, 9, 1), "key 'a.key' has invalid GGUF type 9"),
        (struct.pack("<I", 13), "key 'a.key' has invalid GGUF type 13"),
        (struct.pack("<IIQQ", 9, 8, 1, 2**63), f"string length {2**63} exceeds"),
    ],
)
def test_absurd_values_are_refused_with_their_key(tmp_path: Path, value: bytes, what: str) -> None:
    path = write(tmp_path / "x.gguf", start(0, 2), ARCHITECTURE, text(b"a.key"), value)
    message = refusal(path)
    assert what in message
    assert "metadata key 2 of 2 (a.key)" in message


@pytest.mark.parametrize(
    ("shape", "kind", "offset", "what"),
    [
        ((2**40,), 0, 0, "are missing"),
        ((2**62, 2**62), 0, 0, "overflow"),
        ((2**63,), 0, 0, "invalid number of elements"),
        ((32,), 4711, 0, "invalid ggml type"),
        ((32,), 2**31, 0, "invalid ggml type"),
        ((32,), 4, 0, "block size"),
        ((33,), 2, 0, "block size"),
        ((32,), 0, 32, "has offset 32, expected 0"),
        ((32,), 0, 2**63, "has offset"),
        ((1, 1, 1, 1, 1), 0, 0, "invalid number of dimensions: 5 > 4"),
    ],
)
def test_absurd_tensors_are_refused(
    tmp_path: Path, shape: tuple[int, ...], kind: int, offset: int, what: str
) -> None:
    info = text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    path = write(tmp_path / "x.gguf", start(1, 1), ARCHITECTURE, info, bytes(512))
    assert what in refusal(path)


def test_a_key_that_is_there_twice_is_refused_in_ggmls_words(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", start(0, 2), ARCHITECTURE, ARCHITECTURE)
    assert "duplicate key 'general.architecture'" in refusal(path)


def test_a_huge_sparse_file_is_refused_without_taking_its_memory(tmp_path: Path) -> None:
    value = text(b"a.key") + struct.pack("<IIQ", 9, 11, 2**29)
    path = write(tmp_path / "x.gguf", start(0, 2), ARCHITECTURE, value)
    os.truncate(path, 2**33)
    assert "bytes of header" in refusal(path)


# --- split files ---------------------------------------------------------------------------------


def split_model(folder: Path, count: int = 2) -> list[Path]:
    paths = [folder / f"m-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_tensor(f"blk.{i}.ffn_up.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model_is_read_as_one(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    header = read_header(paths[0])
    assert header.files == tuple(paths)
    assert [t.file for t in header.tensors.values()] == paths
    assert header.file_size == sum(p.stat().st_size for p in paths)


def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path) -> None:
    paths = split_model(tmp_path, 3)
    paths[1].unlink()
    assert "there is no m-00002-of-00003.gguf: download all of them" in refusal(paths[0])


def test_another_part_than_the_first_points_to_the_first(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    assert f"name the first one, {paths[0]}" in refusal(paths[1])


def test_a_renamed_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    path = split_model(tmp_path)[0].rename(tmp_path / "model.gguf")
    assert "must look like NAME-00001-of-00002.gguf" in refusal(path)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ModelFileError, match="it is not file 2 of 2"):
        read_header(paths[0])


def test_a_cut_off_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    paths = split_model(tmp_path)
    os.truncate(paths[1], paths[1].stat().st_size - 64)
    with pytest.raises(ModelFileError, match=r"m-00002-of-00002\.gguf is cut off"):
        read_header(paths[0])


# --- what llama.cpp cannot run -------------------------------------------------------------------


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    pair = ARCHITECTURE.replace(text(b"llama"), text(b"lambda"))
    header = read_header(write(tmp_path / "x.gguf", start(0, 1), pair))
    with pytest.raises(UnsupportedModelError, match=r"architecture 'lambda'.*does not know"):
        check_loadable(header)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "starcoder2"])
def test_good_models_pass(random_model: RandomModel, arch: str) -> None:
    check_loadable(read_header(random_model(arch)))


def test_an_image_encoder_is_refused(tmp_path: Path) -> None:
    pair = ARCHITECTURE.replace(text(b"llama"), text(b"clip"))
    header = read_header(write(tmp_path / "x.gguf", start(0, 1), pair))
    with pytest.raises(UnsupportedModelError, match="image encoder"):
        check_loadable(header)


def test_captured_log_passes_errors_on_and_restores() -> None:
    with pytest.raises(KeyError), captured_log():
        raise KeyError


def test_captured_log_keeps_the_last_lines_of_a_model_that_logs_thousands() -> None:
    with captured_log() as lines:
        for i in range(LINES_KEPT + 10):
            _on_line(2, b"line %d" % i, None)
    assert len(lines) == LINES_KEPT
    assert lines[-1] == f"line {LINES_KEPT + 9}"
