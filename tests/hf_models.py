"""Small random Hugging Face models of the paper's families, with tokenizers made here.

``make`` writes one as a folder, ``convert`` turns folders into GGUFs with llama.cpp's converter.
That tells BPE pre-tokenizers apart by a hash of token ids, which a vocabulary made here cannot
have, so for those it is told which one it is.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from coreinfer_edge.binding import load as native
from coreinfer_edge.measure.random_llama import byte_characters

# The models are too small for threads, which then only spin.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
CONVERTER = native.BINDING_DIR.parent / "convert"

N_VOCAB = 512
N_LAYER = 3
LOGIT_SPREAD = 3.0
SEED = 5  # one with which no greedy text is a single word for ever

_SIZES: dict[str, Any] = {
    "vocab_size": N_VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class FATReLU(torch.nn.Module):
    """x where it is above a threshold, else 0 (ProSparse, arXiv 2402.13516)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.threshold, x, torch.zeros_like(x))


class ShiftedReLU(FATReLU):
    """What is above the threshold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x - self.threshold)


@dataclass(frozen=True)
class Family:
    """A class of models.

    Attributes:
        model: the class in transformers, its configuration's is ``model.config_class``.
        config: arguments of the configuration beyond ``_SIZES``.
        tokenizer: writes the files of the tokenizer.
        pre: what the converter is told to be the BPE pre-tokenizer.
        activation: put in place of the gate's.
        written: what config.json says otherwise than transformers writes it.
    """

    model: str
    config: Mapping[str, Any]
    tokenizer: Callable[[Path], None]
    pre: str | None = None
    activation: torch.nn.Module | None = None
    written: Mapping[str, Any] | None = None


# --- tokenizers -----------------------------------------------------------------------------------

# What vocabularies are trained on.
_TEXT = """\
The river that runs through the old town was once the only road that the merchants had.
They came in spring, when the water was high, with salt, wool and iron, and they left in autumn.
Nobody knows who built the first bridge; it was there in 1287, when the king's men counted houses,
and it fell in 1342, after three weeks of rain. The second one, of stone, stands to this day.

A neuron that answers to one sentence seldom answers to the next. What matters is which of them
answer together, how often, and how strongly. Half of them can be left out of most texts, and the
reader will not see it; leave out the other half, and there is nothing left to read.

"How far is it from here to the sea?" asked the child. "About 120 kilometres," said the teacher,
"or 75 miles. If you walk 20 kilometres each day, you'll be there in six days. Isn't that far?"
The answer wasn't what she had hoped for - she'd thought of an afternoon. She didn't give up.

def area(width, height):
    # the area of a rectangle
    return width * height

Bread needs four things: flour, water, salt and time. Mix 500 g of flour with 350 g of water, wait
for an hour, add 10 g of salt, and fold the dough every 30 minutes. After the fourth fold let it
rest overnight. In the morning heat the oven, shape the loaf, and bake it for 45 minutes. Let it
cool: the inside goes on baking. The crust should sing, and the café will smell of it.
"""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _sentencepiece(kind: str) -> Callable[[Path], None]:
    """A SentencePiece model as those of Llama 2 or Gemma, which differ in what the ids mean."""

    def write(folder: Path) -> None:
        gemma = kind == "GemmaTokenizer"
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_TEXT.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=N_VOCAB,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.99,
            normalization_rule_name="identity",
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=not gemma,
            **dict(
                zip(
                    ("pad_id", "eos_id", "bos_id", "unk_id"),
                    (0, 1, 2, 3) if gemma else (-1, 2, 1, 0),
                    strict=True,
                )
            ),
            **({"eos_piece": "<eos>", "bos_piece": "<bos>"} if gemma else {}),
            minloglevel=2,
            num_threads=1,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        _write_json(
            folder / "tokenizer_config.json",
            tokenizer_class=kind,
            bos_token="<bos>" if gemma else "<s>",
            eos_token="<eos>" if gemma else "</s>",
            unk_token="<unk>",
            **({"pad_token": "<pad>"} if gemma else {"legacy": False}),
            add_bos_token=True,
            add_eos_token=False,
        )

    return write


def _bpe(pattern: str, bos: str | None, eos: str) -> Callable[[Path], None]:
    """A byte-level BPE tokenizer as those of Llama 3 and Qwen."""

    def write(folder: Path) -> None:
        specials = [token for token in (bos, eos) if token]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(
            [_TEXT],
            trainers.BpeTrainer(
                vocab_size=N_VOCAB,
                special_tokens=specials,
                initial_alphabet=byte_characters(),
                show_progress=False,
            ),
        )
        if bos:
            tokenizer.post_processor = processors.TemplateProcessing(
                f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token=bos, eos_token=eos
        ).save_pretrained(folder)

    return write


def _opt_tokenizer(folder: Path) -> None:
    """GPT-2's BPE as OPT's repositories have it: vocab.json, merges.txt, </s> before each text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        [_TEXT],
        trainers.BpeTrainer(
            vocab_size=N_VOCAB - 8,  # the model's is larger than the tokenizer's
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            initial_alphabet=byte_characters(),
            show_progress=False,
        ),
    )
    trained.model.save(str(folder))

    def token(content: str) -> dict[str, Any]:
        sides = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        return {"__type": "AddedToken", "content": content, "normalized": True, **sides}

    _write_json(
        folder / "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        **{f"{kind}_token": token("</s>") for kind in ("bos", "eos", "unk")},
        pad_token=token("<pad>"),
        add_bos_token=True,
        add_prefix_space=False,
        errors="replace",
    )


_LLAMA_2 = _sentencepiece("LlamaTokenizer")
_GEMMA = _sentencepiece("GemmaTokenizer")
_QWEN = _bpe(_QWEN2, None, "<|endoftext|>")

# --- families -------------------------------------------------------------------------------------

_OPT = {"ffn_dim": 160, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
_THRESHOLD = 0.25
_GEMMA_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

FAMILIES = {
    "opt": Family("OPTForCausalLM", _OPT, _opt_tokenizer),
    "opt-350m": Family(
        "OPTForCausalLM",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
        _opt_tokenizer,
    ),
    "relu": Family("LlamaForCausalLM", {"hidden_act": "relu"}, _LLAMA_2),
    "fatrelu": Family(
        "LlamaForCausalLM",
        {},
        _LLAMA_2,
        activation=FATReLU(_THRESHOLD),
        # ProSparse's config.json names code that the repository brings along
        written={
            "architectures": ["SparseLlamaForCausalLM"],
            "model_type": "sparsellama",
            "hidden_act": "fatrelu",
            "hidden_act_param": _THRESHOLD,
        },
    ),
    "shiftrelu": Family(
        "LlamaForCausalLM",
        {},
        _LLAMA_2,
        activation=ShiftedReLU(_THRESHOLD),
        written={"hidden_act": "shiftrelu", "hidden_act_param": _THRESHOLD},
    ),
    "llama-2": Family("LlamaForCausalLM", {"num_key_value_heads": 4}, _LLAMA_2),
    "llama-3": Family(
        "LlamaForCausalLM",
        {
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        _bpe(_LLAMA3, "<|begin_of_text|>", "<|end_of_text|>"),
        "llama-bpe",
    ),
    "mistral": Family("MistralForCausalLM", {"sliding_window": None}, _LLAMA_2),
    "qwen-2": Family("Qwen2ForCausalLM", {"bos_token_id": None, "eos_token_id": 0}, _QWEN, "qwen2"),
    "qwen-3": Family(
        "Qwen3ForCausalLM",
        {"bos_token_id": None, "eos_token_id": 0, "head_dim": 32, "tie_word_embeddings": True},
        _QWEN,
        "qwen2",
    ),
    "gemma-2": Family(
        "Gemma2ForCausalLM",
        {**_GEMMA_IDS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
        _GEMMA,
    ),
    "gemma-3": Family(
        "Gemma3ForCausalLM",
        {**_GEMMA_IDS, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
        _GEMMA,
    ),
    "phi-3": Family(
        "Phi3ForCausalLM",
        {"pad_token_id": 0, "original_max_position_embeddings": 256, "sliding_window": None},
        _LLAMA_2,
    ),
}


def make(family: Family, folder: Path) -> Any:
    """Write a random model with its tokenizer; returns the model."""
    torch.manual_seed(SEED)
    model_class = getattr(transformers, family.model)
    sizes = {**_SIZES, **family.config}
    if "ffn_dim" in sizes:
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    config = model_class.config_class(**sizes)
    config.save_pretrained(folder)
    family.tokenizer(folder)
    model = model_class(config).float().eval()
    _draw_weights(model, _no_text(folder))
    if family.activation is not None:
        for layer in model.model.layers:
            layer.mlp.act_fn = family.activation
    model.save_pretrained(folder)
    if family.written:
        path = folder / "config.json"
        _write_json(path, **{**json.loads(path.read_text()), **family.written})
    return model


def _no_text(folder: Path) -> list[int]:
    """Tokens that are no text by themselves: special, unused, or a part of a character."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = (tokenizer.decode([i], skip_special_tokens=True) for i in range(N_VOCAB))
    return [i for i, text in enumerate(texts) if not text.isprintable() or not text.strip("\ufffd")]


@torch.no_grad()
def _draw_weights(model: Any, seldom: Sequence[int]) -> None:
    """Weights by which activations stay of order one and logits spread by LOGIT_SPREAD.

    The tokens ``seldom`` are never the likeliest.
    """
    embedding = model.get_input_embeddings().weight
    is_gemma = "Gemma" in type(model).__name__
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight is embedding:
            # What all tokens share makes a neuron active at most tokens or at few, as those of
            # trained models are. Gemma multiplies its embeddings itself.
            shared = 0.7 * torch.randn(weight.shape[1])
            scale = weight.shape[1] ** -0.5 if is_gemma else 1.0
            weight.copy_(scale * (torch.randn_like(weight) + shared))
        elif "embed_positions" in name:
            weight.copy_(torch.randn_like(weight))
        elif weight.ndim > 1:
            weight.copy_(1.5 * torch.randn_like(weight) / math.sqrt(weight.shape[1]))
        else:
            is_factor = name.endswith("norm.weight") and not is_gemma  # whose factor is 1 + weight
            weight.copy_(is_factor + 0.1 * torch.randn_like(weight))

    model.get_output_embeddings().weight[seldom] *= 0.1

    # Random signs, or the last token would be its own likeliest successor where the embedding is
    # the output matrix too.
    names = ("model.norm", "model.decoder.final_layer_norm", "model.decoder.project_out")
    last = next(weights[f"{name}.weight"] for name in names if f"{name}.weight" in weights)
    signs = torch.randint(0, 2, last.shape[-1:]) * 2.0 - 1
    factor, one = LOGIT_SPREAD, float(is_gemma and last.ndim == 1)
    for _ in range(2):
        last.copy_((last + one) * signs * factor - one)
        signs = torch.ones_like(signs)
        factor = LOGIT_SPREAD / model(torch.arange(4, 68)[None]).logits.std()


# --- conversion -----------------------------------------------------------------------------------

_RUN = """
import json, runpy, sys, traceback
converter, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [converter, converter + "/gguf-py"]
from conversion.base import TextModel
hashed = TextModel.get_vocab_base_pre
for folder, out, pre in jobs:
    TextModel.get_vocab_base_pre = hashed if pre is None else lambda self, tokenizer: pre
    sys.argv = ["convert", folder, "--outfile", out, "--outtype", "f32"]
    try:
        runpy.run_path(converter + "/convert_hf_to_gguf.py", run_name="__main__")
    except BaseException:
        if not isinstance(sys.exception(), SystemExit) or sys.exception().code:
            open(out + ".error", "w").write(traceback.format_exc())
"""


def convert(jobs: Sequence[tuple[Path, Path, str | None]]) -> None:
    """Run the converter over folders: (folder, GGUF to write, pre-tokenizer or None).

    Where it fails on one, the reason is beside the GGUF, with the suffix ``.error``.
    """
    arguments = json.dumps([(str(folder), str(out), pre) for folder, out, pre in jobs])
    command = [sys.executable, "-c", _RUN, str(CONVERTER), arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class HFModel:
    """A model of a family: in transformers, its tokenizer, its folder and its GGUF in F32."""

    model: Any
    tokenizer: Any
    folder: Path
    gguf: Path


def make_all(folder: Path) -> dict[str, HFModel]:
    """All families, converted by one process, which has torch to load."""
    made = {}
    for name, family in FAMILIES.items():
        (folder / name).mkdir()
        model = make(family, folder / name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        made[name] = HFModel(model, tokenizer, folder / name, folder / f"{name}.gguf")
    convert([(of.folder, of.gguf, FAMILIES[name].pre) for name, of in made.items()])
    return made
