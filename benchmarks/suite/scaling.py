"""Fit of a power law: score as a function of the number of simulations.

Public names: `PowerLaw`, `power_law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

CONFIDENCE_LEVEL = 0.9
"""Confidence level of the interval for the exponent."""

EXPONENTS = np.geomspace(0.02, 3.0, 4_000)
"""Grid of exponents that the fit searches."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """Power law: score = floor + factor * budget^-exponent.

    Attributes:
        floor: Limit of the score at large budgets.
        factor: Difference between score and floor at a budget of one simulation.
        exponent: Exponent of the decrease.
        low: Lower end of the 90% confidence interval of the exponent.
        high: Upper end of the 90% confidence interval of the exponent.
    """

    floor: float
    factor: float
    exponent: float
    low: float
    high: float

    def at(self, budget: float) -> float:
        """Return the score that the power law predicts at a budget."""
        return self.floor + self.factor * budget**-self.exponent


def power_law(
    budgets: Sequence[float], scores: Sequence[float], floor: float | None = None
) -> PowerLaw | None:
    """Fit a power law to scores by least squares.

    The confidence interval of the exponent comes from the profile likelihood. The errors of the
    scores are assumed to be Gaussian with the same unknown standard deviation.

    Args:
        budgets: Number of simulations of each run.
        scores: Score of each run; lower is better.
        floor: Limit of the score at large budgets, such as 0.5 for a C2ST. If None, the floor is
            fitted.

    Returns:
        The power law. If the data do not bound the exponent from below or from above, `low` is 0 or
        `high` is infinity. The result is None if there are too few runs or budgets to fit the
        parameters, if the scores do not decrease, or if the best exponent lies at an end of the
        grid `EXPONENTS`.

    Example:
        >>> law = power_law([1e3, 1e4, 1e5], [0.9, 0.7, 0.6], floor=0.5)
        >>> print(f"{law.exponent:.2f}, {law.at(1e6):.2f}")
        0.30, 0.55
    """
    from scipy import stats

    n, y = np.asarray(budgets, float), np.asarray(scores, float)
    num_parameters = 2 if floor is not None else 3
    if len(y) <= num_parameters or len(set(n)) < num_parameters:
        return None
    errors, floors, factors = _at_exponents(n, y, floor)
    best = int(np.argmin(errors))
    if factors[best] <= 0 or best in (0, len(EXPONENTS) - 1):
        return None
    degrees_of_freedom = len(y) - num_parameters
    ratio = 1.0 + stats.f.ppf(CONFIDENCE_LEVEL, 1, degrees_of_freedom) / degrees_of_freedom
    inside = (errors <= errors[best] * ratio + 1e-12 * np.var(y)) & (factors > 0)
    return PowerLaw(
        float(floors[best]),
        float(factors[best]),
        float(EXPONENTS[best]),
        0.0 if inside[0] else float(EXPONENTS[inside].min()),
        float("inf") if inside[-1] else float(EXPONENTS[inside].max()),
    )


def _at_exponents(
    n: np.ndarray, y: np.ndarray, floor: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fit y = floor + factor n^(-exponent) by least squares for each exponent of `EXPONENTS`.

    If `floor` is a number, the floor is fixed to it.

    Returns:
        The sums of squared errors, the floors and the factors.
    """
    powers = n[None] ** -EXPONENTS[:, None]
    # the score is linear in the power of the budget: the fitted floor is the intercept
    centre = powers.mean(axis=1) if floor is None else np.zeros(len(EXPONENTS))
    level = y.mean() if floor is None else floor
    centred = powers - centre[:, None]
    factors = centred @ (y - level) / np.sum(centred**2, axis=1)
    errors = np.sum((y[None] - level - factors[:, None] * centred) ** 2, axis=1)
    return errors, level - factors * centre, factors
