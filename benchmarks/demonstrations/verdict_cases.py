"""Posteriors with known faults, for `python -m benchmarks verdict`.

Public names: `Case`, `CASES`, `EXACT`, `Narrow`, `make_exact`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import logsumexp

import sbi_flows as sf
import simulators
from sbi_flows.core.typing import Key

SIMULATIONS = 5_000
"""Number of simulations of the fits."""

NATS_ROWS = 400
"""Number of data sets from which the unused information of a fit is computed."""

SIZE, LENGTH, TRIALS = 32, 1_000, 20
"""Width of an image, length of a series, and number of trials."""

PIXEL_NOISE, BLOB_SD = 0.5, 3.0
SCALES = np.array([0.5, 2.0, 0.5, 2.0, 1.0, 1.0, 1.0, 1.0, 0.7, 1.5])
"""Standard deviations of the noise of the ten entries of the Gaussian simulators."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A posterior, its simulator, and what it leaves unused.

    Attributes:
        posterior: The posterior.
        simulator: The simulator `(key, theta) -> x`.
        nats: Unused information in nats.
        parameters: Names of the parameters with unused information.
    """

    posterior: Any
    simulator: Callable[[Key, Any], Array]
    nats: float
    parameters: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LinearGaussian:
    """Exact posterior of theta ~ N(0, I) given S x, where x = A theta + noise.

    Attributes:
        prior: The prior of theta (D,).
        design: The matrix A, shape (C, D).
        summary: The matrix S, shape (K, C).
    """

    prior: sf.Prior
    design: np.ndarray
    summary: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Covariance of the posterior, shape (D, D)."""
        return np.linalg.inv(np.eye(self.prior.dim) + self._weights @ self.summary @ self.design)

    @property
    def _weights(self) -> np.ndarray:
        seen = self.summary @ self.design
        noise = self.summary @ np.diag(SCALES[: self.design.shape[0]] ** 2) @ self.summary.T
        return seen.T @ np.linalg.inv(noise)

    def mean(self, x: Array) -> Array:
        """Posterior means (*, D) of observations (*, C)."""
        return x @ jnp.asarray((self.covariance @ self._weights @ self.summary).T)

    def sample(self, key: Key, x: Array, n: int) -> Array:
        """Draw n times for each observation."""
        mean = self.mean(jnp.asarray(x))
        noise = jax.random.normal(key, (*mean.shape[:-1], n, mean.shape[-1]))
        return mean[..., None, :] + noise @ jnp.asarray(np.linalg.cholesky(self.covariance).T)

    def log_prob(self, theta: Array, x: Array) -> Array:
        """Log density of theta."""
        mean = self.mean(jnp.asarray(x))
        mean = mean if jnp.ndim(theta) == mean.ndim else mean[..., None, :]
        return dist.MultivariateNormal(mean, jnp.asarray(self.covariance)).log_prob(theta)


@dataclasses.dataclass(frozen=True)
class Narrow:
    """A Gaussian posterior whose standard deviations are divided by a factor."""

    posterior: LinearGaussian
    factor: float

    @property
    def prior(self) -> sf.Prior:
        """Prior of the posterior."""
        return self.posterior.prior

    def sample(self, key: Key, x: Array, n: int) -> Array:
        """Draw n times for each observation."""
        mean = self.posterior.mean(jnp.asarray(x))[..., None, :]
        return mean + (self.posterior.sample(key, x, n) - mean) / self.factor

    def log_prob(self, theta: Array, x: Array) -> Array:
        """Log density of theta, without a constant."""
        mean = self.posterior.mean(jnp.asarray(x))
        mean = mean if jnp.ndim(theta) == mean.ndim else mean[..., None, :]
        return self.posterior.log_prob(mean + (theta - mean) * self.factor, x)


@dataclasses.dataclass(frozen=True)
class ExactDraws:
    """Exact draws of a benchmark task; `log_prob` ranks them by an arbitrary function of theta.

    Where the sampler, which rejects proposals, finds no draws (2 of 1,000 observations of slcp),
    draws of the prior take their place. This can only make a test reject.
    """

    prior: sf.Prior
    task: simulators.Task

    def sample(self, key: Key, x: Array, n: int) -> Array:
        """Draw n times for each observation."""
        draw = self.task.sample_reference
        if draw is None:
            raise ValueError(f"{self.task.name}: expected a task with exact draws")
        keys = jax.random.split(key, len(x))
        draws = jax.lax.map(lambda each: jnp.asarray(draw(each[0], each[1], n)), (keys, x))
        prior = jnp.broadcast_to(self.prior.sample(key, n), draws.shape)
        return jnp.where(jnp.isfinite(draws), draws, prior)

    def log_prob(self, theta: Array, x: Array) -> Array:
        """Return an arbitrary function of theta, which suffices for ranks."""
        return -jnp.sum(theta**2, axis=-1)


@dataclasses.dataclass(frozen=True)
class Reduced:
    """A fit that reads a function of the observation."""

    posterior: Any
    reduce: Callable[[Array], Array]

    @property
    def prior(self) -> sf.Prior:
        """Prior of the fit."""
        return self.posterior.prior

    def sample(self, key: Key, x: Array, n: int) -> Array:
        """Draw n times for each observation."""
        return self.posterior.sample(key, self.reduce(x), n)

    def log_prob(self, theta: Array, x: Array) -> Array:
        """Log density of theta."""
        return self.posterior.log_prob(theta, self.reduce(x))


def make_exact(name: str) -> Case:
    """Return an exact posterior: "gaussian 2", "gaussian 10", "two_moons" or "slcp"."""
    if not name.startswith("gaussian"):
        task = simulators.get(name)
        exact = ExactDraws(sf.as_prior(task.prior), task)
        return Case(exact, task.simulator, 0.0, ())
    dim = int(name.split()[1])
    posterior = LinearGaussian(_normal_prior(dim), np.eye(10)[:, :dim], np.eye(10))
    return Case(posterior, partial(_linear, posterior.design), 0.0, ())


EXACT = {"gaussian 2": 70, "gaussian 10": 60, "two_moons": 60, "slcp": 3}
"""Number of checks of each exact posterior; exact draws of slcp take a minute for each check."""


def _entry_ignored(key: Key) -> Case:
    """Two parameters and ten entries, of which the most informative one is ignored."""
    return _linear_case(np.delete(np.eye(10), 0, axis=0), ("theta[0]",))


def _coarser(key: Key) -> Case:
    """Two parameters and ten entries, which are averaged in pairs of different noise."""
    return _linear_case(np.kron(np.eye(5), np.full((1, 2), 0.5)), ("theta[0]", "theta[1]"))


def _linear_case(summary: np.ndarray, parameters: tuple[str, ...]) -> Case:
    design = np.zeros((10, 2))
    design[:2, 0], design[2:4, 1], design[4:, :] = 1.0, 1.0, 0.2
    full = LinearGaussian(_normal_prior(2), design, np.eye(10))
    posterior = LinearGaussian(full.prior, design, summary)
    nats = 0.5 * np.linalg.slogdet(posterior.covariance)[1]
    nats -= 0.5 * np.linalg.slogdet(full.covariance)[1]
    return Case(posterior, partial(_linear, design), float(nats), parameters)


def _linear(design: np.ndarray, key: Key, theta: Array) -> Array:
    noise = jax.random.normal(key, (len(design),))
    return jnp.asarray(design) @ theta + jnp.asarray(SCALES[: len(design)]) * noise


def _normal_prior(dim: int) -> sf.Prior:
    return sf.as_prior(dist.Normal(0.0, 1.0).expand([dim]))


def _blobs(key: Key) -> Case:
    """Images of a blob in noise, read as 1,024 numbers by a network without an embedding."""
    prior = sf.as_prior({"cx": dist.Uniform(6.0, 26.0), "cy": dist.Uniform(6.0, 26.0)})
    pixels = jnp.arange(SIZE, dtype=float)

    def image(cx: Array, cy: Array) -> Array:
        rows = jnp.exp(-0.5 * ((pixels - cy) / BLOB_SD) ** 2)
        return rows[:, None] * jnp.exp(-0.5 * ((pixels - cx) / BLOB_SD) ** 2)[None]

    def simulator(key: Key, theta: Any) -> Array:
        return image(theta["cx"], theta["cy"]) + PIXEL_NOISE * jax.random.normal(key, (SIZE, SIZE))

    def log_likelihood(theta: Array, x: Array) -> Array:
        return -0.5 * jnp.sum((x - image(theta[0], theta[1])) ** 2) / PIXEL_NOISE**2

    return _fitted(key, prior, simulator, log_likelihood, (0.02, 2.0), ("cx", "cy"))


def _series(key: Key) -> Case:
    """AR(2) series of 1,000, read as numbers by a network without an embedding."""
    prior = sf.as_prior({"phi_1": dist.Uniform(-0.6, 0.6), "phi_2": dist.Uniform(-0.35, 0.35)})

    def simulator(key: Key, theta: Any) -> Array:
        def step(state: tuple[Array, Array], noise: Array) -> tuple[tuple[Array, Array], Array]:
            new = theta["phi_1"] * state[0] + theta["phi_2"] * state[1] + noise
            return (new, state[0]), new

        noise = jax.random.normal(key, (LENGTH + 50,))
        return jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), noise)[1][50:]

    def log_likelihood(theta: Array, x: Array) -> Array:
        return -0.5 * jnp.sum((x[2:] - theta[0] * x[1:-1] - theta[1] * x[:-2]) ** 2)

    return _fitted(key, prior, simulator, log_likelihood, (0.002, 0.15), ("phi_1", "phi_2"))


def _pooled(key: Key) -> Case:
    """Twenty trials of unknown mean and spread, of which only the mean is read."""
    prior = sf.as_prior({"mu": dist.Uniform(-2.0, 2.0), "log_sigma": dist.Uniform(-1.0, 1.0)})

    def simulator(key: Key, theta: Any) -> Array:
        return theta["mu"] + jnp.exp(theta["log_sigma"]) * jax.random.normal(key, (TRIALS, 1))

    def log_likelihood(theta: Array, x: Array) -> Array:
        return jnp.sum(dist.Normal(theta[0], jnp.exp(theta[1])).log_prob(x))

    reduce = partial(jnp.mean, axis=-2)
    parameters = ("log_sigma",)
    return _fitted(key, prior, simulator, log_likelihood, (0.02, 2.0), parameters, reduce)


def _fitted(
    key: Key,
    prior: sf.Prior,
    simulator: Callable[[Key, Any], Array],
    log_likelihood: Callable[[Array, Array], Array],
    grid: tuple[float, float],
    parameters: tuple[str, ...],
    reduce: Callable[[Array], Array] = lambda x: x,
) -> Case:
    """Fit to `SIMULATIONS` rows, and compute the unused information from the exact posterior.

    Both parameters are uniform a priori. `grid` is the step and the half-width of the grid around
    the truth on which the exact posterior is normalised.
    """
    simulate_key, fit_key, new_key = jax.random.split(key, 3)
    sims = sf.simulate(simulate_key, prior, simulator, SIMULATIONS, progress=False)
    npe = sf.NPE(prior, sf.MAF(), members=2, training=sf.Training(max_epochs=60))
    fit, _ = npe.fit(fit_key, sf.Simulations(sims.theta, reduce(sims.x)), progress=False)
    new = sf.simulate(new_key, prior, simulator, NATS_ROWS, progress=False)
    posterior = Reduced(fit, reduce)
    exact = _exact_log_prob(prior, log_likelihood, grid, new)
    nats = np.asarray(exact) - np.asarray(posterior.log_prob(jnp.asarray(new.theta), new.x))
    return Case(posterior, simulator, float(np.mean(nats)), parameters)


def _exact_log_prob(
    prior: sf.Prior,
    log_likelihood: Callable[[Array, Array], Array],
    grid: tuple[float, float],
    new: sf.Simulations,
) -> Array:
    """Return exact posterior log densities of the truths, normalised on a grid around each."""
    step, half = grid
    offsets = jnp.arange(-half, half + step / 2, step)
    square = jnp.stack(jnp.meshgrid(offsets, offsets), axis=-1).reshape(-1, 2)

    @jax.jit
    def one(theta: Array, x: Array) -> Array:
        points = theta + square
        values = jax.lax.map(lambda p: log_likelihood(p, x), points, batch_size=256)
        values = jnp.where(prior.contains(points), values, -jnp.inf)
        return log_likelihood(theta, x) - logsumexp(values) - 2 * math.log(step)

    return jnp.stack([one(theta, x) for theta, x in zip(new.theta, new.x, strict=True)])


CASES: dict[str, Callable[[Key], Case]] = {
    "ignores one entry of ten": _entry_ignored,
    "coarser summary": _coarser,
    "raw images": _blobs,
    "raw series": _series,
    "trials, mean alone": _pooled,
}
"""Functions that make a case; a fit uses the random key."""
