"""Codec of conformal posteriors: saves the scores of the calibration simulations.

Public names: `CONFORMAL`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.ensembles import require_entry
from sbi_flows.artefact.layers import Header, LayerCodec
from sbi_flows.core.errors import ArtefactError
from sbi_flows.posteriors.codec_calibrated import (
    FIELD_NAMES,
    require_calibration,
    require_calibration_arrays,
)


class ConformalCodec(LayerCodec):
    """Codec of a `ConformalPosterior`; see `LayerCodec`."""

    kind = "conformal"
    file_format = 2
    field_names = FIELD_NAMES

    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields and the tensors; see `LayerCodec.require`."""
        names = require_calibration(header, table)
        wanted = Entry(np.dtype(np.float64), (header.fields["simulations"],), 0)
        require_entry(f"{header.prefix}/scores", wanted, table)
        return (*names, "scores")

    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Raise ArtefactError unless the scores are sorted and none is NaN."""
        require_calibration_arrays(prefix, tensors)
        scores = tensors["scores"]
        if np.any(np.isnan(scores)) or np.any(scores[1:] < scores[:-1]):
            raise ArtefactError(f"{prefix}/scores: expected sorted numbers, got others")


CONFORMAL = ConformalCodec()
