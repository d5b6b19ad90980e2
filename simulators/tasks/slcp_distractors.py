"""SLCP with distractors: the eight numbers of SLCP, mixed with 92 uninformative numbers."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.task import Task
from simulators.tasks.slcp import slcp

INFORMATIVE = 8
NOISE = 92
COMPONENTS = 20
DEGREES = 2.0
SEED = 42

CITATION = (
    "Greenberg et al. 2019, Automatic Posterior Transformation, arXiv:1905.07488; as in Lueckmann "
    "et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653, task T.4"
)


class Distractors(NamedTuple):
    """Fixed parameters of the distractors, the 92 uninformative numbers of an observation.

    Attributes:
        locations: Centres of the mixture's components, shape (20, 92).
        scales: Lower triangular factors of the components' scale matrices, shape (20, 92, 92).
        order: Permutation of an observation, shape (100,). Before the permutation, the eight
            informative numbers come first and the 92 distractors follow. Entry i of the observation
            is entry order[i] of the array before the permutation.
    """

    locations: np.ndarray
    scales: np.ndarray
    order: np.ndarray


@cache
def slcp_distractors() -> Task:
    """Make the SLCP task with 92 uninformative dimensions, in a fixed random order.

    The 92 numbers are drawn from a mixture, with equal weights, of 20 multivariate t distributions
    with two degrees of freedom. The variance of this mixture is infinite.

    Returns:
        The task: theta of shape (5,), x of shape (100,). The posterior is equal to that of `slcp`
        given the eight informative entries.

    References:
        Greenberg et al. 2019, arXiv:1905.07488; Lueckmann et al. 2021, arXiv:2101.04653, task T.4.

    Example:
        >>> slcp_distractors().observation(1).shape
        (100,)
    """
    clean = slcp()
    draw = clean.sample_reference
    assert draw is not None

    def simulator(key: Key, theta: Array) -> Array:
        signal_key, noise_key = jax.random.split(key)
        joined = jnp.concatenate([clean.simulator(signal_key, theta), _noise(noise_key)])
        return joined[jnp.asarray(distractors().order)]

    return Task(
        name="slcp_distractors",
        prior=clean.prior,
        simulator=simulator,
        citation=CITATION,
        sample_reference=lambda key, x, n: draw(key, informative(x), n),
    )


@cache
def distractors() -> Distractors:
    """Draw the fixed parameters of the distractors, with the seed of the published task.

    Example:
        >>> distractors().scales.shape
        (20, 92, 92)
    """
    rng = np.random.RandomState(SEED)
    locations = np.stack([15.0 * rng.normal(size=NOISE) for _ in range(COMPONENTS)])
    scales = [
        3.0 * (np.tril(rng.normal(size=(NOISE, NOISE))) + np.diag(np.exp(rng.normal(size=NOISE))))
        for _ in range(COMPONENTS)
    ]
    return Distractors(locations, np.stack(scales), rng.permutation(INFORMATIVE + NOISE))


def informative(x: Array) -> Array:
    """Return the eight informative entries of an observation (100,), in the order of `slcp`."""
    return x[jnp.asarray(np.argsort(distractors().order)[:INFORMATIVE])]


def _noise(key: Key) -> Array:
    component_key, normal_key, chi_key = jax.random.split(key, 3)
    fixed = distractors()
    which = jax.random.randint(component_key, (), 0, COMPONENTS)
    z = jax.random.normal(normal_key, (NOISE,))
    spread = jnp.sqrt(DEGREES / jax.random.chisquare(chi_key, DEGREES))
    scale = jnp.asarray(fixed.scales, z.dtype)[which]
    return jnp.asarray(fixed.locations, z.dtype)[which] + spread * (scale @ z)
