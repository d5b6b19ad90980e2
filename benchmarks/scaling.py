"""How a score falls with the number of simulations: a power law and its uncertainty.

Public names: `PowerLaw`, `power_law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEVEL = 0.9

EXPONENTS = np.geomspace(0.02, 3.0, 400)
"""Exponents tried where the floor is fitted as well."""


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """score = floor + factor * budget^-exponent.

    Attributes:
        floor: What the score falls to.
        factor: Excess at one simulation.
        exponent: How fast it falls.
        low: Lower end of the exponent's 90% interval.
        high: Upper end.
    """

    floor: float
    factor: float
    exponent: float
    low: float
    high: float

    def at(self, budget: float) -> float:
        """The score at this budget."""
        return self.floor + self.factor * budget**-self.exponent


def power_law(
    budgets: Sequence[float], scores: Sequence[float], floor: float | None = None
) -> PowerLaw | None:
    """Fit by least squares; one value a run, so that seeds count.

    Args:
        budgets: Numbers of simulations.
        scores: Scores that fall with the budget.
        floor: The best possible score, such as 0.5 of a C2ST: the fit is one of logarithms, and
            scores that are not above it are left out. Without it, the floor is fitted too, and the
            interval is that of the profile likelihood for errors of one size.

    Returns:
        The law with a 90% interval for its exponent, which is open (0 or infinity) where the data
        do not bound it; None for no more runs than the law has numbers, for too few budgets to tell
        them apart, for scores that do not fall, and where no exponent is better than the largest
        or the smallest.

    Example:
        >>> law = power_law([1e3, 1e4, 1e5], [0.9, 0.7, 0.6], floor=0.5)
        >>> print(f"{law.exponent:.3f}, {law.at(1e6):.3f}")
        0.301, 0.550
    """
    n, y = np.asarray(budgets, float), np.asarray(scores, float)
    return _to_fitted_floor(n, y) if floor is None else _to_known_floor(n, y, floor)


def _to_known_floor(n: np.ndarray, y: np.ndarray, floor: float) -> PowerLaw | None:
    from scipy import stats

    above = y > floor
    x, y = np.log(n[above]), np.log(y[above] - floor)
    if len(x) < 3 or len(set(x)) < 2:
        return None
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.5 + LEVEL / 2, len(x) - 2) * fit.stderr
    slope = float(fit.slope)
    if slope >= 0:
        return None
    return PowerLaw(
        floor, float(np.exp(fit.intercept)), -slope, float(-slope - half), float(-slope + half)
    )


def _to_fitted_floor(n: np.ndarray, y: np.ndarray) -> PowerLaw | None:
    from scipy import stats

    if len(y) < 4 or len(set(n)) < 3:
        return None
    fits = []
    for exponent in EXPONENTS:
        design = np.stack([np.ones_like(n), n**-exponent], axis=1)
        coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
        fits.append((float(np.sum((y - design @ coefficients) ** 2)), *coefficients))
    errors, floors, factors = np.array(fits).T
    best = int(np.argmin(errors))
    if factors[best] <= 0 or best in (0, len(EXPONENTS) - 1):
        return None
    spare = len(y) - 3
    ratio = 1.0 + stats.f.ppf(LEVEL, 1, spare) / spare
    inside = (errors <= errors[best] * ratio + 1e-12 * np.var(y)) & (factors > 0)
    return PowerLaw(
        float(floors[best]),
        float(factors[best]),
        float(EXPONENTS[best]),
        0.0 if inside[0] else float(EXPONENTS[inside].min()),
        float("inf") if inside[-1] else float(EXPONENTS[inside].max()),
    )
