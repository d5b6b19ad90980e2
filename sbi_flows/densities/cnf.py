"""Continuous normalising flow, trained by maximum likelihood.

Public names: `CNF`.

Sources: Chen et al. 2018, "Neural Ordinary Differential Equations" (arXiv:1806.07366); Grathwohl et
al. 2018, "FFJORD" (arXiv:1810.01367); Finlay et al. 2020, "How to Train Your Neural ODE"
(arXiv:2002.02798), for the regularisers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import field
from types import MappingProxyType
from typing import Any, ClassVar

import distrax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density, StandardNormal
from sbi_flows.densities.ode import (
    Continuous,
    Solver,
    check_networks,
    field_derivatives,
    reversed_ends,
)
from sbi_flows.networks.mlp import split_keys
from sbi_flows.networks.velocity import Film, VelocitySettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class CNF:
    """Continuous normalising flow: an ODE carries noise to the posterior.

    Every training step solves the ODE and differentiates the solve. Training is therefore slower
    than with `FlowMatching` or `Diffusion`, but the loss is the negative log density itself.

    Attributes:
        network: Settings of the velocity network.
        solver: Settings of the ODE solver for draws, densities and validation.
        training: Settings of the ODE solver in training steps; by default less accurate than
            `solver`. Its `adjoint` differentiates the solve. Use adaptive steps: with a few equal
            steps, training can find a velocity whose density is normalised only for exactly these
            steps.
        kinetic: Weight of the squared speed along a solution, which makes solutions straighter.
        jacobian: Weight of the squared Frobenius norm of the velocity's Jacobian along a solution.

    References:
        FFJORD, arXiv:1810.01367; How to Train Your Neural ODE, arXiv:2002.02798.

    Example:
        >>> import jax
        >>> density = CNF().build(jax.random.key(0), dim=3, context_dim=4)
        >>> density(jax.numpy.zeros((5, 4))).event_shape
        (3,)
    """

    network: VelocitySettings = field(default_factory=lambda: Film(width=64, blocks=2))
    solver: Solver = field(default_factory=Solver)
    training: Solver = field(
        default_factory=lambda: Solver(rtol=1e-2, atol=1e-2, max_steps=64, exact_up_to=8)
    )
    kinetic: float = 0.02
    jacobian: float = 0.02
    # at a higher rate the velocity becomes steep, and its ODE needs many steps
    fit_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"learning_rate": 1e-3})

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range or of another type."""
        check_networks(network=self.network, solver=self.solver, training=self.training)
        for name in ("kinetic", "jacobian"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected zero or a positive number, got {value}")

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Build the flow for z in R^dim; its velocity is zero initially."""
        return _CNF(self, key, dim, context_dim)


_ENDS = 0.0, math.pi / 2
"""Angle at the noise end and angle at the data end of the ODE."""


class _CNF(Continuous):
    """Continuous normalising flow; see `CNF`."""

    def __init__(self, settings: CNF, key: Key, dim: int, context_dim: int) -> None:
        super().__init__(settings.network, settings.solver, key, dim, context_dim)
        self.settings = settings

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """Return the flow for contexts (*, C); see `Density.__call__`."""
        return self.flow(context, key, _ENDS)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Compute the negative log density (B,) in nats; a training step adds the regularisers."""
        if key is None:
            return -self(context).log_prob(z)
        settings = self.settings
        context_key, network_key, probe_key = split_keys(key, 3)
        graph, arrays = self.velocity(context, context_key)
        probes = settings.training.probes_of(probe_key, self.dim, z.dtype)

        def field(angle: Array, state: tuple[Array, Array, Array], arrays: Any) -> tuple:
            network, encoded = nnx.merge(graph, arrays[0]), arrays[1]
            # use one dropout mask for a whole solve, so that the field is continuous in time
            velocity, divergence, squared_norm = field_derivatives(
                lambda z: network(z, angle, encoded, key=network_key), state[0], probes
            )
            speed = jnp.sum(velocity**2, axis=-1)
            return velocity, divergence, settings.kinetic * speed + settings.jacobian * squared_norm

        zeros = jnp.zeros(z.shape[:-1], z.dtype)
        start = z, zeros, zeros
        noise, log_det, cost = settings.training(field, start, arrays, reversed_ends(_ENDS))
        base = StandardNormal(z.shape, z.dtype)
        # the solve runs backward in time, so that the integrated cost is negative
        return -base.log_prob(noise) - log_det - cost
