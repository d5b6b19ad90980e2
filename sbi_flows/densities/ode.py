"""Densities defined by an ODE: a velocity carries standard normal noise to data.

Time is an angle from 0 (noise) to pi / 2 (data); see `paths.py`. Draws solve the ODE from noise to
data. Log densities solve it from data to noise, and integrate the divergence of the velocity.

Public names: `Solver`, `SolverStats`, `Velocity`, `OdeFlow`, `Continuous`, `reversed_ends`,
`FieldDerivatives`, `field_derivatives`, `check_networks`.

Sources: Chen et al. 2018, "Neural Ordinary Differential Equations" (arXiv:1806.07366), for the
change of density along a solution; Grathwohl et al. 2018, "FFJORD" (arXiv:1810.01367), for the
estimate of the divergence; Kidger 2021, "On Neural Differential Equations" (arXiv:2202.02435), for
diffrax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_object, require_positive
from sbi_flows.core.typing import Key
from sbi_flows.densities.base import Density, StandardNormal, VectorDistribution
from sbi_flows.networks.mlp import hashed_normal, hashed_words
from sbi_flows.networks.velocity import VelocitySettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """Settings of the ODE solver of a continuous flow.

    Attributes:
        method: A diffrax solver; None for `diffrax.Bosh3()`.
        rtol: Relative tolerance of an adaptive solve. The error is the root mean square over all
            points that are solved together.
        atol: Absolute tolerance, in units of the noise.
        steps: Number of steps of a solve with equal steps; None adapts the steps to the tolerances.
        max_steps: Maximum number of steps of an adaptive solve. A solve that needs more fails.
        exact_up_to: Largest dimension in which the divergence is computed exactly. Above it, the
            divergence is estimated from `probes` random directions. All solves use the
            same directions, so that repeated calls give the same density. An estimated density need
            not integrate to one.
        probes: Number of random directions for the estimate of the divergence.
        noise: Distribution of the random directions.
        adjoint: A diffrax adjoint, which differentiates the solve; None for
            `diffrax.RecursiveCheckpointAdjoint()`, which supports reverse mode (`jax.grad`).

    Raises:
        ValueError: A setting is out of range.

    References:
        FFJORD, arXiv:1810.01367; On Neural Differential Equations, arXiv:2202.02435.
    """

    method: Any = None
    rtol: float = 1e-3
    atol: float = 1e-3
    steps: int | None = None
    max_steps: int = 512
    exact_up_to: int = 32
    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    adjoint: Any = None

    def __post_init__(self) -> None:
        """Raise ValueError if a setting is out of range."""
        require_positive(rtol=self.rtol, atol=self.atol)
        for name in ("method", "adjoint"):
            if isinstance(getattr(self, name), type):
                require_object(name, getattr(self, name), object, f"an object of diffrax's {name}s")
        require_count(1, max_steps=self.max_steps, probes=self.probes)
        require_count(0, exact_up_to=self.exact_up_to)
        if self.steps is not None:
            require_count(1, steps=self.steps)
        if self.noise not in ("rademacher", "gaussian"):
            raise ValueError(f"noise: expected 'rademacher' or 'gaussian', got {self.noise!r}")

    def __call__(self, field: Callable, start: Any, args: Any, ends: tuple[float, float]) -> Any:
        """Solve d state / d angle = field(angle, state, args).

        Args:
            field: Function `(angle, state, args) -> derivative`.
            start: Initial state, a pytree of arrays.
            args: Arrays that the field depends on; the solve can be differentiated by them.
            ends: First and last angle.

        Returns:
            The state at the last angle; every entry is NaN if the solve failed.
        """
        return self.solve(field, start, args, ends)[0]

    def solve(
        self, field: Callable, start: Any, args: Any, ends: tuple[float, float]
    ) -> tuple[Any, SolverStats]:
        """Solve the ODE as `__call__` does, and also return the solver statistics."""
        import diffrax

        method = diffrax.Bosh3() if self.method is None else self.method
        dtype = jax.tree.leaves(start)[0].dtype
        fixed = self.steps
        first, last, size = _times(ends, fixed, dtype)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            method,
            first,
            last,
            size,
            start,
            args,
            stepsize_controller=(
                diffrax.PIDController(self.rtol, self.atol)
                if fixed is None
                else diffrax.ConstantStepSize()
            ),
            adjoint=diffrax.RecursiveCheckpointAdjoint() if self.adjoint is None else self.adjoint,
            # rounding can add one step to a solve with equal steps
            max_steps=self.max_steps if fixed is None else fixed + 1,
            throw=False,
        )
        ok = solution.result == diffrax.RESULTS.successful
        state = jax.tree.map(lambda a: jnp.where(ok, a[-1], jnp.nan), solution.ys)
        steps, evaluations = solution.stats["num_steps"], jnp.full_like(ok, -1, int)
        if isinstance(method, diffrax.AbstractERK):
            tableau: Any = method.tableau
            # the first evaluation of a step may be the last one of the step before (fsal)
            evaluations = steps * (tableau.num_stages - tableau.fsal) + tableau.fsal
        return state, SolverStats(steps, evaluations)

    def probes_of(self, key: Key, dim: int, dtype: Any) -> Array:
        """Return the directions (K, d) along which the divergence is computed.

        The sum of their outer products is the identity matrix: exactly if the divergence is exact,
        on average if it is estimated.
        """
        if dim <= self.exact_up_to:
            return jnp.eye(dim, dtype=dtype)
        shape = self.probes, dim
        if self.noise == "gaussian":
            return hashed_normal(key, shape, dtype) / math.sqrt(self.probes)
        signs = jnp.where(hashed_words(key, shape) >> 31 == 0, 1.0, -1.0)
        return signs.astype(dtype) / math.sqrt(self.probes)


def _times(ends: tuple[float, float], steps: int | None, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """Return the first angle, the last one, and the step size (None adapts it).

    The three values are Python floats if the state has JAX's default float dtype. diffrax checks
    the sign of a Python float while tracing, but checks an array by a callback to the host.
    """
    first, last = (dtype.type(end) for end in ends)
    size = None if steps is None else (last - first) / dtype.type(steps)
    if dtype != jnp.result_type(float):
        return first, last, size
    return float(first), float(last), None if size is None else float(size)


class SolverStats(NamedTuple):
    """Statistics of one or several ODE solves: numbers of steps and of evaluations.

    Attributes:
        steps: Number of steps.
        evaluations: Number of evaluations of the vector field; -1 if it is unknown.
    """

    steps: Array
    evaluations: Array


class Velocity(NamedTuple):
    """Velocity network together with encoded contexts, as a function of its arrays.

    Solves can be differentiated with respect to the arrays.

    Attributes:
        graph: Static part of the network.
        arrays: Weights of the network, and contexts as `VelocityNetwork.encode_context` returns
            them.
    """

    graph: nnx.GraphDef
    arrays: tuple[Any, Any]

    def __call__(self, z: Array, angle: Array, arrays: tuple[Any, Any]) -> Array:
        """Compute the velocity at points z (*draws, *batch, d)."""
        weights, encoded = arrays
        return nnx.merge(self.graph, weights)(z, angle, encoded)


class OdeFlow(VectorDistribution):
    """Distribution of points that start as standard normal noise and follow a velocity.

    Args:
        velocity: Velocity as a function of point and angle.
        shape: Batch shape and dimension (*batch, d).
        dtype: Dtype of the points.
        ends: Angle of the noise and angle of the data.
        solver: Settings of the ODE solver.
        sampler: Function `(velocity, noise, key) -> points` that makes the draws; None to draw by
            solving the ODE.
    """

    def __init__(
        self,
        velocity: Velocity,
        shape: tuple[int, ...],
        dtype: Any,
        ends: tuple[float, float],
        solver: Solver,
        sampler: Callable[[Callable, Array, Key], Array] | None = None,
    ) -> None:
        """Store the velocity and the settings of the solver."""
        super().__init__(shape, dtype)
        self._velocity, self._ends = velocity, ends
        self._solver, self._sampler = solver, sampler
        self._base = StandardNormal(shape, dtype)

    def log_prob(self, value: Array) -> Array:
        """Return the log density (*draws, *batch) of points (*draws, *batch, d).

        Each context is solved separately: its steps do not depend on the other contexts. The
        density is NaN where a solve fails.
        """
        return self.log_prob_and_stats(value)[0]

    def log_prob_and_stats(self, value: Array) -> tuple[Array, SolverStats]:
        """Return log densities (*draws, *batch), and solver statistics (*batch) of each context."""
        if not self.batch_shape:
            (noise, log_det), stats = self._solve(value, reversed_ends(self._ends))
            return self._base.log_prob(noise) + log_det, stats
        weights, encoded = self._velocity.arrays

        def evaluate(encoded: Any, value: Array) -> tuple[Array, SolverStats]:
            velocity = self._velocity._replace(arrays=(weights, encoded))
            return self._with(velocity, self._shape[1:]).log_prob_and_stats(value)

        axis = -len(self._shape)
        mapped = jax.vmap(evaluate, in_axes=(0, axis), out_axes=(axis + 1, 0))
        return mapped(encoded, value)

    def _sample_n(self, key: Key, n: int) -> Array:
        noise_key, key = jax.random.split(key)
        noise = self._base.sample(seed=noise_key, sample_shape=n)
        if self._sampler is not None:
            velocity = partial(self._velocity, arrays=self._velocity.arrays)
            return self._sampler(velocity, noise, key)

        def field(angle: Array, z: Array, arrays: Any) -> Array:
            return self._velocity(z, angle, arrays)

        return self._solver(field, noise, self._velocity.arrays, self._ends)

    def _sample_n_and_log_prob(self, key: Key, n: int) -> tuple[Array, Array]:
        if self._sampler is not None:
            points = self._sample_n(key, n)
            return points, self.log_prob(points)
        noise = self._base.sample(seed=jax.random.split(key)[0], sample_shape=n)
        (points, log_det), _ = self._solve(noise, self._ends)
        return points, self._base.log_prob(noise) - log_det

    def _with(self, velocity: Velocity, shape: tuple[int, ...]) -> OdeFlow:
        return OdeFlow(velocity, shape, self._dtype, self._ends, self._solver, self._sampler)

    def _solve(
        self, z: Array, ends: tuple[float, float]
    ) -> tuple[tuple[Array, Array], SolverStats]:
        """Return the final points, the integral (*) of the divergence, and solver statistics."""
        probes = self._solver.probes_of(jax.random.key(0), z.shape[-1], z.dtype)

        def field(angle: Array, state: tuple[Array, Array], arrays: Any) -> tuple[Array, Array]:
            return field_derivatives(lambda z: self._velocity(z, angle, arrays), state[0], probes)[
                :2
            ]

        start = z, jnp.zeros(z.shape[:-1], z.dtype)
        return self._solver.solve(field, start, self._velocity.arrays, ends)


def reversed_ends(ends: tuple[float, float]) -> tuple[float, float]:
    """Return the two angles in reverse order."""
    return ends[1], ends[0]


class Continuous(Density):
    """Abstract density whose draws follow the ODE of a velocity network."""

    needs_ode: ClassVar[bool] = True

    def __init__(
        self, network: VelocitySettings, solver: Solver, key: Key, dim: int, context_dim: int
    ) -> None:
        """Build the network; its initial velocity is zero, so the density is a standard normal."""
        self.network = network.build(nnx.Rngs(key), dim, context_dim)
        self.solver, self.dim = solver, dim

    def velocity(self, context: Array, key: Key | None) -> Velocity:
        """Return the velocity for contexts (*, C); a key turns dropout on."""
        graph, state = nnx.split(self.network)
        return Velocity(graph, (state, self.network.encode_context(context, key=key)))

    def flow(
        self,
        context: Array,
        key: Key | None,
        ends: tuple[float, float],
        sampler: Callable[[Callable, Array, Key], Array] | None = None,
    ) -> OdeFlow:
        """Return the distribution for contexts (*, C); see `OdeFlow` for the arguments."""
        shape = (*context.shape[:-1], self.dim)
        velocity = self.velocity(context, key)
        return OdeFlow(velocity, shape, context.dtype, ends, self.solver, sampler)


class FieldDerivatives(NamedTuple):
    """Values and derivatives of a vector field at points (*, d).

    Attributes:
        value: The field, shape (*, d).
        divergence: Trace of the Jacobian of the field, shape (*).
        squared_norm: Squared Frobenius norm of the Jacobian, shape (*).
    """

    value: Array
    divergence: Array
    squared_norm: Array


_PROBES_AT_ONCE = 8
"""Number of directions in one batch of derivatives; memory use is proportional to this number."""


def field_derivatives(
    function: Callable[[Array], Array], z: Array, probes: Array
) -> FieldDerivatives:
    """Evaluate a vector field and the trace and norm of its Jacobian.

    Args:
        function: The field, from points (*, d) to (*, d).
        z: Points (*, d).
        probes: Directions (K, d) of the derivatives; see `Solver.probes_of`.
    """

    def along(probe: Array) -> tuple[Array, Array, Array]:
        direction = jnp.broadcast_to(probe, z.shape)
        value, slope = jax.jvp(function, (z,), (direction,))
        return value, jnp.sum(slope * direction, axis=-1), jnp.sum(slope**2, axis=-1)

    if len(probes) <= _PROBES_AT_ONCE:
        value, divergence, squares = jax.vmap(along, out_axes=(None, 0, 0))(probes)
    else:
        value = function(z)
        # recompute in the backward pass, which would otherwise store the results of all batches
        derivatives = jax.checkpoint(lambda probe: along(probe)[1:])
        divergence, squares = jax.lax.map(derivatives, probes, batch_size=_PROBES_AT_ONCE)
    return FieldDerivatives(value, jnp.sum(divergence, axis=0), jnp.sum(squares, axis=0))


def check_networks(network: Any, **solvers: Any) -> None:
    """Raise ValueError unless the values are settings of a velocity network and of solvers.

    Args:
        network: Settings of a velocity network, such as `sf.Film()`.
        **solvers: Settings of solvers; each keyword is the name of an argument, for the message.

    Raises:
        ValueError: A value has another type, or is a class instead of an instance.
    """
    require_object("network", network, VelocitySettings, "one such as sf.Film()")
    for name, solver in solvers.items():
        require_object(name, solver, Solver, "one such as sf.Solver()")
