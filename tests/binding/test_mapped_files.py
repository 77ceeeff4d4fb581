"""Pages of mapped model files, which weights in our layout need no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from core_session import core_session

from coreinfer_edge import EdgeLLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted on Linux only")


def resident(path: Path) -> int:
    """Bytes of a file's mappings that are in the memory of this process."""
    result, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            is_file = line.endswith(str(path.resolve()))
        elif is_file and key == "Rss:":
            result += int(values[0]) << 10
    return result


@pytest.mark.slow
def test_a_model_in_our_layout_is_in_memory_once(smollm2: Path) -> None:
    with core_session(smollm2, packed=True) as session:
        if not session.llama.packed_bytes:
            pytest.skip("this processor has no kernels of ours")
    with EdgeLLM(smollm2, n_ctx=256) as llm:
        assert llm.llama.packed_bytes > 0.95 * smollm2.stat().st_size
        assert llm.generate("The history of Rome", 8, temperature=0)
        assert resident(smollm2) < 0.1 * smollm2.stat().st_size
    with EdgeLLM(smollm2, n_ctx=256, density=1.0) as llm:
        llm.generate("The history of Rome", 8, temperature=0)
        assert resident(smollm2) > 0.5 * smollm2.stat().st_size
