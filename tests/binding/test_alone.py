"""Several tokens at once, each with the bits that it has as the only one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_session import core_session
from test_reference import some_tokens

RandomModel = Callable[..., Path]

# Attention splits its keys from 512 on, among threads.
N_PROMPT, N_TOKENS = 520, 24


def evaluated(path: Path, at_once: int, verify: bool, **options: Any) -> Any:
    with core_session(path, n_ctx=768, type_k=None, type_v=None, **options) as session:
        tokens = some_tokens(N_PROMPT + N_TOKENS)
        session.run(tokens[:N_PROMPT])
        if verify:
            session.core.use_verify()
        return session.run(tokens[N_PROMPT:], at_once)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("type", ["f16", "q4_0", "q4_k", "q8_0"])
def test_a_verified_token_has_the_bits_of_a_single_one(
    random_model: RandomModel, type: str, flash_attn: bool, packed: bool
) -> None:
    path = random_model("llama", type, shape="small", n_ctx=768)
    options = {"flash_attn": flash_attn, "packed": packed, "n_threads": 2, "n_threads_batch": 2}
    alone = evaluated(path, 1, verify=False, **options)
    for at_once in (7, 16):
        assert (evaluated(path, at_once, verify=True, **options) == alone).all()


def test_without_the_mark_rounding_tells_several_from_one(random_model: RandomModel) -> None:
    path = random_model("llama", "f16", shape="small", n_ctx=768)
    alone, batch = (evaluated(path, n, verify=False) for n in (1, 7))
    assert (alone != batch).any()
    assert np.allclose(alone, batch, atol=0.5)
