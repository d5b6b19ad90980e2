"""Codec of composed posteriors: saves the settings of the sampler.

Public names: `COMPOSED`.
"""

from __future__ import annotations

from collections.abc import Mapping

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.layers import Header, LayerCodec
from sbi_flows.artefact.strict import expect_integer

MAX_LEVELS, MAX_STEPS = 2**16, 2**16
"""Maximum number of noise levels, and also of Langevin steps at each level."""


class ComposedCodec(LayerCodec):
    """Codec of a `ComposedPosterior`; see `LayerCodec`."""

    kind = "composed"
    file_format = 3
    field_names = ("levels", "steps")

    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields; see `LayerCodec.require`."""
        expect_integer(f"{header.name}.levels", header.fields["levels"], 1, MAX_LEVELS)
        expect_integer(f"{header.name}.steps", header.fields["steps"], 1, MAX_STEPS)
        return ()

    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Do nothing, because a composed posterior has no arrays."""


COMPOSED = ComposedCodec()
