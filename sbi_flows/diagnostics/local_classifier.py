"""Classifiers that tell true parameters from draws of a posterior, near one observation.

Public names: `Pairs`, `Classified`, `local_frame`, `in_frame`, `neighbours`, `classify`.

A classifier is a logistic regression on what a posterior's errors are made of: in the posterior's
own frame (its mean and covariance at each data set taken off) coordinates, their squares and
products, and random waves, which tell any two densities apart. Being convex, it has one solution,
and all classifiers share the matrix that each step to it is solved by: a hundred of them cost
little more than one.

Source: Linhart, Gramfort & Rodrigues 2023, "L-C2ST: Local Diagnostics for Posterior Approximations
in Simulation-Based Inference" (arXiv:2306.03580); Böhning 1992, "Multinomial logistic regression
algorithm" (Ann. Inst. Statist. Math. 44:197), for the steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key

MOMENTS = 64
"""Draws that a posterior's frame at a data set is made of."""

WAVES = 64
"""Random waves, each a feature."""

NUMBERS = (0.5, 3.0)
"""Range of their wave numbers, per standard deviation of the posterior."""

PRODUCTS = 30
"""Most coordinates whose products are features: there are 435 then."""

STEPS = 8
"""Steps to the solution, which is nearly reached by the first one where there is little to see."""

COMPONENTS, PROJECTED = 32, 64
"""Principal components that stand for an observation of more entries, and the random projections
that they are found in."""

LEAST_SHARE, MOST_AXES = 0.05, 12
"""Directions that distances are taken in: least variance in that of the first, and their number."""

LIMIT = 40.0
"""Largest standard coordinate."""


class Pairs(NamedTuple):
    """True parameters and draws at the same data sets, in the posterior's frame at each.

    Attributes:
        truth: Shape (k, d).
        draw: Shape (k, d).
        weight: Weight of each data set, shape (k,): 1 at the nearest.
    """

    truth: Any
    draw: Any
    weight: Any


class Classified(NamedTuple):
    """What the classifiers say of parameters: first that of the true labels, then permuted ones.

    Attributes:
        probability: Of being a true parameter, shape (n, 1 + P).
        statistic: Mean of its squared distance from one half, shape (1 + P,).
        swapped: Which of the k pairs were swapped, shape (k, 1 + P).
    """

    probability: np.ndarray
    statistic: np.ndarray
    swapped: np.ndarray


@jax.jit
@full_precision
def local_frame(draws: Array) -> tuple[Array, Array, Array]:
    """The frame in which draws (B, m, d) of each of B posteriors have mean 0 and covariance 1.

    Returns:
        Means (B, d), whitening matrices (B, d, d) and standard deviations (B, d). The matrices are
        symmetric roots of the correlations, drawn to the identity by as much as `MOMENTS` draws ask
        for: each coordinate stays close to its parameter.
    """
    m, dim = draws.shape[1:]
    shrink = max(0.05, dim / (dim + MOMENTS))
    mean = jnp.mean(draws, axis=1)
    away = draws - mean[:, None]
    tiny = jnp.finfo(draws.dtype).tiny ** 0.5
    sd = jnp.maximum(jnp.std(draws, axis=1), tiny)
    away = away / sd[:, None]
    correlation = jnp.einsum("bni,bnj->bij", away, away) / m
    drawn = (1.0 - shrink) * correlation + shrink * jnp.eye(dim)[None]
    values, vectors = jnp.linalg.eigh(drawn)
    root = jnp.einsum("bij,bj,bkj->bik", vectors, values**-0.5, vectors)
    return mean, root / sd[:, None], sd


@jax.jit
@full_precision
def in_frame(frame: tuple[Any, ...], y: Any) -> Array:
    """Parameters (B, d) in frames (B, ...), or (n, d) in one; logarithmic beyond 3."""
    mean, root, _ = frame
    z = jnp.einsum("bij,bj->bi", jnp.broadcast_to(root, (len(y), *root.shape[1:])), y - mean)
    # a truth that lies far out speaks for the many that do not
    return jnp.clip(z, -3.0, 3.0) + jnp.sign(z) * jnp.log1p(jnp.maximum(jnp.abs(z) - 3.0, 0.0))


def neighbours(
    key: Key,
    features: np.ndarray,
    moments: np.ndarray,
    both: tuple[np.ndarray, np.ndarray],
    share: float,
    least: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The data sets nearest to the last one, and their weights.

    Near is what has a similar posterior: by the moments of the given one, and by what a linear
    regression on the observation and its squares predicts of parameters and of their squares. Truth
    and draw enter their mean alone, which does not know which is which.

    Args:
        key: Random key.
        features: Of the N data sets and, last, of the observation, shape (N + 1, C).
        moments: Means and logarithms of standard deviations, likewise, shape (N + 1, 2 d).
        both: Truths and draws, standard coordinates, shape (N, d) each.
        share: Share of the data sets.
        least: Least number of them.

    Returns:
        Numbers (k,), the nearest first, and weights (k,): 1 at the nearest, hardly any at the last.
    """
    place = np.asarray(_places(key, features, moments, both), float)
    place = place - place[:-1].mean(axis=0)
    variances, axes = np.linalg.eigh(place[:-1].T @ place[:-1] / len(place))
    kept = np.flatnonzero(variances >= LEAST_SHARE * variances[-1])[-MOST_AXES:]
    place = place @ axes[:, kept]
    distance = np.sqrt(np.sum((place[:-1] - place[-1]) ** 2, axis=1))
    count = min(len(distance), max(least, round(share * len(distance))))
    near = np.argsort(distance, kind="stable")[:count]
    # a little beyond the last, or all would weigh nothing where all are equally far
    radius = max(1.1 * distance[near[-1]], 1e-12)
    weight = (1.0 - (distance[near] / radius) ** 3) ** 3
    return near, weight / weight[0]


@jax.jit
@full_precision
def _places(key: Key, features: Any, moments: Any, both: tuple[Any, Any]) -> Array:
    """Where each data set lies, in prior standard deviations, shape (N + 1, 4 d)."""
    v = _components(key, features)
    rows = jnp.concatenate([v, v**2 - 1.0], axis=1)
    seen = rows[:-1]
    wanted = jnp.concatenate([sum(both), sum(y**2 for y in both)], axis=1) / 2
    wanted -= jnp.mean(wanted, axis=0)[None]
    ridge = 10.0 * jnp.eye(rows.shape[1])
    predicted = rows @ jnp.linalg.solve(seen.T @ seen + ridge, seen.T @ wanted)
    return jnp.concatenate([moments, predicted], axis=1)


def _components(key: Key, features: Array) -> Array:
    """Features (N + 1, C) of unit variance, or the first of their principal components."""
    rows = features - jnp.mean(features, axis=0)[None]
    if rows.shape[1] > COMPONENTS:
        start = jax.random.normal(key, (rows.shape[1], PROJECTED), rows.dtype)
        basis = jnp.linalg.qr(rows.T @ (rows @ start))[0]
        projected = rows @ basis
        axes = jnp.linalg.eigh(projected.T @ projected)[1]
        rows = projected @ axes[:, ::-1][:, :COMPONENTS]
    sd = jnp.std(rows, axis=0)
    return jnp.clip(rows / jnp.where(sd > 1e-6, sd, 1.0)[None], -10.0, 10.0)


def classify(key: Key, pairs: Pairs, points: Array, permutations: int) -> Classified:
    """Train on pairs, with their labels and with permuted ones, and look at points.

    A permutation swaps truth and draw in half of the pairs. If both have the same distribution at
    each data set, the labels are one more such swap: the first statistic is exchangeable with the
    others, whatever the features and the weights are.

    Args:
        key: Random key.
        pairs: The pairs.
        points: Where probabilities are wanted, in the posterior's frame, shape (n, d).
        permutations: Number P of permutations.
    """
    wave_key, swap_key = jax.random.split(key)
    k = len(pairs.truth)
    swapped = np.zeros((k, 1 + permutations), bool)
    swapped[:, 1:] = jax.random.bernoulli(swap_key, 0.5, (k, permutations))
    probability = np.asarray(_probabilities(wave_key, pairs, points, swapped), float)
    statistic = np.mean((probability - 0.5) ** 2, axis=0)
    return Classified(probability, statistic, swapped)


@jax.jit
@full_precision
def _probabilities(key: Key, pairs: Pairs, points: Array, swapped: Any) -> Array:
    rows = _shapes(key, jnp.concatenate([pairs.truth, pairs.draw]))
    weight = jnp.tile(jnp.asarray(pairs.weight, rows.dtype), 2)
    truth = jnp.concatenate([~swapped, swapped]).astype(rows.dtype)
    center = jnp.mean(rows, axis=0)[None]
    one = jnp.ones((1, 1), rows.dtype)
    features = _with_constant(rows - center, one)
    # the ridge: log odds of a prior standard deviation of about 1 from each kind of features
    curve = 0.25 * (features.T * weight[None]) @ features + jnp.eye(features.shape[1])
    factor = jax.scipy.linalg.cho_factor(curve)

    def step(found: Array, _: None) -> tuple[Array, None]:
        error = weight[:, None] * (truth - jax.nn.sigmoid(features @ found))
        return found + jax.scipy.linalg.cho_solve(factor, features.T @ error - found), None

    start = jnp.zeros((features.shape[1], truth.shape[1]), rows.dtype)
    found = jax.lax.scan(step, start, length=STEPS)[0]
    return jax.nn.sigmoid(_with_constant(_shapes(key, points) - center, one) @ found)


def _with_constant(rows: Array, one: Array) -> Array:
    return jnp.concatenate([rows, jnp.broadcast_to(one, (len(rows), 1))], axis=1)


def _shapes(key: Key, z: Array) -> Array:
    """Features of parameters (n, d) in the frame: polynomials, and waves of the same weight."""
    dim = z.shape[1]
    i, j = np.triu_indices(dim if dim <= PRODUCTS else 0, 1)
    polynomials = jnp.concatenate([z, z**2 - 1.0, z[:, i] * z[:, j]], axis=1)
    wave_key, length_key, phase_key = jax.random.split(key, 3)
    direction = jax.random.normal(wave_key, (dim, WAVES), z.dtype)
    direction /= jnp.sqrt(jnp.sum(direction**2, axis=0))[None]
    # half of them along single coordinates: most errors of shape are a parameter's own
    along = np.arange(WAVES // 2)
    direction = direction.at[:, along].set(jnp.eye(dim)[:, along % dim])
    number = jax.random.uniform(length_key, (1, WAVES), z.dtype, *NUMBERS)
    phase = jax.random.uniform(phase_key, (1, WAVES), z.dtype, maxval=2.0 * np.pi)
    waves = jnp.cos(z @ direction * number + phase) * (2.0 / WAVES) ** 0.5
    return jnp.concatenate([polynomials / polynomials.shape[1] ** 0.5, waves], axis=1)
