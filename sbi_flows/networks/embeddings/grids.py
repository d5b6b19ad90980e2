"""Settings of embeddings of arrays on a regular grid: series, spectra, images and cubes.

Public names: `GridSettings`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

from sbi_flows.networks.embeddings.base import EmbeddingSettings, as_channels
from sbi_flows.networks.embeddings.summaries import Statistic, evaluate, labels_of
from sbi_flows.observations.shared import SharedAxes


class GridSettings(EmbeddingSettings):
    """Settings of an embedding of one array on a grid, perhaps with a last axis of channels."""

    @abc.abstractmethod
    def _shape(self, like: Any) -> tuple[int, ...]:
        """Return the shape (*grid, C) of an observation; raise ValueError if it has another."""

    @abc.abstractmethod
    def _statistics(self, shape: tuple[int, ...]) -> Sequence[Statistic]:
        """Return the fixed summaries of an array (*grid, C)."""

    def check(self, like: Any) -> None:
        """Raise ValueError unless the observation is an array on such a grid."""
        self._shape(like)

    def shared(self, like: Any) -> SharedAxes:
        """Return the axes of the grid, whose entries share one standardisation."""
        return (tuple(range(len(self._shape(like)) - 1)),)

    def summary_labels(self, like: Any) -> tuple[str, ...]:
        """Return the names of the fixed summaries."""
        return labels_of(self._statistics(self._shape(like)))

    def summarise(self, x: Any, mask: Any) -> Array:
        """Compute fixed summaries (B, K)."""
        shape = self._shape(jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
        x, mask = as_channels(x, mask, len(shape) - 1)
        return evaluate(self._statistics(shape), x, mask)
