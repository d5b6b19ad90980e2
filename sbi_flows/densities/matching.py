"""Continuous flows that learn a velocity by regression: flow matching and diffusion.

Public names: `FlowMatching`, `Diffusion`, `Matching`.

Both regress the velocity of a Gaussian path (`paths.py`) on its points, and draw and evaluate by
the same ODE (`ode.py`); they differ in where on the path training looks, and in how they draw.
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

STRATA = 4
"""Places on the path at which each row is validated, always the same ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    network: VelocitySettings = field(default_factory=Film)
    solver: Solver = field(default_factory=Solver)
    sampler: Sampler | None = field(default_factory=Heun)
    # steps are cheap and losses noisy
    fit_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"max_epochs": 120, "patience": 30, "learning_rate": 2e-3, "ema_decay": 0.999}
    )

    def __post_init__(self) -> None:
        """Refuse parts that are none."""
        check_networks(network=self.network, solver=self.solver)
        if self.sampler is not None:
            require_object("sampler", self.sampler, Sampler, "one such as sf.Heun()")

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the flow for z in R^dim; it starts at the identity."""
        return Matching(self, key, dim, context_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(_Settings):
    """Velocity of straight lines from noise to the posterior, learned by regression.

    Attributes:
        network: The velocity network.
        path: Where on the lines training looks.
        solver: How the ODE is solved, for densities and, without a sampler, for draws.
        sampler: `Heun`, or `Ancestral` for draws with noise on the way; None draws by the solver.

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
        """Refuse parts that are none."""
        super().__post_init__()
        require_object("path", self.path, Straight, "one such as sf.Straight()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diffusion(_Settings):
    """Denoising diffusion: the posterior is what its noisy points are denoised to.

    Attributes:
        network: The velocity network.
        path: The noise levels, `EDM`, `VP` or `VE`, and how training spreads over them.
        solver: How the ODE is solved, for densities and, without a sampler, for draws.
        sampler: `Heun` or `Ancestral`; None draws by the solver.

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
        """Refuse parts that are none."""
        super().__post_init__()
        require_object("path", self.path, Path, "one such as sf.EDM()")


class Matching(Continuous):
    """Flow of a velocity that was learned by regression."""

    has_likelihood_loss: ClassVar[bool] = False

    def __init__(self, settings: _Settings, key: Key, dim: int, context_dim: int) -> None:
        """Make the network, whose velocity is zero at first."""
        super().__init__(settings.network, settings.solver, key, dim, context_dim)
        self.path: Path = settings.path  # type: ignore[attr-defined]
        self.sampler = settings.sampler

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The flow given contexts (*, C), a distribution over R^dim."""
        draw = None if self.sampler is None else partial(self.sampler, self.path)
        return self.flow(context, key, self.path.ends, draw)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Weighted squared error of the velocity, summed over its entries: (B,).

        With a key at one place of the path a row, in training. Without at several, which are the
        same each time: an epoch is not the better for its luck.
        """
        given_key, network_key, key = split_key(key, 3)
        given = self.network.encode_context(context, key=given_key)
        if key is not None:
            return self._error(key, network_key, 0, 1, z, given)
        keys = split_keys(jax.random.key(0), STRATA)
        errors = [self._error(k, None, i, STRATA, z, given) for i, k in enumerate(keys)]
        return jnp.mean(jnp.stack(errors), axis=0)

    def _error(
        self, key: Key, network_key: Key | None, stratum: int, strata: int, z: Array, given: Any
    ) -> Array:
        place_key, noise_key = split_keys(key, 2)
        places = (stratum + hashed_uniform(place_key, z.shape[:-1], z.dtype)) / strata
        angle = self.path.angles(places)
        noise = hashed_normal(noise_key, z.shape, z.dtype)
        sin, cos = jnp.sin(angle)[..., None], jnp.cos(angle)[..., None]
        guess = self.network(sin * z + cos * noise, angle, given, key=network_key)
        error = guess - (cos * z - sin * noise)
        return self.path.weight(angle) * jnp.sum(error**2, axis=-1)
