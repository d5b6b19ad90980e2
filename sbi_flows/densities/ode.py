"""The density that a velocity makes of noise: one ODE, solved either way.

Public names: `Solver`, `SolverStats`, `Velocity`, `OdeFlow`, `Continuous`, `reversed_ends`,
`field_derivatives`, `check_networks`.

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
    """How the ODE of a continuous flow is solved.

    Attributes:
        method: A diffrax solver; None for `diffrax.Bosh3()`.
        rtol: Relative tolerance of an adaptive solve, of the root mean square of all points that
            are solved for together.
        atol: Absolute tolerance, in whitened units.
        steps: Number of equal steps of a fixed solve; None adapts them to the tolerances.
        max_steps: Most steps of an adaptive solve. One that needs more fails.
        exact_up_to: Largest dimension whose divergence is computed exactly; above, by `probes`
            random projections, which are the same at all points of a solve, and in all that
            evaluate: a density does not change from call to call, but it is an estimate, which need
            not integrate to one.
        probes: Number of random projections.
        noise: Their distribution.
        adjoint: A diffrax adjoint, which differentiates a solve; None for diffrax's own.

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
        """Refuse settings that solve nothing."""
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
        """Solve d state / d angle = field(angle, state, args) from one end to the other.

        Returns:
            The state at the end; NaN throughout where the solve failed.
        """
        return self.solve(field, start, args, ends)[0]

    def solve(
        self, field: Callable, start: Any, args: Any, ends: tuple[float, float]
    ) -> tuple[Any, SolverStats]:
        """What a call returns, and how much work it was."""
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
            # a fixed solve may need one more for what rounding leaves
            max_steps=self.max_steps if fixed is None else fixed + 1,
            throw=False,
        )
        ok = solution.result == diffrax.RESULTS.successful
        state = jax.tree.map(lambda a: jnp.where(ok, a[-1], jnp.nan), solution.ys)
        steps, evaluations = solution.stats["num_steps"], jnp.full_like(ok, -1, int)
        if isinstance(method, diffrax.AbstractERK):
            tableau: Any = method.tableau
            # a step may begin with the last evaluation of the one before
            evaluations = steps * (tableau.num_stages - tableau.fsal) + tableau.fsal
        return state, SolverStats(steps, evaluations)

    def probes_of(self, key: Key, dim: int, dtype: Any) -> Array:
        """Directions (K, d) whose outer products add up to the identity, exactly or on average."""
        if dim <= self.exact_up_to:
            return jnp.eye(dim, dtype=dtype)
        shape = self.probes, dim
        if self.noise == "gaussian":
            return hashed_normal(key, shape, dtype) / math.sqrt(self.probes)
        signs = jnp.where(hashed_words(key, shape) >> 31 == 0, 1.0, -1.0)
        return signs.astype(dtype) / math.sqrt(self.probes)


def _times(ends: tuple[float, float], steps: int | None, dtype: np.dtype) -> tuple[Any, Any, Any]:
    """Return the first angle, the last one, and the step size (None adapts it).

    They are Python floats where these have the dtype of the state: diffrax checks the sign of a
    Python float when it traces, and that of an array by a callback to the host.
    """
    first, last = (dtype.type(end) for end in ends)
    size = None if steps is None else (last - first) / dtype.type(steps)
    if dtype != jnp.result_type(float):
        return first, last, size
    return float(first), float(last), None if size is None else float(size)


class SolverStats(NamedTuple):
    """Work of a solve: its steps, and evaluations of the field; -1 where these are not known."""

    steps: Array
    evaluations: Array


class Velocity(NamedTuple):
    """A velocity network with what contexts give it, so that solves can differentiate both.

    Attributes:
        graph: Static half of the network.
        arrays: Its arrays, and what `VelocityNetwork.encode_context` returns.
    """

    graph: nnx.GraphDef
    arrays: tuple[Any, Any]

    def __call__(self, z: Array, angle: Array, arrays: tuple[Any, Any]) -> Array:
        """Velocity at points z (*draws, *batch, d)."""
        state, given = arrays
        return nnx.merge(self.graph, state)(z, angle, given)


class OdeFlow(VectorDistribution):
    """The distribution of points that begin as standard normal noise and follow a velocity.

    Args:
        velocity: The velocity.
        shape: Batch shape and dimension (*batch, d).
        dtype: Of the points.
        ends: First angle, of noise, and last one, of data.
        solver: How to solve.
        sampler: What draws instead of a solve, a function `(velocity, noise, key) -> points`.
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
        """Hold the velocity and how to solve."""
        super().__init__(shape, dtype)
        self._velocity, self._ends = velocity, ends
        self._solver, self._sampler = solver, sampler
        self._base = StandardNormal(shape, dtype)

    def log_prob(self, value: Array) -> Array:
        """Log density (*draws, *batch) of points (*draws, *batch, d).

        Each context has a solve of its own, whose steps do not depend on the others.
        """
        return self.log_prob_and_stats(value)[0]

    def log_prob_and_stats(self, value: Array) -> tuple[Array, SolverStats]:
        """Log density (*draws, *batch), and the work of the solve for each context, (*batch)."""
        if not self.batch_shape:
            (noise, change), effort = self._solve(value, reversed_ends(self._ends))
            return self._base.log_prob(noise) + change, effort
        state, given = self._velocity.arrays

        def one(given: Any, value: Array) -> tuple[Array, SolverStats]:
            velocity = self._velocity._replace(arrays=(state, given))
            return self._like(velocity, self._shape[1:]).log_prob_and_stats(value)

        axis = -len(self._shape)
        return jax.vmap(one, in_axes=(0, axis), out_axes=(axis + 1, 0))(given, value)

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
        (points, change), _ = self._solve(noise, self._ends)
        return points, self._base.log_prob(noise) - change

    def _like(self, velocity: Velocity, shape: tuple[int, ...]) -> OdeFlow:
        return OdeFlow(velocity, shape, self._dtype, self._ends, self._solver, self._sampler)

    def _solve(
        self, z: Array, ends: tuple[float, float]
    ) -> tuple[tuple[Array, Array], SolverStats]:
        """Where points end with the integral of the divergence on their way (*), and the work."""
        probes = self._solver.probes_of(jax.random.key(0), z.shape[-1], z.dtype)

        def field(angle: Array, state: tuple[Array, Array], arrays: Any) -> tuple[Array, Array]:
            return field_derivatives(lambda z: self._velocity(z, angle, arrays), state[0], probes)[
                :2
            ]

        start = z, jnp.zeros(z.shape[:-1], z.dtype)
        return self._solver.solve(field, start, self._velocity.arrays, ends)


def reversed_ends(ends: tuple[float, float]) -> tuple[float, float]:
    """From data to noise."""
    return ends[1], ends[0]


class Continuous(Density):
    """Abstract density whose distribution follows a velocity network."""

    needs_ode: ClassVar[bool] = True

    def __init__(
        self, network: VelocitySettings, solver: Solver, key: Key, dim: int, context_dim: int
    ) -> None:
        """Make the network; its velocity is zero, which is the identity."""
        self.network = network.build(nnx.Rngs(key), dim, context_dim)
        self.solver, self.dim = solver, dim

    def velocity(self, context: Array, key: Key | None) -> Velocity:
        """The network given contexts (*, C); a key turns dropout on."""
        graph, state = nnx.split(self.network)
        return Velocity(graph, (state, self.network.encode_context(context, key=key)))

    def flow(
        self,
        context: Array,
        key: Key | None,
        ends: tuple[float, float],
        sampler: Callable[[Callable, Array, Key], Array] | None = None,
    ) -> OdeFlow:
        """The distribution given contexts (*, C)."""
        shape = (*context.shape[:-1], self.dim)
        velocity = self.velocity(context, key)
        return OdeFlow(velocity, shape, context.dtype, ends, self.solver, sampler)


class FieldDerivatives(NamedTuple):
    """A field at points (*, d), its divergence (*) and the sum of its Jacobian's squares (*)."""

    value: Array
    divergence: Array
    squares: Array


def field_derivatives(
    function: Callable[[Array], Array], z: Array, probes: Array
) -> FieldDerivatives:
    """Evaluate a field with what its Jacobian does along probes (K, d): see `Solver.probes_of`."""

    def along(probe: Array) -> tuple[Array, Array, Array]:
        direction = jnp.broadcast_to(probe, z.shape)
        value, slope = jax.jvp(function, (z,), (direction,))
        return value, jnp.sum(slope * direction, axis=-1), jnp.sum(slope**2, axis=-1)

    if len(probes) <= _ABREAST:
        value, divergence, squares = jax.vmap(along, out_axes=(None, 0, 0))(probes)
    else:
        value = function(z)
        # a derivative computes them again, or it would hold those of all batches
        one = jax.checkpoint(lambda probe: along(probe)[1:])
        divergence, squares = jax.lax.map(one, probes, batch_size=_ABREAST)
    return FieldDerivatives(value, jnp.sum(divergence, axis=0), jnp.sum(squares, axis=0))


_ABREAST = 8
"""Probes at once: each of them takes the memory that the network takes."""


def check_networks(network: Any, **solvers: Any) -> None:
    """Refuse what is no velocity network, and what are no solvers.

    Raises:
        ValueError: Something else was given, or a class where an object was meant.
    """
    require_object("network", network, VelocitySettings, "one such as sf.Film()")
    for name, solver in solvers.items():
        require_object(name, solver, Solver, "one such as sf.Solver()")
