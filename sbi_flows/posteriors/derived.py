"""Base class of posteriors that are derived from another posterior.

Public names: `Derived`.
"""

from __future__ import annotations

from typing import Any

from jax import Array

from sbi_flows.core.typing import Key, Obs
from sbi_flows.observations.batches import Missing
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows


class Derived(AbstractPosterior):
    """Abstract posterior that is derived from another posterior, called its base posterior.

    Draws and densities are those of the base posterior, unless a class overrides them.

    Attributes:
        posterior: The base posterior.
        record: Facts about the derivation, in addition to the base posterior's record; plain JSON
            data.
    """

    posterior: AbstractPosterior

    @property
    def prior(self) -> Prior:
        """Prior of the parameters; it defines their names."""
        return self.posterior.prior

    @property
    def observation(self) -> Obs:
        """Shape and dtype of one observation (`jax.ShapeDtypeStruct` leaves)."""
        return self.posterior.observation

    @property
    def typicality(self) -> Typicality | None:
        """Distribution of the training simulations; None if it is not known."""
        return self.posterior.typicality

    @property
    def space_labels(self) -> tuple[str, ...]:
        """Names of the columns of the first array of `spaces`."""
        return self.posterior.space_labels

    @property
    def missing(self) -> Missing:
        """Entries that an observation may lack."""
        return self.posterior.missing

    @property
    def used_rows(self) -> UsedRows | None:
        """Fingerprints of the simulations that the fit and the corrections used."""
        return self.posterior.used_rows

    @property
    def needs_ode(self) -> bool:
        """Return True if a density needs an ODE solve, which evaluates a network many times."""
        return self.posterior.needs_ode

    @property
    def origin(self) -> AbstractPosterior:
        """The posterior from which this one was derived, in one or more steps."""
        return self.posterior.origin

    def _features_of(self, bound: Any) -> Array:
        return self.posterior._features_of(bound)

    def _sample(self, key: Key, bound: Any, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        return self.posterior._sample(key, bound, n, with_log_prob)

    def _log_prob(self, theta: Array, bound: Any) -> Array:
        return self.posterior._log_prob(theta, bound)

    def _standard_log_prob(self, y: Array, bound: Any) -> Array:
        return self.posterior._standard_log_prob(y, bound)
