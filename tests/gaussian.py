"""Exact posterior of theta ~ N(0, I), x ~ N(theta, s^2 I), with options that make it wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from sbi_flows.prior.prior import Prior, as_prior

NOISE = 0.5


def add_noise(key: Array, theta: Array) -> Array:
    return theta + NOISE * jax.random.normal(key, theta.shape)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The conjugate posterior, or a wrong one.

    Attributes:
        prior: The prior, which names the D parameters.
        scale: Factor on the posterior's standard deviation, one per parameter.
        shift: Shift of its mean in exact standard deviations, one per parameter.
        blind: If true, the posterior ignores the data and equals the prior.
    """

    prior: Prior
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    blind: bool = False

    def moments(self, x: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation, shape (*, D) each."""
        variance = 1.0 if self.blind else NOISE**2 / (1 + NOISE**2)
        weight = 0.0 if self.blind else 1 / (1 + NOISE**2)
        sd = jnp.broadcast_to(variance**0.5, x.shape)
        leading = (1,) * (x.ndim - 1)
        shift = jnp.reshape(jnp.asarray(self.shift), (*leading, -1))
        scale = jnp.reshape(jnp.asarray(self.scale), (*leading, -1))
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
    """Make the posterior of `dim` parameters; scale and shift are a number or one per parameter."""
    prior = as_prior(dist.Normal(0, 1).expand([dim])) if prior is None else prior
    factors = [
        tuple(float(v) for v in option) if isinstance(option, tuple) else (float(option),) * dim
        for option in (scale, shift)
    ]
    return Gaussian(prior, *factors, blind=blind)
