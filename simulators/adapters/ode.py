"""ODE solver for simulators; a failed solve returns NaN, which marks an invalid simulation.

Public names: `solve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array


def solve(
    vector_field: Callable[[Any, Array, Any], Array],
    y0: Array,
    args: Any,
    times: Array,
    *,
    dt0: float,
    tolerance: float,
    max_steps: int,
) -> Array:
    """Solve an ODE by Tsit5 with adaptive steps.

    Args:
        vector_field: Function `(t, y, args)` that returns dy/dt, shape (S,).
        y0: Initial state, at `times[0]`, shape (S,).
        args: Third argument of the vector field.
        times: Increasing times, shape (T,).
        dt0: Initial step size.
        tolerance: Relative and absolute tolerance of the step-size control.
        max_steps: Maximum number of steps, rejected steps included.

    Returns:
        The states at `times`, shape (T, S). All are NaN if `max_steps` is reached. The states
        are differentiable in forward mode (`jax.jvp`, `jax.jacfwd`).

    References:
        Tsitouras 2011, Comput. Math. Appl. 62 (the method).

    Example:
        >>> import jax.numpy as jnp
        >>> decay = lambda t, y, rate: -rate * y
        >>> times = jnp.array([0.0, 1.0, 2.0])
        >>> y = solve(decay, jnp.ones(1), 0.5, times, dt0=0.1, tolerance=1e-6, max_steps=100)
        >>> print(", ".join(f"{float(value):.3f}" for value in y[:, 0]))
        1.000, 0.607, 0.368
    """
    import diffrax

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(vector_field),
        diffrax.Tsit5(),
        t0=times[0],
        t1=times[-1],
        dt0=dt0,
        y0=y0,
        args=args,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
        throw=False,
    )
    ok = solution.result == diffrax.RESULTS.successful
    return jnp.where(ok, jnp.asarray(solution.ys), jnp.nan)
