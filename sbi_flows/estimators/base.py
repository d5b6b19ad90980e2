"""Protocol of estimators: the attributes and methods that stacks and truncated rounds use.

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
    """Protocol of the history of a fit; `History` and `StackHistory` implement it."""

    @property
    def held_out(self) -> np.ndarray:
        """Indices, among the valid rows, of each member's validation rows, shape (M, V)."""
        ...

    @property
    def held_out_log_prob(self) -> np.ndarray:
        """Log density of theta in each validation row, shape (M, V), in nats.

        Entry (m, v) is computed by member m, which did not train on that row. NaN and -inf both
        mean that the density of the row is zero or could not be computed.
        """
        ...

    @property
    def interrupted(self) -> bool:
        """Whether an interrupt (Ctrl-C) ended the fit."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """Protocol of estimators: frozen settings whose method `fit` returns an amortised posterior.

    `NPE` and `Stack` are estimators. Any class with these attributes and methods is an estimator,
    which can be stacked and fitted in truncated rounds. Two estimators can be stacked if they have
    equal `prior`, `members` and `validation_fraction`, hold out the same rows for the same key, and
    return an `sf.Posterior` with the same standardiser. The last two conditions hold for an
    estimator that passes its key and its simulations unchanged to `NPE.fit`.

    Example:
        >>> import dataclasses, jax, numpyro.distributions as dist, sbi_flows as sf
        >>> from sbi_flows.estimators.base import Estimator
        >>> isinstance(sf.NPE(dist.Normal(0, 1)), Estimator)
        True
    """

    @property
    def prior(self) -> Prior:
        """Prior from which the parameters of the simulations are drawn."""
        ...

    @property
    def members(self) -> int:
        """Number M of models in the ensemble; each model holds out different rows."""
        ...

    @property
    def validation_fraction(self) -> float:
        """Fraction of the rows that each member holds out for validation."""
        ...

    def fit(
        self, key: Key, simulations: Simulations, *, progress: bool = True, summarise: bool = True
    ) -> tuple[Posterior, FitHistory]:
        """Fit to the valid rows of the simulations; the estimator itself does not change.

        Args:
            key: Random key. The rows that each member holds out depend on it, on the number of
                valid rows and on `validation_fraction` only.
            simulations: Parameters and observations.
            progress: Show a progress bar.
            summarise: Store a description of the training simulations in `posterior.typicality`. A
                stack passes False to its estimators and computes the description once.

        Returns:
            The posterior and the history of the fit.
        """
        ...

    def with_prior(self, prior: Prior) -> Estimator:
        """Return a copy of the estimator with another prior over the same parameters."""
        ...

    def with_checkpoint_folder(self, name: str) -> Estimator:
        """Return the same estimator, with the subfolder `name` as its checkpoint folder.

        The subfolder lies in the present checkpoint folder. An estimator without checkpoints
        returns itself.
        """
        ...
