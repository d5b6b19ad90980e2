"""The common part of the saved layers of calibrated posteriors.

A calibrated posterior was calibrated on simulations. At each observation it makes draws with a
stored random key and ranks values among them. The layer holds this key and the number of draws, so
that a loaded posterior gives the same results.

Public names: `FIELD_NAMES`, `Calibration`, `calibrated_layer`, `require_calibration`,
`require_calibration_arrays`, `calibration_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.artefact.container import Entry
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.ensembles import require_entry
from sbi_flows.artefact.layers import Header, Layer, LayerCodec
from sbi_flows.artefact.strict import expect_integer
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.typing import Key
from sbi_flows.posteriors.codec_rows import ROWS, require_hashes, require_rows
from sbi_flows.posteriors.passes import MIN_DRAWS
from sbi_flows.simulations.fingerprints import UsedRows

FIELD_NAMES = ("simulations", "failed", "draws", "key")

MAX_DRAWS = 2**20
"""Maximum number of draws at one observation."""

MAX_SIMULATIONS = 2**53

_KEY_WORDS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
"""Number of 32-bit words in a random key, for each of JAX's random number generators."""


class Calibration(NamedTuple):
    """Attributes that calibrated posteriors have in common.

    Attributes:
        num_simulations: Number of calibration simulations.
        num_failed: Number of failed simulations, which were left out.
        draws: Number of posterior draws for each observation.
        key: Random key for the posterior draws.
        record: Attribute `record` of the posterior.
        rows: Fingerprints of the calibration simulations; None if they are not known.
    """

    num_simulations: int
    num_failed: int
    draws: int
    key: Key
    record: Mapping[str, Any]
    rows: UsedRows | None = None


def calibrated_layer(codec: LayerCodec, calibration: Calibration, arrays: Tensors) -> Layer:
    """Build the layer of a calibrated posterior.

    Args:
        codec: Codec of the posterior's class.
        calibration: Attributes that all calibrated posteriors have.
        arrays: Additional arrays of the posterior's class, by name.
    """
    key = calibration.key
    fields = {
        "simulations": int(calibration.num_simulations),
        "failed": int(calibration.num_failed),
        "draws": int(calibration.draws),
        "key": str(jax.random.key_impl(key)),
    }
    tensors = {"key": np.asarray(jax.random.key_data(key)), **arrays}
    if calibration.rows is not None:
        tensors[ROWS] = calibration.rows.hashes
    return Layer(codec, fields, tensors, calibration.record)


def require_calibration(header: Header, table: Mapping[str, Entry]) -> tuple[str, ...]:
    """Check the fields and tensors of `Calibration`.

    Returns:
        Names of the tensors, without the prefix of the layer.

    Raises:
        ArtefactError: A field or a tensor is invalid, or the key's tensor is missing.
    """
    name, values = header.name, header.fields
    generator = values["key"]
    if not isinstance(generator, str) or generator not in _KEY_WORDS:
        raise ArtefactError(f"{name}.key: expected one of {[*_KEY_WORDS]}, got {generator!r:.80}")
    expect_integer(f"{name}.simulations", values["simulations"], 1, MAX_SIMULATIONS)
    expect_integer(f"{name}.failed", values["failed"], 0, MAX_SIMULATIONS)
    expect_integer(f"{name}.draws", values["draws"], MIN_DRAWS, MAX_DRAWS)
    wanted = Entry(np.dtype(np.uint32), (_KEY_WORDS[generator],), 0)
    require_entry(f"{header.prefix}/key", wanted, table)
    has_rows = bool(require_rows(f"{header.prefix}/{ROWS}", table))
    return ("key", ROWS) if has_rows else ("key",)


def require_calibration_arrays(prefix: str, tensors: Tensors) -> None:
    """Raise ArtefactError if the fingerprints of the calibration simulations are invalid."""
    if ROWS in tensors:
        require_hashes(f"{prefix}/{ROWS}", tensors[ROWS])


def calibration_of(layer: Layer) -> Calibration:
    """Return the attributes in `Calibration` from a layer that was read from a file."""
    words, values = jnp.asarray(layer.tensors["key"]), layer.fields
    key = jax.random.wrap_key_data(words, impl=values["key"])
    counts = (values["simulations"], values["failed"], values["draws"])
    hashes = layer.tensors.get(ROWS)
    rows = None if hashes is None else UsedRows(hashes)
    return Calibration(*counts, key, layer.record, rows)
