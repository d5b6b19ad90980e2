"""Direct posterior: a mixture of ensembles of conditional densities.

Public names: `Posterior`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.pytrees import is_traced, register_pytree
from sbi_flows.core.typing import Key, Obs
from sbi_flows.core.warn import warn_user
from sbi_flows.densities.conditional import Blueprint, Weights, needs_ode
from sbi_flows.densities.embedded import present_fraction, space_labels, spaces_of
from sbi_flows.networks.embeddings import EmbeddingSettings
from sbi_flows.observations.batches import COMPLETE, Missing, as_batch
from sbi_flows.observations.shared import SharedAxes
from sbi_flows.observations.standardise import (
    LACKING,
    NEVER,
    Standardiser,
    features_of,
)
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors import codec_direct, mixtures
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.bound import in_chunks, split_draws
from sbi_flows.prior.constrained import ConstrainedPrior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows

MAX_SHORT_INPUTS = 1024
"""Number of inputs up to which the memory for the draws limits a compiled call."""

MIN_ACCEPTANCE = 0.03
"""Smallest probability of a condition that is estimated with an error of at most 10%."""


class _Constrained(NamedTuple):
    """Prepared observations of a posterior whose prior has a condition.

    Attributes:
        features: Standardised features, shape (B, C).
        log_acceptance: Log probability that a draw of the networks meets the condition, shape (B,).
    """

    features: Array
    log_acceptance: Array


_Bound: TypeAlias = Array | _Constrained
"""Prepared observations: features (B, C), or a `_Constrained` if the prior has a condition."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Posterior(AbstractPosterior):
    """Amortised posterior: a mixture of ensembles. The members of an ensemble have equal weights.

    Each draw or density needs one pass through the networks. For densities with an adaptive ODE
    solver, all draws in a compiled call share the solver's steps. The result for one draw then
    depends on the other draws, within the solver's tolerance.

    Attributes:
        prior: Prior of the parameters; it defines their names.
        blueprints: Static description of the members of each ensemble.
        weights: Network weights, one `Weights` for each ensemble; the arrays of its members are
            stacked on a leading axis.
        shares: Weight of each ensemble in the mixture; the weights add up to 1.
        standardiser: Map from observations to features.
        observation: Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves).
        record: Facts about the fit as plain JSON data, read-only: settings, simulations, history,
            versions and, if the posterior was saved with a report, the check.
        typicality: Distribution of the training simulations; if None, observations are not tested.
        used_rows: Fingerprints of the training simulations; checks warn if they are given the same
            simulations. None if they are not known.
    """

    prior: Prior
    blueprints: tuple[Blueprint, ...]
    weights: tuple[Weights, ...]
    shares: tuple[float, ...]
    standardiser: Standardiser
    observation: Obs
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    typicality: Typicality | None = None
    used_rows: UsedRows | None = None

    @property
    def members(self) -> int:
        """Number of models in the mixture, in all ensembles together."""
        return sum(mixtures.count(w) for w in self.weights)

    @property
    def needs_ode(self) -> bool:
        """Return True if a density needs an ODE solve, which evaluates a network many times."""
        return any(map(needs_ode, self.blueprints))

    @property
    def origin(self) -> Posterior:
        """This posterior itself, because it is not derived from another one."""
        return self

    @property
    def has_own_regions(self) -> bool:
        """Always False: credible regions are those of highest density, the default regions."""
        return False

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Raise ValueError, because `has_own_regions` is False."""
        raise ValueError(
            "posterior: expected one with credible regions of its own, got a direct one"
        )

    def __repr__(self) -> str:
        """Show the prior, the densities with their shares, and the number of models."""
        parts = [
            f"{b.density}" if share == 1.0 else f"{share:.2f} {b.density}"
            for b, share in zip(self.blueprints, self.shares, strict=True)
        ]
        return f"Posterior({self.prior}, {' + '.join(parts)}, members={self.members})"

    @property
    def missing(self) -> Missing:
        """Entries that an observation may lack."""
        blueprint = self.blueprints[0]
        growing: SharedAxes = ()
        codes = self.standardiser.can_miss
        if codes is None:
            return COMPLETE
        if isinstance(blueprint.embedding, EmbeddingSettings):
            growing = blueprint.embedding.growing(blueprint.sizes.like)
        if is_traced(codes):
            return Missing(codes, growing, blueprint.missing)
        codes = np.asarray(codes)
        return Missing(codes != NEVER, growing, blueprint.missing, bool(np.any(codes == LACKING)))

    @property
    def space_labels(self) -> tuple[str, ...]:
        """Names of the columns of the first array of `spaces`."""
        return space_labels(self.blueprints[0], self.observation)

    def present_fraction(self, x: Obs) -> np.ndarray | None:
        """Return the fraction of entries that each observation has, shape (B,).

        The result is None if observations must be complete.
        """
        return present_fraction(self.blueprints[0], self.features(x))

    def features(self, x: Obs) -> Array:
        """Compute the standardised features (B, C) of observations; B = 1 for a single one.

        If entries can be missing, they are zero, and a mask follows: shape (B, 2 C).
        """
        return self._standardised(x)[0]

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (B, C) and, if an embedding has a network, its output (B, F).

        Missing entries are zero. For an embedding with fixed summaries, the summaries (B, K) take
        the place of the features.

        If the members have different embeddings, the output is computed by the embedding of
        the first member.
        """
        return spaces_of(self.blueprints[0], self.weights[0], self.features(x))

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""
        return self._batch(x)[1]

    def _batch(self, x: Obs) -> tuple[Obs, bool]:
        """Return checked observations, and whether x was a single observation."""
        columns = reorder_columns("x", x, self.columns)
        return as_batch(columns, self.observation, self.missing)

    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
        names = codec_direct.Contents._fields
        return codec_direct.encode(codec_direct.Contents(*(getattr(self, n) for n in names)))

    def _bind(self, x: Obs) -> tuple[_Bound, bool]:
        """Return prepared observations, and whether x was a single observation."""
        features, single = self._standardised(x)
        if not isinstance(self.prior, ConstrainedPrior):
            return features, single
        evaluate = partial(mixtures.log_acceptance, self._parts, self.prior, self.weights)
        keys = jnp.repeat(jax.random.key(0)[None], len(features), axis=0)
        entries = mixtures.ACCEPTANCE_DRAWS * self.prior.dim
        log_acceptance = in_chunks(evaluate, entries, features, keys)[0]
        if not is_traced(log_acceptance):
            _warn_of_few(np.exp(np.asarray(log_acceptance, float)))
        return _Constrained(features, log_acceptance), single

    def _standardised(self, x: Obs) -> tuple[Array, bool]:
        """Return features (B, C), and whether x was a single observation."""
        batch, single = self._batch(x)
        return features_of(self.standardiser, batch), single

    def _features_of(self, bound: _Bound) -> Array:
        """Return the features (B, C) of prepared observations."""
        return bound.features if isinstance(bound, _Constrained) else bound

    def _sample(self, key: Key, bound: _Bound, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        # split many draws of one observation into pieces: repeat the observation for each piece
        features = self._features_of(bound)
        pieces, each = split_draws(n, self.prior.dim)
        repeated = jnp.repeat(features, pieces, axis=0)
        keys = jax.random.split(key, len(repeated))
        evaluate = partial(
            mixtures.sample, self._parts, each, with_log_prob, self.prior, self.weights
        )
        draws, log_prob = in_chunks(evaluate, self._entries(each), repeated, keys)
        draws = draws.reshape(len(features), -1, self.prior.dim)[:, :n]
        log_prob = log_prob.reshape(len(features), -1)[:, :n]
        return draws, _normalised(log_prob, bound) if with_log_prob else log_prob

    def _log_prob(self, theta: Array, bound: _Bound) -> Array:
        n, features = theta.shape[1], self._features_of(bound)
        # split many theta of one observation into pieces: repeat the observation for each piece
        pieces, each = split_draws(n, self.prior.dim)
        padded = _pad(theta, pieces * each).reshape(-1, each, self.prior.dim)
        repeated = jnp.repeat(features, pieces, axis=0)
        evaluate = partial(mixtures.log_prob, self._parts, self.prior, self.weights)
        log_prob = in_chunks(evaluate, self._entries(each), repeated, padded)[0]
        return _normalised(log_prob.reshape(len(features), -1)[:, :n], bound)

    def _standard_log_prob(self, y: Array, bound: _Bound) -> Array:
        features, theta = self._features_of(bound), self.prior.unchecked_from_standard(y)
        log_prob = mixtures.standard_log_prob(self._parts, self.weights, y[None], features)[0]
        log_prob = log_prob - self.prior.unchecked_log_det(y, theta)
        if isinstance(bound, _Constrained):
            inside = self.prior.unchecked_contains(theta)
            log_prob = jnp.where(inside, log_prob - bound.log_acceptance, -jnp.inf)
        return log_prob

    def _entries(self, n: int) -> int:
        """Return the number of entries that n draws of one observation add to a compiled call.

        Long observations count as well, because a network that reads them needs memory.
        """
        most = max(b.sizes.feature_count + b.sizes.summaries for b in self.blueprints)
        long = max(most - MAX_SHORT_INPUTS, 0)
        return n * self.prior.dim + long

    @property
    def _parts(self) -> mixtures.Parts:
        return tuple(zip(self.blueprints, self.shares, strict=True))


register_pytree(
    Posterior,
    leaves=("prior", "weights", "standardiser"),
    static=("blueprints", "shares", "observation"),
    facts={"record": {}, "typicality": None, "used_rows": None},
)


def _warn_of_few(acceptance: np.ndarray) -> None:
    """Warn if probabilities (B,) of the prior's condition are too small to be estimated well."""
    few = int(np.sum(acceptance < MIN_ACCEPTANCE))
    if few:
        warn_user(
            f"x: at {few} of {len(acceptance)} observations, fewer than "
            f"{100 * MIN_ACCEPTANCE:.0f}% of the network's draws meet the condition of the prior "
            f"(down to {100 * acceptance.min():.1g}%); densities there may be off by over 10%",
            SbiFlowsWarning,
        )


def _normalised(log_prob: Array, bound: _Bound) -> Array:
    """Divide densities (B, n) by the probability that draws meet the prior's condition."""
    if not isinstance(bound, _Constrained):
        return log_prob
    return log_prob - bound.log_acceptance[:, None]


def _pad(rows: Array, n: int) -> Array:
    """Pad rows (B, m, D) to the shape (B, n, D) by repeating the last row."""
    missing = n - rows.shape[1]
    return jnp.pad(rows, ((0, 0), (0, missing), (0, 0)), mode="edge") if missing else rows
