"""Bernoulli GLM: a neuron's filter from its spikes, as ten statistics or as the raw train."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from simulators.adapters import mcmc
from simulators.adapters.task import Task

BINS = 100
FILTER = 9
"""Length of the stimulus filter."""
SEED = 42
"""Of the white-noise stimulus."""

CITATION = (
    "Goncalves et al. 2020, Training deep neural density estimators to identify mechanistic models "
    "of neural dynamics, eLife 9; as in Lueckmann et al. 2021, Benchmarking Simulation-Based "
    "Inference, arXiv:2101.04653, tasks T.5 and T.6"
)


@cache
def bernoulli_glm() -> Task:
    """The Bernoulli GLM task: offset and filter from ten sufficient statistics of 100 time bins.

    A spike falls into bin t with probability sigmoid((X theta)_t); the row X_t holds 1 and the
    last nine values of a fixed white-noise stimulus. The observation is X' y. Priors: theta_0 ~
    N(0, 2) and theta_1:9 ~ N(0, (F'F)^-1), a variance and a covariance, where F = D^2 +
    diag(sqrt(i / 9)) and D takes first differences, so that filters are smooth.

    Returns:
        The task: theta of shape (10,), x of shape (10,). The reference is NUTS.

    References:
        Goncalves et al. 2020, eLife 9:e56261; Lueckmann et al. 2021, arXiv:2101.04653, task T.5.

    Example:
        >>> bernoulli_glm().observation(1).shape
        (10,)
    """
    return Task(
        name="bernoulli_glm",
        prior=_prior(),
        simulator=lambda key, theta: _statistics(_spikes(key, theta)),
        citation=CITATION,
        stored_as="bernoulli_glm",
        sample_reference=mcmc.NutsReference(_model, ("theta",)),
    )


@cache
def bernoulli_glm_raw() -> Task:
    """The Bernoulli GLM task with the raw spike train as observation.

    Returns:
        The task of `bernoulli_glm`, but x is the train of zeros and ones, shape (100,), float; its
        posterior is the same.

    References:
        Lueckmann et al. 2021, arXiv:2101.04653, task T.6.

    Example:
        >>> bernoulli_glm_raw().observation(1).shape
        (100,)
    """
    return Task(
        name="bernoulli_glm_raw",
        prior=_prior(),
        simulator=_spikes,
        citation=CITATION,
        stored_as="bernoulli_glm",
        sample_reference=mcmc.NutsReference(_model, ("theta",), prepare=_statistics),
    )


@cache
def design_matrix() -> np.ndarray:
    """The matrix X, shape (100, 10), float32.

    Example:
        >>> print(design_matrix()[:2, :3].round(3))
        [[ 1.     0.497  0.   ]
         [ 1.    -0.138  0.497]]
    """
    stimulus = np.random.RandomState(SEED).randn(BINS).astype(np.float32)
    lagged = [
        np.concatenate([np.zeros(j, np.float32), stimulus[: BINS - j]]) for j in range(FILTER)
    ]
    return np.stack([np.ones(BINS, np.float32), *lagged], axis=1)


def _prior() -> dist.Distribution:
    difference = np.eye(FILTER) - np.eye(FILTER, k=-1)
    f = difference @ difference + np.diag(np.sqrt(np.arange(FILTER) / FILTER))
    precision = np.zeros((1 + FILTER, 1 + FILTER))
    precision[0, 0] = 0.5
    precision[1:, 1:] = f.T @ f
    covariance = np.linalg.inv(precision)
    return dist.MultivariateNormal(jnp.zeros(1 + FILTER), jnp.asarray(covariance))


def _spikes(key: Key, theta: Array) -> Array:
    p = jax.nn.sigmoid(jnp.asarray(design_matrix()) @ theta)
    return (jax.random.uniform(key, (BINS,)) < p).astype(p.dtype)


@full_precision
def _statistics(spikes: Array) -> Array:
    return spikes @ jnp.asarray(design_matrix())


@full_precision
def _model(statistics: Array) -> None:
    theta = numpyro.sample("theta", _prior())
    logits = jnp.asarray(design_matrix()) @ theta
    numpyro.factor("x", statistics @ theta - jnp.sum(jax.nn.softplus(logits)))
