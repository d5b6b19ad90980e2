"""How a score falls with the number of simulations: a power law and its uncertainty.

Public names: `PowerLaw`, `power_law`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEVEL = 0.9


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """excess = factor * budget^-exponent.

    Attributes:
        factor: Excess at one simulation.
        exponent: How fast it falls.
        low: Lower end of the exponent's 90% interval.
        high: Upper end.
    """

    factor: float
    exponent: float
    low: float
    high: float

    def at(self, budget: float) -> float:
        """The excess at this budget."""
        return self.factor * budget**-self.exponent


def power_law(budgets: Sequence[float], excess: Sequence[float]) -> PowerLaw | None:
    """Fit by least squares on logarithms; one value a run, so that seeds count.

    Args:
        budgets: Numbers of simulations.
        excess: Score above its best possible value, such as C2ST - 0.5; values that are not
            positive are left out, as their logarithm says nothing.

    Returns:
        The law with a 90% t interval for its exponent; None for fewer than three runs or two
        budgets.

    Example:
        >>> law = power_law([1e3, 1e4, 1e5], [0.4, 0.2, 0.1])
        >>> print(f"{law.exponent:.3f}, {law.at(1e6):.3f}")
        0.301, 0.050
    """
    from scipy import stats

    x, y = np.asarray(budgets, float), np.asarray(excess, float)
    x, y = np.log(x[y > 0]), np.log(y[y > 0])
    if len(x) < 3 or len(set(x)) < 2:
        return None
    fit = stats.linregress(x, y)
    half = stats.t.ppf(0.5 + LEVEL / 2, len(x) - 2) * fit.stderr
    slope = float(fit.slope)
    return PowerLaw(
        float(np.exp(fit.intercept)), -slope, float(-slope - half), float(-slope + half)
    )
