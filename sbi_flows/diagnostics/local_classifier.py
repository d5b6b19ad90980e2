"""Classifiers that separate true parameters from posterior draws near one observation.

Each classifier is a logistic regression. It uses coordinates in which the posterior has mean 0 and
covariance 1. Its features are the coordinates, their squares and products, and cosine waves in
random directions; with enough waves, any two densities can be distinguished. The loss is convex, so
the solution is unique. All classifiers use the same matrix factorisation, so that a hundred
classifiers cost little more than one classifier.

Internal names: `Pairs`, `ClassifierOutput`, `classify`, `MAX_COORDINATE`.

References:
    Linhart, Gramfort & Rodrigues 2023, L-C2ST: Local Diagnostics for Posterior Approximations in
    Simulation-Based Inference, arXiv:2306.03580.
    Böhning 1992, Multinomial logistic regression algorithm, Ann. Inst. Statist. Math. 44:197 (the
    steps of the solver).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key

NUM_WAVES = 64
"""Number of features that are cosine waves in random directions."""

WAVE_NUMBERS = (0.5, 3.0)
"""Range of the wave numbers, in radians per standard deviation of the posterior."""

MAX_PRODUCT_COORDINATES = 30
"""Largest number of coordinates whose products are features (30 coordinates give 435 products)."""

NUM_STEPS = 8
"""Number of solver steps; for small errors of the posterior, one step is nearly enough."""

MAX_COORDINATE = 40.0
"""Standard coordinates of parameters are clipped to this absolute value."""


class Pairs(NamedTuple):
    """True parameters and one posterior draw for each of k data sets.

    Attributes:
        truth: True parameters, shape (k, d).
        draw: Posterior draws, shape (k, d).
        weight: Weight of each data set, shape (k,); 1 for the data set nearest to the observation.
    """

    truth: Array | np.ndarray
    draw: Array | np.ndarray
    weight: Array | np.ndarray


class ClassifierOutput(NamedTuple):
    """Output of 1 + P classifiers, the first trained on true labels, the others on permuted ones.

    Attributes:
        probability: Probability that each of n points is a true parameter, shape (n, 1 + P).
        statistic: Mean of (probability - 1/2)^2 over the points, shape (1 + P,).
        is_swapped: True where the labels of a pair were swapped, shape (k, 1 + P).
    """

    probability: np.ndarray
    statistic: np.ndarray
    is_swapped: np.ndarray


def classify(key: Key, pairs: Pairs, points: Array, permutations: int) -> ClassifierOutput:
    """Train classifiers on true and on permuted labels, and evaluate them at points.

    A permutation swaps truth and draw in about half of the pairs, chosen at random. If truth and
    draw have the same distribution for each data set, the true labels are equivalent to one more
    permutation. The statistic of the true labels is then exchangeable with the statistics of the
    permutations, for any features and weights.

    Args:
        key: Random key.
        pairs: The pairs to train on.
        points: Points at which to evaluate the classifiers, in the coordinates of the pairs, shape
            (n, d).
        permutations: Number P of permutations.
    """
    wave_key, swap_key = jax.random.split(key)
    k = len(pairs.truth)
    is_swapped = np.zeros((k, 1 + permutations), bool)
    is_swapped[:, 1:] = jax.random.bernoulli(swap_key, 0.5, (k, permutations))
    probability = np.asarray(_probabilities(wave_key, pairs, points, is_swapped), float)
    statistic = np.mean((probability - 0.5) ** 2, axis=0)
    return ClassifierOutput(probability, statistic, is_swapped)


@jax.jit
@full_precision
def _probabilities(key: Key, pairs: Pairs, points: Array, is_swapped: Array | np.ndarray) -> Array:
    """Fit 1 + P logistic regressions and return their probabilities at points, (n, 1 + P)."""
    rows = _features(key, jnp.concatenate([pairs.truth, pairs.draw]))
    weight = jnp.tile(jnp.asarray(pairs.weight, rows.dtype), 2)
    labels = jnp.concatenate([~is_swapped, is_swapped]).astype(rows.dtype)
    center = jnp.mean(rows, axis=0)[None]
    features = _with_constant(rows - center)
    # The ridge is a Gaussian prior: each kind of feature adds about 1 sd to the log odds.
    bound = 0.25 * (features.T * weight[None]) @ features + jnp.eye(features.shape[1])
    factor = jax.scipy.linalg.cho_factor(bound)

    def step(solution: Array, _: None) -> tuple[Array, None]:
        error = weight[:, None] * (labels - jax.nn.sigmoid(features @ solution))
        gradient = features.T @ error - solution
        return solution + jax.scipy.linalg.cho_solve(factor, gradient), None

    start = jnp.zeros((features.shape[1], labels.shape[1]), rows.dtype)
    solution = jax.lax.scan(step, start, length=NUM_STEPS)[0]
    return jax.nn.sigmoid(_with_constant(_features(key, points) - center) @ solution)


def _with_constant(rows: Array) -> Array:
    """Append a column of ones."""
    return jnp.concatenate([rows, jnp.ones((len(rows), 1), rows.dtype)], axis=1)


def _features(key: Key, z: Array) -> Array:
    """Return features of points (n, d): polynomials and random waves, with equal total weight."""
    dim = z.shape[1]
    i, j = np.triu_indices(dim if dim <= MAX_PRODUCT_COORDINATES else 0, 1)
    polynomials = jnp.concatenate([z, z**2 - 1.0, z[:, i] * z[:, j]], axis=1)
    wave_key, length_key, phase_key = jax.random.split(key, 3)
    direction = jax.random.normal(wave_key, (dim, NUM_WAVES), z.dtype)
    direction /= jnp.sqrt(jnp.sum(direction**2, axis=0))[None]
    # Half of the waves vary along a single coordinate, because most errors affect one parameter.
    single = np.arange(NUM_WAVES // 2)
    direction = direction.at[:, single].set(jnp.eye(dim)[:, single % dim])
    number = jax.random.uniform(length_key, (1, NUM_WAVES), z.dtype, *WAVE_NUMBERS)
    phase = jax.random.uniform(phase_key, (1, NUM_WAVES), z.dtype, maxval=2.0 * np.pi)
    waves = jnp.cos(z @ direction * number + phase) * (2.0 / NUM_WAVES) ** 0.5
    return jnp.concatenate([polynomials / polynomials.shape[1] ** 0.5, waves], axis=1)
