"""Equivariant embedding of point clouds.

Public names: `PointCloud`.

Source: Satorras, Hoogeboom & Welling 2021, "E(n) Equivariant Graph Neural Networks"
(arXiv:2102.09844), equations 3-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count
from sbi_flows.networks.embeddings.base import fill, masked_mean
from sbi_flows.networks.mlp import ResidualMLP

_MAX_PAIRS = 2**20
"""Maximum number of pairs of points in one step; it limits the memory of hidden layers."""


class PointCloud(nnx.Module):
    """Graph network for point clouds that respects permutations, rotations and translations.

    The embedding of a cloud has two parts. The first `features` numbers are invariant: permuting,
    rotating, reflecting or translating the points does not change them. The other numbers are the
    coordinates of `vectors` points. They are equivariant: they rotate and move with the cloud.
    Observations are standardised entry by entry before they are embedded. The symmetry of a
    posterior is therefore exact only if all entries have the same median and scale.
    A point with a missing entry is left out, so the number of points may differ between clouds.

    Args:
        space: Dimension n of the space.
        marks: Number of features that each point has besides its coordinates; 0 for none.
        features: Number of invariant features.
        vectors: Number of equivariant points.
        width: Width of the hidden layers.
        rounds: Number of message-passing layers.
        rngs: Keys for the initial weights.

    Raises:
        ValueError: A number is not positive.

    References:
        E(n) Equivariant Graph Neural Networks, arXiv:2102.09844.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> PointCloud(2, vectors=1, rngs=nnx.Rngs(0))(jnp.ones((5, 10, 2))).shape
        (5, 34)
    """

    def __init__(
        self,
        space: int,
        marks: int = 0,
        *,
        features: int = 32,
        vectors: int = 1,
        width: int = 32,
        rounds: int = 2,
        rngs: nnx.Rngs,
    ) -> None:
        """Create the layers."""
        require_count(1, space=space, features=features, width=width, rounds=rounds)
        require_count(0, marks=marks, vectors=vectors)
        self.space, self.marks, self.vectors = space, marks, vectors
        self.enter = nnx.Linear(max(marks, 1), width, rngs=rngs)
        self.messages, self.pulls, self.updates = (
            nnx.List([ResidualMLP(i, o, width=width, blocks=1, rngs=rngs) for _ in range(rounds)])
            for i, o in ((2 * width + 1, width), (width, 1), (2 * width, width))
        )
        self.leave = ResidualMLP(width, features, width=width, blocks=1, rngs=rngs)
        self.weigh = nnx.Linear(width, max(vectors, 1), rngs=rngs)

    def __call__(self, x: Any, mask: Any = None) -> Array:
        """Embed point clouds.

        Args:
            x: Points, shape (B, P, n). With marks, a dict of "points" (B, P, n) and "marks"
                (B, P, marks). Missing entries are zero.
            mask: For each array, True where an entry is present; None if all are present.

        Returns:
            Embeddings, shape (B, features + vectors * n).

        Raises:
            ValueError: The arrays do not have these shapes.
        """
        points, marks = self._parts(x)
        present = None
        if mask is not None:
            present = jnp.all(mask["points"] if isinstance(mask, Mapping) else mask, axis=-1)
            if self.marks:
                present &= jnp.all(mask["marks"], axis=-1)
        parts = points, marks, present
        batch_size = max(1, _MAX_PAIRS // points.shape[-2] ** 2)
        if points.ndim != 3 or len(points) <= batch_size:
            return self._embed(*parts)
        return jax.lax.map(lambda row: self._embed(*row), parts, batch_size=batch_size)

    def _embed(self, points: Array, marks: Array, present: Array | None) -> Array:
        """Embed clouds (*, P, n); `present` (*, P) says which points are not missing."""
        listed = None if present is None else present[..., :, None]
        neighbours = None if present is None else present[..., None, :, None]
        points = fill(points, listed)
        h, places = self.enter(marks), points
        for message, pull, update in zip(self.messages, self.pulls, self.updates, strict=True):
            differences = places[..., :, None, :] - places[..., None, :, :]
            squared = jnp.sum(differences**2, axis=-1, keepdims=True)
            shape = (*squared.shape[:-1], h.shape[-1])
            ends = (
                jnp.broadcast_to(end, shape) for end in (h[..., :, None, :], h[..., None, :, :])
            )
            # the logarithm gives messages a similar magnitude in wide and in narrow clouds
            messages = message(jnp.concatenate([*ends, jnp.log1p(squared)], axis=-1))
            pulled = differences / jnp.sqrt(squared + 1.0) * pull(messages)
            places = places + masked_mean(pulled, neighbours, -2)
            received = masked_mean(messages, neighbours, -2)
            h = h + update(jnp.concatenate([h, received], axis=-1))
        invariant = self.leave(masked_mean(h, listed, -2))
        if not self.vectors:
            return invariant
        centre = masked_mean(points, listed, -2, keepdims=True)
        weights, arms = self.weigh(h)[..., None], (places - centre)[..., None, :]
        offsets = masked_mean(weights * arms, None if listed is None else listed[..., None], -3)
        vectors = (centre + offsets).reshape(*invariant.shape[:-1], -1)
        return jnp.concatenate([invariant, vectors], axis=-1)

    def _parts(self, x: Any) -> tuple[Array, Array]:
        """Check and return points and marks; marks are ones if the clouds have no marks."""
        points = x["points"] if isinstance(x, Mapping) else x
        marks = x.get("marks") if isinstance(x, Mapping) else None
        if points.ndim < 2 or points.shape[-1] != self.space:
            raise ValueError(f"points: expected shape (B, P, {self.space}), got {points.shape}")
        if marks is None and not self.marks:
            return points, jnp.ones((*points.shape[:-1], 1), points.dtype)
        if marks is None or marks.shape != (*points.shape[:-1], self.marks):
            wanted = (*points.shape[:-1], self.marks)
            got = None if marks is None else marks.shape
            raise ValueError(f"marks: expected shape {wanted}, got {got}")
        return points, marks
