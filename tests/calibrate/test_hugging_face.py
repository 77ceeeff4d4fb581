"""From a Hugging Face model to a GGUF that knows its neurons."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coreinfer_edge.calibrate import hugging_face, torch_model
from coreinfer_edge.calibrate.convert import Conversion, calibrated, check, convert
from coreinfer_edge.choose.prior import from_header
from coreinfer_edge.choose.statistics import Ffn, Floats, Statistics
from coreinfer_edge.errors import (
    ArgumentError,
    CoreInferError,
    MissingPackageError,
    ModelFileError,
    UnsupportedModelError,
)
from coreinfer_edge.model.header import read_header
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # the models are too small for more

LlamaLogits = Callable[..., NDArray[np.float32]]
Folder = Callable[..., Path]

TEXT = "The mill stood by the river, and nobody knew who had built it. " * 60
REPOSITORY = Path(__file__).resolve().parents[2]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of one merge, with GPT-2's way to split words, which llama.cpp knows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "\u0120t", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u0120", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """``hf_folder(**changes) -> Path``: a small Llama with random weights."""
    made: dict[str, Path] = {}

    def model(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            config = transformers.LlamaConfig(
                vocab_size=258,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                bos_token_id=257,
                eos_token_id=257,
                initializer_range=0.15,
                **changes,
            )
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("hf") / "small-llama"
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return model


@pytest.fixture(scope="module", autouse=True)
def _tokenizer_known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The converter knows tokenizers by a hash; ours splits text as GPT-2's does."""
    start = tmp_path_factory.mktemp("converter") / "converter.py"
    start.write_text(
        f"import sys, runpy\nsys.argv[0] = {str(hugging_face.CONVERTER)!r}\n"
        f"sys.path.insert(0, {str(hugging_face.CONVERTER.parent)!r})\n"
        f"sys.path.insert(1, {str(hugging_face.CONVERTER.parent / 'gguf-py')!r})\n"
        "from conversion.base import TextModel\n"
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hugging_face, "CONVERTER", start)
        yield


def conversion(source: Path, output: Path, **options: Any) -> Conversion:
    options = {"calibration": TEXT, "n_tokens": 1024, "n_threads": 1, "type": "f32", **options}
    return Conversion(source, output, **options)


@pytest.fixture(scope="module")
def made(hf_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama in F32, with statistics of torch."""
    path = tmp_path_factory.mktemp("made") / "small.gguf"
    convert(conversion(hf_folder(), path))
    return path


def test_a_hugging_face_model_becomes_a_gguf_with_the_same_logits_and_statistics(
    made: Path, hf_folder: Folder, llama_logits: LlamaLogits
) -> None:
    tokens = list(range(3, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(hf_folder())
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(llama_logits(made, tokens), expected, atol=1e-3)
    prior = from_header(read_header(made))
    assert prior is not None
    assert prior.gradient is not None
    with EdgeLLM(made, 0.5, n_ctx=128, n_threads=1, warmup=0) as llm:
        llm.generate("The mill", max_tokens=24)
        assert llm.last is not None
        assert llm.last.density < 0.6


def test_torch_and_native_statistics_agree(made: Path, hf_folder: Folder) -> None:
    header = read_header(made)
    torch_, native = (
        calibrated(conversion(hf_folder(), made, back_end=back_end), header)
        for back_end in ("torch", "native")
    )
    assert (torch_.layers, torch_.n_tokens) == (native.layers, native.n_tokens)
    for name in ("mean", "mean_square", "normalized_mean_square"):
        for one, other in zip(getattr(torch_, name), getattr(native, name), strict=True):
            error = np.sqrt(np.mean((one - other) ** 2) / np.mean(one**2))
            assert error < 5e-3, name  # keys and values are kept in half precision by llama.cpp
    assert torch_.clusters is not None
    assert native.clusters is not None
    for one, other in zip(torch_.clusters.frequency, native.clusters.frequency, strict=True):
        mean = [counts.astype(float).mean(axis=0) for counts in (one, other)]
        assert np.abs(mean[0] - mean[1]).mean() < 2  # of 255


def test_gradients_are_those_of_single_tokens_on_average(made: Path, hf_folder: Folder) -> None:
    """Against labels of single tokens, each with a gradient of its own."""
    folder = hf_folder()
    header = read_header(made)
    text = TEXT[:65]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    acts: list[Any] = []
    model.requires_grad_(False)

    def hook(_: Any, arguments: tuple[Any, ...]) -> None:
        if not arguments[0].requires_grad:
            arguments[0].requires_grad_(True)
        acts.append(arguments[0])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(hook)
    log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    exact = [np.zeros(160) for _ in acts]
    random = np.random.default_rng(0)
    n_labels = 8
    for position in range(len(ids)):
        p = log_p[position].detach().exp().double().numpy()
        for label in random.choice(len(p), n_labels, p=p / p.sum()):
            gradients = torch.autograd.grad(log_p[position, label], acts, retain_graph=True)
            for total, gradient in zip(exact, gradients, strict=True):
                total += gradient[0].double().square().sum(0).numpy() / n_labels / len(ids)
    seen = [
        calibrated(conversion(folder, made, calibration=text, n_tokens=64, seed=seed), header)
        for seed in range(12)
    ]
    for i, expected in enumerate(exact):
        mean = np.mean([prior.gradient[i] for prior in seen if prior.gradient], axis=0)
        assert mean.mean() == pytest.approx(expected.mean(), rel=0.15)
        assert np.corrcoef(mean, expected)[0, 1] > 0.8


def test_a_relu_model_reports_the_share_of_exact_zeros(hf_folder: Folder, tmp_path: Path) -> None:
    folder = hf_folder(hidden_act="relu")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    path = tmp_path / "relu.gguf"
    try:
        prior = convert(conversion(folder, path))
    except UnsupportedModelError:
        pytest.skip("this llama.cpp has no Llama with ReLU")
    assert prior.zero_share is not None
    shares: list[float] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, arguments: shares.append(float((arguments[0] == 0).float().mean()))
    )
    tokens = list(TEXT.encode()[:512])
    with torch.no_grad():
        model(
            torch.tensor(
                [
                    transformers.AutoTokenizer.from_pretrained(folder)(bytes(tokens).decode())[
                        "input_ids"
                    ]
                ]
            )
        )
    assert 0.3 < prior.zero_share[1] < 0.7
    assert prior.zero_share[1] == pytest.approx(shares[0], abs=0.05)


@pytest.mark.parametrize("type", ["q4_k_m", "f16"])
def test_it_is_quantised_to_the_type_asked_for(
    type: str, hf_folder: Folder, tmp_path: Path
) -> None:
    path = tmp_path / "out.gguf"
    convert(conversion(hf_folder(), path, type=type, back_end="native", n_tokens=64))
    types = {tensor.type for tensor in read_header(path).tensors.values()}
    # K-quants need rows of 256, and give way to others of as many bits
    wanted = {
        "q4_k_m": {"q5_0", "q8_0", "q5_1"},
        "q8_0": {"q8_0"},
        "f16": {"f16"},
        "q4_0": {"q4_0"},
    }
    assert types & wanted[type]
    assert list(tmp_path.glob(".*gguf*")) == []


def test_the_same_input_and_seed_give_the_same_bytes(hf_folder: Folder, tmp_path: Path) -> None:
    files = [tmp_path / "1" / "out.gguf", tmp_path / "2" / "out.gguf"]
    for file in files:
        file.parent.mkdir()
        convert(conversion(hf_folder(), file, type="q4_0", n_tokens=512, seed=3))
    assert files[0].read_bytes() == files[1].read_bytes()


# --- models that do not fit into memory -----------------------------------------------------------

# Those of hf_models.py that transformers loads without code of their own.
STREAMED = (
    "opt",
    "opt-350m",
    "relu",
    "llama-2",
    "llama-3",
    "mistral",
    "qwen-2",
    "qwen-3",
    "gemma-2",
    "gemma-3",
    "phi-3",
)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``family_folder(name) -> Path``: the model of a family of hf_models.py."""
    from hf_models import FAMILIES, make

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(FAMILIES[name], made[name])
        return made[name]

    return folder


def collected(folder: Path) -> tuple[list[Statistics], list[Floats]]:
    """The statistics of two windows of a model of hf_models.py, and the gradients."""
    from coreinfer_edge.calibrate.torch_statistics import TorchStatistics

    ffns = [Ffn(layer, 160, 0) for layer in range(3)]
    back_end = TorchStatistics(folder, ffns, 0.4, 32, seed=0, width=64)
    windows = [range(4, 68), range(300, 364)]
    return [each for window in windows for each in back_end.run(window)], back_end.gradient()


def without_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch_model, "available_bytes", lambda: (0, "the test"))


@pytest.mark.parametrize("family", STREAMED)
def test_a_model_that_does_not_fit_is_streamed_to_the_same_statistics(
    family: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family_folder(family)
    in_memory, gradient = collected(folder)
    without_memory(monkeypatch)
    streamed, streamed_gradient = collected(folder)
    assert all(np.all(each > 0) for each in gradient)
    np.testing.assert_allclose(streamed_gradient, gradient, rtol=1e-4, atol=1e-7)
    for one, other in zip(streamed, in_memory, strict=True):
        for name in ("sum", "sum_sq", "normalized_sq", "top", "active", "n_tokens"):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("family", ["llama-2", "opt", "gemma-2", "qwen-3"])
def test_streaming_holds_the_weights_of_two_layers_at_the_most(
    family: str, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and is still held by a module or by autograd."""
    from accelerate.utils import OffloadedWeightsLoader
    from torch.multiprocessing.reductions import StorageWeakRef

    folder = family_folder(family)
    held: list[tuple[Any, int]] = []
    seen: list[int] = []
    read = OffloadedWeightsLoader.__getitem__

    def watched(loader: Any, name: str) -> Any:
        weight = read(loader, name)
        held.append((StorageWeakRef(weight.untyped_storage()), weight.nbytes))
        held[:] = [(storage, size) for storage, size in held if not storage.expired()]
        seen.append(sum(size for _, size in held))
        return weight

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", watched)
    without_memory(monkeypatch)
    collected(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = sum(weight.nbytes for weight in model.parameters())
    layer = sum(w.nbytes for name, w in model.named_parameters() if ".layers.0." in name)
    assert 0 < max(seen) <= 2 * layer < total
    assert all(storage.expired() for storage, _ in held)


@pytest.mark.parametrize(
    ("share", "streamed", "dtype"),
    [(0.9, True, torch.bfloat16), (3.9, False, torch.bfloat16), (4.1, False, torch.float32)],
)
def test_a_model_is_streamed_only_where_it_does_not_fit(
    share: float,
    streamed: bool,
    dtype: torch.dtype,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(family_folder("llama-2"))
    folder = tmp_path / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    n_bytes = sum(path.stat().st_size for path in hugging_face.weight_files(folder))
    available = int(share * n_bytes)
    monkeypatch.setattr(torch_model, "available_bytes", lambda: (available, "the test"))
    model = torch_model.load_model(folder, n_ff=3 * 160, n_tokens=16)
    on_disk = {name for name, weight in model.named_parameters() if weight.device.type == "meta"}
    layers = {name for name, _ in model.named_parameters() if ".layers." in name}
    assert on_disk == (layers if streamed else set())
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_weights_that_are_not_in_safetensors_are_streamed_from_a_copy_that_is_removed(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family_folder("opt")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    folder, scratch = tmp_path / "model", tmp_path / "scratch"
    for each in (folder, scratch):
        each.mkdir()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    _, gradient = collected(source)
    monkeypatch.setattr(torch_model.tempfile, "tempdir", str(scratch))
    without_memory(monkeypatch)
    _, streamed = collected(folder)
    np.testing.assert_allclose(streamed, gradient, rtol=1e-4, atol=1e-7)
    gc.collect()
    assert list(scratch.iterdir()) == []


def test_conversion_streams_a_model_that_does_not_fit(
    made: Path, hf_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = read_header(made)
    in_memory = from_header(header)
    without_memory(monkeypatch)
    streamed = calibrated(conversion(hf_folder(), made), header)
    assert in_memory is not None
    for name in ("mean", "mean_square", "gradient"):
        np.testing.assert_allclose(
            getattr(streamed, name), getattr(in_memory, name), rtol=5e-3, atol=1e-5, err_msg=name
        )


# --- what goes wrong ------------------------------------------------------------------------------


def folder_with(source: Path, tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_what_the_converter_says_last_is_the_error(hf_folder: Folder, tmp_path: Path) -> None:
    folder = folder_with(hf_folder(), tmp_path, architectures=["NoSuchModel"])
    with pytest.raises(CoreInferError, match="NoSuchModel is not supported"):
        convert(conversion(folder, tmp_path / "out.gguf"))
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("gguf")] == []


def test_damaged_weights_are_one_error(hf_folder: Folder, tmp_path: Path) -> None:
    folder = folder_with(hf_folder(), tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"llama\.cpp's converter cannot convert"):
        convert(conversion(folder, tmp_path / "out.gguf"))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_is_refused_before_the_work(
    missing: str, hf_folder: Folder, tmp_path: Path
) -> None:
    folder = folder_with(hf_folder(), tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ModelFileError, match=r"config\.json|no weights"):
        check(conversion(folder, tmp_path / "out.gguf"))


@pytest.mark.parametrize("options", [{"type": "q9"}, {"back_end": "jax"}])
def test_unknown_types_and_back_ends_are_refused(
    options: dict[str, str], hf_folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="must be one of"):
        check(conversion(hf_folder(), tmp_path / "out.gguf", **options))


@pytest.mark.parametrize("package", ["torch", "accelerate"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, hf_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'coreinfer-edge\[convert\]'"):
        check(conversion(hf_folder(), tmp_path / "out.gguf"))


def test_an_interrupt_leaves_nothing_behind(
    hf_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            children.append(self)

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hugging_face.subprocess, "Popen", Watched)
    monkeypatch.setattr(hugging_face.time, "sleep", interrupt)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(conversion(hf_folder(), folder / "out.gguf"))
    assert list(folder.iterdir()) == []
    assert children[0].poll() is not None
