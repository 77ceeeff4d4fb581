"""EdgeLLM behaves as llama_cpp does: dense token for token, and in all that sampling can do."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import continued, edge
from test_reference import some_tokens

from coreinfer_edge._bundled import llama_cpp
from coreinfer_edge._bundled.llama_cpp import Llama, LlamaGrammar, LogitsProcessorList
from coreinfer_edge._bundled.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from coreinfer_edge.binding import load as native
from coreinfer_edge.run.llm import EdgeLLM

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

STOCK = "COREINFER_STOCK_LIB"


@pytest.fixture
def model(random_model: RandomModel) -> Path:
    return random_model("llama", n_layer=8)


# --- unpatched libllama ---------------------------------------------------------------------------

# Run in this process with our libraries, and in another with the stock libllama.
COMPARED = '''
def compared(llama):
    """Everything that is to be the same: tokens, logits, texts."""
    result = {"tokens": [], "texts": []}
    for text, seed, options in (
        ("The capital of France is", None, {"temp": 0.0}),
        ("def fibonacci(n):", None, {"temp": 0.0, "repeat_penalty": 1.3}),
        ("Once upon a time there was", 7, {"temp": 0.8}),
        ("Once upon a time there was", 8, {"temp": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.01}),
        ("1 2 3 4 5 6 7 8 9 " * 20, 9, {"temp": 0.7, "mirostat_mode": 2}),
    ):
        llama.set_seed(seed or 1)
        steps = llama.generate(llama.tokenize(text.encode(), special=True), **options)
        result["tokens"].append([token for token, _ in zip(steps, range(16))])
        steps.close()
    llama.reset()
    llama.eval(llama.tokenize(b"The quick brown fox jumps over the lazy dog"))
    result["logits"] = llama.scores[: llama.n_tokens].tobytes().hex()
    messages = [{"role": "user", "content": "Name three colours."}]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
        answer = llama.create_chat_completion(messages, max_tokens=16, **options)
        result["texts"].append(answer["choices"][0]["message"]["content"])
        messages += [answer["choices"][0]["message"], {"role": "user", "content": "Why?"}]
    return result
'''

IN_STOCK = f"""
import json, sys
sys.path.insert(0, sys.argv[1])
import llama_cpp
if hasattr(llama_cpp.llama_cpp._lib, "llama_set_ffn_hook"):
    sys.exit("this libllama is patched")
{COMPARED}
print(json.dumps(compared(llama_cpp.Llama(sys.argv[2], **json.loads(sys.argv[3])))))
"""

OPTIONS: dict[str, Any] = {
    "n_ctx": 512,
    "n_batch": 64,  # the longest prompt takes several
    "n_threads": 1,
    "n_threads_batch": 1,
    "logits_all": True,
    "verbose": False,
}


@pytest.fixture(scope="module")
def stock(smollm2: Path) -> dict[str, Any]:
    """What ``compared`` gives with the libllama that COREINFER_STOCK_REFERENCE builds."""
    folder = os.environ.get(STOCK, "")
    if not folder or not any(Path(folder).glob("*llama.*")):
        pytest.fail(
            f"{STOCK} is {folder!r}, where there is no unpatched libllama: run `make test`, or"
            " build with -DCOREINFER_STOCK_REFERENCE=ON and name the folder stock/ of that build"
        )
    done = subprocess.run(
        [
            *(sys.executable, "-c", IN_STOCK),
            *(str(native.BINDING_DIR.parent), str(smollm2), json.dumps(OPTIONS)),
        ],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": folder},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compared(llama: Llama) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(COMPARED, namespace)
    result: dict[str, Any] = namespace["compared"](llama)
    return result


@pytest.mark.parametrize(
    "options",
    [{"density": 1.0}, {"density": 0.5, "warmup": 10**9, "repack": False}],
    ids=["density-1", "endless-warm-up"],
)
def test_dense_is_bit_for_bit_and_token_for_token_what_unpatched_libllama_gives(
    options: dict[str, Any], stock: dict[str, Any], smollm2: Path
) -> None:
    with EdgeLLM(smollm2, **options, **OPTIONS) as llm:
        assert compared(llm.llama) == stock


def test_the_dense_strategy_is_density_1(model: Path) -> None:
    with edge(model, density=1.0) as whole, edge(model, strategy="dense") as dense:
        assert whole.strategy == dense.strategy == "dense"
        assert continued(dense, some_tokens(20), 30) == continued(whole, some_tokens(20), 30)


def test_the_core_set_of_a_real_model_keeps_most_of_what_it_says(smollm2: Path) -> None:
    text = (
        "The water cycle describes how water moves above, on and below the surface of the Earth."
        " The sun warms the sea, and water rises into the air as vapour. The air cools as it rises,"
        " and the vapour becomes drops, which are the clouds. The wind carries the clouds over the"
        " land, where the drops fall as rain or snow. Rivers take the water back to the sea,"
    )

    def predictions(**options: Any) -> Any:
        """Log-probabilities over the second half, with the first half for a prompt."""
        with EdgeLLM(smollm2, warmup=0, **options, **OPTIONS) as llm:
            tokens = llm.llama.tokenize(text.encode())
            start = len(tokens) // 2

            def forced(seen: Any, scores: Any) -> Any:
                scores[:] = -np.inf
                scores[tokens[len(seen)]] = 0
                return scores

            steps = llm.llama.generate(
                tokens[:start], temp=0.0, logits_processor=LogitsProcessorList([forced])
            )
            assert list(itertools.islice(steps, len(tokens) - start)) == tokens[start:]
            steps.close()
            logits = llm.llama.scores[start : len(tokens) - 1].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    dense = predictions(density=1.0)
    divergence = {
        density: (np.exp(dense) * (dense - predictions(density=density))).sum(axis=1).mean()
        for density in (0.9, 0.6, 0.3)
    }
    print(divergence)
    assert 0 < divergence[0.9] < 0.3
    assert divergence[0.9] < divergence[0.6] < divergence[0.3]


# --- llama_cpp.Llama on our libraries -------------------------------------------------------------


def plain(path: Path, **options: Any) -> Llama:
    return Llama(str(path), **{**OPTIONS, **options})


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.0, "stop": ["w2"]},
    {"temperature": 0.0, "stop": " w3"},
    {"seed": 5},
    {"seed": 5, "temperature": 2.0, "top_k": 5},
    {"seed": 5, "top_p": 0.5, "typical_p": 0.7, "min_p": 0.2},
    {"seed": 5, "repeat_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.3},
    {"seed": 5, "mirostat_mode": 1},
    {"seed": 5, "logit_bias": {70: 5.0, 80: 5.0}},
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0, "logprobs": 2, "echo": True},
    {"seed": 5, "max_tokens": 1},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_dense_completions_are_those_of_llama_cpp_to_the_last_field(
    options: dict[str, Any], model: Path
) -> None:
    options = {"max_tokens": 24, **options}
    with edge(model, density=1.0, **OPTIONS) as llm:
        ours = llm.llama.create_completion("the hat", **options)
        text = llm.generate("the hat", **{key: v for key, v in options.items() if key != "echo"})
    llama = plain(model, flash_attn=False, type_k=0, type_v=0)
    theirs = llama.create_completion("the hat", **options)
    assert without_ids(ours) == without_ids(theirs)
    if not options.get("echo"):
        assert text == theirs["choices"][0]["text"]


CHAT: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 5, "stop": ["w2"]},
    {"temperature": 0.8, "seed": 5, "response_format": {"type": "json_object"}},
    {
        "temperature": 0.8,
        "seed": 5,
        "response_format": {
            "type": "json_object",
            "schema": {"type": "object", "properties": {"n": {"enum": ["a", "b"]}}},
        },
    },
]


@pytest.mark.parametrize("options", CHAT, ids=str)
def test_dense_chats_are_those_of_llama_cpp(options: dict[str, Any], model: Path) -> None:
    messages = [{"role": "user", "content": "the hat"}]
    theirs = plain(model).create_chat_completion(messages, max_tokens=30, **options)
    with EdgeLLM(model, density=1.0, **OPTIONS) as llm:
        assert (
            llm.chat(messages, max_tokens=30, **options)
            == (theirs["choices"][0]["message"]["content"])
        )


def test_dense_every_turn_is_what_llama_cpp_gives_that_was_loaded_for_it_alone(model: Path) -> None:
    options = {**OPTIONS, "n_batch": 16}
    first = some_tokens(40)
    with EdgeLLM(model, density=1.0, **options) as llm:
        answer = continued(llm, first, 12)
        second = [*first, *answer, *some_tokens(9)]
        for prompt in (first, second, second, second[:20], [7, *first], first):
            llama = plain(model, n_batch=16)
            theirs = list(itertools.islice(llama.generate(prompt, temp=0.0), 12))
            assert continued(llm, prompt, 12) == theirs
            assert llm.llama.n_tokens == llama.n_tokens
            logits = [
                llama_cpp.llama_get_logits_ith(either.ctx, -1)[: llama.n_vocab()]
                for either in (llm.llama, llama)
            ]
            assert logits[0] == logits[1]


def test_dense_a_second_turn_goes_on_from_the_last_full_batch_it_shares(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    evaluate = Llama.eval

    def counted(llama: Llama, tokens: Any) -> None:
        evaluated.append(len(tokens))
        evaluate(llama, tokens)

    monkeypatch.setattr(Llama, "eval", counted)
    with EdgeLLM(model, strategy="dense", **{**OPTIONS, "n_batch": 16}) as llm:
        first = some_tokens(40)
        answer = continued(llm, first, 3)
        evaluated.clear()
        continued(llm, [*first, *answer, 5], 1)
    assert evaluated == [12]


# --- with a core set ------------------------------------------------------------------------------


@pytest.fixture
def core(model: Path) -> Any:
    with edge(model, warmup=0, **OPTIONS) as llm:
        yield llm
        assert llm.last is not None
        assert llm.last.density < 1


def test_the_same_seed_gives_the_same_text_with_a_core_set_and_another_seed_another(
    core: EdgeLLM,
) -> None:
    texts = [core.generate("the hat", max_tokens=24, seed=seed) for seed in (1, 2, 1, 2)]
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_stop_strings_hold_with_a_core_set(core: EdgeLLM) -> None:
    text = core.generate("the hat", max_tokens=60, temperature=0)
    # a token of the vocabulary: other neighbours may have bytes between them that are no text
    words = re.findall(r"w\d+", text)
    stop = words[len(words) // 2]
    assert (
        core.generate("the hat", max_tokens=60, temperature=0, stop=stop)
        == (text[: text.index(stop)])
    )
    streamed = "".join(core.stream("the hat", max_tokens=60, temperature=0, stop=[stop]))
    assert stop not in streamed


def test_grammars_hold_with_a_core_set(core: EdgeLLM) -> None:
    grammar = LlamaGrammar.from_string('root ::= ("ab" | "cd" | "xyz") root | "."', verbose=False)
    for seed in range(3):
        text = core.generate("the hat", max_tokens=30, seed=seed, grammar=grammar)
        assert re.match(r"(ab|cd|xyz)*(\.|a?|c?|xy?)$", text)
        assert text


def test_json_schemas_hold_with_a_core_set(core: EdgeLLM) -> None:
    schema = {
        "type": "object",
        "properties": {"hat": {"enum": ["red", "blue"]}, "men": {"type": "boolean"}},
        "required": ["hat", "men"],
    }
    for seed in range(3):
        answer = core.chat(
            [{"role": "user", "content": "the hat"}],
            max_tokens=200,
            seed=seed,
            response_format={"type": "json_object", "schema": schema},
        )
        parsed = json.loads(answer)
        assert parsed["hat"] in ("red", "blue")
        assert isinstance(parsed["men"], bool)


def test_logprobs_are_of_the_tokens_that_the_core_set_generates(core: EdgeLLM) -> None:
    answer = core.llama.create_completion("the hat", max_tokens=10, temperature=0, logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    likeliest = [max(top.values()) for top in logprobs["top_logprobs"]]
    assert logprobs["token_logprobs"] == likeliest
    core.generate("the hat", max_tokens=10, temperature=0)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_speculative_decoding_by_prompt_lookup_gives_the_same_tokens(
    density: float, model: Path
) -> None:
    # The default context is longer than a batch, in which the binding would have no room.
    options: dict[str, Any] = {"density": density, "warmup": 0, "n_batch": 64}
    prompt = some_tokens(12) * 8
    with edge(model, **options) as llm:
        expected = continued(llm, prompt, 150)
    draft = LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=4)
    with edge(model, draft_model=draft, **options) as llm:
        assert continued(llm, prompt, 150) == expected
        text = llm.generate(prompt, max_tokens=60, temperature=0)
        assert llm.generate(prompt, max_tokens=60, temperature=0) == text
        assert llm.last is not None
        assert (llm.last.density < 1) == (density < 1)


def test_draft_tokens_during_the_warm_up_work(model: Path) -> None:
    draft = LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=7)
    with edge(model, draft_model=draft, warmup=10, n_ctx=300) as llm:
        tokens = continued(llm, some_tokens(12) * 8, 100)
        assert len(tokens) == 100
        assert llm.llama.run.warmup_tokens >= 10
        assert llm.llama.run.density < 1
        # to the end of the context
        tokens = continued(llm, some_tokens(12) * 8, 1000)
        assert len(tokens) == 300 - 96 + 2
