"""What every conditional density is: a flax module that maps a context to a distribution."""

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
    """Abstract p(z | context) over R^d.

    Attributes:
        likelihood: Whether the loss is the negative log density, in nats.
        solved: Whether draws and densities solve an ODE; where that fails they are NaN.
    """

    has_likelihood_loss: ClassVar[bool] = True
    needs_ode: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The distribution given contexts (*, C); a key turns dropout on."""

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Training loss of each row: z (B, d), context (B, C) to (B,).

        Without a key, in validation, it is the same each time.
        """
        return -self(context, key=key).log_prob(z)


class TransformedDistribution(distrax.Transformed):
    """Draws of a distribution, mapped by a bijector that takes any leading axes.

    `distrax.Transformed` maps `n` draws by `vmap`, which puts their axis before those over which a
    bijector sums: several times slower on a CPU.
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
        dtype: Of the draws.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Hold both."""
        super().__init__()
        self._shape, self._dtype = shape, dtype

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(d,)."""
        return self._shape[-1:]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """(*batch)."""
        return self._shape[:-1]

    @property
    def dtype(self) -> Any:
        """Of the draws; what distrax has would trace a draw for it."""
        return self._dtype


class StandardNormal(VectorDistribution):
    """Independent standard normal entries."""

    def log_prob(self, value: Array) -> Array:
        """Log density (*) at points (*, d)."""
        return -0.5 * jnp.sum(value**2 + math.log(2 * math.pi), axis=-1)

    def _sample_n(self, key: Key, n: int) -> Array:
        return jax.random.normal(key, (n, *self._shape), self._dtype)


def sample_per_context(
    conditional: Callable[[Array], distrax.DistributionLike], contexts: Array, keys: Key, n: int
) -> Array:
    """Draw n times for each of B contexts, with a key each: shape (n, B, d).

    What is drawn for one does not depend on the others.

    Args:
        conditional: Makes the distribution given contexts (B, C).
        contexts: Shape (B, C).
        keys: Shape (B,).
        n: Number of draws.
    """
    found = _from_noise(conditional(contexts))
    if found is None:

        def one(key: Key, context: Array) -> Array:
            return conditional(context[None]).sample(seed=key, sample_shape=n)[:, 0]

        return jax.vmap(one, out_axes=1)(keys, contexts)
    # all contexts at once: by `vmap`, their axis would come before those that bijectors sum over
    base, push = found
    own = StandardNormal(base.event_shape, base.dtype)
    return push(jax.vmap(lambda key: own.sample(seed=key, sample_shape=n), out_axes=1)(keys))


def _from_noise(
    distribution: distrax.DistributionLike,
) -> tuple[StandardNormal, Callable[[Array], Array]] | None:
    """The noise that a distribution is made of, and the map from there, if it is made so."""
    if isinstance(distribution, StandardNormal):
        return distribution, lambda noise: noise
    if not isinstance(distribution, TransformedDistribution):
        return None
    found = _from_noise(distribution.distribution)
    if found is None:
        return None
    base, inner = found
    return base, lambda noise: distribution.bijector.forward(inner(noise))


def check_density(name: str, density: Any) -> None:
    """Refuse what describes no density.

    Raises:
        ValueError: It has no `build`, or is a class where an object was meant.
    """
    require_object(name, density, DensitySettings, "a density such as sf.NSF()")


@runtime_checkable
class DensitySettings(Protocol):
    """A frozen, hashable description that builds a `Density` once the sizes are known.

    A class variable `fit_defaults` may hold fields of `sf.Training`, by name, that a fit has where
    the user gives no settings.
    """

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the module for z in R^dim and contexts in R^context_dim."""
        ...
