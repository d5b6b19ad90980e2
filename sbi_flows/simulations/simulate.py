"""Simulate at parameters drawn from the prior, or at parameters of the user.

Public names: `simulate`, `simulate_at`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm.auto import tqdm

from sbi_flows.core.checks import as_random_key, require_count, require_flag
from sbi_flows.core.typing import Key, Simulator
from sbi_flows.prior.prior import Prior, PriorLike, as_prior
from sbi_flows.simulations.arrays import as_parameters
from sbi_flows.simulations.batching import plan_calls, simulate_call, with_current_state
from sbi_flows.simulations.constants import warn_constant
from sbi_flows.simulations.executors import Executor, External
from sbi_flows.simulations.external import empty_outputs, external_tasks, put_row
from sbi_flows.simulations.failures import report_failures
from sbi_flows.simulations.outputs import check_executor, check_outputs
from sbi_flows.simulations.simulations import Simulations, unchecked_simulations
from sbi_flows.simulations.worker import from_named


def simulate(
    key: Key,
    prior: PriorLike,
    simulator: Simulator,
    n: int,
    *,
    executor: Executor | None = None,
    missing: bool = False,
    progress: bool = True,
) -> Simulations:
    """Draw n parameter vectors from the prior, and run the simulator once for each.

    Args:
        key: Random key. The result depends neither on the size of compiled calls nor on the number
            of devices.
        prior: A prior, or anything that `as_prior` accepts.
        simulator: Function `(key, theta) -> x` for one parameter vector. theta is an array, or a
            dict of named parameters if the prior is a dict or a model. x is an array or a dict of
            arrays. JAX traces the function and runs it in compiled calls on all devices of this
            process. For functions that JAX cannot trace, use `simulators.external_simulator`.
        n: Number of simulations.
        executor: Executor of an external simulator, for example `Processes` or `Dask`. The default
            is the executor that belongs to the simulator. The result does not depend on it.
        missing: Whether NaN in x marks a missing entry; otherwise it marks a failed simulation.
        progress: Show a progress bar. For a JAX function, the bar appears only if more than one
            compiled call is needed.

    Returns:
        Simulations with n rows. Rows with NaN or infinity in x are marked invalid; with `missing`,
        rows with infinity or with nothing but NaN.

    Raises:
        ValueError: n is not positive; JAX cannot trace the simulator; the simulator does not return
            numbers; or it has random numbers that do not come from its key: from NumPy, from
            Python's `random`, or from a constant key.
        SimulationFailed: All rows are invalid.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> simulate(jax.random.key(0), dist.Normal(0, 1), noisy, 100)
        Simulations(N=100, D=1, x=float32[], invalid=0)
    """
    require_count(1, n=n)
    require_flag(missing=missing)
    prior = as_prior(prior)
    check_executor(simulator, executor)
    prior_key, noise_key = jax.random.split(as_random_key("key", key))
    theta = prior.sample(prior_key, n)
    not_finite = n - int(np.sum(np.isfinite(theta).all(axis=1)))
    if not_finite:
        raise ValueError(f"prior: expected finite draws, got {not_finite} of {n} with NaN or inf")
    x, failed = _observations(noise_key, prior, simulator, theta, executor, progress)
    return _reported(theta, x, failed, missing)


def simulate_at(
    key: Key,
    prior: PriorLike,
    simulator: Simulator,
    theta: Any,
    *,
    executor: Executor | None = None,
    missing: bool = False,
    progress: bool = True,
) -> Simulations:
    """Run the simulator once for each of the user's parameter vectors, such as posterior draws.

    Args:
        key: Random key. The result depends neither on the size of compiled calls nor on the number
            of devices.
        prior: A prior, or anything that `as_prior` accepts. It defines the names of the parameters.
        simulator: As for `simulate`.
        theta: Parameters, shape (n, D); a dict or a table is matched by name.
        executor: As for `simulate`.
        missing: As for `simulate`.
        progress: As for `simulate`.

    Returns:
        Simulations with one row for each row of theta. Rows with NaN or infinity in x are marked
        invalid; with `missing`, rows with infinity or with nothing but NaN.

    Raises:
        ValueError: theta does not have D columns, or the simulator is not accepted (see
            `simulate`).
        SimulationFailed: All rows are invalid.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> noisy = lambda key, theta: theta + jax.random.normal(key)
        >>> simulate_at(jax.random.key(0), dist.Normal(0, 1), noisy, [[0.0], [1.0]])
        Simulations(N=2, D=1, x=float32[], invalid=0)
    """
    require_flag(missing=missing)
    prior = as_prior(prior)
    theta = as_parameters(prior.by_name(theta), is_double=bool(prior.layout.offset))
    if theta.shape[1] != prior.dim:
        raise ValueError(
            f"theta: expected {prior.dim} columns for {prior.labels}, got {theta.shape[1]}"
        )
    check_executor(simulator, executor)
    key = as_random_key("key", key)
    x, failed = _observations(key, prior, simulator, theta, executor, progress)
    return _reported(theta, x, failed, missing)


def _observations(
    key: Key,
    prior: Prior,
    simulator: Simulator,
    theta: Array | np.ndarray,
    executor: Executor | None,
    progress: bool,
) -> tuple[Any, dict[int, str]]:
    """Simulate at parameters (n, D) that have already been checked.

    Returns:
        The observations, and a dict from the row number of a failed row to the reason.
    """
    if isinstance(simulator, External):
        return _simulate_externally(key, prior, simulator, theta, executor, progress)
    return _simulate_in_calls(key, prior, simulator, theta, progress), {}


def _reported(
    theta: Array | np.ndarray, x: Any, reasons: dict[int, str], missing: bool
) -> Simulations:
    """Return the simulations; warn of failed rows and of constant observations."""
    failed = np.zeros(len(theta), bool)
    failed[list(reasons)] = True
    simulations = unchecked_simulations(theta, x, ~failed, missing=missing)
    report_failures(simulations, reasons.values(), stacklevel=4)
    warn_constant(simulations.theta, simulations.x, simulations.valid)
    return simulations


def _simulate_in_calls(
    key: Key, prior: Prior, simulator: Simulator, theta: Any, progress: bool
) -> Any:
    """Run a JAX simulator in compiled calls that all have the same number of rows."""
    simulator, n = with_current_state(simulator), len(theta)
    plan = plan_calls(n)
    check_outputs(key, prior, simulator, plan)
    keys, calls = jax.random.split(key, n), []
    starts = range(0, n, plan.rows)
    for start in tqdm(starts, desc="simulate", disable=not progress or len(starts) < 2):
        rows = np.arange(start, start + plan.rows) % n
        calls.append(simulate_call(prior, simulator, keys[rows], theta[rows], plan.mesh))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *calls)


def _simulate_externally(
    key: Key,
    prior: Prior,
    simulator: External,
    theta: Array | np.ndarray,
    executor: Executor | None,
    progress: bool,
) -> tuple[Any, dict[int, str]]:
    """Run an external simulator.

    Returns:
        The observations, and a dict from the row number of a failed row to the reason.
    """
    n, reasons = len(theta), {}
    tasks = external_tasks(prior, theta, jax.random.split(key, n), 0)
    x = empty_outputs(simulator, n)
    executor = simulator.executor if executor is None else executor
    rows = executor.run(simulator.job, simulator.limits, tasks)
    for i, row in tqdm(rows, total=n, desc="simulate", disable=not progress):
        put_row(x, reasons, i, i, row)
    return from_named(x), reasons
