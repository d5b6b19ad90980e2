"""Continuous flows that learn a velocity by regression: flow matching and diffusion.

In both, a network learns the velocity of a Gaussian path (`paths.py`) by regression, and this
velocity defines an ODE (`ode.py`). The two kinds of flow differ in the distribution of training
times and in the steps of the sampler.

Public names: `FlowMatching`, `Diffusion`, `Matching`, `VALIDATION_STRATA`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import distrax
import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.core.checks import require_object
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density
from sbi_flows.densities.ode import Continuous, Solver, check_networks
from sbi_flows.densities.paths import EDM, Path, Straight
from sbi_flows.densities.samplers import Heun, Sampler
from sbi_flows.networks.mlp import hashed_normal, hashed_uniform, split_key, split_keys
from sbi_flows.networks.velocity import Film, VelocitySettings

VALIDATION_STRATA = 4
"""Number of fixed times on the path at which the loss of each validation row is computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """Settings that flow matching and diffusion share."""

    network: VelocitySettings = field(default_factory=Film)
    solver: Solver = field(default_factory=Solver)
    sampler: Sampler | None = field(default_factory=Heun)
    path: Path
    # many epochs and a long average, because steps are cheap and losses are noisy
    fit_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"max_epochs": 120, "patience": 30, "learning_rate": 2e-3, "ema_decay": 0.999}
    )

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is of another type."""
        check_networks(network=self.network, solver=self.solver)
        if self.sampler is not None:
            require_object("sampler", self.sampler, Sampler, "one such as sf.Heun()")

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the flow for z in R^dim; its velocity is zero initially."""
        return Matching(self, key, dim, context_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(_Settings):
    """Flow matching: regression of the velocity of straight lines from noise to the posterior.

    Attributes:
        network: Settings of the velocity network.
        path: Straight path, which sets the distribution of training times.
        solver: Settings of the ODE solver for densities, and for draws if `sampler` is None.
        sampler: `Heun` (deterministic) or `Ancestral` (adds noise at every step); None draws with
            the ODE solver.

    References:
        Flow Matching for Generative Modeling, arXiv:2210.02747; Flow Matching for Scalable
        Simulation-Based Inference, arXiv:2305.17161.

    Example:
        >>> import jax
        >>> density = FlowMatching().build(jax.random.key(0), dim=3, context_dim=4)
        >>> density(jax.numpy.zeros((5, 4))).batch_shape
        (5,)
    """

    path: Straight = field(default_factory=Straight)

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is of another type."""
        super().__post_init__()
        require_object("path", self.path, Straight, "one such as sf.Straight()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion(_Settings):
    """Denoising diffusion: a network learns to remove noise, and draws start from pure noise.

    Attributes:
        network: Settings of the velocity network.
        path: Noise levels and their distribution in training: `EDM`, `VP` or `VE`.
        solver: Settings of the ODE solver for densities, and for draws if `sampler` is None.
        sampler: `Heun` (deterministic) or `Ancestral` (adds noise at every step); None draws with
            the ODE solver.

    References:
        Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364;
        Compositional Score Modeling for Simulation-Based Inference, arXiv:2209.14249.

    Example:
        >>> import jax
        >>> density = Diffusion().build(jax.random.key(0), dim=3, context_dim=4)
        >>> density(jax.numpy.zeros((5, 4))).event_shape
        (3,)
    """

    path: Path = field(default_factory=EDM)

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is of another type."""
        super().__post_init__()
        require_object("path", self.path, Path, "one such as sf.EDM()")


class Matching(Continuous):
    """Continuous flow whose velocity is learned by regression."""

    has_likelihood_loss: ClassVar[bool] = False

    def __init__(self, settings: _Settings, key: Key, dim: int, context_dim: int) -> None:
        """Build the network; its initial velocity is zero."""
        super().__init__(settings.network, settings.solver, key, dim, context_dim)
        self.path = settings.path
        self.sampler = settings.sampler

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the flow for contexts (*, C); see `Density.__call__`."""
        sampler = None if self.sampler is None else partial(self.sampler, self.path)
        return self.flow(context, key, self.path.ends, sampler)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Compute the weighted squared error of the velocity, summed over its entries: (B,).

        With a key (a training step) each row has one random time on the path. Without a key
        (validation) each row has several times, which are the same in every call, so that epochs
        can be compared.
        """
        context_key, network_key, key = split_key(key, 3)
        encoded = self.network.encode_context(context, key=context_key)
        if key is not None:
            return self._error(key, network_key, (0, 1), z, encoded)
        keys = split_keys(jax.random.key(0), VALIDATION_STRATA)
        errors = [
            self._error(key, None, (i, VALIDATION_STRATA), z, encoded) for i, key in enumerate(keys)
        ]
        return jnp.mean(jnp.stack(errors), axis=0)

    def _error(
        self, key: Key, network_key: Key | None, stratum: tuple[int, int], z: Array, encoded: Any
    ) -> Array:
        """Compute the error at random times in one stratum, given as (index, number of strata)."""
        time_key, noise_key = split_keys(key, 2)
        index, count = stratum
        uniforms = (index + hashed_uniform(time_key, z.shape[:-1], z.dtype)) / count
        angle = self.path.angles(uniforms)
        noise = hashed_normal(noise_key, z.shape, z.dtype)
        sin, cos = jnp.sin(angle)[..., None], jnp.cos(angle)[..., None]
        velocity = self.network(sin * z + cos * noise, angle, encoded, key=network_key)
        error = velocity - (cos * z - sin * noise)
        return self.path.weight(angle) * jnp.sum(error**2, axis=-1)
