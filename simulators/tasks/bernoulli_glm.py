"""Bernoulli GLM: infer a neuron's stimulus filter from a spike train or ten statistics of it."""

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
"""Number of time bins of a spike train."""
FILTER_LENGTH = 9
STIMULUS_SEED = 42

CITATION = (
    "Goncalves et al. 2020, Training deep neural density estimators to identify mechanistic models "
    "of neural dynamics, eLife 9; as in Lueckmann et al. 2021, Benchmarking Simulation-Based "
    "Inference, arXiv:2101.04653, tasks T.5 and T.6"
)


@cache
def bernoulli_glm() -> Task:
    """Make the Bernoulli GLM task, observed through ten sufficient statistics of the spike train.

    The parameters are an offset and a stimulus filter. Time bin t of 100 holds a spike, y_t = 1,
    with probability sigmoid((X theta)_t). Row t of X holds 1 and the last nine values of a fixed
    white-noise stimulus. The observation is X' y. The priors are theta_0 ~ N(0, 2) and
    theta_1:9 ~ N(0, (F'F)^-1). Here 2 is a variance, F = D^2 + diag(sqrt(i / 9)), and D is the
    first-difference matrix, so that the prior favours smooth filters.

    Returns:
        The task: theta of shape (10,), x of shape (10,). The reference sampler is NUTS.

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
    """Make the Bernoulli GLM task with the raw spike train as observation.

    Returns:
        The task: theta of shape (10,), as in `bernoulli_glm`; x of shape (100,), floats 0 and 1.
        The posterior is equal to that of `bernoulli_glm` given the statistics of the spike train.

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
    """Return the design matrix X, shape (100, 10), float32.

    Example:
        >>> print(design_matrix()[:2, :3].round(3))
        [[ 1.     0.497  0.   ]
         [ 1.    -0.138  0.497]]
    """
    stimulus = np.random.RandomState(STIMULUS_SEED).randn(BINS).astype(np.float32)
    lagged = [
        np.concatenate([np.zeros(j, np.float32), stimulus[: BINS - j]])
        for j in range(FILTER_LENGTH)
    ]
    return np.stack([np.ones(BINS, np.float32), *lagged], axis=1)


def _prior() -> dist.Distribution:
    difference = np.eye(FILTER_LENGTH) - np.eye(FILTER_LENGTH, k=-1)
    f = difference @ difference + np.diag(np.sqrt(np.arange(FILTER_LENGTH) / FILTER_LENGTH))
    precision = np.zeros((1 + FILTER_LENGTH, 1 + FILTER_LENGTH))
    precision[0, 0] = 0.5
    precision[1:, 1:] = f.T @ f
    covariance = np.linalg.inv(precision)
    return dist.MultivariateNormal(jnp.zeros(1 + FILTER_LENGTH), jnp.asarray(covariance))


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
