"""Makes a prior: runs text through a model and collects the statistics of its FFN neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from coreinfer_edge.binding.sequences import Sequences
from coreinfer_edge.choose.chooser import Chooser, choose
from coreinfer_edge.choose.divergence import Divergence
from coreinfer_edge.choose.prior import Clusters, Gain, Prior
from coreinfer_edge.choose.statistics import LEVELS, CoreSet, Extra, Ffn, Floats, Statistics
from coreinfer_edge.choose.strategies import TOP_SHARE
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.model.header import GGUFHeader
from coreinfer_edge.run.llm import EdgeLLM
from coreinfer_edge.run.one_sequence import OneSequence
from coreinfer_edge.run.session import Session, Settings

WINDOW = 512  # the most tokens of text read in one context
SENTENCE = 64  # tokens that are clustered as one text; at most 255, which a byte can count

# The loss of a core set is measured on at most this many windows, one in eight, at these densities.
MOST_HELD_OUT = 4
MEASURED_DENSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

# The gain of the prior is measured at this density. The prior may count as the first of these
# numbers of tokens that does no harm on text of another kind; None is no limit. If all do harm, the
# sensitivities are dropped too, and the model chooses as without a prior.
GAIN_DENSITY = 0.5
MOST_TOKENS = (None, 256.0, 32.0, 0.0)

_CONTINUATION = 128  # the last tokens of such a window; the tokens before are its prompt
_PROMPT, _TRIAL = 0, 1  # sequences

# Bounds the clustering: of more sentences than this, evenly spaced ones are used.
MOST_SENTENCES = 512


class BackEnd(Protocol):
    """Runs the model over text and collects the statistics of its neurons."""

    def run(self, tokens: Sequence[int]) -> list[Statistics]:
        """Evaluate one window; the statistics of each of its sentences (SENTENCE tokens)."""
        ...

    def gradient(self) -> list[Floats] | None:
        """Mean squared gradients of the windows so far, per FFN [n_ff]; None without."""
        ...


class NativeStatistics:
    """The back end that runs the GGUF itself. It has no gradients."""

    def __init__(self, sequences: Sequences) -> None:
        self._sequences = sequences

    def run(self, tokens: Sequence[int]) -> list[Statistics]:
        """Evaluate one window; the statistics of each of its sentences."""
        sequences, core = self._sequences, self._sequences.core
        sequences.clear()
        core.use_core(False)
        core.collect(True, Extra(normalized=True, top_share=TOP_SHARE, active=True))
        result = []
        for position in range(0, len(tokens), SENTENCE):
            core.clear_statistics()
            # With all logits: else llama.cpp computes the last layer for one token in SENTENCE.
            sequences.logits(_PROMPT, position, tokens[position : position + SENTENCE])
            result.append(core.statistics())
        core.collect(False)
        return result

    def gradient(self) -> None:
        """None."""


def calibrate(
    llm: EdgeLLM,
    header: GGUFHeader,
    texts: Sequence[Sequence[int]],
    n_tokens: int = 32768,
    n_clusters: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
    folder: Path | None = None,
    other: Sequence[int] = (),
) -> Prior:
    """Run text through a model, and make its prior.

    The text is read in windows: evenly spaced ones of a single text, or the beginning of each of
    several texts. If there are enough windows, some are held out of the statistics, and the loss of
    a core set is measured on them. The gain of the prior is measured on text of another kind.

    Args:
        llm: the model, loaded with ``strategy="dense"``.
        header: the header of its file.
        texts: the tokens of each text; best is text like that of the model's later use.
        n_tokens: about how many tokens of a single text to read.
        n_clusters: groups for ``strategy="similarity"``; 0 for none.
        seed: the seed of clustering, and of sampling with torch.
        advance: called with the number of tokens done since the last call.
        folder: the Hugging Face model that the file was made from, for statistics with gradients
            from torch; None for the statistics of the file itself, without gradients.
        other: tokens of text of another kind. The gain is measured only if they fill a window and
            some windows are held out.

    Raises:
        ArgumentError: the text is shorter than SENTENCE tokens.
        InsufficientMemoryError: the model of the folder does not fit.
        MissingPackageError: a folder is given, and torch, transformers or accelerate is not
            installed.
        ModelFileError: transformers cannot load the folder.
        UnsupportedModelError: the FFNs of the folder are not found, or some were not run.
    """
    windows, held_out = _hold_out(_windows(texts, n_tokens))
    width = max(map(len, windows))
    n_sentences = sum(map(len, windows)) // SENTENCE
    kept = set(np.linspace(0, n_sentences - 1, min(n_sentences, MOST_SENTENCES)).astype(int))
    n_ctx = width + _CONTINUATION
    # packed, so that core sets are measured with the levels that they will have
    sequences = Sequences(llm.llama, header.files, n_ctx, 2, n_logits=_CONTINUATION, packed=True)
    try:
        ffns, down_norms = sequences.core.ffns, sequences.core.down_norms()
        back_end: BackEnd = NativeStatistics(sequences)
        if folder is not None:
            from coreinfer_edge.calibrate.torch_statistics import TorchStatistics

            back_end = TorchStatistics(folder, ffns, TOP_SHARE, SENTENCE, seed, width)
        total: Statistics | None = None
        sentences: list[npt.NDArray[np.uint8]] = []
        number = 0
        for window in windows:
            for statistics in back_end.run(window):
                total = statistics if total is None else total.plus(statistics, 1.0)
                if n_clusters and number in kept:
                    sentences.append(np.concatenate(statistics.top).astype(np.uint8))
                number += 1
            advance(len(window))
        assert total is not None
        counts = total.n_tokens
        if not counts.all():
            raise UnsupportedModelError("no statistics were collected for some layers of the model")
        prior = Prior(
            layers=[ffn.layer for ffn in ffns],
            n_tokens=int(counts.max()),
            mean=[x / n for x, n in zip(total.sum, counts, strict=True)],
            mean_square=[x / n for x, n in zip(total.sum_sq, counts, strict=True)],
            normalized_mean_square=[
                x / n for x, n in zip(total.normalized_sq, counts, strict=True)
            ],
            down_norms=down_norms,
            clusters=_clusters(sentences, ffns, n_clusters, seed),
            gradient=back_end.gradient(),
            zero_share=total.activation_sparsity,
        )
        if not held_out:
            return prior
        width = min(width, max(map(len, held_out)))
        others = _spread(other, width, MOST_HELD_OUT) if len(other) >= width else []
        return _with_cost(prior, sequences, ffns, header.n_layers, held_out, others, advance)
    finally:
        sequences.close()


def _windows(texts: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """The windows to read, each of whole sentences and in a context of its own."""
    if len(texts) == 1:
        text = texts[0]
        width = min(WINDOW, len(text) // SENTENCE * SENTENCE)
        n_windows = max(1, min(n_tokens, len(text)) // width) if width else 0
        windows = _spread(text, width, n_windows)
    else:
        widths = [min(WINDOW, len(text) // SENTENCE * SENTENCE) for text in texts]
        windows = [list(text[:n]) for text, n in zip(texts, widths, strict=True) if n]
    if not windows:
        raise ArgumentError(
            f"the calibration text has {sum(map(len, texts))} tokens: it needs at least {SENTENCE},"
            " and some thousands to be of use"
        )
    return windows


def _spread(text: Sequence[int], width: int, n: int) -> list[list[int]]:
    """Windows evenly spaced over a text."""
    starts = np.linspace(0, len(text) - width, n).astype(int).tolist()
    return [list(text[start : start + width]) for start in starts]


def _hold_out(windows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to calibrate on, and a few with a prompt and a continuation to measure on."""
    long = [i for i, window in enumerate(windows) if len(window) >= SENTENCE + _CONTINUATION]
    n = min(MOST_HELD_OUT, len(windows) // 8, len(long))
    at = np.linspace(0, max(0, len(long) - 1), n + 2).astype(int)[1:-1].tolist()
    held_out = {long[i] for i in at}
    return (
        [window for i, window in enumerate(windows) if i not in held_out],
        [windows[i] for i in sorted(held_out)],
    )


# --- the loss of a core set -----------------------------------------------------------------------


def _with_cost(
    prior: Prior,
    sequences: Sequences,
    ffns: Sequence[Ffn],
    n_layers: int,
    own: Sequence[list[int]],
    others: Sequence[list[int]],
    advance: Callable[[int], None],
) -> Prior:
    """The prior with sensitivity, quality and gain, measured on windows held out of it.

    The last _CONTINUATION tokens of a window are decoded teacher-forced.

    Args:
        own: windows of the calibration text.
        others: windows of text of another kind.
    """

    def chooser(of: Prior | None) -> Chooser:
        return Chooser("energy", ffns, n_layers, prior.down_norms, of, None, levels=None)

    sensitivity, low_bits_loss = _sensitivity(sequences, own, chooser(prior), advance)
    prior = replace(prior, sensitivity=sensitivity, low_bits_loss=low_bits_loss)
    without = (chooser(None), GAIN_DENSITY)
    on_others: list[float] = []
    kept = 0
    if others:
        limited = [replace(prior, most_tokens=most) for most in MOST_TOKENS]
        # the last resort: nothing of the prior is left that changes a choice
        limited.append(replace(limited[-1], sensitivity=None, low_bits_loss=None))
        settings = [without, *((chooser(each), GAIN_DENSITY) for each in limited)]
        on_others = _kl_of(sequences, others, settings)
        harmless = (i for i, kl in enumerate(on_others[1:]) if kl <= on_others[0])
        kept = next(harmless, len(limited) - 1)
        prior = limited[kept]
    settings = [(chooser(prior), density) for density in MEASURED_DENSITIES]
    own_without, *on_own = _kl_of(sequences, own, [without, *settings])
    quality = dict(zip(MEASURED_DENSITIES, on_own, strict=True))
    gain = None
    if others:
        own_with = quality[GAIN_DENSITY]
        gain = Gain(GAIN_DENSITY, own_without, own_with, on_others[0], on_others[1 + kept])
    return replace(prior, quality=quality, quality_levels=without[0].levels, gain=gain)


def _sensitivity(
    sequences: Sequences,
    windows: Sequence[list[int]],
    chooser: Chooser,
    advance: Callable[[int], None],
) -> tuple[Floats, Floats | None]:
    """For each FFN, the KL divergence from dense to a model that keeps half of that FFN alone.

    And to one that has that FFN alone at 2 bits; None if neurons cannot have 2 bits here.
    """
    ffns = sequences.core.ffns
    alone, low = [Divergence() for _ in ffns], [Divergence() for _ in ffns]
    for window in windows:
        prompt = _Prompt(sequences, window, chooser)
        assert prompt.session.of_prompt is not None
        halves = choose(chooser.scored(prompt.session.of_prompt), [0.5] * len(alone))
        for i, half in halves.items():
            with prompt.trial(chooser, GAIN_DENSITY, alone[i]) as trial:
                trial.take({i: half})
        for i, ffn in enumerate(ffns if 2 in chooser.levels else ()):
            all_low = np.full(ffn.n_ff, LEVELS.index(2), dtype=np.uint8)
            with prompt.trial(chooser, GAIN_DENSITY, low[i]) as trial:
                trial.take({i: CoreSet(np.arange(ffn.n_ff, dtype=np.int32), None, all_low)})
        advance(len(window))
    return _kls(alone), _kls(low) if 2 in chooser.levels else None


def _kls(divergences: Sequence[Divergence]) -> Floats:
    return np.array([max(0.0, each.kl) for each in divergences], dtype=np.float32)


def _kl_of(
    sequences: Sequences, windows: Sequence[list[int]], settings: Sequence[tuple[Chooser, float]]
) -> list[float]:
    """The KL divergence from dense to core, for each chooser and its density."""
    divergences = [Divergence() for _ in settings]
    for window in windows:
        prompt = _Prompt(sequences, window, settings[0][0])
        for (chooser, density), divergence in zip(settings, divergences, strict=True):
            with prompt.trial(chooser, density, divergence) as trial:
                trial.choose()
    return [max(0.0, divergence.kl) for divergence in divergences]


class _Prompt:
    """A window whose last _CONTINUATION tokens are decoded with one core set after another.

    Attributes:
        session: the tokens before them, pre-filled.
    """

    def __init__(self, sequences: Sequences, window: list[int], chooser: Chooser) -> None:
        sequences.clear()
        self._prompt = OneSequence(sequences, _PROMPT, spare=_TRIAL)
        self._rest = window[-_CONTINUATION:]
        self.session = Session(self._prompt, chooser, 1.0, Settings(quality=0.0, warmup=0))
        self.session.begin()
        self.session.prefill(window[:-_CONTINUATION])
        self.session.stop_collecting()
        sequence = self._prompt.copy(_TRIAL)
        self._dense = sequence.decode(self._rest)
        sequence.remove()

    @contextmanager
    def trial(
        self, chooser: Chooser, density: float, divergence: Divergence
    ) -> Iterator[Session[Floats]]:
        """A session for choosing; after it the tokens are decoded, and compared with dense."""
        sequence = self._prompt.copy(_TRIAL)
        trial = self.session.branch(sequence, chooser, density)
        yield trial
        divergence.add(self._dense, trial.decode(self._rest))
        trial.leave()
        sequence.remove()


# --- clusters -------------------------------------------------------------------------------------


def _clusters(
    sentences: Sequence[npt.NDArray[np.uint8]], ffns: Sequence[Ffn], n_clusters: int, seed: int
) -> Clusters | None:
    if not n_clusters:
        return None
    ends = np.cumsum([ffn.n_ff for ffn in ffns])[:-1]
    groups = cluster(sentences, n_clusters, seed)
    frequency = np.stack([_frequency(sentences, groups == k) for k in np.unique(groups)])
    return Clusters(np.split(frequency, ends, axis=1), TOP_SHARE)


def _frequency(
    sentences: Sequence[npt.NDArray[np.uint8]], members: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """For each neuron, the share of tokens that it was a core neuron of, in 255ths."""
    total = np.zeros(len(sentences[0]), dtype=np.uint64)
    for counts, is_member in zip(sentences, members, strict=True):
        if is_member:
            total += counts
    share = total / (SENTENCE * int(members.sum()))
    result: npt.NDArray[np.uint8] = np.rint(255 * share).astype(np.uint8)
    return result


def cluster(
    sentences: Sequence[npt.NDArray[np.uint8]], n_clusters: int, seed: int
) -> npt.NDArray[np.intp]:
    """Group sentences by the cosine of how often each neuron is a core neuron: k-means.

    The inner products of the sentences are enough, so the centres are never computed.

    Args:
        sentences: counts by neuron [n_neurons] each.
        n_clusters: the most clusters.
        seed: the seed of the first centres (k-means++).

    Returns:
        The number of each sentence's cluster [n_sentences].
    """
    matrix = np.stack(sentences)
    products = np.zeros((len(matrix), len(matrix)))
    for part in np.array_split(matrix, max(1, matrix.shape[1] // 4096), axis=1):
        values = part.astype(np.float32)
        products += values @ values.T
    norms = np.sqrt(np.maximum(np.diag(products), 1e-12))
    cosine = products / norms[:, None] / norms
    random = np.random.default_rng(seed)
    first = [int(random.integers(len(cosine)))]
    while len(first) < min(n_clusters, len(cosine)):
        distance = np.maximum(1 - cosine[first].max(axis=0), 0)
        distance[first] = 0
        if distance.sum() == 0:
            break  # the rest are equal to a centre
        first.append(int(random.choice(len(cosine), p=distance / distance.sum())))
    groups: npt.NDArray[np.intp] = cosine[first].argmax(axis=0)
    for _ in range(50):
        # cosine of each sentence with the sum of a group's: their inner products, scaled
        similarity = []
        for k in range(len(first)):
            members = groups == k
            size = np.sqrt(max(cosine[np.ix_(members, members)].sum(), 1e-12))
            similarity.append(cosine[members].sum(axis=0) / size)
        changed: npt.NDArray[np.intp] = np.stack(similarity).argmax(axis=0)
        if (changed == groups).all():
            break
        groups = changed
    return groups
