"""`python -m benchmarks inside-jax`: use a posterior as a prior for NUTS, and inside `lax.scan`.

Public names: `run`, `two_experiments`, `scan_speed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import MCMC, NUTS
from scipy import stats

import sbi_flows as sf
from benchmarks.suite.records import provenance, write_json

SEED = 11
SIMULATIONS, DRAWS, CHAINS = 10_000, 4_000, 4
NOISE = 0.3
"""Standard deviation of the noise, the same in both experiments."""
EVALUATIONS, REPEATS = 1_000, 5


class Experiments(NamedTuple):
    """Two experiments with the same two parameters theta; each observes theta plus noise.

    Attributes:
        prior: Prior of theta.
        first: Observation of the first experiment, shape (2,).
        second: Observation of the second experiment, shape (2,).
        joint: Function that takes a seed and draws from the exact posterior given both
            observations, shape (DRAWS, 2).
    """

    prior: dist.Distribution
    first: Array
    second: Array
    joint: Callable[[int], np.ndarray]


def conjugate() -> Experiments:
    """Make experiments with a standard normal prior. The exact posterior is normal."""
    first, second = jnp.array([0.7, -0.4]), jnp.array([0.4, -0.1])
    precision = 1.0 + 2.0 / NOISE**2
    mean = np.asarray(first + second) / NOISE**2 / precision

    def joint(seed: int) -> np.ndarray:
        noise = np.random.default_rng(seed).normal(size=(DRAWS, 2))
        return mean + noise / np.sqrt(precision)

    return Experiments(dist.Normal(0.0, 1.0).expand([2]), first, second, joint)


def bounded() -> Experiments:
    """Make experiments with a uniform prior, and observations near its bounds.

    The exact posterior is a truncated normal distribution.
    """
    first, second = jnp.array([0.05, 0.6]), jnp.array([-0.1, 0.9])
    mean, sd = np.asarray(first + second) / 2.0, NOISE / np.sqrt(2.0)

    def joint(seed: int) -> np.ndarray:
        low, high = (0.0 - mean) / sd, (1.0 - mean) / sd
        exact = stats.truncnorm(low, high, loc=mean, scale=sd)
        return exact.rvs(size=(DRAWS, 2), random_state=np.random.default_rng(seed))

    return Experiments(dist.Uniform(0.0, 1.0).expand([2]), first, second, joint)


def run(folder: Path) -> dict[str, Any]:
    """Use a posterior as a prior and in a scan, print the results, and write a record.

    Args:
        folder: Output folder. It must exist and be writable.

    Returns:
        The record, also written as `inside-jax.json`.
    """
    results: dict[str, Any] = {}
    for name, experiments in {"conjugate": conjugate(), "bounded": bounded()}.items():
        posterior = _fit(experiments.prior)
        results[name] = two_experiments(posterior, experiments)
        print(f"{name}: C2ST {results[name]['c2st']:.3f} against the joint posterior")
        if name == "conjugate":
            results["scan"] = scan_speed(posterior, experiments.first)
            print(f"scan: {results['scan']['ratio']:.0f} times the speed of repeated calls")
    record = {**provenance(), "kind": "inside-jax", **results}
    write_json(folder / "inside-jax.json", record)
    return record


def two_experiments(posterior: Any, experiments: Experiments) -> dict[str, Any]:
    """Draw with NUTS from the posterior given both experiments.

    The prior is the estimated posterior of the first experiment. The likelihood is the one of the
    second experiment.

    Args:
        posterior: Estimated posterior of theta given the observation of one experiment.
        experiments: The observations, and the exact posterior given both.

    Returns:
        A dict of `c2st`, the C2ST between NUTS draws and exact draws; `mean` and `sd`, the means
        and standard deviations of the NUTS draws; `exact_mean` and `exact_sd`, the same for the
        exact draws; and `draws`, the number of draws.
    """
    prior = posterior.at(experiments.first).to_numpyro()

    def model(y: Array) -> None:
        theta = numpyro.sample("theta", prior)
        numpyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=y)

    settings = {"num_chains": CHAINS, "chain_method": "vectorized", "progress_bar": False}
    sampler = MCMC(NUTS(model), num_warmup=500, num_samples=DRAWS // CHAINS, **settings)
    sampler.run(jax.random.key(SEED + 3), experiments.second)
    draws, exact = np.asarray(sampler.get_samples()["theta"]), experiments.joint(SEED)
    return {
        "c2st": float(sf.c2st(exact, draws)),
        "mean": draws.mean(axis=0).tolist(),
        "sd": draws.std(axis=0).tolist(),
        "exact_mean": exact.mean(axis=0).tolist(),
        "exact_sd": exact.std(axis=0).tolist(),
        "draws": DRAWS,
    }


def scan_speed(posterior: Any, x: Array) -> dict[str, float]:
    """Time 1,000 evaluations of the log density, in one scan and by repeated calls.

    Args:
        posterior: The posterior.
        x: One observation.

    Returns:
        `scan_seconds` and `calls_seconds`, each the shortest time of several repeats, and `ratio`,
        the time of the calls divided by the time of the scan.
    """
    thetas = posterior.sample(jax.random.key(SEED + 4), x, EVALUATIONS)
    at = posterior.at(x)

    @jax.jit
    def scan(thetas: Array) -> Array:
        return jax.lax.scan(lambda carry, theta: (carry, at.log_prob(theta)), None, thetas)[1]

    def calls(thetas: Array) -> Array:
        return jnp.stack([posterior.log_prob(theta, x) for theta in thetas])

    seconds = {}
    for name, function in {"scan": scan, "calls": calls}.items():
        function(thetas).block_until_ready()
        seconds[name] = min(_seconds(function, thetas) for _ in range(REPEATS))
    return {
        "scan_seconds": seconds["scan"],
        "calls_seconds": seconds["calls"],
        "ratio": seconds["calls"] / seconds["scan"],
    }


def _seconds(function: Callable[[Array], Array], thetas: Array) -> float:
    start = time.perf_counter()
    function(thetas).block_until_ready()
    return time.perf_counter() - start


def _fit(prior: dist.Distribution) -> Any:
    def simulator(key: Array, theta: Array) -> Array:
        return theta + NOISE * jax.random.normal(key, (2,))

    sims = sf.simulate(jax.random.key(SEED + 1), prior, simulator, SIMULATIONS, progress=False)
    return sf.NPE(prior).fit(jax.random.key(SEED + 2), sims, progress=False)[0]
