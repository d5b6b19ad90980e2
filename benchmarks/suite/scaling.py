"""How a score falls with the number of simulations: a power law and its uncertainty.

Public names: `PowerLaw`, `power_law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEVEL = 0.9

EXPONENTS = np.geomspace(0.02, 3.0, 4_000)
"""Exponents that are tried."""


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
    """Fit by least squares in the scores themselves; one value a run, so that seeds count.

    Args:
        budgets: Numbers of simulations.
        scores: Scores that fall with the budget, with errors of one size.
        floor: The best possible score, such as 0.5 of a C2ST; fitted too where it is None.

    Returns:
        The law, with a 90% interval for its exponent by the profile likelihood, which is open (0 or
        infinity) where the data do not bound it; None for no more runs than the law has numbers,
        for too few budgets to tell these apart, for scores that do not fall, and where no exponent
        is better than the largest or the smallest.

    Example:
        >>> law = power_law([1e3, 1e4, 1e5], [0.9, 0.7, 0.6], floor=0.5)
        >>> print(f"{law.exponent:.2f}, {law.at(1e6):.2f}")
        0.30, 0.55
    """
    from scipy import stats

    n, y = np.asarray(budgets, float), np.asarray(scores, float)
    numbers = 2 if floor is not None else 3
    if len(y) <= numbers or len(set(n)) < numbers:
        return None
    errors, floors, factors = _at_exponents(n, y, floor)
    best = int(np.argmin(errors))
    if factors[best] <= 0 or best in (0, len(EXPONENTS) - 1):
        return None
    spare = len(y) - numbers
    ratio = 1.0 + stats.f.ppf(LEVEL, 1, spare) / spare
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
    """Sum of squared errors, floor and factor of the best law with each of the exponents."""
    falling = n[None] ** -EXPONENTS[:, None]
    # a floor that is fitted is what a regression calls the intercept
    centre = falling.mean(axis=1) if floor is None else np.zeros(len(EXPONENTS))
    level = y.mean() if floor is None else floor
    apart = falling - centre[:, None]
    factors = apart @ (y - level) / np.sum(apart**2, axis=1)
    errors = np.sum((y[None] - level - factors[:, None] * apart) ** 2, axis=1)
    return errors, level - factors * centre, factors
