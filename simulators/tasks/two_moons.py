"""Two moons: a two-dimensional task whose posterior consists of two mirrored crescents."""

from __future__ import annotations

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from simulators.adapters.sampling import rejection
from simulators.adapters.task import Task

CITATION = (
    "Greenberg et al. 2019, Automatic Posterior Transformation for Likelihood-Free Inference, "
    "arXiv:1905.07488; as in Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, "
    "arXiv:2101.04653, task T.8"
)


@cache
def two_moons() -> Task:
    """Make the two moons task.

    The prior is U(-1, 1)^2. With a ~ U(-pi/2, pi/2) and r ~ N(.1, .01^2), the observation is

        x = (r cos a + .25 - |theta_1 + theta_2| / sqrt 2, r sin a + (theta_2 - theta_1) / sqrt 2).

    The reference sampler solves this equation exactly for theta.

    Returns:
        The task: theta of shape (2,), x of shape (2,).

    References:
        Greenberg et al. 2019, arXiv:1905.07488, appendix; Lueckmann et al. 2021, arXiv:2101.04653.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> task = two_moons()
        >>> task.simulator(jax.random.key(0), jnp.array([0.5, -0.5])).shape
        (2,)
    """
    return Task(
        name="two_moons",
        prior=dist.Uniform(-1.0, 1.0).expand([2]).to_event(1),
        simulator=_simulator,
        citation=CITATION,
        sample_reference=_sample_reference,
    )


def _simulator(key: Key, theta: Array) -> Array:
    along, across = (theta[0] + theta[1]) / math.sqrt(2), (theta[1] - theta[0]) / math.sqrt(2)
    return _crescent(key, ()) + jnp.stack([0.25 - jnp.abs(along), across])


def _crescent(key: Key, shape: tuple[int, ...]) -> Array:
    """Draw the noise r (cos a, sin a), shape (*shape, 2)."""
    angle_key, radius_key = jax.random.split(key)
    a = jax.random.uniform(angle_key, shape, minval=-math.pi / 2, maxval=math.pi / 2)
    r = 0.1 + 0.01 * jax.random.normal(radius_key, shape)
    return jnp.stack([r * jnp.cos(a), r * jnp.sin(a)], axis=-1)


@partial(jax.jit, static_argnums=2)
def _sample_reference(key: Key, x: Array, n: int) -> Array:
    """Draw the noise and solve for theta, with a random sign of theta_1 + theta_2."""
    x = jnp.asarray(x, jnp.result_type(float))

    def propose(key: Key) -> tuple[Array, Array]:
        noise_key, sign_key = jax.random.split(key)
        noise = _crescent(noise_key, (n,))
        magnitude, across = noise[:, 0] + 0.25 - x[0], x[1] - noise[:, 1]
        along = magnitude * jax.random.rademacher(sign_key, (n,), x.dtype)
        theta = jnp.stack([along - across, along + across], axis=-1) / math.sqrt(2)
        # reject noise that would make |theta_1 + theta_2| / sqrt 2 negative
        return theta, (magnitude >= 0) & jnp.all(jnp.abs(theta) <= 1, axis=-1)

    return rejection(key, propose, n)
