"""The prior: per-neuron statistics from calibration, ``coreinfer.*`` metadata of the GGUF.

Arrays over neurons hold those of all dense FFNs one after the other, in the order of the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coreinfer_edge.core_context import Ffn, Floats
from coreinfer_edge.errors import ModelFileError
from coreinfer_edge.gguf_header import GGUFArray, GGUFHeader

VERSION = 1
MAX_CLUSTERS = 256

_VERSION = "coreinfer.version"
_LAYERS = "coreinfer.layers"
_NEURONS = "coreinfer.neurons"
_TOKENS = "coreinfer.tokens"
_MEAN = "coreinfer.activation.mean"
_MEAN_SQUARE = "coreinfer.activation.mean_square"
_NORMALIZED = "coreinfer.activation.normalized_mean_square"
_CLUSTERS = "coreinfer.similarity.clusters"
_TOP_SHARE = "coreinfer.similarity.top_share"
_FREQUENCY = "coreinfer.similarity.frequency"

KEYS_OF_NEURONS = (_MEAN, _MEAN_SQUARE, _NORMALIZED)


@dataclass(frozen=True)
class Clusters:
    """Calibration texts grouped by their core neurons, for the strategy ``similarity``.

    Attributes:
        frequency: share of a cluster's tokens that the neuron was among the largest positive of,
            in 255ths, per FFN [n_clusters, n_ff].
        top_share: how many of a token's positive neurons counted as its largest.
    """

    frequency: list[npt.NDArray[np.uint8]]
    top_share: float

    def __len__(self) -> int:
        return len(self.frequency[0])


@dataclass(frozen=True)
class Prior:
    """What calibration has seen of the activation, the input of ffn_down.

    Attributes:
        layers: number of the layer of each FFN.
        n_tokens: tokens of the calibration text.
        mean: activation, per FFN [n_ff].
        mean_square: its square, per FFN [n_ff].
        normalized_mean_square: its square in each token's activation scaled to norm 1, per FFN
            [n_ff].
        clusters: None if there are none.
    """

    layers: list[int]
    n_tokens: int
    mean: list[Floats]
    mean_square: list[Floats]
    normalized_mean_square: list[Floats]
    clusters: Clusters | None

    def check_fits(self, ffns: Sequence[Ffn]) -> None:
        """Raise ModelFileError unless the prior is of a model with these FFNs."""
        of_model = [(ffn.layer, ffn.n_ff) for ffn in ffns]
        of_prior = list(zip(self.layers, map(len, self.mean), strict=True))
        if of_model != of_prior:
            raise _bad(
                f"they are of {len(of_prior)} FFNs with {sum(n for _, n in of_prior)} neurons, and"
                f" the model has {len(of_model)} with {sum(n for _, n in of_model)}"
            )


def _bad(reason: str) -> ModelFileError:
    return ModelFileError(
        f"the coreinfer.* statistics in the file do not fit the model: {reason}: make the file"
        " again with coreinfer-edge convert, or use strategy='dense'"
    )


def to_metadata(prior: Prior) -> dict[str, int | float | npt.NDArray[Any]]:
    """The prior as metadata: numbers (u32, f32) and arrays (i32, f32, u8) by key."""
    metadata: dict[str, int | float | npt.NDArray[Any]] = {
        _VERSION: VERSION,
        _LAYERS: np.array(prior.layers, dtype=np.int32),
        _NEURONS: np.array([len(mean) for mean in prior.mean], dtype=np.int32),
        _TOKENS: prior.n_tokens,
        _MEAN: np.concatenate(prior.mean),
        _MEAN_SQUARE: np.concatenate(prior.mean_square),
        _NORMALIZED: np.concatenate(prior.normalized_mean_square),
    }
    if prior.clusters is not None:
        metadata[_CLUSTERS] = len(prior.clusters)
        metadata[_TOP_SHARE] = prior.clusters.top_share
        metadata[_FREQUENCY] = np.concatenate(prior.clusters.frequency, axis=1).ravel()
    return metadata


def from_header(header: GGUFHeader) -> Prior | None:
    """The prior in a GGUF file, None where there is none.

    Raises:
        ModelFileError: it is damaged, or of a version that this package does not know.
    """
    metadata = header.metadata
    version = metadata.get(_VERSION)
    if version is None:
        return None
    if not isinstance(version, int) or version != VERSION:
        raise _bad(f"they are of version {version}, and this package reads version {VERSION}")
    widths = _numbers(metadata, _NEURONS, np.int32, None)
    layers = _numbers(metadata, _LAYERS, np.int32, len(widths))
    if len(widths) == 0 or (widths < 1).any():
        raise _bad(f"{_NEURONS} holds no or not only positive numbers")
    n_tokens = metadata.get(_TOKENS)
    if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 1:
        raise _bad(f"{_TOKENS} is {n_tokens!r}")
    ends = np.cumsum(widths, dtype=np.int64)

    def per_ffn(key: str) -> list[Floats]:
        return np.split(_numbers(metadata, key, np.float32, int(ends[-1])), ends[:-1])

    mean, mean_square, normalized = map(per_ffn, KEYS_OF_NEURONS)
    for key, arrays in ((_MEAN_SQUARE, mean_square), (_NORMALIZED, normalized)):
        if any((array < 0).any() for array in arrays):
            raise _bad(f"{key} holds negative numbers")
    return Prior(
        layers=layers.tolist(),
        n_tokens=n_tokens,
        mean=mean,
        mean_square=mean_square,
        normalized_mean_square=normalized,
        clusters=_clusters(metadata, ends),
    )


def _clusters(metadata: Mapping[str, Any], ends: npt.NDArray[np.int64]) -> Clusters | None:
    n = metadata.get(_CLUSTERS)
    if n is None:
        return None
    if not isinstance(n, int) or not 1 <= n <= MAX_CLUSTERS:
        raise _bad(f"{_CLUSTERS} is {n!r}")
    top_share = metadata.get(_TOP_SHARE)
    if not isinstance(top_share, float) or not 0 < top_share <= 1:
        raise _bad(f"{_TOP_SHARE} is {top_share!r}")
    counts = _numbers(metadata, _FREQUENCY, np.uint8, n * int(ends[-1]))
    return Clusters(np.split(counts.reshape(n, -1), ends[:-1], axis=1), top_share)


def _numbers(
    metadata: Mapping[str, Any], key: str, dtype: npt.DTypeLike, length: int | None
) -> npt.NDArray[Any]:
    array = metadata.get(key)
    if not isinstance(array, GGUFArray) or array.type == "str":
        raise _bad(f"{key} is not an array of numbers")
    if length is not None and array.length != length:
        raise _bad(f"{key} has {array.length} elements instead of {length}")
    values = array.read()
    assert isinstance(values, np.ndarray)
    if values.dtype != dtype:
        raise _bad(f"{key} is of type {array.type}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise _bad(f"{key} holds what is no finite number")
    return values
