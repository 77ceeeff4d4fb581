"""The prior: per-neuron statistics from calibration, ``coreinfer.*`` metadata of the GGUF.

docs/metadata.md specifies the keys. A list "per FFN" has an element for each dense FFN of the
model, in the order of the layers.
"""

from __future__ import annotations

import binascii
import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import numpy as np
import numpy.typing as npt

from coreinfer_edge.choose.statistics import LEVELS, Ffn, Floats, Level, level_names
from coreinfer_edge.errors import ModelFileError

VERSION = 1
MAX_CLUSTERS = 256

_VERSION = "coreinfer.version"
_FINGERPRINT = "coreinfer.fingerprint"
_LAYERS = "coreinfer.layers"
_NEURONS = "coreinfer.neurons"
_TOKENS = "coreinfer.tokens"
_MEAN = "coreinfer.activation.mean"
_MEAN_SQUARE = "coreinfer.activation.mean_square"
_NORMALIZED = "coreinfer.activation.normalized_mean_square"
_ZEROS = "coreinfer.activation.zero_share"
_GRADIENT = "coreinfer.gradient.mean_square"
_DOWN_NORM = "coreinfer.down.squared_norm"
_SENSITIVITY = "coreinfer.sensitivity"
_LOW_BITS = "coreinfer.sensitivity.2_bits"
_DENSITIES = "coreinfer.quality.density"
_LEVELS = "coreinfer.quality.levels"
_KL = "coreinfer.quality.kl"
_MOST_TOKENS = "coreinfer.prior.most_tokens"
_GAIN_DENSITY = "coreinfer.prior.gain.density"
_GAIN_KL = "coreinfer.prior.gain.kl"
_CLUSTERS = "coreinfer.similarity.clusters"
_TOP_SHARE = "coreinfer.similarity.top_share"
_FREQUENCY = "coreinfer.similarity.frequency"

_FINGERPRINT_BYTES = 256

Metadata = dict[str, int | float | str | list[str] | npt.NDArray[Any]]


@runtime_checkable
class Array(Protocol):
    """An array among the metadata of a file, read on demand."""

    @property
    def type(self) -> str:
        """``"str"``, or of numbers as in GGUF, e.g. ``"f32"``."""

    @property
    def length(self) -> int: ...

    def read(self) -> npt.NDArray[Any] | list[bytes]: ...


class ModelFile(Protocol):
    """The part of ``model.header.GGUFHeader`` that a prior needs."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def ffn_tensors(self) -> Sequence[Any]:
        """``model.header.GGUFTensor`` objects, in the order of their names."""


@dataclass(frozen=True)
class Clusters:
    """Calibration texts grouped by their core neurons, for the strategy ``similarity``.

    Attributes:
        frequency: share of a cluster's tokens for which the neuron was among the largest positive
            ones, in 255ths, per FFN [n_clusters, n_ff].
        top_share: share of a token's positive neurons that counted as its largest.
    """

    frequency: list[npt.NDArray[np.uint8]]
    top_share: float

    def __len__(self) -> int:
        return len(self.frequency[0])


class Gain(NamedTuple):
    """The value of the prior: KL divergence from dense to core, in nats per token.

    Attributes:
        density: that of the core sets, chosen by the strategy ``energy``.
        own_without, own_with: without and with the prior, on text like the calibration text that
            is not part of it.
        other_without, other_with: the same on text of another kind.
    """

    density: float
    own_without: float
    own_with: float
    other_without: float
    other_with: float


@dataclass(frozen=True)
class Prior:
    """The statistics that calibration collected of the activation, the input of ffn_down.

    Attributes:
        layers: number of the layer of each FFN.
        n_tokens: tokens of the calibration text.
        mean: activation, per FFN [n_ff].
        mean_square: its square, per FFN [n_ff].
        normalized_mean_square: the same after each token's activation is scaled to norm 1, per
            FFN [n_ff].
        down_norms: squared norm of the column of ffn_down, per FFN [n_ff].
        clusters: None if there are none.
        gradient: squared gradient of the log-likelihood (in nats) of a token sampled from the
            model, with respect to the activation, per FFN [n_ff]; None where not calibrated.
        zero_share: share of activations that are exactly 0 [n_ffn]; None where not counted.
        sensitivity: KL divergence from the dense model to one that keeps half of this FFN, in
            nats per token [n_ffn]; None where not measured.
        low_bits_loss: KL divergence from the dense model to one that has this FFN alone at 2 bits,
            in nats per token [n_ffn]; None where not measured.
        quality: KL divergence from dense to core by density, strategy ``energy``, in nats per
            token, on text held out of the statistics; empty where not measured.
        quality_levels: the levels that neurons could have for that.
        most_tokens: the largest number of tokens that the prior may count as in a choice; None for
            the strategy's own limit, 0 if the prior is of no use.
        gain: None where not measured.
    """

    layers: list[int]
    n_tokens: int
    mean: list[Floats]
    mean_square: list[Floats]
    normalized_mean_square: list[Floats]
    down_norms: list[Floats]
    clusters: Clusters | None = None
    gradient: list[Floats] | None = None
    zero_share: Floats | None = None
    sensitivity: Floats | None = None
    low_bits_loss: Floats | None = None
    quality: Mapping[float, float] = field(default_factory=dict)
    quality_levels: tuple[Level, ...] = ("full",)
    most_tokens: float | None = None
    gain: Gain | None = None

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


def fingerprint(header: ModelFile) -> str:
    """Identifies the FFN weights of a model, and is cheap to compute at load.

    SHA-256, in hex, over all FFN tensors in the order of their names: a line with name, type and
    shape, and the 256 bytes in the middle of the data (all of it where it is shorter).

    Raises:
        ModelFileError: the file can no longer be read.
    """
    digest = hashlib.sha256()
    files = {}
    try:
        for tensor in header.ffn_tensors:
            if tensor.file not in files:
                files[tensor.file] = open(tensor.file, "rb", buffering=0)  # noqa: SIM115
            n_bytes = min(_FINGERPRINT_BYTES, tensor.n_bytes)
            shape = " ".join(map(str, tensor.shape))
            digest.update(f"{tensor.name} {tensor.type} {shape}\n".encode())
            files[tensor.file].seek(tensor.offset + (tensor.n_bytes - n_bytes) // 2)
            digest.update(files[tensor.file].read(n_bytes))
    except OSError as error:
        raise ModelFileError(f"{header.path} cannot be read: {error.strerror or error}") from error
    finally:
        for file in files.values():
            file.close()
    return digest.hexdigest()


# --- writing --------------------------------------------------------------------------------------


def to_metadata(prior: Prior, of_model: str) -> Metadata:
    """The prior as metadata, by key.

    Args:
        prior: the prior.
        of_model: the fingerprint of its model.

    Returns:
        Numbers (u32, f32), texts, arrays of numbers (i32, f32) and arrays of texts.
    """
    metadata: Metadata = {
        _VERSION: VERSION,
        _FINGERPRINT: of_model,
        _LAYERS: np.array(prior.layers, dtype=np.int32),
        _NEURONS: np.array([len(mean) for mean in prior.mean], dtype=np.int32),
        _TOKENS: prior.n_tokens,
        _MEAN: _bfloat16(prior.mean),
        _MEAN_SQUARE: _bfloat16(prior.mean_square),
        _NORMALIZED: _bfloat16(prior.normalized_mean_square),
        _DOWN_NORM: _bfloat16(prior.down_norms),
    }
    if prior.gradient is not None:
        metadata[_GRADIENT] = _bfloat16(prior.gradient)
    if prior.zero_share is not None:
        metadata[_ZEROS] = prior.zero_share
    if prior.sensitivity is not None:
        metadata[_SENSITIVITY] = prior.sensitivity
    if prior.low_bits_loss is not None:
        metadata[_LOW_BITS] = prior.low_bits_loss
    if prior.quality:
        metadata[_DENSITIES] = np.array(list(prior.quality), dtype=np.float32)
        metadata[_KL] = np.array(list(prior.quality.values()), dtype=np.float32)
        metadata[_LEVELS] = level_names(prior.quality_levels)
    if prior.most_tokens is not None:
        metadata[_MOST_TOKENS] = float(prior.most_tokens)
    if prior.gain is not None:
        metadata[_GAIN_DENSITY] = float(prior.gain.density)
        metadata[_GAIN_KL] = np.array(prior.gain[1:], dtype=np.float32)
    if prior.clusters is not None:
        metadata[_CLUSTERS] = len(prior.clusters)
        metadata[_TOP_SHARE] = prior.clusters.top_share
        metadata[_FREQUENCY] = [_base64(array.tobytes()) for array in prior.clusters.frequency]
    return metadata


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _bfloat16(arrays: Sequence[Floats]) -> list[str]:
    """Each rounded to the nearest bfloat16, the upper half of a float32."""
    result = []
    for array in arrays:
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result.append(_base64(rounded.astype("<u2").tobytes()))
    return result


# --- reading --------------------------------------------------------------------------------------


def from_header(header: ModelFile) -> Prior | None:
    """The prior in a GGUF file; None if the file has none.

    It is also None, with a RuntimeWarning, if the prior is of a later version or was made for other
    weights.

    Raises:
        ModelFileError: it is damaged.
    """
    metadata = header.metadata
    version = metadata.get(_VERSION)
    if version is None:
        return None
    if not _is_count(version):
        raise _bad(f"{_VERSION} is {version!r}")
    if version != VERSION:
        _ignore(f"they are of version {version}, and this package reads {VERSION}")
        return None
    of_file = metadata.get(_FINGERPRINT)
    if not isinstance(of_file, str) or not re.fullmatch("[0-9a-f]{64}", of_file):
        raise _bad(f"{_FINGERPRINT} is not a SHA-256 in hex")
    if of_file != fingerprint(header):
        _ignore("they were made for other FFN weights than these")
        return None
    return _read(metadata, header.n_layers)


def _ignore(reason: str) -> None:
    warnings.warn(
        f"the coreinfer.* statistics in the file are ignored: {reason}; coreinfer-edge convert"
        " makes new ones",
        RuntimeWarning,
        stacklevel=4,
    )


def _read(metadata: Mapping[str, Any], n_layers: int) -> Prior:
    widths = _numbers(metadata, _NEURONS, np.int32, None).tolist()
    if not widths or min(widths) < 1:
        raise _bad(f"{_NEURONS} is empty or holds a number below 1")
    layers = _numbers(metadata, _LAYERS, np.int32, len(widths)).tolist()
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= n_layers:
        raise _bad(f"{_LAYERS} does not ascend within 0 .. {n_layers - 1}")
    n_tokens = metadata.get(_TOKENS)
    if not _is_count(n_tokens):
        raise _bad(f"{_TOKENS} is {n_tokens!r}")
    densities = _optional_numbers(metadata, _DENSITIES, None, least=0, most=1)
    n_quality = None if densities is None else len(densities)
    quality = _optional_numbers(metadata, _KL, n_quality, least=0)
    if (densities is None) != (quality is None):
        raise _bad(f"{_DENSITIES} and {_KL} do not go together")
    return Prior(
        layers=layers,
        n_tokens=n_tokens,
        mean=_floats(metadata, _MEAN, widths),
        mean_square=_floats(metadata, _MEAN_SQUARE, widths, least=0),
        normalized_mean_square=_floats(metadata, _NORMALIZED, widths, least=0),
        down_norms=_floats(metadata, _DOWN_NORM, widths, least=0),
        clusters=_clusters(metadata, widths),
        gradient=_floats(metadata, _GRADIENT, widths, least=0) if _GRADIENT in metadata else None,
        zero_share=_optional_numbers(metadata, _ZEROS, len(widths), least=0, most=1),
        sensitivity=_optional_numbers(metadata, _SENSITIVITY, len(widths), least=0),
        low_bits_loss=_optional_numbers(metadata, _LOW_BITS, len(widths), least=0),
        quality={}
        if densities is None or quality is None
        else dict(zip(densities.tolist(), quality.tolist(), strict=True)),
        quality_levels=_levels(metadata),
        most_tokens=_optional_number(metadata, _MOST_TOKENS, least=0),
        gain=_gain(metadata),
    )


def _levels(metadata: Mapping[str, Any]) -> tuple[Level, ...]:
    value = metadata.get(_LEVELS, "full")  # without the key they were dropped or kept
    names = {str(level): level for level in LEVELS}
    items = value.split(",") if isinstance(value, str) else []
    if not items or not set(items) <= set(names) or len(set(items)) < len(items):
        raise _bad(f"{_LEVELS} is {value!r}")
    return tuple(names[item] for item in items)


def _gain(metadata: Mapping[str, Any]) -> Gain | None:
    density = _optional_number(metadata, _GAIN_DENSITY, least=0, most=1)
    kl = _optional_numbers(metadata, _GAIN_KL, 4, least=0)
    if (density is None) != (kl is None):
        raise _bad(f"{_GAIN_DENSITY} and {_GAIN_KL} do not go together")
    return None if density is None or kl is None else Gain(density, *kl.tolist())


def _optional_number(
    metadata: Mapping[str, Any], key: str, least: float, most: float = np.inf
) -> float | None:
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, float) or not np.isfinite(value) or not least <= value <= most:
        raise _bad(f"{key} is {value!r}")
    return value


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _clusters(metadata: Mapping[str, Any], widths: Sequence[int]) -> Clusters | None:
    n = metadata.get(_CLUSTERS)
    if n is None:
        return None
    if not _is_count(n) or n > MAX_CLUSTERS:
        raise _bad(f"{_CLUSTERS} is {n!r}")
    top_share = metadata.get(_TOP_SHARE)
    if not isinstance(top_share, float) or not 0 < top_share <= 1:
        raise _bad(f"{_TOP_SHARE} is {top_share!r}")
    parts = _bytes(metadata, _FREQUENCY, [n * width for width in widths])
    return Clusters(
        [np.frombuffer(part, dtype=np.uint8).reshape(n, -1) for part in parts], top_share
    )


def _bytes(metadata: Mapping[str, Any], key: str, lengths: Sequence[int]) -> list[bytes]:
    """An array of base64 texts, one for each FFN, of known lengths once decoded."""
    array = metadata.get(key)
    if not isinstance(array, Array) or array.type != "str":
        raise _bad(f"{key} is not an array of texts")
    if array.length != len(lengths):
        raise _bad(f"{key} has {array.length} elements instead of {len(lengths)}")
    result = []
    for i, (text, length) in enumerate(zip(array.read(), lengths, strict=True)):
        try:
            # the length first, so that nothing longer than expected is decoded
            data = binascii.a2b_base64(text) if len(text) == -(-length // 3) * 4 else b""
        except binascii.Error as error:
            raise _bad(f"{key}[{i}] is not base64: {error}") from error
        if len(data) != length:
            raise _bad(f"{key}[{i}] is not the base64 of {length} bytes")
        result.append(data)
    return result


def _floats(
    metadata: Mapping[str, Any], key: str, widths: Sequence[int], least: float = -np.inf
) -> list[Floats]:
    """Numbers for each neuron, per FFN [n_ff]."""
    result: list[Floats] = []
    for data in _bytes(metadata, key, [2 * width for width in widths]):
        values = (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        result.append(_checked(key, values, least, np.inf))
    return result


def _checked(key: str, values: Floats, least: float, most: float) -> Floats:
    if not np.isfinite(values).all():
        raise _bad(f"{key} holds a number that is not finite")
    if (values < least).any() or (values > most).any():
        raise _bad(f"{key} holds numbers outside {least:g} .. {most:g}")
    return values


def _optional_numbers(
    metadata: Mapping[str, Any], key: str, length: int | None, least: float, most: float = np.inf
) -> Floats | None:
    if key not in metadata:
        return None
    return _checked(key, _numbers(metadata, key, np.float32, length), least, most)


def _numbers(
    metadata: Mapping[str, Any], key: str, dtype: npt.DTypeLike, length: int | None
) -> npt.NDArray[Any]:
    array = metadata.get(key)
    if not isinstance(array, Array) or array.type == "str":
        raise _bad(f"{key} is not an array of numbers")
    if length is not None and array.length != length:
        raise _bad(f"{key} has {array.length} elements instead of {length}")
    values = array.read()
    assert isinstance(values, np.ndarray)
    if values.dtype != dtype:
        raise _bad(f"{key} is of type {array.type}")
    return values
