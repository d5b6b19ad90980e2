"""Encoded posterior: conditioned on the codes that a frozen network computes from observations.

Public names: `EncodedPosterior`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jax import Array

from sbi_flows.artefact.ensembles import decode_observation, encode_observation
from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.errors import ArtefactError
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.pytrees import register_pytree
from sbi_flows.core.record import ReadOnlyDict
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.encoder import Encoder, Network, encode
from sbi_flows.observations.batches import COMPLETE, Missing, as_batch
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.codec_encoded import (
    CAN_MISS,
    CODES,
    ENCODED,
    codes_of,
    example_arrays,
    examples_of,
    require_same_codes,
)
from sbi_flows.posteriors.codec_rows import ROWS
from sbi_flows.posteriors.derived import Derived
from sbi_flows.posteriors.writing import content_of
from sbi_flows.simulations.fingerprints import UsedRows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EncodedPosterior(Derived):
    """Posterior given observations that a frozen network encodes; made by `Encoded.fit`.

    The base posterior is conditioned on codes (F,). Here x is an observation (*event) in the user's
    units, or a batch (B, *event), from which the network computes the codes.

    A saved file does not contain the network, neither its program nor its weights: pass it again to
    `sf.load(path, network=...)`.

    Attributes:
        posterior: The base posterior, given codes.
        encoder: The frozen network.
        like: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        can_miss: Whether each entry of a flattened observation can be missing (NaN), shape (C,);
            None if observations must be complete.
        examples: Two training observations (2, *event); a file holds them to recognise the network.
        own_rows: Fingerprints of the training simulations; None if they are not known.
        record: Facts about the fit, as for `Posterior`.
    """

    posterior: AbstractPosterior
    encoder: Encoder
    like: Obs
    can_miss: Any = None
    examples: Obs | None = None
    own_rows: UsedRows | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    codec: ClassVar[LayerCodec] = ENCODED

    def __repr__(self) -> str:
        """Show the base posterior."""
        return f"EncodedPosterior({self.posterior})"

    @property
    def observation(self) -> Obs:
        """Shape and dtype of one observation before the encoding."""
        return self.like

    @property
    def origin(self) -> AbstractPosterior:
        """This posterior itself, because its observations differ from those of its base."""
        return self

    @property
    def used_rows(self) -> UsedRows | None:
        """Fingerprints of the training simulations, with observations before the encoding."""
        return self.own_rows

    @property
    def has_own_regions(self) -> bool:
        """Return True if the base posterior has credible regions of its own."""
        return self.posterior.has_own_regions

    @property
    def space_labels(self) -> tuple[str, ...]:
        """Names of the entries of a code: code[0], code[1], ..."""
        labels = self.posterior.space_labels
        return tuple(f"code{name[1:]}" if name.startswith("x[") else name for name in labels)

    @property
    def missing(self) -> Missing:
        """Entries that an observation may lack."""
        if self.can_miss is None:
            return COMPLETE
        return Missing(self.can_miss, simulates_gaps=True)

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return the level of the smallest credible region that contains each true theta.

        See `AbstractPosterior.credible_levels`.
        """
        return self.posterior.credible_levels(key, theta, self._codes(x)[0])

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""
        return self._batch(x)[1]

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return the standardised codes (B, F)."""
        return self.posterior.spaces(self._codes(x)[0])

    def present_fraction(self, x: Obs) -> None:
        """Return None, because codes have no missing entries."""
        return

    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
        has_mask = self.can_miss is not None
        fields = {"observation": encode_observation(self.observation), "has_missing": has_mask}
        if self.examples is None:
            raise ValueError("posterior: expected one as `Encoded.fit` returns it, with examples")
        codes = codes_of(self.encoder, self.examples, has_mask=has_mask)
        tensors = {CODES: codes, **example_arrays(self.examples)}
        if has_mask:
            tensors[CAN_MISS] = np.asarray(self.can_miss, np.uint8)
        if self.own_rows is not None:
            tensors[ROWS] = self.own_rows.hashes
        return content_of(self.posterior).derive(Layer(ENCODED, fields, tensors, self.record))

    @classmethod
    def from_layer(
        cls, posterior: AbstractPosterior, layer: Layer, network: Network | None = None
    ) -> EncodedPosterior:
        """Rebuild an encoded posterior from its layer in a file.

        Args:
            posterior: The base posterior.
            layer: The layer.
            network: The network, which the file does not contain.

        Raises:
            ArtefactError: The network is missing, or differs from the one that was used.
        """
        if network is None:
            raise ArtefactError(
                "expected the network of the fit, which the file does not contain; pass it: "
                "load(path, network=...)"
            )
        observation = decode_observation(layer.fields["observation"])
        encoder, has_mask = Encoder.of(network), bool(layer.fields["has_missing"])
        examples, codes = examples_of(layer.tensors, observation), layer.tensors[CODES]
        require_same_codes(encoder, examples, codes, has_mask=has_mask)
        given = [leaf.shape for leaf in jax.tree.leaves(posterior.observation)]
        if given != [codes.shape[1:]]:
            raise ArtefactError(f"codes: expected those of a posterior given {given}, got others")
        can_miss = layer.tensors[CAN_MISS] > 0 if has_mask else None
        rows = UsedRows(layer.tensors[ROWS]) if ROWS in layer.tensors else None
        record = ReadOnlyDict(layer.record)
        return cls(posterior, encoder, observation, can_miss, examples, rows, record)

    def _batch(self, x: Obs) -> tuple[Obs, bool]:
        """Return checked observations (B, *event), and whether x was a single observation."""
        return as_batch(reorder_columns("x", x, self.columns), self.observation, self.missing)

    def _codes(self, x: Obs) -> tuple[Array, bool]:
        """Return codes (B, F), and whether x was a single observation."""
        batch, single = self._batch(x)
        return encode(self.encoder, batch, has_mask=self.can_miss is not None), single

    def _bind(self, x: Obs) -> tuple[Any, bool]:
        codes, single = self._codes(x)
        return self.posterior._bind(codes)[0], single


register_pytree(
    EncodedPosterior,
    leaves=("posterior", "encoder", "can_miss"),
    static=("like",),
    facts={"examples": None, "own_rows": None, "record": {}},
)
