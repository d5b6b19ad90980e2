"""Sharpness: width of the posterior relative to the prior.

Calibration does not measure sharpness: a posterior equal to the prior is calibrated.

Public name: `Sharpness`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sbi_flows.core.tables import table
from sbi_flows.diagnostics.ranks import Ranks


@dataclasses.dataclass(frozen=True, repr=False)
class Sharpness:
    """Information gained over the prior at a typical data set, per parameter.

    Attributes:
        labels: Names of the D parameters.
        contraction: 1 - posterior variance / prior variance, the median over data sets, shape
            (D,): 0 if nothing is learned, 1 if the parameter is known exactly.
        sd: Median posterior standard deviation, in the parameters' units, shape (D,).
        movement: Variance of the posterior mean over data sets / prior variance, shape (D,): 0 if
            the posterior does not depend on the data.
    """

    labels: tuple[str, ...]
    contraction: np.ndarray
    sd: np.ndarray
    movement: np.ndarray

    @property
    def unlearned(self) -> tuple[str, ...]:
        """Names of parameters whose posterior is as wide as the prior and independent of the data.

        Such a parameter has a contraction below 0.1 and a movement below 0.05. The limits allow for
        sampling noise: 50 data sets determine the prior variance to about 10%.
        """
        is_unlearned = (self.contraction < 0.1) & (self.movement < 0.05)
        return tuple(m for m, flag in zip(self.labels, is_unlearned, strict=True) if flag)

    def __repr__(self) -> str:
        """Return the table of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return a table of contraction, standard deviation and movement per parameter."""
        columns = {
            "contraction": (f"{c:.2f}" for c in self.contraction),
            "posterior sd": (f"{s:.4g}" for s in self.sd),
            "movement": (f"{m:.2f}" for m in self.movement),
        }
        return table(self.labels, columns)

    def to_dict(self) -> dict[str, Any]:
        """Return contraction, standard deviation and movement by parameter as JSON data."""
        return {
            label: {"contraction": float(c), "sd": float(s), "movement": float(m)}
            for label, c, s, m in zip(
                self.labels, self.contraction, self.sd, self.movement, strict=True
            )
        }


def sharpness_of(ranks: Ranks) -> Sharpness:
    """Compute sharpness from the result of `draw_pass`.

    The median over data sets is used, because the variance of one heavy-tailed posterior can
    exceed the sum of all others.

    References:
        Schad et al. 2021, Toward a principled Bayesian workflow, arXiv:1904.12765, eq. 7 (the
        contraction).
    """
    prior = np.var(ranks.theta, axis=0, dtype=np.float64)
    prior = np.where(prior > 0, prior, 1.0)
    sd = np.median(ranks.sd.astype(np.float64), axis=0)
    return Sharpness(
        labels=ranks.labels,
        contraction=1.0 - sd**2 / prior,
        sd=sd,
        movement=np.var(ranks.mean, axis=0, dtype=np.float64) / prior,
    )
