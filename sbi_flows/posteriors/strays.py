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

GAP_START = 4.0
"""Between this distance and that of strays there must be fewer draws than strays."""

MIN_FRACTION, MAX_FRACTION = 2e-4, 0.02
"""Range of the fraction of strays; more draws than that are a second mode."""

MIN_RATIO = 1.2
"""Smallest ratio of the standard deviations with and without strays that causes a warning."""

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
        The standard deviation of all draws relative to that without the strays, shape (D,); and the
        fraction of strays, shape (D,), which is zero unless they determine the standard deviation
        and are separate from the other draws: a tail, in contrast, has more draws at a smaller
        distance.
    """
    low, middle, high = np.quantile(draws, [0.16, 0.5, 0.84], axis=0)
    scale = (high - low) / 2
    scale = np.where(scale > 0, scale, np.inf)
    distance = np.abs(draws - middle) / scale
    is_far = distance > MIN_STRAY_DISTANCE
    inner = np.std(draws, axis=0, where=~is_far)
    ratio = draws.std(axis=0) / np.where(inner > 0, inner, 1.0)
    fraction = np.mean(is_far, axis=0)
    nearby = np.mean((distance > GAP_START) & ~is_far, axis=0)
    is_stray = (fraction >= MIN_FRACTION) & (fraction <= MAX_FRACTION) & (fraction > nearby)
    return ratio, np.where(is_stray & (ratio >= MIN_RATIO), fraction, 0.0)


def _text(labels: Sequence[str], ratio: np.ndarray, fraction: np.ndarray) -> str:
    worst = int(np.argmax(np.where(fraction > 0, ratio, 0.0)))
    others = int(np.sum(fraction > 0)) - 1
    also = f" (and of {others} other parameter{'s' * (others > 1)})" * (others > 0)
    return (
        f"{100 * fraction[worst]:.2g}% of the draws of {labels[worst]}{also} lie more than "
        f"{MIN_STRAY_DISTANCE:g} robust standard deviations from the median; they make the "
        f"standard deviation {ratio[worst]:.2g} times as large. Report quantiles, which they "
        "hardly affect, or fit with more simulations"
    )
