"""Continuous normalising flow, trained by its likelihood.

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
    """Velocity whose solutions carry noise to the posterior, learned by maximum likelihood.

    Each step of the training solves the ODE and differentiates the solve: the slowest of the
    continuous flows, and the one whose loss is the held-out log density itself.

    Attributes:
        network: The velocity network.
        solver: How the ODE is solved, for draws, densities and in validation.
        training: How it is solved in training, by default less closely, and with `adjoint`
            differentiated; what is validated is solved by `solver`. Of steps that do not adapt,
            training finds a velocity that only they integrate to one.
        kinetic: Weight of the squared speed along a solution, which straightens it.
        jacobian: Weight of the squared Frobenius norm of the velocity's Jacobian along it.

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
    # a field that changes fast needs many steps of its ODE
    fit_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"learning_rate": 1e-3})

    def __post_init__(self) -> None:
        """Refuse parts that are none."""
        check_networks(network=self.network, solver=self.solver, training=self.training)
        for name in ("kinetic", "jacobian"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}: expected zero or a positive number, got {value}")

    def build(self, key: Key, dim: int, context_dim: int) -> Density:
        """Make the flow for z in R^dim; it starts at the identity."""
        return _CNF(self, key, dim, context_dim)


class _CNF(Continuous):
    def __init__(self, settings: CNF, key: Key, dim: int, context_dim: int) -> None:
        super().__init__(settings.network, settings.solver, key, dim, context_dim)
        self.settings = settings

    def __call__(self, context: Array, *, key: Key | None = None) -> distrax.Distribution:
        """The flow given contexts (*, C), a distribution over R^dim."""
        return self.flow(context, key, _ENDS)

    def loss(self, key: Key | None, z: Array, context: Array) -> Array:
        """Negative log density of each row (B,), in nats; in training with the regularisers."""
        if key is None:
            return -self(context).log_prob(z)
        settings = self.settings
        given_key, network_key, probe_key = split_keys(key, 3)
        graph, arrays = self.velocity(context, given_key)
        probes = settings.training.probes_of(probe_key, self.dim, z.dtype)

        def field(angle: Array, state: tuple[Array, Array, Array], arrays: Any) -> tuple:
            network, given = nnx.merge(graph, arrays[0]), arrays[1]
            # one mask of the dropout a solve: the field is the same at all times
            found = field_derivatives(
                lambda z: network(z, angle, given, key=network_key), state[0], probes
            )
            speed = jnp.sum(found.value**2, axis=-1)
            cost = settings.kinetic * speed + settings.jacobian * found.squares
            return found.value, found.divergence, cost

        zeros = jnp.zeros(z.shape[:-1], z.dtype)
        start = z, zeros, zeros
        noise, change, cost = settings.training(field, start, arrays, reversed_ends(_ENDS))
        base = StandardNormal(z.shape, z.dtype)
        # the solve runs backward: what it adds up along the way is negative
        return -base.log_prob(noise) - change - cost


_ENDS = 0.0, math.pi / 2
