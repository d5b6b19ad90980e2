"""The linear-Gaussian posterior, truncated to the prior's box, as the first layer of every density.

Ridge regression of the standard coordinates on the standardised observation, in closed form; where
the prior is bounded, the few numbers that truncation changes (one gain, offset and scale an entry)
are then fitted by maximum likelihood. A density behind it that starts at the identity is, at epoch
0, the best linear-Gaussian posterior; training leaves it only as far as held-out density rewards.

Source for the effective degrees of freedom: Hastie, Tibshirani & Friedman 2009, "The Elements of
Statistical Learning", section 3.4.1. A regression on truncated data keeps its direction and shrinks
its length (Brillinger 1983, "A generalized linear model with Gaussian regressor variables"), hence
one gain an entry.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sbi_flows.densities.bijectors.truncated import TruncatedAutoregression
from sbi_flows.networks.shapes import align

PENALTIES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, jnp.inf)
"""Ridge penalties tried, as multiples of the number of rows; the last one is no regression."""

MAX_FEATURES = 512
"""Longer observations are projected onto this many directions before the regression."""

_STEPS, _RATE, _ROWS = 100, 0.1, 4096


class LinearStart(NamedTuple):
    """y | c ~ truncated Gaussian autoregression around gain * (c @ weight) + bias.

    Attributes:
        weight: Shape (C, d).
        gain: Shape (d,).
        bias: Shape (d,).
        chain: Regression of entry i on the entries before it, strictly upper, shape (d, d).
        log_scale: Shape (d,).
    """

    weight: Array
    gain: Array
    bias: Array
    chain: Array
    log_scale: Array

    @classmethod
    def standard(cls, features: int, dim: int) -> LinearStart:
        """Return the start that ignores the observation: mean zero and unit scale."""
        zeros = jnp.zeros(dim)
        return cls(jnp.zeros((features, dim)), jnp.ones(dim), zeros, jnp.zeros((dim, dim)), zeros)

    def bijector(self, c: Array, bounded: tuple[bool, ...]) -> TruncatedAutoregression:
        """Noise to standard coordinates given features c (*, C)."""
        return self.from_predictor(c @ self.weight, bounded)

    def from_predictor(self, line: Array, bounded: tuple[bool, ...]) -> TruncatedAutoregression:
        """The same, given c @ weight of shape (*, d)."""
        mean = align(self.gain, line) * line + align(self.bias, line)
        return TruncatedAutoregression(mean, self.chain, self.log_scale, bounded)


def standard_truncation(
    batch_shape: tuple[int, ...], bounded: tuple[bool, ...], dtype: Any
) -> TruncatedAutoregression:
    """Return the bijector from noise to standard coordinates of a model without a linear start.

    It is that of `LinearStart.standard`: the identity for unbounded coordinates, and a standard
    normal truncated to the prior's box for bounded ones.

    Args:
        batch_shape: Batch shape of the bijector.
        bounded: Which of the d coordinates are bounded.
        dtype: Dtype of the coordinates.
    """
    dim = len(bounded)
    mean, zeros = jnp.zeros((*batch_shape, dim), dtype), jnp.zeros(dim, dtype)
    return TruncatedAutoregression(mean, jnp.zeros((dim, dim), dtype), zeros, bounded)


def fit_linear_start(
    y: Array, c: Array, train: Array, held_out: Array, bounded: tuple[bool, ...]
) -> LinearStart:
    """Fit on the training rows; choose the ridge penalty by log density of the held-out rows.

    Args:
        y: Standard coordinates, shape (N, d).
        c: Standardised features of the observation, shape (N, C).
        train: Row numbers to fit on.
        held_out: Row numbers to choose on.
        bounded: Which of the d coordinates are bounded.

    Returns:
        The best fit; where no penalty helps, one that ignores the observation. Observations of more
        than `MAX_FEATURES` numbers enter through their leading principal directions.
    """
    if c.shape[1] > MAX_FEATURES:
        directions = _leading_directions(c[train[:_ROWS]])
        start = fit_linear_start(y, c @ directions, train, held_out, bounded)
        return start._replace(weight=directions @ start.weight)
    fits = _ridge_path(y[train], c[train])

    def score(f: LinearStart) -> Array:
        return -jnp.mean(_loss(f, y[held_out], c[held_out] @ f.weight, bounded))

    scores = jax.vmap(score)
    best = _argmax(scores(fits))
    start = jax.tree.map(lambda a: a[best], fits)
    if not any(bounded):
        return start
    rows = train[:_ROWS]
    polished = _polish(start, y[rows], c[rows] @ start.weight, bounded)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), start, polished)
    best = _argmax(scores(both))
    return jax.tree.map(lambda a: a[best], both)


def _leading_directions(c: Array) -> Array:
    """Orthonormal directions (C, MAX_FEATURES) that hold most of the variance of rows (N, C).

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


def _ridge_path(y: Array, c: Array) -> LinearStart:
    """One fit a penalty, stacked, from one eigendecomposition."""
    y_mean, c_mean = jnp.mean(y, axis=0), jnp.mean(c, axis=0)
    y, c = y - y_mean[None], c - c_mean[None]
    values, vectors = jnp.linalg.eigh(c.T @ c / len(c))
    values = jnp.maximum(values, 0.0)
    moments = vectors.T @ (c.T @ y) / len(c)
    eye = jnp.eye(y.shape[-1], dtype=y.dtype)

    def fit(penalty: Array) -> LinearStart:
        weight = vectors @ (moments / (values + penalty)[:, None])
        freedom = 1.0 + jnp.sum(values / (values + penalty))
        residual = y - c @ weight
        covariance = residual.T @ residual / jnp.maximum(len(c) - freedom, 1.0)
        covariance += (1e-6 * jnp.mean(jnp.diagonal(covariance)) + 1e-12) * eye
        lower = jnp.linalg.cholesky(covariance)
        # y = mean + lower @ noise, as a regression of each entry on the ones before it
        whitener = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
        scale = jnp.diagonal(lower)
        chain = (eye - scale[:, None] * whitener).T
        weight = weight - weight @ chain
        bias = y_mean - y_mean @ chain - c_mean @ weight
        return LinearStart(weight, jnp.ones_like(bias), bias, chain, jnp.log(scale))

    return jax.lax.map(fit, jnp.asarray(PENALTIES, y.dtype))


def _polish(start: LinearStart, y: Array, line: Array, bounded: tuple[bool, ...]) -> LinearStart:
    """Maximum likelihood over all but the weights, by a fixed number of Adam steps."""
    optimiser = optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS))

    def loss(free: LinearStart) -> Array:
        return jnp.mean(_loss(free, y, line, bounded))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        free, state = carry
        updates, state = optimiser.update(jax.grad(loss)(free), state)
        return (optax.apply_updates(free, updates), state), None

    first = (start, optimiser.init(start))
    (free, _), _ = jax.lax.scan(step, first, None, length=_STEPS)
    return free


def _loss(start: LinearStart, y: Array, line: Array, bounded: tuple[bool, ...]) -> Array:
    return -start.from_predictor(line, bounded).log_prob(y)


def _argmax(scores: Array) -> Array:
    return jnp.argmax(jnp.where(jnp.isfinite(scores), scores, -jnp.inf))
