"""How much narrower than the prior a posterior is: calibration alone does not ask.

Public name: `Sharpness`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from sbi_flows.diagnostics.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """What the posterior learns beyond the prior at a typical data set; arrays (D,).

    Attributes:
        labels: Names of the D parameters.
        contraction: 1 - posterior variance / prior variance, the median over data sets; 0 learns
            nothing, 1 everything.
        sd: Median of the posterior standard deviations, in the parameters' units.
        movement: Variance of the posterior mean over data sets / prior variance; 0 when the
            posterior does not answer to the data.
    """

    labels: tuple[str, ...]
    contraction: np.ndarray
    sd: np.ndarray
    movement: np.ndarray

    @property
    def unlearned(self) -> tuple[str, ...]:
        """Parameters whose posterior is the prior: as wide, and not answering to the data."""
        # a tenth: with 50 data sets the prior's variance itself is known to no better than that
        flat = (self.contraction < 0.1) & (self.movement < 0.05)
        return tuple(m for m, is_flat in zip(self.labels, flat, strict=True) if is_flat)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by parameter, fit for JSON."""
        return {
            label: {"contraction": float(c), "sd": float(s), "movement": float(m)}
            for label, c, s, m in zip(
                self.labels, self.contraction, self.sd, self.movement, strict=True
            )
        }


def sharpness_of(ranks: Ranks) -> Sharpness:
    """Sharpness from the moments that a draw pass has kept.

    The contraction is that of Schad et al. 2021, Toward a principled Bayesian workflow,
    arXiv:1904.12765, eq. 7. The median over data sets, as the variance of a heavy-tailed posterior
    at one of them can exceed the sum of all others.
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
