"""What every conditional density is: a flax module that maps a context to a distribution."""

from __future__ import annotations

import abc
from typing import Any, Protocol, runtime_checkable

import distrax
from flax import nnx
from jax import Array

from sbi_flows.typing import Key


class Density(nnx.Module):
    """Abstract p(z | context) over R^d."""

    @abc.abstractmethod
    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The distribution given contexts (*, C); a key turns dropout on."""

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Training loss of each row: z (B, d), context (B, C) to (B,), in nats."""
        return -self(context, key=key).log_prob(z)


class Pushed(distrax.Transformed):
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


def check_settings(name: str, density: Any) -> None:
    """Refuse what describes no density.

    Raises:
        ValueError: It has no `build`, or is a class where an object was meant.
    """
    if isinstance(density, type) or not hasattr(density, "build"):
        kind = density if isinstance(density, type) else type(density)
        article = "the class " if isinstance(density, type) else ""
        raise ValueError(
            f"{name}: expected a density such as sf.NSF(), got {article}{kind.__name__}"
        )


@runtime_checkable
class DensitySettings(Protocol):
    """A frozen, hashable description that builds a `Density` once the sizes are known."""

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the module for z in R^dim and contexts in R^context_dim."""
        ...
