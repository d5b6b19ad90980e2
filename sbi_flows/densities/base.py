"""Base classes of conditional densities: flax modules that map a context to a distribution.

Public names: `Density`, `DensitySettings`, `TransformedDistribution`, `VectorDistribution`,
`StandardNormal`, `sample_per_context`, `check_density`.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import distrax
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_object
from sbi_flows.core.typing import Key


class Density(nnx.Module):
    """Abstract conditional density p(z | context) over R^d.

    Attributes:
        has_likelihood_loss: Whether the training loss is the negative log density, in nats.
        needs_ode: Whether draws and densities solve an ODE. If the solve fails, they are NaN.
    """

    has_likelihood_loss: ClassVar[bool] = True
    needs_ode: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the distribution over R^d.

        Args:
            context: Contexts (*, C).
            key: Random key of dropout; None turns dropout off.
        """

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Compute the training loss of each row.

        Args:
            key: Random key of a training step; None in validation, where the loss is
                deterministic.
            z: Points (B, d).
            context: Contexts (B, C).

        Returns:
            Losses (B,).
        """
        return -self(context, key=key).log_prob(z)


class TransformedDistribution(distrax.Transformed):
    """Distribution of bijector(u), where u follows a base distribution.

    The bijector must accept any leading axes: one call transforms all n draws. The base class
    `distrax.Transformed` would use `vmap` over the draws. This is several times slower on a CPU,
    because `vmap` puts the axis of draws before the axes that the bijector sums over.
    """

    def _sample_n(self, key: Key, n: int) -> Array:
        return self.bijector.forward(self.distribution.sample(seed=key, sample_shape=n))

    def _sample_n_and_log_prob(self, key: Key, n: int) -> tuple[Array, Array]:
        x, log_prob = self.distribution.sample_and_log_prob(seed=key, sample_shape=n)
        y, log_det = self.bijector.forward_and_log_det(x)
        return y, log_prob - log_det


class VectorDistribution(distrax.Distribution):
    """Abstract distribution over vectors.

    Args:
        shape: Batch shape and dimension (*batch, d).
        dtype: Dtype of the draws.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Store the shape and the dtype."""
        super().__init__()
        self._shape, self._dtype = shape, dtype

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one draw, (d,)."""
        return self._shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Shape of the batch of distributions."""
        return self._shape[:-1]

    @property
    def dtype(self) -> Any:
        """Dtype of the draws.

        The base class would trace a draw to find the dtype; here, the stored dtype is returned.
        """
        return self._dtype


class StandardNormal(VectorDistribution):
    """Vectors of independent standard normal entries."""

    def log_prob(self, value: Array) -> Array:
        """Return the log density (*) at points (*, d)."""
        return -0.5 * jnp.sum(value**2 + math.log(2 * math.pi), axis=-1)

    def _sample_n(self, key: Key, n: int) -> Array:
        return jax.random.normal(key, (n, *self._shape), self._dtype)


def sample_per_context(
    conditional: Callable[[Array], distrax.DistributionLike], contexts: Array, keys: Key, n: int
) -> Array:
    """Draw n points for each of B contexts, with one key per context.

    The draws for one context do not depend on the other contexts.

    Args:
        conditional: Function from contexts (B, C) to a distribution of batch shape (B,).
        contexts: Shape (B, C).
        keys: Shape (B,).
        n: Number of draws for each context.

    Returns:
        Draws (n, B, d).
    """
    noise_and_map = _noise_and_map(conditional(contexts))
    if noise_and_map is None:

        def draw(key: Key, context: Array) -> Array:
            return conditional(context[None]).sample(seed=key, sample_shape=n)[:, 0]

        return jax.vmap(draw, out_axes=1)(keys, contexts)
    # One call for all contexts: `vmap` would put the axis of contexts before summed axes (slow).
    noise, transform = noise_and_map
    noise = StandardNormal(noise.event_shape, noise.dtype)
    return transform(jax.vmap(lambda key: noise.sample(seed=key, sample_shape=n), out_axes=1)(keys))


def _noise_and_map(
    distribution: distrax.DistributionLike,
) -> tuple[StandardNormal, Callable[[Array], Array]] | None:
    """Return the noise distribution and the map from noise to draws; None if there is no map."""
    if isinstance(distribution, StandardNormal):
        return distribution, lambda noise: noise
    if not isinstance(distribution, TransformedDistribution):
        return None
    noise_and_map = _noise_and_map(distribution.distribution)
    if noise_and_map is None:
        return None
    noise, inner = noise_and_map
    return noise, lambda values: distribution.bijector.forward(inner(values))


def check_density(name: str, density: Any) -> None:
    """Raise ValueError unless the value is the settings of a density.

    Args:
        name: Name of the argument, for the message.
        density: Value to check.

    Raises:
        ValueError: The value has no method `build`, or is a class instead of an instance.
    """
    require_object(name, density, DensitySettings, "a density such as sf.NSF()")


@runtime_checkable
class DensitySettings(Protocol):
    """Protocol of the settings of a density: frozen, hashable, with a method `build`.

    An optional class variable `fit_defaults` maps names of fields of `sf.Training` to values. A fit
    uses these values if the user gives no training settings.
    """

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the module for z in R^dim and contexts in R^context_dim."""
        ...
