"""Linear start: the linear-Gaussian posterior, truncated to the prior's box.

The linear start is the first layer of a model, and is fitted before training. The standard
coordinates are regressed on the standardised observation by ridge regression, in closed form. Where
the prior is bounded, a gain, an offset and a scale for each entry are then fitted by maximum
likelihood, because truncation changes them. The density that follows is the identity initially, so
that the model at epoch 0 is the best linear-Gaussian posterior. Training keeps a change only if the
held-out log density improves.

Public names: `LinearStart`, `fit_linear_start`, `standard_truncation`, `RIDGE_PENALTIES`,
`MAX_FEATURES`.

Sources: Hastie, Tibshirani & Friedman 2009, "The Elements of Statistical Learning", section 3.4.1,
for the effective degrees of freedom; Brillinger 1983, "A generalized linear model with Gaussian
regressor variables", for the gain: truncation of the data shrinks the regression coefficients, but
does not change their direction.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sbi_flows.densities.bijectors.truncated import TruncatedAutoregression
from sbi_flows.densities.turn import Turn, fit_turn
from sbi_flows.networks.shapes import align

RIDGE_PENALTIES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, jnp.inf)
"""Ridge penalties to choose from, in units of the number of rows; infinity means no regression."""

MAX_FEATURES = 512
"""Maximum number of features of a regression; more features are projected to this number."""

_ADAM_STEPS, _LEARNING_RATE, _MAX_ROWS = 100, 0.1, 4096


class LinearStart(NamedTuple):
    """Truncated Gaussian autoregression with mean gain * (c @ weight) + bias given features c.

    Attributes:
        weight: Regression coefficients of the entries on the features, shape (C, d).
        gain: Factor of the linear predictor c @ weight for each entry, shape (d,).
        bias: Offset of each entry, shape (d,).
        chain: Regression coefficients of entry i on the entries before it, a strictly upper
            triangular matrix, shape (d, d).
        log_scale: Logarithm of the scale of each entry, shape (d,).
        turn: Rotation of the circular entries. The regression predicts the rotated entries. None
            without circular entries.
    """

    weight: Array
    gain: Array
    bias: Array
    chain: Array
    log_scale: Array
    turn: Turn | None = None

    @classmethod
    def standard(cls, features: int, dim: int, circular: tuple[bool, ...] = ()) -> LinearStart:
        """Return the start that ignores the observation: mean zero and unit scale."""
        zeros = jnp.zeros(dim)
        turn = Turn.standard(features, sum(circular)) if any(circular) else None
        return cls(
            jnp.zeros((features, dim)), jnp.ones(dim), zeros, jnp.zeros((dim, dim)), zeros, turn
        )

    def from_predictor(
        self, predictor: Array, bounded: tuple[bool, ...]
    ) -> TruncatedAutoregression:
        """Return the bijector from noise to standard coordinates, before any rotation.

        Args:
            predictor: Linear predictor c @ weight, shape (*, d).
            bounded: Which of the d coordinates are bounded.
        """
        mean = align(self.gain, predictor) * predictor + align(self.bias, predictor)
        return TruncatedAutoregression(mean, self.chain, self.log_scale, bounded)


def standard_truncation(
    batch_shape: tuple[int, ...], bounded: tuple[bool, ...], dtype: Any
) -> TruncatedAutoregression:
    """Return the bijector from noise to standard coordinates of a model without a linear start.

    It is the bijector of `LinearStart.standard`: the identity for unbounded coordinates, and a
    standard normal truncated to the prior's box for bounded ones.

    Args:
        batch_shape: Batch shape of the bijector.
        bounded: Which of the d coordinates are bounded.
        dtype: Dtype of the coordinates.
    """
    dim = len(bounded)
    mean, zeros = jnp.zeros((*batch_shape, dim), dtype), jnp.zeros(dim, dtype)
    return TruncatedAutoregression(mean, jnp.zeros((dim, dim), dtype), zeros, bounded)


def fit_linear_start(
    y: Array,
    c: Array,
    train: Array,
    held_out: Array,
    bounded: tuple[bool, ...],
    circular: tuple[bool, ...] = (),
) -> LinearStart:
    """Fit the linear start to training rows; choose the ridge penalty on held-out rows.

    Observations of more than `MAX_FEATURES` numbers are projected onto their leading principal
    directions first.

    Args:
        y: Standard coordinates, shape (N, d).
        c: Standardised features of the observation, shape (N, C).
        train: Indices of the rows to fit to.
        held_out: Indices of the rows whose log density selects the penalty.
        bounded: Which of the d coordinates are bounded.
        circular: Which of the d coordinates are circular; empty if none is.

    Returns:
        The fit with the highest log density of the held-out rows. If no regression improves this
        log density, the start ignores the observation.
    """
    if c.shape[1] > MAX_FEATURES:
        directions = _leading_directions(c[train[:_MAX_ROWS]])
        start = fit_linear_start(y, c @ directions, train, held_out, bounded, circular)
        if start.turn is not None:
            turn = start.turn._replace(weight=directions @ start.turn.weight)
            start = start._replace(turn=turn)
        return start._replace(weight=directions @ start.weight)
    if any(circular):
        turn = fit_turn(_ridge_weights, y[:, np.flatnonzero(circular)], c, train, held_out)
        y = turn.rotation(c, circular).inverse(y)
        start = fit_linear_start(y, c, train, held_out, bounded)
        return start._replace(turn=turn)

    def score(start: LinearStart) -> Array:
        return -jnp.mean(_loss(start, y[held_out], c[held_out] @ start.weight, bounded))

    start = _best(score, _ridge_path(y[train], c[train]))
    if not any(bounded):
        return start
    rows = train[:_MAX_ROWS]
    refined = _refine(start, y[rows], c[rows] @ start.weight, bounded)
    return _best(score, jax.tree.map(lambda a, b: jnp.stack([a, b]), start, refined))


def _leading_directions(c: Array) -> Array:
    """Return the leading principal directions (C, MAX_FEATURES) of rows (N, C), orthonormal.

    Source: Halko, Martinsson & Tropp 2011, "Finding Structure with Randomness" (arXiv:0909.4061),
    algorithm 4.3 with one power iteration.
    """
    count = min(MAX_FEATURES, len(c))
    c = c - jnp.mean(c, axis=0)[None]
    sketch = jax.random.normal(jax.random.key(0), (len(c), count), c.dtype)
    for _ in range(2):
        directions = jnp.linalg.qr(c.T @ sketch)[0]
        sketch = c @ directions
    return directions


class _Moments(NamedTuple):
    """Moments of centred rows, from which all ridge regressions are computed.

    Attributes:
        y_mean: Mean of the standard coordinates, shape (d,).
        c_mean: Mean of the features, shape (C,).
        values: Eigenvalues of the covariance of the features, shape (C,).
        vectors: Eigenvectors of the same covariance, shape (C, C).
        products: Covariances between the features, projected on the eigenvectors, and the
            standard coordinates, shape (C, d).
    """

    y_mean: Array
    c_mean: Array
    values: Array
    vectors: Array
    products: Array


def _ridge_path(y: Array, c: Array) -> LinearStart:
    """Fit a ridge regression of y on c for each penalty; return the stacked fits.

    All fits share one eigendecomposition.
    """
    moments, y, c = _moments(y, c)
    fit = partial(_ridge_regression, moments, y, c)
    return jax.lax.map(fit, jnp.asarray(RIDGE_PENALTIES, y.dtype))


def _ridge_weights(y: Array, c: Array) -> tuple[Array, Array]:
    """Return the weights (S, C, q) and biases (S, q) of a regression for each of S penalties."""
    moments, y, _ = _moments(y, c)

    def fit(penalty: Array) -> tuple[Array, Array]:
        weight = moments.vectors @ (moments.products / (moments.values + penalty)[:, None])
        return weight, moments.y_mean - moments.c_mean @ weight

    return jax.lax.map(fit, jnp.asarray(RIDGE_PENALTIES, y.dtype))


def _moments(y: Array, c: Array) -> tuple[_Moments, Array, Array]:
    """Return the moments of rows y (N, d) and c (N, C), and the centred rows."""
    y_mean, c_mean = jnp.mean(y, axis=0), jnp.mean(c, axis=0)
    y, c = y - y_mean[None], c - c_mean[None]
    values, vectors = jnp.linalg.eigh(c.T @ c / len(c))
    products = vectors.T @ (c.T @ y) / len(c)
    return _Moments(y_mean, c_mean, jnp.maximum(values, 0.0), vectors, products), y, c


def _ridge_regression(moments: _Moments, y: Array, c: Array, penalty: Array) -> LinearStart:
    """Fit centred rows y (N, d) and c (N, C) with one penalty ()."""
    y_mean, c_mean, values, vectors, products = moments
    weight = vectors @ (products / (values + penalty)[:, None])
    freedom = 1.0 + jnp.sum(values / (values + penalty))
    residual = y - c @ weight
    covariance = residual.T @ residual / jnp.maximum(len(c) - freedom, 1.0)
    eye = jnp.eye(y.shape[-1], dtype=y.dtype)
    # relative to the variance of each coordinate, because coordinates may have any scale
    total = jnp.mean(y * y, axis=0)
    floor = 1e-6 * jnp.diagonal(covariance) + 1e-12 * jnp.where(total > 0.0, total, 1.0)
    covariance += jnp.diag(floor)
    lower = jnp.linalg.cholesky(covariance)
    # y = mean + lower @ noise, written as a regression of each entry on the ones before it
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    scale = jnp.diagonal(lower)
    chain = (eye - scale[:, None] * inverse).T
    weight = weight - weight @ chain
    bias = y_mean - y_mean @ chain - c_mean @ weight
    return LinearStart(weight, jnp.ones_like(bias), bias, chain, jnp.log(scale))


def _refine(
    start: LinearStart, y: Array, predictor: Array, bounded: tuple[bool, ...]
) -> LinearStart:
    """Maximise the likelihood over all arrays except `weight`, by a fixed number of Adam steps."""
    optimiser = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _ADAM_STEPS))

    def loss(start: LinearStart) -> Array:
        return jnp.mean(_loss(start, y, predictor, bounded))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        start, state = carry
        updates, state = optimiser.update(jax.grad(loss)(start), state)
        return (optax.apply_updates(start, updates), state), None

    first = (start, optimiser.init(start))
    (start, _), _ = jax.lax.scan(step, first, None, length=_ADAM_STEPS)
    return start


def _loss(start: LinearStart, y: Array, predictor: Array, bounded: tuple[bool, ...]) -> Array:
    """Return the negative log density of each row."""
    return -start.from_predictor(predictor, bounded).log_prob(y)


def _best(score: Callable[[LinearStart], Array], fits: LinearStart) -> LinearStart:
    """Return the fit with the highest finite score from stacked fits."""
    scores = jax.vmap(score)(fits)
    best = jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf))
    return jax.tree.map(lambda a: a[best], fits)
