"""Sizes of the data, which determine the shapes of a model and the parts of its inputs.

Public names: `Sizes`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.typing import Obs
from sbi_flows.observations.standardise import Shapes, unflatten_rows


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the data that determine the shapes of a model's weights.

    Attributes:
        bounded: Which of the d standard coordinates are bounded.
        tree: Pytree structure of one observation.
        shapes: Shape of each array of the observation.
        circular: Which of the d standard coordinates are circular; empty if none is.
        has_mask: Whether entries can be missing, so that a mask follows the observation.
        summaries: Number K of fixed summaries of an embedding.
        summaries_only: Whether the inputs of the model are the summaries only.
    """

    bounded: tuple[bool, ...]
    tree: Any
    shapes: Shapes
    circular: tuple[bool, ...] = ()
    has_mask: bool = False
    summaries: int = 0
    summaries_only: bool = False

    @property
    def dim(self) -> int:
        """Number d of standard coordinates."""
        return len(self.bounded)

    @property
    def feature_count(self) -> int:
        """Number of features: length C of the flattened observation, twice that with a mask."""
        return self.entry_count * (2 if self.has_mask else 1)

    @property
    def entry_count(self) -> int:
        """Length C of the flattened observation."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def input_count(self) -> int:
        """Number I of inputs: features and summaries, or summaries only."""
        return self.summaries + (0 if self.summaries_only else self.feature_count)

    @property
    def regressor_count(self) -> int:
        """Number of inputs that the linear start reads: the summaries, or all if there are none."""
        return self.summaries or self.feature_count

    def observations(self, inputs: Array) -> tuple[Obs, Obs | None]:
        """Unflatten features or inputs (B, I) to observations (B, *event) and masks, or None.

        Inputs that are summaries only contain no observations, and must not be passed.
        """
        c = self.entry_count
        x = unflatten_rows(inputs[:, :c], self.tree, self.shapes)
        if not self.has_mask:
            return x, None
        return x, unflatten_rows(inputs[:, c : 2 * c] > 0.5, self.tree, self.shapes)

    def summaries_of(self, inputs: Array) -> Array:
        """Return the summaries (B, K) among inputs (B, I)."""
        return inputs[..., self.input_count - self.summaries :]

    def regressors(self, inputs: Array) -> Array:
        """Return the inputs that the linear start reads."""
        return self.summaries_of(inputs) if self.summaries else inputs

    @property
    def like(self) -> Obs:
        """Shape and dtype of one observation, as the networks see it."""
        leaves = [jax.ShapeDtypeStruct(shape, jnp.result_type(float)) for shape in self.shapes]
        return jax.tree.unflatten(self.tree, leaves)
