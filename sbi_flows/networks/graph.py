"""An embedding of point clouds that knows their symmetries.

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
from sbi_flows.networks.mlp import ResidualMLP

_PAIRS = 2**20
"""Pairs of points at once: each of them takes the memory of some hidden layers."""


class PointCloud(nnx.Module):
    """Embed points in space: the same whatever their order; turned and shifted as they are.

    The embedding of each cloud starts with `features` numbers that no permutation, rotation,
    reflection or translation of the points changes, for what has no direction; then come `vectors`
    points in space that move as the cloud does, for what has. An observation is standardised entry
    by entry before it is embedded: the symmetry of a posterior is exact up to how much the means
    and the standard deviations of the entries differ.

    Args:
        space: Dimension of the space, n.
        marks: Length of what each point carries beside its place; 0 for nothing.
        features: Number of invariant numbers.
        vectors: Number of equivariant points.
        width: Width of the hidden layers.
        rounds: Number of rounds of messages.
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

    def __call__(self, x: Any) -> Array:
        """Map clouds (B, P, n), or a dict with these as "points" and (B, P, marks) as "marks".

        Returns:
            Shape (B, features + vectors * n).

        Raises:
            ValueError: The arrays have other shapes.
        """
        points, marks = self._parts(x)
        abreast = max(1, _PAIRS // points.shape[-2] ** 2)
        if points.ndim != 3 or len(points) <= abreast:
            return self._embedded(points, marks)
        return jax.lax.map(lambda one: self._embedded(*one), (points, marks), batch_size=abreast)

    def _embedded(self, points: Array, marks: Array) -> Array:
        h, places = self.enter(marks), points
        for message, pull, update in zip(self.messages, self.pulls, self.updates, strict=True):
            apart = places[..., :, None, :] - places[..., None, :, :]
            distance = jnp.sum(apart**2, axis=-1, keepdims=True)
            shape = (*distance.shape[:-1], h.shape[-1])
            ends = (
                jnp.broadcast_to(own, shape) for own in (h[..., :, None, :], h[..., None, :, :])
            )
            # a logarithm: clouds far apart would have messages of another size
            sent = message(jnp.concatenate([*ends, jnp.log1p(distance)], axis=-1))
            step = jnp.mean(apart / jnp.sqrt(distance + 1.0) * pull(sent), axis=-2)
            places = places + step
            h = h + update(jnp.concatenate([h, jnp.mean(sent, axis=-2)], axis=-1))
        invariant = self.leave(jnp.mean(h, axis=-2))
        if not self.vectors:
            return invariant
        centre = jnp.mean(points, axis=-2, keepdims=True)
        shares = self.weigh(h)
        moved = jnp.einsum("...pk,...pn->...kn", shares, places - centre) / places.shape[-2]
        vectors = (centre + moved).reshape(*invariant.shape[:-1], -1)
        return jnp.concatenate([invariant, vectors], axis=-1)

    def _parts(self, x: Any) -> tuple[Array, Array]:
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
