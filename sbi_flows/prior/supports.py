"""Supports of distributions: membership tests, clipping to the inside, and maps from R^d.

numpyro's constraints compare exactly. Some of its inverse transforms are infinite or NaN on the
edge of a support, or inaccurate near it. The tests in this module have a tolerance for rounding
errors, and the maps have full relative precision up to the edge.

Public names: `in_support`, `move_inside`, `clip_rounding`, `clip_to_bounds`, `transform_of`,
`base_constraint`, `TOLERANCE`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import log_sigmoid, softplus
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.distributions.util import matrix_to_tril_vec, vec_to_tril_matrix

TOLERANCE = 1e-5
"""Tolerance for rounding errors of a value, relative to its scale."""

_CORRELATIONS = type(constraints.corr_matrix)
_FACTORS = type(constraints.corr_cholesky)
_COVARIANCES = (type(constraints.positive_definite), type(constraints.positive_semidefinite))
_LOWER = type(constraints.lower_cholesky)
_ORDERED = type(constraints.ordered_vector)
_POSITIVE_ORDERED = type(constraints.positive_ordered_vector)
_SIMPLEX = type(constraints.simplex)


@runtime_checkable
class SupportTransform(Protocol):
    """Map from R^d to a support; numpyro's transforms satisfy this protocol."""

    def __call__(self, x: Any) -> Any:
        """Map R^d to the support."""
        ...

    def _inverse(self, y: Any) -> Any: ...

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Any:
        """Compute the log absolute Jacobian determinant at x; y is the mapped value."""
        ...

    def inverse_shape(self, shape: Any) -> Any:
        """Return the shape of x, given the shape of y."""
        ...


def base_constraint(support: Any) -> Any:
    """Return a constraint without its `independent` wrappers."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def transform_of(support: Any) -> SupportTransform:
    """Return the map from R^d to a support.

    Raises:
        NotImplementedError: numpyro has no transform for the support.
    """
    base = base_constraint(support)
    if type(base) is _SIMPLEX:
        return StickBreaking()
    if type(base) is _FACTORS:
        return CorrelationFactor()
    if type(base) is _CORRELATIONS:
        return CorrelationMatrix()
    return biject_to(base)


def in_support(support: Any, value: Array) -> Array:
    """Return whether values are in a support, with a tolerance for matrices and sums.

    Args:
        support: A numpyro constraint.
        value: Values, shape (*, *event).

    Returns:
        Bool array with the axes (*) and possibly further axes, over which the caller takes `all`.
    """
    base = base_constraint(support)
    if type(base) is _SIMPLEX:
        close = jnp.abs(jnp.sum(value, axis=-1) - 1.0) <= TOLERANCE
        return jnp.all(value >= 0.0, axis=-1) & close
    if type(base) is _FACTORS:
        lower = jnp.all(jnp.tril(value) == value, axis=(-2, -1))
        unit = jnp.abs(jnp.linalg.norm(value, axis=-1) - 1.0) <= TOLERANCE
        return lower & jnp.all(unit & (_diagonal(value) >= 0.0), axis=-1)
    if type(base) is _CORRELATIONS:
        unit = jnp.all(jnp.abs(_diagonal(value) - 1.0) <= TOLERANCE, axis=-1)
        return unit & _is_positive(value)
    if isinstance(base, _COVARIANCES):
        diagonal = _diagonal(value)
        return jnp.all(diagonal > 0.0, axis=-1) & _is_positive(_as_correlations(value))
    return jnp.asarray(base(value))


def move_inside(value: Array, support: Any) -> Array:
    """Clip values to the inside of a support, where the inverse of its transform is finite.

    Values on the edge, or outside by a rounding error, are replaced by a value next to the edge.
    Ties in ordered vectors are separated. Correlations of singular matrices are reduced. NaN stays
    NaN.
    """
    base = base_constraint(support)
    if type(base) in (_SIMPLEX, _POSITIVE_ORDERED):
        value = jnp.maximum(value, jnp.finfo(value.dtype).tiny)
    if type(base) is _SIMPLEX:
        return value
    if type(base) in (_ORDERED, _POSITIVE_ORDERED):
        return _separate_ties(value, math.inf)
    if isinstance(base, _LOWER) or type(base) is _FACTORS:
        eye = jnp.broadcast_to(jnp.eye(value.shape[-1], dtype=bool), value.shape)
        return jnp.where(eye, jnp.maximum(value, jnp.finfo(value.dtype).tiny), value)
    if type(base) is _CORRELATIONS or isinstance(base, _COVARIANCES):
        return _positive_definite(value)
    return clip_to_bounds(value, base)


def clip_to_bounds(theta: Array, support: Any) -> Array:
    """Clip the values of a map to the open interval between the bounds of a support.

    A map to the support (0, 1), for example, may round to 1; the result is the largest number
    below 1. Without a bound, values are clipped to the largest finite number; so are the entries of
    matrices. Ties in ordered vectors are separated. NaN stays NaN.
    """
    base = base_constraint(support)
    if type(base) in (_ORDERED, _POSITIVE_ORDERED, _SIMPLEX):
        return move_inside(theta, base)
    return jnp.clip(theta, *_limits(base, theta))


def clip_rounding(theta: Array, support: Any) -> Array:
    """Clip draws that are outside a support by a rounding error; do not change other draws.

    The tolerance is `TOLERANCE` times the scale (see `_scale`): the width of an interval, or the
    typical distance of draws from a single bound. Infinite draws become the largest finite number.

    Args:
        theta: Draws, shape (n, *event).
        support: A numpyro constraint.
    """
    base = base_constraint(support)
    if type(base) is _SIMPLEX:
        return jnp.where(theta < -TOLERANCE, theta, move_inside(theta, base))
    if type(base) in (_ORDERED, _POSITIVE_ORDERED):
        return _separate_ties(theta, TOLERANCE)
    low, high = _limits(base, theta)
    clipped = jnp.clip(theta, low, high)
    bounds = [getattr(base, name, None) for name in ("lower_bound", "upper_bound")]
    near = jnp.ones(theta.shape, bool)
    for bound, side in zip(bounds, (-1.0, 1.0), strict=True):
        if bound is not None:
            wide = _broadcast(jnp.asarray(bound, theta.dtype), theta)
            beyond = side * (theta - wide)
            near &= (beyond <= TOLERANCE * _scale(theta, wide, bounds)) | jnp.isinf(theta)
    return jnp.where(near, clipped, theta)


def _scale(theta: Array, bound: Array, bounds: list[Any]) -> Array:
    """Return the scale of draws (n, *event) to which the tolerance at a bound is relative.

    With two bounds it is their distance, and at least the rounding error of the bound divided by
    `TOLERANCE`. With one bound it is a mean distance of draws from the bound, and at least the
    bound's absolute value.
    """
    if all(b is not None for b in bounds):
        low, high = (jnp.asarray(b, theta.dtype) for b in bounds)
        width = _broadcast(jnp.subtract(*jnp.broadcast_arrays(high, low)), theta)
        return jnp.broadcast_to(jnp.maximum(width, _eps(theta) * jnp.abs(bound)), theta.shape)
    distance = jnp.minimum(jnp.abs(theta - bound), jnp.finfo(theta.dtype).max)
    # the mean of a low power is finite for heavy tails
    typical = jnp.mean(distance**0.25, axis=0, keepdims=True) ** 4
    return jnp.broadcast_to(jnp.maximum(typical, jnp.abs(bound)), theta.shape)


def _eps(like: Array) -> float:
    """Return the relative rounding error of a bound, divided by `TOLERANCE`."""
    return 16.0 * float(jnp.finfo(like.dtype).eps) / TOLERANCE


def _limits(support: Any, like: Array) -> tuple[Array, Array]:
    """Return the smallest and the largest number strictly between the bounds of a support."""
    low = _next_number(getattr(support, "lower_bound", -jnp.inf), jnp.inf, like)
    high = _next_number(getattr(support, "upper_bound", jnp.inf), -jnp.inf, like)
    return low, high


def _next_number(bound: Any, towards: float, like: Array) -> Array:
    """Return the number next to `bound` in direction `towards`, broadcastable with `like`."""
    bound = jnp.asarray(bound, like.dtype)
    step = jnp.nextafter(bound, jnp.full_like(bound, towards))
    # compiled programs flush subnormal numbers to zero
    tiny = jnp.finfo(like.dtype).tiny
    step = jnp.where(jnp.abs(step) < tiny, jnp.copysign(tiny, step), step)
    return _broadcast(step, like)


def _broadcast(value: Array, like: Array) -> Array:
    """Add leading axes to `value`, so that it broadcasts with `like`."""
    return jnp.reshape(value, (1,) * (like.ndim - value.ndim) + value.shape)


def _separate_ties(theta: Array, tolerance: float) -> Array:
    """Make the entries of vectors theta (*, K) increase: raise an entry above its predecessor.

    An entry that does not exceed its predecessor becomes the next floating-point number above it.
    An entry that is smaller by more than `tolerance`, relative to its size, is not changed.
    """

    def step(before: Array, entry: Array) -> tuple[Array, Array]:
        # the gradient treats both entries as equal: nextafter has no derivative
        above = _next_number(jax.lax.stop_gradient(before), jnp.inf, before)
        size = jnp.maximum(jnp.abs(entry), jnp.abs(before))
        is_tie = (entry <= before) & (before - entry <= tolerance * size)
        entry = jnp.where(is_tie, above, entry)
        return entry, entry

    entries = jnp.moveaxis(theta, -1, 0)
    rest = jax.lax.scan(step, entries[0], entries[1:])[1]
    return jnp.moveaxis(jnp.concatenate([entries[:1], rest]), 0, -1)


def _diagonal(value: Array) -> Array:
    return jnp.diagonal(value, axis1=-2, axis2=-1)


def _as_correlations(value: Array) -> Array:
    """Divide covariance matrices by their standard deviations."""
    sd = jnp.sqrt(jnp.maximum(_diagonal(value), jnp.finfo(value.dtype).tiny))
    return value / sd[..., :, None] / sd[..., None, :]


def _is_positive(correlations: Array) -> Array:
    """Return whether matrices are symmetric and positive definite, up to rounding."""
    mirrored = jnp.swapaxes(correlations, -2, -1)
    symmetric = jnp.all(jnp.abs(correlations - mirrored) <= TOLERANCE, axis=(-2, -1))
    values = jnp.linalg.eigvalsh(jnp.nan_to_num(correlations))
    return symmetric & (values[..., 0] > -TOLERANCE)


def _positive_definite(value: Array) -> Array:
    """Shrink the correlations of singular matrices until they are positive definite."""
    correlations = _as_correlations(value)
    smallest = jnp.linalg.eigvalsh(correlations)[..., :1, None]
    # numpyro tests whether the eigenvalues, which have rounding errors, are positive
    missing = jnp.maximum(0.5 * TOLERANCE - smallest, 0.0)
    factor = jnp.where(missing > 0.0, 1.0 / (1.0 + 0.5 * TOLERANCE + missing), 1.0)
    eye = jnp.broadcast_to(jnp.eye(value.shape[-1], dtype=bool), value.shape)
    return jnp.where(eye, value, value * factor)


class StickBreaking:
    """Map from R^(K-1) to the simplex, with full relative precision of every entry.

    The map equals numpyro's `StickBreakingTransform`; it is computed with logarithms.
    """

    def __call__(self, x: Array) -> Array:
        """Map R^(K-1) to the simplex."""
        z, before = self._parts(x)
        last = before[..., -1:] + log_sigmoid(-z[..., -1:])
        return jnp.exp(jnp.concatenate([log_sigmoid(z) + before, last], axis=-1))

    def _inverse(self, y: Array) -> Array:
        rest = jnp.flip(jnp.cumsum(jnp.flip(y, axis=-1), axis=-1), axis=-1)[..., 1:]
        return jnp.log(y[..., :-1]) - jnp.log(rest) + self._shift(rest)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Compute the log Jacobian determinant with respect to the first K - 1 entries."""
        z, before = self._parts(x)
        return jnp.sum(log_sigmoid(z) + log_sigmoid(-z) + before, axis=-1)

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of x, given the shape of y."""
        return (*shape[:-1], shape[-1] - 1)

    def _parts(self, x: Array) -> tuple[Array, Array]:
        """Return the logit of each broken fraction, and the log of the stick before each break."""
        z = x - self._shift(x)
        return z, _exclusive_sum(log_sigmoid(-z))

    def _shift(self, like: Array) -> Array:
        count = like.shape[-1]
        return _broadcast(jnp.log(jnp.arange(count, 0, -1, dtype=like.dtype)), like)


class CorrelationFactor:
    """Map from R^d to Cholesky factors of correlation matrices.

    The map equals numpyro's `CorrCholeskyTransform`. It is computed with logarithms, so that
    entries near -1 and 1 keep full relative precision of their distance from the edge.
    """

    def __call__(self, x: Array) -> Array:
        """Map R^d to Cholesky factors."""
        lower, log_rest, before = self._parts(x)
        total = jnp.sum(log_rest, axis=-1)
        eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=bool), lower.shape)
        return jnp.where(eye, jnp.exp(total)[..., None], jnp.tanh(lower) * jnp.exp(before))

    def _inverse(self, y: Array) -> Array:
        squares = jnp.flip(jnp.cumsum(jnp.flip(y * y, axis=-1), axis=-1), axis=-1)
        zeros = jnp.zeros_like(squares[..., :1])
        rest = jnp.concatenate([squares[..., 1:], zeros], axis=-1)
        rest = jnp.sqrt(jnp.maximum(rest, jnp.finfo(y.dtype).tiny))
        return matrix_to_tril_vec(jnp.arcsinh(y / rest), diagonal=-1)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Compute the log Jacobian determinant with respect to the entries below the diagonal."""
        _, log_rest, before = self._parts(x)
        return jnp.sum(jnp.tril(before, -1) + 2.0 * log_rest, axis=(-2, -1))

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of x, given the shape of y."""
        return (*shape[:-2], shape[-1] * (shape[-1] - 1) // 2)

    def _parts(self, x: Array) -> tuple[Array, Array, Array]:
        """Return x and -log(cosh(x)) below the diagonal, and cumulative sums of the latter.

        All have shape (*, K, K). The sum at an entry covers the entries before it in its row.
        """
        lower = vec_to_tril_matrix(x, diagonal=-1)
        size = jnp.abs(lower)
        log_rest = math.log(2.0) - size - softplus(-2.0 * size)
        log_rest = jnp.tril(log_rest, -1)
        return lower, log_rest, _exclusive_sum(log_rest)


class CorrelationMatrix:
    """Map from R^d to correlation matrices, through their Cholesky factors."""

    def __call__(self, x: Array) -> Array:
        """Map R^d to correlation matrices."""
        factor = CorrelationFactor()(x)
        product = jnp.matmul(factor, jnp.swapaxes(factor, -2, -1), precision="highest")
        eye = jnp.broadcast_to(jnp.eye(product.shape[-1], dtype=bool), product.shape)
        return jnp.where(eye, jnp.ones_like(product), product)

    def _inverse(self, y: Array) -> Array:
        return CorrelationFactor()._inverse(jnp.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """Compute the log Jacobian determinant with respect to the entries below the diagonal."""
        factor = CorrelationFactor()
        log_rest = factor._parts(x)[1]
        count = log_rest.shape[-1]
        order = _broadcast(jnp.arange(count - 1, -1, -1, dtype=log_rest.dtype), log_rest[..., 0])
        product = jnp.sum(order * jnp.sum(log_rest, axis=-1), axis=-1)
        return factor.log_abs_det_jacobian(x, y) + product

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of x, given the shape of y."""
        return CorrelationFactor().inverse_shape(shape)


def _exclusive_sum(values: Array) -> Array:
    """Return the sum of the entries before each entry, along the last axis."""
    sums = jnp.cumsum(values, axis=-1)
    return jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1)
