"""CoreContext: statistics and norms against the reference, and what bad input and bad files do.

Sums of F32 models are compared in root mean squares over the neurons of a layer; the largest error
is about 1e-6 with SiLU, and 6e-5 with GELU, whose table rounds to half precision.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from core_session import Logits, core_session
from make_random_gguf import make_random_gguf
from numpy.typing import NDArray
from reference import ARCHS, Array, Reference
from test_reference import HAS_GELU, TYPES, some_tokens

from coreinfer_edge._bundled.llama_cpp import Llama
from coreinfer_edge.binding.core import CoreContext, column_type, constants
from coreinfer_edge.choose.statistics import BLOCK, CoreSet, Extra, Statistics
from coreinfer_edge.errors import ArgumentError, ModelFileError, UnsupportedModelError

RandomModel = Callable[..., Path]

SILU_TOLERANCE, GELU_TOLERANCE = 2e-5, 5e-4
# Of one activation near the least of the largest; half precision has a last bit of 1e-3.
SILU_TIE, GELU_TIE = 1e-5, 2e-3

NONE, ALL = Extra(), Extra(normalized=True, top_share=0.4)


def test_choosing_pads_core_sets_as_the_library_does() -> None:
    assert constants().block == BLOCK


def test_the_library_names_its_kernels_and_what_it_keeps_of_streamed_weights() -> None:
    assert constants().kernels.decode().split() == [
        "avx512vnni",
        "avx512",
        "avxvnni",
        "avx2",
        "i8mm",
        "dotprod",
        "neon",
        "none",
    ]
    assert constants().lookup_rows == 512
    assert constants().stream_min_chunks * constants().stream_chunk == 8 << 20


def indices(*neurons: int) -> NDArray[np.int32]:
    return np.array(neurons, dtype=np.int32)


# --- what the model has ---------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_every_layer_has_an_ffn_with_its_width_and_the_bytes_of_its_weights(
    arch: str, random_model: RandomModel
) -> None:
    path = random_model(arch, "q8_0", n_layer=3)
    n_bytes = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _, layer, name, *_ = [*tensor.name.split("."), "", ""]
        if name in ("ffn_up", "ffn_gate", "ffn_down"):
            n_bytes[int(layer)] = n_bytes.get(int(layer), 0) + int(tensor.n_bytes)
    with core_session(path) as session:
        found = [(ffn.layer, ffn.n_ff, ffn.n_bytes) for ffn in session.core.ffns]
        assert found == [(i, 160, n_bytes[i]) for i in range(3)]
        assert session.core.full_bytes == session.core.core_bytes == sum(n_bytes.values())


def test_core_bytes_are_those_of_the_compact_tensors_and_of_the_layers_left_dense(
    random_model: RandomModel,
) -> None:
    with core_session(random_model("llama", "q8_0")) as session:
        (layer,) = {ffn.n_bytes for ffn in session.core.ffns}
        half = CoreSet(np.arange(0, 160, 2, dtype=np.int32), None)
        session.core.set_core({1: half, 2: half})
        # 80 of 160 neurons, padded to the block of 32 that the types have
        assert session.core.core_bytes == 2 * layer + 2 * layer * 96 // 160
        session.core.set_core({})
        assert session.core.core_bytes == 4 * layer


def test_columns_have_a_type_of_32_weights_a_block() -> None:
    types = gguf.GGMLQuantizationType
    assert column_type(types.F16) == types.F16
    assert column_type(types.Q6_K) == types.Q8_0
    with pytest.raises(ArgumentError, match="999 is no ggml_type"):
        column_type(999)


@pytest.mark.parametrize("type", ["f32", *TYPES])
def test_down_norms_are_the_squared_norms_of_the_columns_of_every_type(
    type: str, random_model: RandomModel
) -> None:
    path = random_model("llama", type, shape="small", n_layer=2)
    model = Reference(path)
    with core_session(path) as session:
        norms = session.core.down_norms()
    for i, actual in enumerate(norms):
        expected = (model.weight(f"blk.{i}.ffn_down") ** 2).sum(axis=0)
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("arch", ["qwen3moe", "mamba"])
def test_a_model_without_a_dense_ffn_is_refused_and_stays_usable(
    arch: str, random_model: RandomModel
) -> None:
    path, tokens = random_model(arch), some_tokens(8)
    llama = Llama(str(path), n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    llama.eval(tokens)
    before = llama.scores[:8].copy()
    with pytest.raises(UnsupportedModelError, match="no dense FFN"):
        CoreContext(llama.ctx, [path], n_threads=1)
    llama.reset()
    llama.eval(tokens)
    np.testing.assert_array_equal(llama.scores[:8], before)
    llama.close()


# --- statistics -----------------------------------------------------------------------------------


def assert_sums_equal(
    actual: Statistics,
    layer: int,
    activations: Array,
    arch: str = "llama",
    extra: Extra = NONE,
) -> None:
    """``activations``: of all the tokens that should be in the statistics [n_tokens, n_ff]."""
    assert actual.n_tokens[layer] == len(activations)
    assert_sum_equals(actual.sum[layer], activations, arch)
    assert_sum_equals(actual.sum_sq[layer], activations**2, arch)
    if extra.normalized:
        assert_sum_equals(actual.normalized_sq[layer], normalized(activations) ** 2, arch)
    else:
        assert not actual.normalized_sq[layer].any()
    assert_top_equals(actual.top[layer], activations, arch, extra.top_share)


def assert_sum_equals(actual: Array, values: Array, arch: str) -> None:
    """``values``: what should have been added up [n_tokens, n_ff]."""
    expected = values.sum(axis=0)
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    print(f"{error:.1e}")
    assert error < (GELU_TOLERANCE if arch in HAS_GELU else SILU_TOLERANCE)


def normalized(activations: Array) -> Array:
    """Each token's scaled to norm 1."""
    scaled: Array = activations / np.linalg.norm(activations, axis=1, keepdims=True)
    return scaled


def assert_top_equals(actual: Array, activations: Array, arch: str, share: float) -> None:
    """Neuron for neuron, but where rounding may decide which are among a token's largest."""
    tie = GELU_TIE if arch in HAS_GELU else SILU_TIE
    surely, perhaps = np.array([largest(token, share, tie) for token in activations]).sum(axis=0)
    in_doubt = (perhaps - surely).sum()
    print(f"{in_doubt} of {perhaps.sum()} in doubt")
    assert in_doubt <= (0.1 if arch in HAS_GELU else 0.01) * perhaps.sum()
    assert (surely <= actual).all()
    assert (actual <= perhaps).all()


def largest(token: Array, share: float, tie: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which neurons are surely, and which perhaps, among the largest positive ones.

    Both are the same unless another value is less than ``tie`` from the least of the largest, or
    one is so near to zero that rounding makes it positive or not. The zeros of a ReLU are zero.
    """
    falling = np.sort(token)[::-1]

    def least_of_largest(above: float) -> float:
        n_top = math.ceil(round(share * int(((token > above) & (token != 0)).sum()), 6))
        return float(falling[n_top - 1]) if n_top else math.inf

    def is_tied(least: float) -> bool:
        return bool(np.count_nonzero(np.abs(token / least - 1) <= tie) > 1)

    around_zero = 1e-6 * np.abs(token).max()
    high, low = least_of_largest(around_zero), least_of_largest(-around_zero)
    return (
        token > high * (1 + tie) if is_tied(high) else token >= high,
        token >= low * (1 - tie) if is_tied(low) else token >= low,
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_statistics_of_a_prompt_of_many_ubatches_equal_those_of_the_reference(
    arch: str, random_model: RandomModel
) -> None:
    path, tokens = random_model(arch), some_tokens(150)
    with core_session(path, n_batch=32, n_ubatch=16) as session:
        session.core.collect(True, ALL)
        session.run(tokens)
        actual = session.core.statistics()
    for i, activations in enumerate(Reference(path).activations(tokens)):
        assert_sums_equal(actual, i, activations, arch, ALL)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_last_layer_counts_only_the_tokens_whose_logits_were_asked_for(
    arch: str, random_model: RandomModel
) -> None:
    path, tokens = random_model(arch), some_tokens(100)
    with core_session(path, n_batch=32, n_ubatch=16, logits_all=False) as session:
        session.core.collect(True, ALL)
        session.llama.eval(tokens)
        actual = session.core.statistics()
    *others, last = Reference(path).activations(tokens)
    for i, activations in enumerate(others):
        assert_sums_equal(actual, i, activations, arch, ALL)
    # llama_cpp asks for those of the last token of each batch.
    assert_sums_equal(actual, len(others), last[[31, 63, 95, 99]], arch, ALL)


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.1, 0.4, 1.0])
def test_the_largest_are_the_share_asked_for_of_the_positive_neurons(
    share: float, random_model: RandomModel
) -> None:
    path, tokens = random_model("llama", n_ff=200), some_tokens(40)
    with core_session(path) as session:
        session.core.collect(True, Extra(top_share=share))
        session.run(tokens)
        actual = session.core.statistics()
    for i, activations in enumerate(Reference(path).activations(tokens)):
        assert_sums_equal(actual, i, activations, extra=Extra(top_share=share))


@pytest.mark.parametrize(
    ("arch", "type"), [*((arch, "f32") for arch in ARCHS), ("llama", "q4_0"), ("phi3", "q8_0")]
)
def test_collecting_does_not_change_the_logits_by_a_bit(
    arch: str, type: str, random_model: RandomModel
) -> None:
    tokens = some_tokens(40)
    with core_session(random_model(arch, type), n_batch=16, n_ubatch=8) as session:
        without = session.run(tokens)
        session.core.collect(True)
        np.testing.assert_array_equal(session.restart().run(tokens), without)
        session.core.collect(True, ALL)
        np.testing.assert_array_equal(session.restart().run(tokens), without)
        session.core.collect(False)
        np.testing.assert_array_equal(session.restart().run(tokens), without)


def test_collecting_with_several_threads_counts_every_neuron_once(
    random_model: RandomModel,
) -> None:
    path, tokens = random_model("llama", n_ff=200), some_tokens(40)
    with core_session(path, n_threads=3, n_threads_batch=5) as session:
        session.core.collect(True, ALL)
        session.run(tokens[:30])
        session.run(tokens[30:], 1)
        actual = session.core.statistics()
    for i, activations in enumerate(Reference(path).activations(tokens)):
        assert_sums_equal(actual, i, activations, extra=ALL)


def test_statistics_are_of_the_tokens_between_start_and_stop_and_since_the_last_clearing(
    random_model: RandomModel,
) -> None:
    path, tokens = random_model(), some_tokens(40)
    activations = Reference(path).activations(tokens)
    with core_session(path) as session:
        core = session.core
        assert not core.statistics().n_tokens.any()
        session.run(tokens[:10])
        core.collect(True)
        session.run(tokens[10:15])
        core.collect(False)
        session.run(tokens[15:20])
        core.collect(True)
        session.run(tokens[20:25], 1)
        for i, a in enumerate(activations):
            assert_sums_equal(core.statistics(), i, np.concatenate([a[10:15], a[20:25]]))
        core.clear_statistics()
        assert not core.statistics().n_tokens.any()
        session.run(tokens[25:])
        for i, a in enumerate(activations):
            assert_sums_equal(core.statistics(), i, a[25:])


def test_what_is_collected_beyond_the_sums_may_change_while_tokens_are_counted(
    random_model: RandomModel,
) -> None:
    path, tokens = random_model(), some_tokens(30)
    activations = Reference(path).activations(tokens)
    with core_session(path) as session:
        session.core.collect(True)
        session.run(tokens[:10])
        session.core.collect(True, ALL)
        session.run(tokens[10:20], 1)
        session.core.collect(True, Extra(normalized=True))
        session.run(tokens[20:])
        actual = session.core.statistics()
    for i, a in enumerate(activations):
        assert_sum_equals(actual.sum_sq[i], a**2, "llama")
        assert_sum_equals(actual.normalized_sq[i], normalized(a[10:]) ** 2, "llama")
        assert_top_equals(actual.top[i], a[10:20], "llama", ALL.top_share)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.inf, math.nan])
def test_a_share_that_is_none_is_refused_and_what_is_collected_stays(
    share: float, random_model: RandomModel
) -> None:
    path, tokens = random_model(), some_tokens(10)
    with core_session(path) as session:
        session.core.collect(True, ALL)
        with pytest.raises(ArgumentError, match="top_share must be from 0 to 1"):
            session.core.collect(False, Extra(top_share=share))
        session.run(tokens)
        actual = session.core.statistics()
    for i, activations in enumerate(Reference(path).activations(tokens)):
        assert_sums_equal(actual, i, activations, extra=ALL)


def test_statistics_add_up_with_a_weight() -> None:
    def statistics(*values: float) -> Statistics:
        a = np.array(values, dtype=np.float32)
        return Statistics([a], [a * a], [a * a * a], [a + a], a[:1])

    total = statistics(1, 2).plus(statistics(4, 6), 0.5)
    np.testing.assert_array_equal(total.sum, [[3, 5]])
    np.testing.assert_array_equal(total.sum_sq, [[9, 22]])
    np.testing.assert_array_equal(total.normalized_sq, [[33, 116]])
    np.testing.assert_array_equal(total.top, [[6, 10]])
    np.testing.assert_array_equal(total.n_tokens, [3])


# --- core sets that cannot be ---------------------------------------------------------------------

KEPT = np.arange(40, dtype=np.int32)


@pytest.mark.parametrize(
    ("core", "message"),
    [
        ({1: CoreSet(indices(), None)}, "FFN 1: it needs 1 to 160 neurons, not 0"),
        ({1: CoreSet(indices(0, 160), None)}, "neuron 160 at position 1"),
        ({1: CoreSet(indices(-1, 3), None)}, "neuron -1 at position 0"),
        ({1: CoreSet(indices(3, 3), None)}, "neuron 3 at position 1"),
        ({1: CoreSet(indices(5, 4), None)}, "neuron 4 at position 1"),
        ({1: CoreSet(np.arange(161), None)}, "1 to 160 neurons, not 161"),
        ({1: CoreSet(indices(2**31 - 1), None)}, "neuron 2147483647 at position 0"),
        ({4: CoreSet(KEPT, None)}, "FFN 4"),
        ({-1: CoreSet(KEPT, None)}, "FFN -1"),
        ({1: CoreSet(KEPT, np.zeros(159, dtype=np.float32))}, "FFN 1: no such FFN, or fill"),
        ({1: CoreSet(KEPT, np.zeros((160, 1), dtype=np.float32))}, "FFN 1: no such FFN, or fill"),
        ({1: CoreSet(KEPT, None), 2: CoreSet(indices(9, 9), None)}, "FFN 2"),
    ],
)
def test_a_core_set_that_cannot_be_is_refused_and_leaves_the_model_dense(
    core: dict[int, CoreSet], message: str, random_model: RandomModel
) -> None:
    tokens = some_tokens(8)
    with core_session(random_model()) as session:
        dense = session.run(tokens)
        with_core = session.restart().use({1: KEPT}).run(tokens)
        assert np.abs(with_core - dense).max() > 0.1
        with pytest.raises(ArgumentError, match=message):
            session.core.set_core(core)
        session.core.use_core(False)
        np.testing.assert_array_equal(session.restart().run(tokens), dense)
        np.testing.assert_array_equal(session.restart().use({1: KEPT}).run(tokens), with_core)


# --- files ----------------------------------------------------------------------------------------


def dense_and_core_logits(path: Path) -> tuple[Logits, Logits]:
    with core_session(path) as session:
        dense = session.run(some_tokens(8))
        return dense, session.restart().use({1: KEPT, 2: KEPT}).run(some_tokens(8))


def test_a_file_cut_off_after_loading_is_an_error_that_leaves_the_model_dense(
    tmp_path: Path,
) -> None:
    path = make_random_gguf(tmp_path / "model.gguf")
    dense, _ = dense_and_core_logits(path)
    whole = path.read_bytes()
    # Without mmap: a mapped file that is cut off ends any process, with or without us.
    with core_session(path, use_mmap=False) as session:
        session.use({3: KEPT})
        os.truncate(path, len(whole) // 3)
        with pytest.raises(ModelFileError, match=r"model\.gguf: ends at byte .* cut"):
            session.core.set_core({1: CoreSet(KEPT, None), 2: CoreSet(KEPT, None)})
        np.testing.assert_array_equal(session.run(some_tokens(8)), dense)
        with pytest.raises(ModelFileError, match=r"model\.gguf: ends at byte"):
            session.core.down_norms()
        path.write_bytes(whole)  # it may be another model by now
        with pytest.raises(ModelFileError, match=r"model\.gguf: was written to"):
            session.core.set_core({1: CoreSet(KEPT, None), 2: CoreSet(KEPT, None)})
        np.testing.assert_array_equal(session.restart().run(some_tokens(8)), dense)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove open files")
@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_file_removed_or_replaced_after_loading_does_not_matter(
    replaced: bool, tmp_path: Path
) -> None:
    path = make_random_gguf(tmp_path / "model.gguf")
    _, with_core = dense_and_core_logits(path)
    with core_session(path) as session:
        if replaced:
            make_random_gguf(tmp_path / "other.gguf", seed=1).replace(path)
        else:
            path.unlink()
        actual = session.use({1: KEPT, 2: KEPT}).run(some_tokens(8))
        np.testing.assert_array_equal(actual, with_core)


def test_files_that_are_not_the_models_are_refused_and_leave_the_model_dense(
    random_model: RandomModel, tmp_path: Path
) -> None:
    path, tokens = random_model(), some_tokens(8)
    dense, _ = dense_and_core_logits(path)
    (tmp_path / "text.gguf").write_text("no model")
    llama = Llama(str(path), n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    for files, error, message in (
        ([tmp_path / "missing.gguf"], ModelFileError, "missing.gguf: cannot be opened: No such"),
        ([tmp_path], ModelFileError, "not a readable GGUF"),
        ([tmp_path / "text.gguf"], ModelFileError, "text.gguf: is not a readable GGUF"),
        ([path, tmp_path / "text.gguf"], ModelFileError, "text.gguf: is not a readable GGUF"),
        ([], ArgumentError, "path of a model file"),
        ([random_model("llama", n_ff=96)], UnsupportedModelError, "no dense FFN"),
    ):
        with pytest.raises(error, match=message):
            CoreContext(llama.ctx, files, n_threads=1)
    llama.eval(tokens)
    assert np.abs(llama.scores[:8] - dense).max() < 0.05  # not the F32 cache of the other
    llama.close()


def test_a_model_split_over_files_gives_the_same_core(tmp_path: Path) -> None:
    path = make_random_gguf(tmp_path / "model.gguf")
    dense, with_core = dense_and_core_logits(path)
    files = split(path, tmp_path)
    with core_session(files[0], files) as session:
        np.testing.assert_array_equal(session.run(some_tokens(8)), dense)
        actual = session.restart().use({1: KEPT, 2: KEPT}).run(some_tokens(8))
        np.testing.assert_array_equal(actual, with_core)


def split(path: Path, folder: Path) -> list[Path]:
    """The model in two files, as llama-gguf-split writes them; even and odd tensors apart."""
    reader = gguf.GGUFReader(path)
    files = [folder / f"part-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, file in enumerate(files):
        writer = gguf.GGUFWriter(file, "llama")
        if i == 0:
            for key, value in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    kind, *inner = value.types
                    writer.add_key_value(key, value.contents(), kind, inner[-1] if inner else None)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[i::2]:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


# --- lifetimes ------------------------------------------------------------------------------------


def test_closing_brings_the_dense_graph_back_and_can_be_done_twice(
    random_model: RandomModel,
) -> None:
    path, tokens = random_model(), some_tokens(8)
    with core_session(path) as session:
        dense = session.run(tokens)
        session.restart().use({1: KEPT}).run(tokens)
        session.core.close()
        session.core.close()
        np.testing.assert_array_equal(session.restart().run(tokens), dense)


def test_a_second_core_context_after_the_first_is_closed_starts_afresh(
    random_model: RandomModel,
) -> None:
    path, tokens = random_model(), some_tokens(8)
    with core_session(path) as session:
        dense = session.run(tokens)
        for _ in range(3):  # the same address again, likely
            session.core.collect(True)
            np.testing.assert_array_equal(session.restart().run(tokens), dense)
            with_core = session.restart().use({1: KEPT}).run(tokens)
            assert np.abs(with_core - dense).max() > 0.1
            session.core.close()
            session.core = CoreContext(session.llama.ctx, [path], n_threads=1)
            assert not session.core.statistics().n_tokens.any()


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_the_name_of_a_file_need_not_be_text(random_model: RandomModel, tmp_path: Path) -> None:
    path = random_model()
    odd = tmp_path / os.fsdecode(b"\xff.gguf")
    odd.symlink_to(path)
    with core_session(path) as session, core_session(path, [odd]) as other:
        for norms, same in zip(session.core.down_norms(), other.core.down_norms(), strict=True):
            np.testing.assert_array_equal(norms, same)


def test_a_context_that_cannot_be_described_is_freed(
    random_model: RandomModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with core_session(random_model()) as session:
        closed = []
        close = CoreContext.close

        def fail(core: CoreContext, i: int) -> None:
            raise MemoryError

        def spy(core: CoreContext) -> None:
            closed.append(core)
            close(core)

        monkeypatch.setattr(CoreContext, "_ffn", fail)
        monkeypatch.setattr(CoreContext, "close", spy)
        with pytest.raises(MemoryError):
            CoreContext(session.llama.ctx, [Path(session.llama.model_path)], n_threads=1)
        assert len(closed) == 1


def test_closing_after_the_llama_context_is_safe_and_other_calls_are_refused(
    random_model: RandomModel,
) -> None:
    with core_session(random_model()) as session:
        session.use({1: KEPT}).run(some_tokens(8))
        session.llama.close()
        for call in (
            session.core.statistics,
            session.core.clear_statistics,
            session.core.down_norms,
            lambda: session.core.set_core({1: CoreSet(KEPT, None)}),
        ):
            with pytest.raises(ArgumentError, match="llama_context has been freed"):
                call()
        assert session.core.core_bytes == 0


def test_two_contexts_of_one_process_do_not_disturb_each_other(random_model: RandomModel) -> None:
    paths = (random_model("llama"), random_model("phi3"))
    tokens = some_tokens(20)
    alone = []
    for path in paths:
        with core_session(path) as session:
            session.run(tokens[:10])
            alone.append(session.use({1: KEPT}).run(tokens[10:], 1))
    with core_session(paths[0]) as first, core_session(paths[1]) as second:
        first.core.collect(True)
        first.run(tokens[:10])
        second.run(tokens[:10])
        first.use({1: KEPT})
        second.use({1: KEPT})
        for i, token in enumerate(tokens[10:]):
            np.testing.assert_array_equal(first.run([token])[0], alone[0][i])
            np.testing.assert_array_equal(second.run([token])[0], alone[1][i])
        assert not second.core.statistics().n_tokens.any()
