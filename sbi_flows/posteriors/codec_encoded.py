"""Codec of encoded posteriors: saves the shape of the observations and a test of the encoder.

The file does not contain the encoder, neither its program nor its weights. It contains the codes of
two fixed observations, with which the encoder that the user supplies is compared.

Public names: `ENCODED`, `probe`, `require_same_codes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.embeddings import TOLERANCE
from sbi_flows.artefact.ensembles import decode_observation, require_entry
from sbi_flows.artefact.layers import Header, LayerCodec
from sbi_flows.artefact.strict import expect_type
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.typing import Obs
from sbi_flows.densities.encoder import Encoder, encode
from sbi_flows.observations.standardise import entry_count
from sbi_flows.posteriors.codec_rows import ROWS, require_hashes, require_rows

PROBE, CAN_MISS = "probe", "can_miss"
"""Names of the tensors: codes of two fixed observations, and which entries can be missing."""

MAX_CODES = 2**20
"""Maximum number of entries of a code."""


class EncodedCodec(LayerCodec):
    """Codec of an `EncodedPosterior`; see `LayerCodec`."""

    kind = "encoded"
    file_format = 4
    field_names = ("observation", "has_missing")

    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields and the tensors; see `LayerCodec.require`."""
        observation = decode_observation(header.fields["observation"], keep_doubles=True)
        flag = header.fields["has_missing"]
        has_missing = expect_type(f"{header.name}.has_missing", flag, bool, "a truth value")
        name = f"{header.prefix}/{PROBE}"
        entry = table.get(name)
        size = 0 if entry is None or len(entry.shape) != 2 else entry.shape[1]
        if not 1 <= size <= MAX_CODES:
            raise ArtefactError(f"{name}: expected a tensor of float64 [2, F], got {entry!s}")
        require_entry(name, Entry(np.dtype(np.float64), (2, size), 0), table)
        names = [PROBE]
        if has_missing:
            wanted = Entry(np.dtype(np.uint8), (entry_count(observation),), 0)
            require_entry(f"{header.prefix}/{CAN_MISS}", wanted, table)
            names.append(CAN_MISS)
        has_rows = bool(require_rows(f"{header.prefix}/{ROWS}", table))
        return (*names, ROWS) if has_rows else tuple(names)

    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Check the fingerprints; see `LayerCodec.require_arrays`."""
        if ROWS in tensors:
            require_hashes(f"{prefix}/{ROWS}", tensors[ROWS])


ENCODED = EncodedCodec()


def probe(encoder: Encoder, like: Obs, *, has_mask: bool) -> np.ndarray:
    """Return the codes (2, F) of two fixed observations, float64.

    Args:
        encoder: The encoder.
        like: Shape and dtype of one observation.
        has_mask: Whether entries can be missing.
    """

    def pair(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = jnp.cos(jnp.arange(1.0, 2.0 * leaf.size + 1.0)).reshape(2, *leaf.shape)
        return values.astype(leaf.dtype)

    codes = encode(encoder, jax.tree.map(pair, like), has_mask=has_mask)
    return np.asarray(codes, np.float64)


def require_same_codes(encoder: Encoder, like: Obs, saved: np.ndarray, *, has_mask: bool) -> None:
    """Raise ArtefactError if an encoder gives other codes than the saved one."""
    codes = probe(encoder, like, has_mask=has_mask)
    if codes.shape != saved.shape:
        raise ArtefactError(f"network: expected codes (B, {saved.shape[1]}), got {codes.shape[1]}")
    difference = np.max(np.abs(codes - saved), initial=0.0)
    if not difference <= TOLERANCE * np.max(np.abs(saved), initial=1e-30):
        raise ArtefactError(
            "network: expected the network that the posterior was fitted with, got one whose codes "
            f"differ by up to {difference:.2g}"
        )
