"""Makes a prior: runs text through a model and gathers what its FFN neurons do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from coreinfer_edge.core_context import Extra, Statistics
from coreinfer_edge.edge import EdgeLLM
from coreinfer_edge.errors import ArgumentError, UnsupportedModelError
from coreinfer_edge.gguf_header import GGUFHeader
from coreinfer_edge.prior import Clusters, Prior
from coreinfer_edge.sequences import Sequences
from coreinfer_edge.strategies import TOP_SHARE

WINDOW = 512  # tokens of text read in one context
SENTENCE = 64  # tokens that are clustered as one text; at most 255, which a byte can count

# Bounds the clustering: more sentences than these are thinned out evenly.
MOST_SENTENCES = 512


def calibrate(
    llm: EdgeLLM,
    header: GGUFHeader,
    text: str,
    n_tokens: int = 32768,
    n_clusters: int = 8,
    seed: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Prior:
    """Run windows evenly spaced over a text through a model, and gather its prior.

    Args:
        llm: the model, loaded with ``strategy="dense"``.
        header: that of its file.
        text: what to run; the more like what the model will be used for, the better.
        n_tokens: about how many tokens of it.
        n_clusters: groups for ``strategy="similarity"``; 0 for none.
        seed: of the clustering.
        advance: called with the number of tokens done since the last call.

    Raises:
        ArgumentError: the text is shorter than SENTENCE tokens.
    """
    tokens = llm.llama.tokenize(text.encode(), add_bos=False, special=False)
    if len(tokens) < SENTENCE:
        raise ArgumentError(
            f"the calibration text has {len(tokens)} tokens: it needs {SENTENCE} at the least, and"
            " some thousands to be of use"
        )
    width = min(WINDOW, len(tokens) // SENTENCE * SENTENCE)
    n_windows = max(1, min(n_tokens, len(tokens)) // width)
    starts = np.linspace(0, len(tokens) - width, n_windows).astype(int).tolist()
    n_sentences = n_windows * width // SENTENCE
    kept = set(np.linspace(0, n_sentences - 1, min(n_sentences, MOST_SENTENCES)).astype(int))
    total: Statistics | None = None
    sentences: list[npt.NDArray[np.uint8]] = []
    number = 0
    sequences = Sequences(llm.llama, header.files, width, 1, n_logits=SENTENCE)
    try:
        core = sequences.core
        core.collect(True, Extra(normalized=True, top_share=TOP_SHARE))
        for start in starts:
            sequences.clear()
            for position in range(0, width, SENTENCE):
                core.clear_statistics()
                # with logits, or the last layer would see one token in SENTENCE
                part = tokens[start + position : start + position + SENTENCE]
                sequences.logits(0, position, part)
                statistics = core.statistics()
                total = statistics if total is None else total.plus(statistics, 1.0)
                if n_clusters and number in kept:
                    sentences.append(np.concatenate(statistics.top).astype(np.uint8))
                number += 1
                advance(SENTENCE)
        ffns, down_norms = core.ffns, core.down_norms()
    finally:
        sequences.close()
    assert total is not None
    clusters = None
    if n_clusters:
        ends = np.cumsum([ffn.n_ff for ffn in ffns])[:-1]
        groups = cluster(sentences, n_clusters, seed)
        frequency = np.stack([_frequency(sentences, groups == k) for k in np.unique(groups)])
        clusters = Clusters(np.split(frequency, ends, axis=1), TOP_SHARE)
    counts = total.n_tokens
    if not counts.all():
        raise UnsupportedModelError("no statistics were collected for some layers of this model")
    return Prior(
        layers=[ffn.layer for ffn in ffns],
        n_tokens=int(counts.max()),
        mean=[x / n for x, n in zip(total.sum, counts, strict=True)],
        mean_square=[x / n for x, n in zip(total.sum_sq, counts, strict=True)],
        normalized_mean_square=[x / n for x, n in zip(total.normalized_sq, counts, strict=True)],
        down_norms=down_norms,
        clusters=clusters,
    )


def _frequency(
    sentences: Sequence[npt.NDArray[np.uint8]], members: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Share of the tokens of some sentences that each neuron was a core neuron of, in 255ths."""
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

    All that is needed are the inner products of the sentences, so the centres are never made.

    Args:
        sentences: counts by neuron [n_neurons] each.
        n_clusters: at most so many.
        seed: of the first centres (k-means++).

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
