"""A model file with statistics from calibration, made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from coreinfer_edge.calibrate.convert import write_with_prior
from coreinfer_edge.choose.prior import Prior
from coreinfer_edge.choose.statistics import Floats
from coreinfer_edge.model.ffn import dense_ffn
from coreinfer_edge.model.header import read_header


def with_prior(model: Path, output: Path) -> Path:
    """Write the model to ``output``, with a prior by which some neurons matter much more."""
    rng = np.random.default_rng(0)
    header = read_header(model)
    ffns = dense_ffn(header)

    def of_each() -> list[Floats]:
        return [rng.lognormal(0, 1.5, ffn.width).astype(np.float32) for ffn in ffns.values()]

    prior = Prior(
        layers=list(ffns),
        n_tokens=1000,
        mean=[np.sqrt(x) / 4 for x in of_each()],
        mean_square=of_each(),
        normalized_mean_square=of_each(),
        down_norms=[np.ones(ffn.width, dtype=np.float32) for ffn in ffns.values()],
    )
    write_with_prior(header, prior, output)
    return output
