"""Elements of sets: settings, first layer and fixed summaries, shared by all embeddings of sets.

Public names: `SetSettings`, `Elements`, `require_each`, `element_of`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.networks.embeddings.base import (
    EmbeddingSettings,
    any_present,
    as_channels,
    fill,
    leaf_shape,
    log_count,
    masked_mean,
    own_scale,
    require_network,
    soft_clip,
)
from sbi_flows.networks.embeddings.layers import Entry
from sbi_flows.networks.embeddings.summaries import (
    LOGARITHMIC,
    evaluate,
    labels_of,
    set_statistics,
)
from sbi_flows.observations.shared import SharedAxes

MAX_VARIANCES = 31
"""Maximum number of summaries of elements whose variances over the elements are summaries."""


class SetSettings(EmbeddingSettings):
    """Settings of an embedding of sets: axis 0 of an observation is the set.

    Attributes:
        each: Embedding of one element; None if an element is a number or a vector.
    """

    each: EmbeddingSettings | None
    reads_any_length: ClassVar[bool] = True

    def check(self, like: Any) -> None:
        """Raise ValueError unless the observation is a set whose elements suit their embedding."""
        name = type(self).__name__
        if self.each is None:
            leaf_shape(name, "a set (n,) or (n, C)", like, (1, 2))
            return
        expected = f"a set (n, *element) of elements for {type(self.each).__name__}"
        leaf_shape(name, expected, like, ())
        self.each.check(element_of(like))

    def shared(self, like: Any) -> SharedAxes:
        """Return the axis of the set and the axes that elements share, for one standardisation."""
        inner = () if self.each is None else self.each.shared(element_of(like))[0]
        return ((0, *(axis + 1 for axis in inner)),)

    def growing(self, like: Any) -> SharedAxes:
        """Return the axis of the set, and the axes along which an element may be shorter."""
        inner = () if self.each is None else self.each.growing(element_of(like))[0]
        return ((0, *(axis + 1 for axis in inner)),)

    def summary_labels(self, like: Any) -> tuple[str, ...]:
        """Return the names of the fixed summaries.

        If elements have an embedding, its summaries are computed for each element. The summaries of
        the set are their means over the elements, and the variances of the first 31 of them.
        """
        if self.each is None:
            return labels_of(set_statistics(_with_column(like.shape)))
        inner = self.each.summary_labels(element_of(like))
        spread = [f"variance of {label}" for label in inner[:MAX_VARIANCES]]
        return ("n", *(f"mean of {label}" for label in inner), *spread)

    def summarise(self, x: Any, mask: Any) -> Array:
        """Compute fixed summaries (B, K) that do not depend on the order of the elements."""
        if self.each is None:
            x, mask = as_channels(x, mask, 1)
            return evaluate(set_statistics(x.shape[1:]), x, mask)
        present = any_present(mask, 2)
        values = _split(self.each.summarise(*_joined(x, mask)), x)
        listed = None if present is None else present[..., None]
        parts = [log_count(values, present), masked_mean(values, listed, 1)]
        deviations = (values - parts[1][:, None, :])[..., :MAX_VARIANCES]
        parts.append(soft_clip(masked_mean(deviations**2, listed, 1), LOGARITHMIC))
        return jnp.concatenate(parts, axis=1)


def require_each(each: Any) -> None:
    """Raise ValueError unless the embedding of the elements is None or settings."""
    if each is not None:
        require_network("each", each, "an embedding, such as SeriesNet()")


def element_of(like: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of one element."""
    return jax.ShapeDtypeStruct(like.shape[1:], like.dtype)


def _with_column(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 2 else (*shape, 1)


def _joined(x: Array, mask: Array | None) -> tuple[Array, Array | None]:
    """Turn the elements of all sets into one batch: (B, n, *element) to (B * n, *element)."""
    x = fill(x, mask)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    return x.reshape(shape), None if mask is None else mask.reshape(shape)


def _split(values: Array, x: Array) -> Array:
    """Split a batch of elements (B * n, F) into sets (B, n, F)."""
    return values.reshape(*x.shape[:2], values.shape[-1])


class Elements(nnx.Module):
    """First layer of the embedding of a set: a vector for each element.

    An element that is a number or a vector enters twice: standardised over all simulations, and
    standardised within its own set. Otherwise its embedding enters.
    """

    def __init__(
        self, each: EmbeddingSettings | None, width: int, *, rngs: nnx.Rngs, like: Any
    ) -> None:
        """Create the layers."""
        if each is None:
            self.enter = Entry(_with_column(like.shape)[-1], width, has_own=True, rngs=rngs)
        else:
            self.each = each.build(rngs, element_of(like))
            self.enter = nnx.Linear(each.features, width, rngs=rngs)

    def __call__(
        self, x: Array, mask: Array | None, *, key: Key | None = None
    ) -> tuple[Array, Array | None]:
        """Map sets (B, n, *element) to vectors (B, n, width) and a mask of the elements (B, n)."""
        present = any_present(mask, 2)
        if isinstance(self.enter, Entry):
            x, mask = as_channels(x, mask, 1)
            return self.enter(x, mask, own_scale(x, mask, (1,))), present
        elements, entries = _joined(x, mask)
        return self.enter(_split(self.each(elements, entries, key=key), x)), present
