"""The abstract posterior and what is derived from one."""

from __future__ import annotations

import abc
import os
from collections.abc import Mapping
from typing import Any

from sbi_flows.artefact.layers import SavedPosterior
from sbi_flows.posteriors.writing import save
from sbi_flows.prior.prior import Prior

PosteriorLike = Any
"""What has `prior`, `sample`, `log_prob` and `sample_and_log_prob` of a `Posterior`.

Where its credible regions are not the highest-density regions of its draws, its
`density_ranks(key, theta, x)` says the levels at which they first hold each truth.
"""


class Derived:
    """Abstract: what is made of a posterior and calibration simulations.

    Attributes:
        posterior: The posterior that it was made of.
        record: What is known of it beyond the record of that posterior, as plain JSON data: the
            check, once it was saved with a report.
    """

    posterior: PosteriorLike
    record: Mapping[str, Any]

    @property
    def prior(self) -> Prior:
        """The prior, which names the parameters."""
        return self.posterior.prior

    @property
    def solved(self) -> bool:
        """Whether densities are the solutions of an ODE."""
        return getattr(self.posterior, "solved", False)

    def save(self, path: str | os.PathLike[str], *, report: Any = None) -> None:
        """Write it to one file, with the posterior that it was made of, as `Posterior.save` does.

        Args:
            path: The file; by custom it ends in `.sbif`.
            report: What `sf.check` found of the corrected posterior, which then travels in
                `record["check"]`.

        Raises:
            ValueError: It was made of another posterior than an `sf.Posterior`, or as that says.
            OSError: The file cannot be written.
        """
        save(self, path, report=report)

    @abc.abstractmethod
    def to_saved(self) -> SavedPosterior:
        """Return what a file says of the posterior; see `Savable`."""


def innermost(posterior: PosteriorLike) -> PosteriorLike:
    """What a posterior was made of in the first place, or the posterior itself."""
    while isinstance(posterior, Derived):
        posterior = posterior.posterior
    return posterior
