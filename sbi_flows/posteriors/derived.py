"""Base class of posteriors that are derived from another posterior.

Public names: `Derived`.
"""

from __future__ import annotations

from sbi_flows.core.typing import Obs
from sbi_flows.observations.batches import Missing
from sbi_flows.observations.typicality import Typicality
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.fingerprints import UsedRows


class Derived(AbstractPosterior):
    """Abstract posterior that is derived from another posterior, called its base posterior.

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
