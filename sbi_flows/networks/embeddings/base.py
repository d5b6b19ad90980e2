"""Settings of embeddings, and helpers for arrays with missing entries.

Missing entries of an observation are zero. The mask, a boolean array of the same shape, is True
where an entry is present. The mask None means that all entries are present; it gives the same
result as a mask of True, at a lower cost.

Public names: `EmbeddingSettings`, `require_network`, `leaf_shape`, `as_channels`, `fill`,
`any_present`, `masked_mean`, `log_count`, `own_scale`, `project`, `soft_clip`, `start_at_zero`.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_object
from sbi_flows.networks.mlp import ResidualMLP
from sbi_flows.observations.shared import SharedAxes

MAX_SUMMARIES = 64
"""Maximum number of fixed summaries of a set, a series or an image."""


_SMALLEST_SCALE = 1e-3
"""Added to the standard deviation of an observation, so that rounding errors stay small."""


class EmbeddingSettings(abc.ABC):
    """Settings of an embedding; a fit builds the network from the shape of the observations.

    All settings are frozen and hashable. In all methods, `like` is one observation: a
    `jax.ShapeDtypeStruct` without a batch axis, or a dict of them for `Fusion`.

    Attributes:
        features: Number F of outputs of the network.
        reads_any_length: Whether the network accepts observations that are shorter along axis 0,
            and returns what it returns for the full length with the last elements missing.
        summaries_only: Whether there is no network, so that a model reads the fixed summaries only.
    """

    features: int
    reads_any_length: ClassVar[bool] = False
    summaries_only: ClassVar[bool] = False

    @abc.abstractmethod
    def check(self, like: Any) -> None:
        """Raise ValueError if one observation does not suit this embedding."""

    @abc.abstractmethod
    def shared(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which all entries share one standardisation.

        There is one tuple of axes for each array, in the order of `jax.tree.leaves(like)`. Axes
        are those of one observation, without the batch axis.
        """

    @abc.abstractmethod
    def growing(self, like: Any) -> SharedAxes:
        """Return the axes of each array along which an observation may be shorter than `like`.

        A shorter observation is padded with missing entries. The order is that of `shared`.
        """

    @abc.abstractmethod
    def summary_labels(self, like: Any) -> tuple[str, ...]:
        """Return the names of the K fixed summaries."""

    @abc.abstractmethod
    def summarise(self, x: Any, mask: Any) -> Array:
        """Compute fixed summaries (B, K) of observations (B, *event); all are finite."""

    @abc.abstractmethod
    def build(self, rngs: nnx.Rngs, like: Any) -> nnx.Module:
        """Create the network `module(x, mask, *, key=None)` with output (B, features)."""


def require_network(name: str, embedding: Any, wanted: str) -> None:
    """Raise ValueError unless a value is the settings of an embedding that has a network.

    Args:
        name: Name of the argument.
        embedding: The value.
        wanted: Description of the expected value, for the error message.
    """
    require_object(name, embedding, EmbeddingSettings, wanted)
    if embedding.summaries_only:
        raise ValueError(
            f"{name}: expected an embedding with a network, got Summaries; use it outside: "
            "sf.Summaries(embedding)"
        )


def leaf_shape(kind: str, expected: str, like: Any, ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of an observation that must be one array with at least one entry.

    Args:
        kind: Name of the embedding, for error messages.
        expected: Description of the expected observation, for error messages.
        like: The observation.
        ranks: Allowed numbers of axes; empty if any positive number is allowed.

    Raises:
        ValueError: The observation is not one array, or has another number of axes, or is empty.
    """
    if not hasattr(like, "shape"):
        names = f" with names {', '.join(map(str, like))}" if isinstance(like, dict) else ""
        raise ValueError(
            f"embedding: {kind} expects {expected}, got several arrays{names}; use Fusion to give "
            "each array its own embedding"
        )
    shape = tuple(like.shape)
    if len(shape) not in (ranks or range(1, 100)) or math.prod(shape) == 0:
        raise ValueError(f"embedding: {kind} expects {expected}, got shape {shape}")
    return shape


def as_channels(x: Array, mask: Array | None, axes: int) -> tuple[Array, Array | None]:
    """Set missing entries to zero, and append a channel axis if there is none.

    Args:
        x: Observations (B, *grid) or (B, *grid, C).
        mask: Mask of the same shape, or None.
        axes: Number of axes of the grid.

    Returns:
        Observations and mask, both of shape (B, *grid, C).
    """
    shape = x.shape if x.ndim == axes + 2 else (*x.shape, 1)
    x = fill(x, mask).reshape(shape)
    return x, None if mask is None else mask.reshape(shape)


def fill(x: Array, mask: Array | None) -> Array:
    """Set missing entries to zero."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def any_present(mask: Array | None, ndim: int) -> Array | None:
    """Return whether any entry is present along all axes after the first `ndim`."""
    return None if mask is None else jnp.any(mask, axis=tuple(range(ndim, mask.ndim)))


def masked_mean(
    x: Array, mask: Array | None, axis: int | tuple[int, ...], *, keepdims: bool = False
) -> Array:
    """Average present entries over some axes; the mean of no entries is zero."""
    if mask is None:
        return jnp.mean(x, axis=axis, keepdims=keepdims)
    total = jnp.sum(fill(x, mask), axis=axis, keepdims=keepdims)
    return total / jnp.maximum(jnp.sum(mask, axis=axis, keepdims=keepdims), 1).astype(x.dtype)


def log_count(x: Array, present: Array | None) -> Array:
    """Compute (log(1 + n) - 4) / 2 for the number n of present elements.

    The result is of order one for n between 1 and 100,000.

    Args:
        x: Array (B, *grid, C), for the number of elements if all are present.
        present: Whether each element is present, shape (B, *grid), or None.

    Returns:
        Array (B, 1).
    """
    if present is None:
        count = jnp.full((x.shape[0], 1), math.prod(x.shape[1:-1]), x.dtype)
    else:
        axes = tuple(range(1, present.ndim))
        count = jnp.sum(present, axis=axes).astype(x.dtype)[:, None]
    return (jnp.log1p(count) - 4.0) / 2.0


def own_scale(x: Array, mask: Array | None, axes: tuple[int, ...]) -> Array:
    """Standardise each observation by its own mean and standard deviation over some axes.

    After standardisation over all simulations, the elements of a narrow observation are almost
    equal; here their differences become visible.

    Args:
        x: Observations (B, *grid, C).
        mask: Mask of the same shape, or None.
        axes: Axes of the grid.

    Returns:
        Array of the shape of x; zero at missing entries and for constant observations.
    """
    deviations = fill(x - masked_mean(x, mask, axes, keepdims=True), mask)
    variance = masked_mean(deviations**2, mask, axes, keepdims=True)
    return deviations / jnp.sqrt(variance + _SMALLEST_SCALE**2)


def project(rows: Array, count: int) -> Array:
    """Project rows (B, C) onto fixed random directions; return shape (B, count)."""
    size = rows.shape[1]
    directions = np.random.default_rng(size).normal(size=(size, count)) / math.sqrt(size)
    return rows @ jnp.asarray(directions, rows.dtype)


def soft_clip(x: Array, scale: float = 1.0) -> Array:
    """Compute scale * arcsinh(x / scale): linear for small numbers, logarithmic for large ones."""
    return scale * jnp.arcsinh(x / scale)


def start_at_zero(network: nnx.Module) -> nnx.Module:
    """Set the output layer of an embedding of this library to zero.

    A fit then starts from the fixed summaries alone. Otherwise the density must first learn to
    ignore the random output of an untrained network.
    """
    last = getattr(network, "leave", None)
    if isinstance(last, ResidualMLP):
        last.leave.kernel[...] = jnp.zeros_like(last.leave.kernel[...])
    return network
