"""An exact posterior with knobs that spoil it: theta ~ N(0, I), x ~ N(theta, s^2 I)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from jax import Array

from sbi_flows.prior.prior import Prior, as_prior

NOISE = 0.5


def add_noise(key: Array, theta: Array) -> Array:
    return theta + NOISE * jax.random.normal(key, theta.shape)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The conjugate posterior, or a spoilt one; knobs are one number a parameter.

    Attributes:
        scale: Factor on the posterior's standard deviation.
        shift: Added to its mean, in exact standard deviations.
        blind: Ignore the data: the posterior is the prior.
    """

    prior: Prior
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    blind: bool = False

    def moments(self, x: Array) -> tuple[Array, Array]:
        """Mean and sd, shape (*, D) both."""
        variance = 1.0 if self.blind else NOISE**2 / (1 + NOISE**2)
        weight = 0.0 if self.blind else 1 / (1 + NOISE**2)
        sd = jnp.broadcast_to(variance**0.5, x.shape)
        wide = (1,) * (x.ndim - 1)
        shift = jnp.reshape(jnp.asarray(self.shift), (*wide, -1))
        scale = jnp.reshape(jnp.asarray(self.scale), (*wide, -1))
        return weight * x + shift * sd, scale * sd

    def sample(self, key: Array, x: Array, n: int) -> Array:
        return self.sample_and_log_prob(key, x, n)[0]

    def log_prob(self, theta: Array, x: Array) -> Array:
        mean, sd = self.moments(jnp.asarray(x))
        if jnp.ndim(theta) > mean.ndim:
            mean, sd = mean[..., None, :], sd[..., None, :]
        z = (theta - mean) / sd
        return jnp.sum(-0.5 * z**2 - jnp.log(sd) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)

    def sample_and_log_prob(self, key: Array, x: Array, n: int) -> tuple[Array, Array]:
        mean, sd = self.moments(jnp.asarray(x))
        noise = jax.random.normal(key, (*mean.shape[:-1], n, mean.shape[-1]))
        draws = mean[..., None, :] + sd[..., None, :] * noise
        return draws, self.log_prob(draws, x)


def make_gaussian(dim=2, *, scale=1.0, shift=0.0, blind=False, prior=None) -> Gaussian:
    """The posterior in `dim` dimensions; knobs a number, or one a parameter."""
    prior = as_prior(dist.Normal(0, 1).expand([dim])) if prior is None else prior
    knobs = [
        tuple(float(v) for v in knob) if isinstance(knob, tuple) else (float(knob),) * dim
        for knob in (scale, shift)
    ]
    return Gaussian(prior, *knobs, blind=blind)


@pytest.fixture(scope="session")
def gaussian():
    return make_gaussian


@pytest.fixture(scope="session")
def simulator():
    return add_noise
