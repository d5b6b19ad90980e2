"""Codec of encoded posteriors: saves the shape of the observations and a test of the encoder.

The file does not contain the encoder, neither its program nor its weights. It contains the codes of
two training observations, with which the encoder that the user supplies is compared.

Public names: `ENCODED`, `codes_of`, `example_arrays`, `examples_of`, `require_same_codes`.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
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

CODES, CAN_MISS = "codes", "can_miss"
"""Names of the tensors: codes of two observations, and which entries can be missing."""

MAX_CODES = 2**20
"""Maximum number of entries of a code."""


class EncodedCodec(LayerCodec):
    """Codec of an `EncodedPosterior`; see `LayerCodec`."""

    kind = "encoded"
    file_format = 4
    field_names = ("observation", "has_missing")

    def require(self, header: Header, dim: int, table: Mapping[str, Entry]) -> tuple[str, ...]:
        """Check the fields and the tensors; see `LayerCodec.require`."""
        observation = decode_observation(header.fields["observation"])
        flag = header.fields["has_missing"]
        has_missing = expect_type(f"{header.name}.has_missing", flag, bool, "a truth value")
        name, float64 = f"{header.prefix}/{CODES}", np.dtype(np.float64)
        entry = table.get(name)
        size = 0 if entry is None or len(entry.shape) != 2 else entry.shape[1]
        if not 1 <= size <= MAX_CODES:
            raise ArtefactError(f"{name}: expected a tensor of float64 [2, F], got {entry!s}")
        wanted = {CODES: Entry(float64, (2, size), 0)}
        # the observations themselves, so that an observation is not larger than the file
        for i, leaf in enumerate(jax.tree.leaves(observation)):
            wanted[_example(i)] = Entry(float64, (2, *leaf.shape), 0)
        if has_missing:
            wanted[CAN_MISS] = Entry(np.dtype(np.uint8), (entry_count(observation),), 0)
        for tensor, expected in wanted.items():
            require_entry(f"{header.prefix}/{tensor}", expected, table)
        has_rows = bool(require_rows(f"{header.prefix}/{ROWS}", table))
        return (*wanted, ROWS) if has_rows else tuple(wanted)

    def require_arrays(self, prefix: str, tensors: Tensors) -> None:
        """Check the codes and the fingerprints; see `LayerCodec.require_arrays`."""
        if not np.all(np.isfinite(tensors[CODES])):
            raise ArtefactError(f"{prefix}/{CODES}: expected finite numbers, got others")
        if ROWS in tensors:
            require_hashes(f"{prefix}/{ROWS}", tensors[ROWS])


ENCODED = EncodedCodec()


def _example(i: int) -> str:
    """Return the name of the tensor of array i of the two observations."""
    return f"x/{i}"


def example_arrays(examples: Obs) -> Tensors:
    """Return the tensors of two observations (2, *event)."""
    leaves = jax.tree.leaves(examples)
    return {_example(i): np.asarray(leaf, np.float64) for i, leaf in enumerate(leaves)}


def examples_of(tensors: Tensors, like: Obs) -> Obs:
    """Return two observations (2, *event) from their tensors; `like` is one observation."""
    leaves, tree = jax.tree.flatten(like)
    arrays = [tensors[_example(i)].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, arrays)


def codes_of(encoder: Encoder, examples: Obs, *, has_mask: bool) -> np.ndarray:
    """Return the codes (2, F) of two observations (2, *event), float64."""
    return np.asarray(encode(encoder, examples, has_mask=has_mask), np.float64)


def require_same_codes(
    encoder: Encoder, examples: Obs, saved: np.ndarray, *, has_mask: bool
) -> None:
    """Raise ArtefactError if an encoder gives other codes of two observations than the saved."""
    codes = codes_of(encoder, examples, has_mask=has_mask)
    if codes.shape != saved.shape:
        raise ArtefactError(f"network: expected codes (B, {saved.shape[1]}), got {codes.shape[1]}")
    size = np.max(np.abs(saved), axis=0)
    scale = np.maximum(size, TOLERANCE**2 * np.max(size, initial=1e-30))
    difference = np.abs(codes - saved)
    if not np.all(difference <= TOLERANCE * scale[None]):
        raise ArtefactError(
            "network: expected the network that the posterior was fitted with, got one whose codes "
            f"differ by up to {np.max(difference):.2g}"
        )
