"""Arguments out of their range: each works or raises an error of ours; none ends the process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RandomModel = Callable[..., Path]

Case = dict[str, Any]

# Arguments of EdgeLLM, and of generate or chat under their names. A group shares a process.
CASES: dict[str, list[Case]] = {
    "threads": [
        {name: value}
        for name in ("n_threads", "n_threads_batch")
        for value in (100_000, 513, 512, 0, -1, 2**31, 2**40, 1.5, "4", True)
    ],
    "batch": [
        {name: value}
        for name in ("n_batch", "n_ubatch")
        for value in (1, 0, -1, 2**31, 2**32, 2**40, 1.5, "512", None)
    ]
    + [{"n_batch": 8, "n_ubatch": 64}, {"n_batch": 1, "logits_all": True}],
    "cache type": [
        {name: value, "flash_attn": flash}
        for name in ("type_k", "type_v")
        for value in (0, 1, 2, 8, 12, 16, 24, 30, 4, 999, -1, 2**40, "q8_0", 1.0)
        for flash in (False, True)
    ]
    + [{"type_k": 8, "type_v": 8, "flash_attn": True}],
    "context": [{"n_ctx": n} for n in (1, 2, 0, -1, 2**31 - 1, 2**31, 2**32, 2**64, 1.5, "512")],
    "device": [
        {"n_gpu_layers": n} for n in (-1, -2, 10**6, 2**31 - 1, 2**31, 2**40, 1.5, "all", None)
    ]
    + [{"split_mode": n} for n in (0, 1, 2, 3, 99, -1, 2**40, "row")]
    + [{"main_gpu": n, "split_mode": mode} for n in (1, 99, -1, -2, 2**40) for mode in (0, 1)]
    + [{"tensor_split": s} for s in ([], [0.0], [-1.0], [nan], [inf, 1.0], [1.0] * 999, "x", 1)],
    "seed": [{"seed": n} for n in (0, -1, -2, 2**31, 2**32, 2**64, 1.5, "x", None)]
    + [{"generate": {"seed": n}} for n in (0, -1, 2**32, 2**64, 1.5, "x")],
    "rope": [{"rope_scaling_type": n} for n in (-1, 0, 1, 2, 3, 99, -2, 2**40, "yarn", None)]
    + [
        {name: value}
        for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")
        for value in (0.0, -1.0, 1e-30, 1e30, 1e300, inf, nan, "x", None)
    ]
    + [
        {"rope_scaling_type": 2, "yarn_ext_factor": 1.0, name: value}
        for name in ("yarn_beta_fast", "yarn_beta_slow", "rope_freq_scale", "rope_freq_base")
        for value in (0.0, -1.0, 1e30, inf, nan)
    ]
    + [{"yarn_orig_ctx": n} for n in (1, -1, 2**32, 2**40, 1.5)],
    "override": [
        {"kv_overrides": overrides}
        for overrides in (
            {},
            {"llama.block_count": 2},
            {"llama.block_count": 0},
            {"llama.block_count": -1},
            {"llama.block_count": 5},
            {"llama.block_count": 100_000},
            {"llama.block_count": "x"},
            {"llama.attention.head_count": 0},
            {"llama.attention.head_count": 3},
            {"llama.attention.head_count_kv": 0},
            {"llama.attention.head_count_kv": 3},
            {"llama.attention.layer_norm_rms_epsilon": -1.0},
            {"llama.attention.layer_norm_rms_epsilon": nan},
            {"llama.attention.key_length": 7},
            {"llama.context_length": 0},
            {"llama.context_length": -1},
            {"llama.embedding_length": 0},
            {"llama.expert_count": 5000},
            {"llama.expert_count": 4},
            {"llama.feed_forward_length": 10**6},
            {"llama.rope.dimension_count": 7},
            {"llama.rope.scaling.type": "nonsense"},
            {"llama.vocab_size": 1},
            {"general.architecture": "nonsense"},
            {"general.architecture": "clip"},
            {"general.architecture": "gpt2"},
            {"tokenizer.ggml.model": "nonsense"},
            {"tokenizer.ggml.model": "bert"},
            {"tokenizer.ggml.model": "none"},
            {"tokenizer.ggml.pre": "nonsense"},
            {"tokenizer.ggml.bos_token_id": 10**6},
            {"tokenizer.ggml.eos_token_id": -1},
            {"tokenizer.ggml.add_bos_token": 7},
            {"": 1},
            {"k" * 127: 1},
            {"k" * 128: 1},
            {"k" * 1000: 1},
            {"key": "v" * 127},
            {"key": "v" * 128},
            {"key": "v" * 1000},
            {"key": 2**64},
            {"key": None},
            {"key": [1]},
            {5: 1},
            [1],
            "x",
        )
    ],
    "chat": [
        {"chat_format": name, "chat": {}} for name in ("nonsense", "chatml", "llama-2", "", 5, None)
    ]
    + [{"chat_handler": 5, "chat": {}}]
    + [
        {"messages": messages, "chat": {}}
        for messages in ([{}], [{"role": "x", "content": "x"}], [{"role": "user"}], ["x"], "x", 5)
    ]
    + [{"chat": options} for options in ({"response_format": "x"}, {"tools": "x"})],
    "logits": [
        {"generate": {"logprobs": 3}},
        {"logits_all": True, "generate": {"logprobs": 3}},
        {"logits_all": True, "generate": {"logprobs": -1}},
        {"logits_all": True, "generate": {"logprobs": 10**6}},
        {"embedding": True},
        *({"pooling_type": n} for n in (0, 1, 4, 99, -2, 2**40)),
        *({"attention_type": n} for n in (0, 1, 99, -2)),
        *({"last_n_tokens_size": n} for n in (0, -1, 10**6, 1.5)),
    ],
    "sampling": [
        {"generate": {name: value}}
        for name, values in {
            "temperature": (-1, nan, inf, 1e-30, "x", None),
            "top_k": (-1, 0, 2**31, 1.5, None),
            "top_p": (-1, 0, 2, nan),
            "min_p": (-1, 2, nan),
            "typical_p": (-1, 0, 2, nan),
            "repeat_penalty": (0, -1, nan, inf),
            "frequency_penalty": (nan, inf),
            "mirostat_mode": (1, 2, 9, -1),
            "mirostat_tau": (-1, nan),
            "logit_bias": ({-1: 1}, {10**6: 1}, {5: nan}, {"x": 1}, [1]),
            "grammar": ("x", 5),
            "max_tokens": (-1, 0, 10**9, 2**64, 1.5, "x"),
            "stop": ("", [""], 5, [5]),
            "suffix": ("x", 5),
            "echo": (True,),
        }.items()
        for value in values
    ],
    "other": [{"numa": n} for n in (True, 1, 2, 3, 4, 99, -1, "x")]
    + [
        {name: value}
        for name in ("flash_attn", "op_offload", "swa_full", "offload_kqv", "use_mmap", "no_perf")
        for value in (2, -1, "x", None, [])
    ]
    + [{"use_mlock": True}, {"lora_path": "nowhere"}, {"lora_scale": nan}, {"lora_base": "nowhere"}]
    + [{name: 5} for name in ("draft_model", "tokenizer", "verbose", "spm_infill", "warmup")]
    + [{"density": d} for d in (nan, inf, -1, 0, 1e-300, "x", None)],
}

# Runs the cases from i on; the last line is the case under way, should the process end.
RUN = """
import sys
from math import inf, nan
from coreinfer_edge import CoreInferError, EdgeLLM

path, cases = sys.argv[1], eval(sys.argv[2])
for case in cases:
    print(case, flush=True)
    arguments = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "warmup": 0, **case}
    generate = {"max_tokens": 4, **arguments.pop("generate", {})}
    chat = arguments.pop("chat", None)
    messages = arguments.pop("messages", [{"role": "user", "content": "x"}])
    try:
        with EdgeLLM(path, **arguments) as llm:
            if chat is None:
                llm.generate("the hat", **generate)
            else:
                llm.chat(messages, max_tokens=4, **chat)
    except CoreInferError as error:
        assert str(error)
print("done")
"""


@pytest.mark.parametrize("group", CASES)
def test_no_argument_ends_the_process_or_raises_an_error_of_others(
    group: str, random_model: RandomModel
) -> None:
    path = random_model("llama", shape="small")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), repr(CASES[group])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    case = done.stdout.splitlines()[-1]
    assert (done.returncode, case) == (0, "done"), f"{case}: {done.stderr[-2000:]}"
