"""Codec of recalibrated posteriors: saves the knots of the quantile maps.

Public names: `RECALIBRATED`, `quantiles_in`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.ensembles import require_entry
from sbi_flows.artefact.layers import Header, Layer, LayerCodec
from sbi_flows.core.errors import ArtefactError
from sbi_flows.posteriors.codec_calibrated import (
    FIELD_NAMES,
    require_calibration,
    require_calibration_arrays,
)
from sbi_flows.posteriors.quantile_maps import Quantiles, increasing


class RecalibratedCodec(LayerCodec):
    """Codec of a `RecalibratedPosterior`; see `LayerCodec`."""

    kind = "recalibrated"
    file_format = 2
    field_names = FIELD_NAMES

    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields and the tensors; see `LayerCodec.require`."""
        names = require_calibration(header, table)
        name = f"{header.prefix}/scores"
        entry = table.get(name)
        if (
            entry is None
            or entry.dtype.name not in ("float32", "float64")
            or len(entry.shape) != 2
            or entry.shape[0] != dim
            or entry.shape[1] < 2
        ):
            raise ArtefactError(
                f"{name}: expected a tensor of float32 or float64 [{dim}, 2 or more], got "
                f"{entry or 'none'!s}"
            )
        require_entry(f"{header.prefix}/values", entry, table)
        return (*names, "scores", "values")

    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Raise ArtefactError unless the knots are finite and strictly increasing."""
        require_calibration_arrays(prefix, tensors)
        for name in Quantiles._fields:
            knots = tensors[name]
            if not np.all(np.isfinite(knots)) or np.any(np.diff(knots, axis=1) <= 0.0):
                raise ArtefactError(
                    f"{prefix}/{name}: expected finite numbers that increase, got others"
                )


RECALIBRATED = RecalibratedCodec()


def quantiles_in(layer: Layer) -> Quantiles:
    """Return the quantile maps in a layer, converted to JAX's current precision."""
    return Quantiles(*(_knots(layer.tensors[name]) for name in Quantiles._fields))


def _knots(array: np.ndarray) -> Array:
    """Convert increasing knots (d, K) to JAX's current precision; keep them strictly increasing."""
    knots = jnp.asarray(array, jnp.result_type(float))
    # neighbours that differ in double precision may be equal in single precision
    is_increasing = bool(np.all(np.diff(np.asarray(knots), axis=1) > 0.0))
    return knots if is_increasing else increasing(knots)
