"""Location and scale of fixed summaries, which are fitted before training.

Public names: `Scaling`, `ROWS_PER_SUMMARY`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from sbi_flows.networks.embeddings.base import soft_clip

ROWS_PER_SUMMARY = 100
"""Minimum number of training rows for each summary; with fewer, summaries keep their own scales.

Scaled summaries are learned more accurately from many rows. From few rows, scaling amplifies those
that say little, and the fit follows their noise.
"""

_NORMAL_IQR = 1.349
_LINEAR = 3.0
"""Number of scales from the median beyond which a summary enters logarithmically."""


class Scaling(NamedTuple):
    """Standardisation of summaries by medians and interquartile ranges.

    Attributes:
        center: Median of each summary, shape (K,).
        scale: Scale of each summary, shape (K,).
    """

    center: Array
    scale: Array

    @classmethod
    def standard(cls, count: int) -> Scaling:
        """Return the scaling that changes only large values."""
        return cls(jnp.zeros(count), jnp.ones(count))

    @classmethod
    def fitted(cls, rows: Array) -> Scaling:
        """Fit to summaries (N, K).

        The scale is the interquartile range divided by 1.349; if it is zero, the standard
        deviation; for a constant summary, 1.
        """
        low, center, high = jnp.quantile(rows, jnp.asarray([0.25, 0.5, 0.75]), axis=0)
        spread, deviation = (high - low) / _NORMAL_IQR, jnp.std(rows, axis=0)
        smallest = 1e-6 * (1.0 + jnp.abs(center))
        scale = jnp.where(spread > smallest, spread, deviation)
        return cls(center, jnp.where(scale > smallest, scale, 1.0))

    def __call__(self, summaries: Array) -> Array:
        """Standardise summaries (B, K)."""
        return soft_clip((summaries - self.center[None]) / self.scale[None], _LINEAR)
