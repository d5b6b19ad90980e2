"""The estimator protocol: what stacks and truncated rounds need of an estimator.

Public names: `Estimator`, `FitHistory`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from sbi_flows.core.typing import Key
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations


@runtime_checkable
class FitHistory(Protocol):
    """What a stack needs to know of a fit; `History` and `StackHistory` have it."""

    @property
    def held_out(self) -> np.ndarray:
        """Numbers of the valid rows that each member was validated on, shape (M, V)."""
        ...

    @property
    def held_out_log_prob(self) -> np.ndarray:
        """Log density of theta of each of these rows, shape (M, V), in nats.

        Row (m, v) is evaluated by member m, which did not train on it. NaN and -inf both mean that
        the model gives the row no density.
        """
        ...

    @property
    def interrupted(self) -> bool:
        """True if an interrupt (Ctrl-C) ended the fit."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """A frozen description that turns simulations into an amortised posterior.

    `NPE` and `Stack` are estimators, and so is every class with these members: it can be stacked,
    and fitted in truncated rounds. Two estimators can be stacked if they have equal `prior`,
    `members` and `validation_fraction`, hold out the same rows for the same key, and return an
    `sf.Posterior` with the same standardiser. An estimator that calls `NPE.fit` with the key and
    the simulations that it was given does so.

    Example:
        >>> import dataclasses, jax, numpyro.distributions as dist, sbi_flows as sf
        >>> from sbi_flows.estimators.base import Estimator
        >>> isinstance(sf.NPE(dist.Normal(0, 1)), Estimator)
        True
    """

    @property
    def prior(self) -> Prior:
        """The prior that the simulations are drawn from."""
        ...

    @property
    def members(self) -> int:
        """Number of models M, each of which holds out other rows."""
        ...

    @property
    def validation_fraction(self) -> float:
        """Fraction of the rows that each member holds out."""
        ...

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True, summarise: bool = True
    ) -> tuple[Posterior, FitHistory]:
        """Fit to the valid rows of the simulations; changes nothing in place.

        Args:
            key: Random key. The rows that each member holds out depend on it, on the number of
                valid rows and on `validation_fraction` only.
            simulations: Parameters and observations.
            progress: Show a progress bar.
            summarise: Describe the distribution of the training simulations in
                `posterior.typicality`. A stack does so once, for all of its estimators.

        Returns:
            The posterior and the history of the fit.
        """
        ...

    def with_prior(self, prior: Prior) -> Estimator:
        """Return the same estimator for another prior over the same parameters."""
        ...

    def with_checkpoint_folder(self, name: str) -> Estimator:
        """Return the same estimator, with the subfolder `name` as its checkpoint folder.

        The subfolder lies in the present checkpoint folder. An estimator without checkpoints
        returns itself.
        """
        ...
