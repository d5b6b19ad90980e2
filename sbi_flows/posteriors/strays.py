"""Warn once if a few draws, far from all others, determine the standard deviation.

A flow compresses its noise to a narrow posterior. It may leave a few draws in a thousand far
outside. They change means and standard deviations much, and quantiles hardly.

Public names: `warn_of_strays`, `strays_of`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import Array

from sbi_flows.core.errors import SbiFlowsWarning
from sbi_flows.core.warn import warn_user
from sbi_flows.prior.prior import Prior

MIN_EXAMINED_DRAWS, MAX_EXAMINED_DRAWS = 4_000, 20_000
"""Minimum number of draws that are examined, and maximum number."""

MIN_STRAY_DISTANCE = 6.0
"""Distance from the median, in robust standard deviations, beyond which a draw is a stray."""

MIN_FRACTION, MAX_FRACTION = 2e-4, 0.02
"""Range of the fraction of strays; more draws than that form a mode or a heavy tail."""

MIN_RATIO = 1.2
"""Smallest ratio of the standard deviation to the robust one that causes a warning."""

_warned: weakref.WeakSet[Any] = weakref.WeakSet()
"""Posteriors that have caused a warning; each warns once."""


def warn_of_strays(posterior: Any, prior: Prior, draws: Array) -> None:
    """Warn once for each posterior if its draws (n, D) contain strays.

    Draws are in the prior's relative units. Parameters are examined in the prior's standard
    coordinates as well, in which a heavy-tailed prior is normal.
    """
    if len(draws) < MIN_EXAMINED_DRAWS or posterior in _warned:
        return
    some = np.asarray(draws[:MAX_EXAMINED_DRAWS], np.float64)
    ratio, fraction = strays_of(some)
    if not np.any(fraction > 0):
        return
    if prior.dim == len(prior.bounded):
        standard = np.asarray(prior.unchecked_to_standard(draws[:MAX_EXAMINED_DRAWS]), np.float64)
        fraction = np.where(strays_of(standard)[1] > 0, fraction, 0.0)
    if np.any(fraction > 0):
        _warned.add(posterior)
        warn_user(_text(prior.labels, ratio, fraction), SbiFlowsWarning)


def strays_of(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find strays among draws (n, D).

    Returns:
        The standard deviation relative to half the distance of the 16% and 84% quantiles, shape
        (D,), and the fraction of strays, shape (D,); zero unless strays determine the standard
        deviation.
    """
    low, middle, high = np.quantile(draws, [0.16, 0.5, 0.84], axis=0)
    scale = (high - low) / 2
    scale = np.where(scale > 0, scale, np.inf)
    ratio = draws.std(axis=0) / scale
    fraction = np.mean(np.abs(draws - middle) > MIN_STRAY_DISTANCE * scale, axis=0)
    is_stray = (fraction >= MIN_FRACTION) & (fraction <= MAX_FRACTION) & (ratio >= MIN_RATIO)
    return ratio, np.where(is_stray, fraction, 0.0)


def _text(labels: Sequence[str], ratio: np.ndarray, fraction: np.ndarray) -> str:
    worst = int(np.argmax(np.where(fraction > 0, ratio, 0.0)))
    others = int(np.sum(fraction > 0)) - 1
    also = f" (and of {others} other parameter{'s' * (others > 1)})" * (others > 0)
    return (
        f"{100 * fraction[worst]:.2g}% of the draws of {labels[worst]}{also} lie more than "
        f"{MIN_STRAY_DISTANCE:g} robust standard deviations from the median; the standard "
        f"deviation is {ratio[worst]:.2g} times the robust one. Report quantiles, which these draws hardly "
        "affect, or fit with more simulations"
    )
