"""Rotation of circular coordinates to the direction predicted from the features.

The rotation is part of the linear start. After it, the two ends of a circular coordinate are
opposite to its predicted direction. Rotations preserve volume. The direction is the angle of a
vector that is linear in the features, plus an angle that is linear in the features. The first term
suits features such as cosine and sine, the second a feature that is itself an angle.

Public names: `Turn`, `fit_turn`.

Source: Fisher & Lee 1992, "Regression models for an angular response".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sbi_flows.densities.bijectors.circular import Rotation
from sbi_flows.networks.shapes import align
from sbi_flows.prior.circular import HALF_WIDTH, wrap

_ADAM_STEPS, _LEARNING_RATE, _MAX_ROWS = 100, 0.03, 4096

SHORT_VECTOR = 0.25
"""Maximum length of a short vector, as a fraction of the root mean square length."""

MAX_SHORT_FRACTION = 0.08
"""Maximum fraction of short vectors. The fraction is 0.06 for a normal distribution in the plane,
0.2 for a normal distribution on a line, and 0.11 for the cosine of a uniform angle."""

_SCALES = np.geomspace(1e-6, 30.0, 400)
"""Grid of scales, in standard coordinates, on which `_log_scale` maximises the density."""


class Turn(NamedTuple):
    """Direction of k circular coordinates given features c, from p = c @ weight + bias.

    Attributes:
        weight: Shape (C, 3 k): coefficients of k cosines, k sines and k angles.
        bias: Shape (3 k,).
    """

    weight: Array
    bias: Array

    @classmethod
    def standard(cls, features: int, count: int) -> Turn:
        """Return a turn of `count` coordinates that predicts direction zero for all features."""
        bias = jnp.repeat(jnp.array([1.0, 0.0, 0.0]), count)
        return cls(jnp.zeros((features, 3 * count)), bias)

    def predictor(self, c: Array) -> Array:
        """Return p (*, 3 k) given features c (*, C)."""
        p = c @ self.weight
        return p + align(self.bias, p)

    def rotation(self, c: Array, circular: tuple[bool, ...], *, at_mean: bool = False) -> Rotation:
        """Return the rotation by the predicted direction, which maps residuals to coordinates.

        Args:
            c: Features, shape (B, C).
            circular: Which of the d standard coordinates are circular.
            at_mean: Average the predictors over the batch, so that the bijector has no batch axis.
        """
        p = self.predictor(c)
        directions = directions_of(jnp.mean(p, axis=0) if at_mean else p)
        indices = np.maximum(np.cumsum(circular) - 1, 0)  # of each entry among the circular ones
        return Rotation(directions[..., indices], circular)


def directions_of(predictor: Array) -> Array:
    """Return directions (*, k) in standard coordinates, given predictors p (*, 3 k)."""
    cos, sin, angle = jnp.split(predictor, 3, axis=-1)
    return jnp.arctan2(sin, cos) * (HALF_WIDTH / math.pi) + angle


RidgePath = Callable[[Array, Array], tuple[Array, Array]]
"""Function from targets (N, q) and features (N, C) to weights (S, C, q) and biases (S, q), one for
each of S ridge penalties."""


def fit_turn(ridge_path: RidgePath, y: Array, c: Array, train: Array, held_out: Array) -> Turn:
    """Fit a turn to training rows; select the regression with held-out rows.

    For each coordinate, the candidates are a regression of the vector (cosine, sine), a regression
    of the angle, each with every ridge penalty, and a refined angle (see `_refine`).

    Args:
        ridge_path: Ridge regression for several penalties.
        y: Circular standard coordinates, shape (N, k).
        c: Standardised features, shape (N, C).
        train: Indices of the rows to fit to.
        held_out: Indices of the rows whose log density selects the fit.

    Returns:
        The turn with the highest log density of the held-out rows, for each coordinate. The density
        of the residuals is a truncated normal.
    """
    phase = y[train] * (math.pi / HALF_WIDTH)
    count = y.shape[1]
    vectors = ridge_path(jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=1), c[train])
    angles = ridge_path(y[train], c[train])
    zeros = [jnp.zeros_like(a) for a in angles]
    ones = [zeros[0], jnp.ones_like(angles[1])]
    fits = [jnp.concatenate([v, z], axis=-1) for v, z in zip(vectors, zeros, strict=True)]
    lines = [
        jnp.concatenate([o, z, a], axis=-1) for o, z, a in zip(ones, zeros, angles, strict=True)
    ]

    def scores(turn: Turn) -> Array:
        """Return the mean log density (k,) of the held-out rows."""
        squares = [
            jnp.mean(wrap(y[rows] - directions_of(turn.predictor(c[rows]))) ** 2, axis=0)
            for rows in (train, held_out)
        ]
        score = _log_density(squares[1], _log_scale(squares[0]))
        return jnp.where(_has_short_vectors(turn.predictor(c[train])), -jnp.inf, score)

    line = _select(scores, Turn(*lines), count)
    refined = _refine(line, y[train[:_MAX_ROWS]], c[train[:_MAX_ROWS]])
    every = [jnp.concatenate([a, b, r[None]]) for a, b, r in zip(fits, lines, refined, strict=True)]
    return _select(scores, Turn(*every), count)


def _has_short_vectors(predictor: Array) -> Array:
    """Return whether the predicted vectors of each of k coordinates are often short.

    If an observation contains the cosine only, for example, all vectors lie on a line through the
    origin. Their direction is 0 or pi, and jumps where the vector is short. Vectors that fill a
    disc are rarely short.
    """
    cos, sin, _ = jnp.split(predictor, 3, axis=-1)
    squares = cos**2 + sin**2
    limit = SHORT_VECTOR**2 * jnp.mean(squares, axis=0, keepdims=True)
    return jnp.mean(squares < limit, axis=0) > MAX_SHORT_FRACTION


def _select(scores: Callable[[Turn], Array], fits: Turn, count: int) -> Turn:
    """Return the fit with the highest finite score for each coordinate, from stacked fits."""
    values = jax.lax.map(scores, fits)
    best = jnp.argmax(jnp.where(jnp.isfinite(values), values, -jnp.inf), axis=0)

    def pick(stacked: Array) -> Array:
        parts = stacked.reshape(*stacked.shape[:-1], 3, count)
        chosen = [parts[best[j], ..., j] for j in range(count)]
        return jnp.stack(chosen, axis=-1).reshape(stacked.shape[1:])

    return Turn(pick(fits.weight), pick(fits.bias))


def _refine(turn: Turn, y: Array, c: Array) -> Turn:
    """Minimise the mean of 1 - cos(residual) by a fixed number of Adam steps."""
    optimiser = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _ADAM_STEPS))

    def loss(turn: Turn) -> Array:
        residual = (y - directions_of(turn.predictor(c))) * (math.pi / HALF_WIDTH)
        return jnp.mean(jnp.sum(1.0 - jnp.cos(residual), axis=1))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        turn, state = carry
        updates, state = optimiser.update(jax.grad(loss)(turn), state)
        return (optax.apply_updates(turn, updates), state), None

    (turn, _), _ = jax.lax.scan(step, (turn, optimiser.init(turn)), None, length=_ADAM_STEPS)
    return turn


def _log_scale(squares: Array) -> Array:
    """Return the log scales (k,) of greatest density, given mean squares (k,) of residuals.

    The distribution is a normal truncated to (-sqrt 3, sqrt 3), with mean zero.
    """
    logs = jnp.asarray(np.log(_SCALES), squares.dtype)
    values = jax.vmap(lambda log: _log_density(squares, jnp.full_like(squares, log)))(logs)
    return logs[jnp.argmax(values, axis=0)]


def _log_density(squares: Array, log_scale: Array) -> Array:
    """Return the mean log density (k,), without a constant; see `_log_scale`."""
    scale = jnp.exp(log_scale)
    mass = jax.scipy.special.erf(HALF_WIDTH / (math.sqrt(2.0) * scale))
    return -0.5 * squares / scale**2 - log_scale - jnp.log(mass)
