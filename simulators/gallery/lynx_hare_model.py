"""Model of the lynx and hare task: its prior, its ODE, and the numpyro model for NUTS.

Public names: `prior`, `vector_field`, `solve`, `numpyro_model`, `nuts`, `as_log_counts`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.infer import MCMC

from sbi_flows.core.typing import Key
from simulators.adapters import mcmc, ode
from simulators.tasks.lotka_volterra import vector_field as vector_field

YEARS = 21
TOLERANCE = 3e-6
"""Relative and absolute tolerance of log populations. Errors are below 0.01 under the prior."""
MAX_STEPS = 512


def prior() -> dict[str, dist.Distribution]:
    """Return the prior of each parameter, by name. In `sigma` and `z0`, the hare comes first.

    Example:
        >>> list(prior())
        ['alpha', 'beta', 'gamma', 'delta', 'sigma', 'z0']
    """
    rate = dist.TruncatedNormal(1.0, 0.5, low=0.0)
    interaction = dist.TruncatedNormal(0.05, 0.05, low=0.0)
    return {
        "alpha": rate,
        "beta": interaction,
        "gamma": rate,
        "delta": interaction,
        "sigma": dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1),
        "z0": dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1),
    }


def solve(
    theta: Mapping[str, Array],
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Array:
    """Solve for the log populations of hare and lynx after 0, 1, ..., 20 years.

    The log populations u and v satisfy du/dt = alpha - beta exp(v) and dv/dt = -gamma + delta
    exp(u). With logarithms, populations as small as exp(-300) do not underflow. The eigenvalues of
    the linearised equations are imaginary, so an explicit solver (Tsit5) is stable with moderate
    steps.

    Args:
        theta: Scalars `alpha`, `beta`, `gamma`, `delta`, and `z0` (2,); other entries are ignored.
        tolerance: Relative and absolute tolerance of the step-size control.
        max_steps: Maximum number of steps, including rejected steps.

    Returns:
        Logs of the populations in thousands, shape (21, 2). All entries are NaN if the solver
        reaches `max_steps`. The result is differentiable in forward mode (`jax.jvp`, `jax.jacfwd`).

    Example:
        >>> import jax.numpy as jnp
        >>> theta = dict(alpha=0.55, beta=0.028, gamma=0.8, delta=0.024, z0=jnp.array([34.0, 6.0]))
        >>> solve(theta).shape
        (21, 2)
    """
    return ode.solve(
        vector_field,
        jnp.log(theta["z0"]),
        {name: theta[name] for name in ("alpha", "beta", "gamma", "delta")},
        jnp.arange(float(YEARS)),
        dt0=0.05,
        tolerance=tolerance,
        max_steps=max_steps,
    )


def numpyro_model(log_counts: Array | None = None) -> None:
    """Define the numpyro model with the sample sites of `prior` and the site `log_counts` (21, 2).

    A sampler must use forward-mode differentiation, as the function `nuts` does.

    Example:
        >>> import jax
        >>> from numpyro.infer import Predictive
        >>> predictive = Predictive(numpyro_model, num_samples=3)
        >>> predictive(jax.random.key(0))["log_counts"].shape
        (3, 21, 2)
    """
    theta = {name: numpyro.sample(name, site) for name, site in prior().items()}
    noise = dist.Normal(solve(theta), theta["sigma"][None, :]).to_event(2)
    numpyro.sample("log_counts", noise, obs=log_counts)


def nuts(key: Key, log_counts: Array, *, warmup: int = 150, draws: int = 1000) -> MCMC:
    """Run NUTS on the model. See `simulators.mcmc.nuts` for the arguments and the result.

    Raises:
        ValueError: The log counts are not finite, or their shape is not (21, 2).
    """
    return mcmc.nuts(key, numpyro_model, as_log_counts(log_counts), warmup=warmup, draws=draws)


def as_log_counts(log_counts: Any) -> Array:
    """Convert log counts to an array; raise ValueError if not finite or not of shape (21, 2)."""
    log_counts = jnp.asarray(log_counts, jnp.result_type(float))
    if log_counts.shape != (YEARS, 2):
        raise ValueError(f"log_counts: expected shape ({YEARS}, 2), got {log_counts.shape}")
    if not bool(jnp.all(jnp.isfinite(log_counts))):
        raise ValueError("log_counts: expected finite values, got NaN or infinity")
    return log_counts
