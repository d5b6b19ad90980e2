"""Run JAX simulators in compiled calls on all devices of this process.

A CPU device simulates its rows in batches of `CPU_BATCH_ROWS`, one batch at a time. An accelerator
simulates all of its rows at once. Rows are independent, so each device runs the same program on its
share of the rows. On CPUs the result of a row is the same, bit for bit, for any number of devices.
On accelerators the result may differ in the last digits, because the kernels depend on the number
of rows.

Public names: `MAX_CALL_ROWS`, `CPU_BATCH_ROWS`, `CallPlan`, `plan_calls`, `plan_store_calls`,
`trace_call`, `simulate_call`, `with_current_state`.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs, Simulator
from sbi_flows.prior.prior import Prior

MAX_CALL_ROWS = 16_384
"""Maximum number of rows that one device simulates in one compiled call."""

CPU_BATCH_ROWS = 256
"""Number of rows in one vectorised batch on a CPU. The arrays of a small batch fit into the cache
of the CPU. In a vectorised batch, an adaptive solver takes as many steps as the slowest row needs,
so a small batch also wastes fewer steps."""

_ROWS = PartitionSpec("rows")


class CallPlan(NamedTuple):
    """Size of compiled calls.

    Attributes:
        rows: Number of rows in one call.
        mesh: Mesh of the devices that share the rows; None for a single device.
    """

    rows: int
    mesh: Mesh | None


def plan_calls(n: int) -> CallPlan:
    """Choose the size of compiled calls for n rows.

    All calls have the same number of rows. If n is not a multiple of this number, a few rows are
    added. All devices of this process are used if each has `CPU_BATCH_ROWS` rows to simulate. If
    the user has chosen a device, for example with `jax.default_device`, only this device is used.
    """
    if n <= CPU_BATCH_ROWS:
        return CallPlan(n, None)
    return _plan_batches(-(-n // CPU_BATCH_ROWS), max(1, MAX_CALL_ROWS // CPU_BATCH_ROWS))


def plan_store_calls(chunk_rows: int) -> CallPlan:
    """Choose the size of compiled calls for a store with chunks of this many rows.

    The size does not depend on the number of rows that are missing in the store, because calls of
    different sizes may round differently.
    """
    batches = max(-(-chunk_rows // CPU_BATCH_ROWS), len(_devices()))
    return _plan_batches(batches, batches)


def _plan_batches(batches: int, max_per_device: int) -> CallPlan:
    """Divide batches among devices; each device gets at most `max_per_device` in one call."""
    devices = _devices()
    per_device = min(-(-batches // len(devices)), max_per_device)
    count = min(-(-batches // per_device), len(devices))
    mesh = Mesh(np.array(devices[:count]), ("rows",)) if count > 1 else None
    return CallPlan(count * per_device * CPU_BATCH_ROWS, mesh)


def trace_call(
    key: Key, prior: Prior, plan: CallPlan, simulator: Simulator, is_fresh: bool
) -> jax.stages.Traced:
    """Trace one call of `simulate_call`.

    JAX caches the trace, so the call itself does not trace the simulator again.

    Args:
        key: A random key with the same implementation as the keys of the call.
        prior: The prior.
        plan: Number of rows and devices of the call.
        simulator: The simulator.
        is_fresh: Whether to bypass JAX's cache of traces, so that the Python code of the simulator
            runs again.

    Raises:
        Exception: JAX or the simulator raised this exception during the trace.
    """
    sharding = None if plan.mesh is None else NamedSharding(plan.mesh, _ROWS)
    split = jax.eval_shape(lambda key: jax.random.split(key, plan.rows), key)
    keys = jax.ShapeDtypeStruct(split.shape, split.dtype, sharding=sharding)
    shape, dtype = (plan.rows, prior.dim), jnp.result_type(float)
    theta = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    program = _on_one_device if plan.mesh is None else _on_all_devices
    if is_fresh:
        # JAX caches traces by the function inside `jit`
        function = program.__wrapped__  # type: ignore[attr-defined]  # jit keeps its function
        program = jax.jit(partial(function), static_argnums=(1, 2))
    return program.trace(prior, simulator, plan.mesh, keys, theta)


def simulate_call(
    prior: Prior, simulator: Simulator, keys: Key, theta: Array, mesh: Mesh | None
) -> Obs:
    """Simulate N rows with keys (N,) and parameters (N, D); N is `CallPlan.rows`."""
    if mesh is None:
        return _on_one_device(prior, simulator, None, keys, theta)
    shares = jax.device_put((keys, theta), NamedSharding(mesh, _ROWS))
    x = _on_all_devices(prior, simulator, mesh, *shares)
    # x is moved to the default device, so that later computations on x run there only
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), x)


@partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _on_one_device(prior: Prior, simulator: Simulator, mesh: None, keys: Key, theta: Array) -> Obs:
    return _simulate_share(prior, simulator, keys, theta)


@partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _on_all_devices(prior: Prior, simulator: Simulator, mesh: Mesh, keys: Key, theta: Array) -> Obs:
    share = partial(_simulate_share, prior, simulator)
    # check_vma is off: the simulator may have a loop that starts from constants, which JAX would
    # reject because constants do not vary over the devices
    split = jax.shard_map(share, mesh=mesh, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)
    return split(keys, theta)


def _simulate_share(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    """Simulate the rows of one device."""
    inputs = (keys, prior.unchecked_structured(theta))
    if jax.default_backend() != "cpu" or len(theta) <= CPU_BATCH_ROWS:
        return jax.vmap(simulator)(*inputs)
    return jax.lax.map(lambda row: simulator(*row), inputs, batch_size=CPU_BATCH_ROWS)


def _devices() -> list[Any]:
    """Return the devices on which simulations run."""
    default = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices() if default is None else [default]


def with_current_state(simulator: Simulator) -> Simulator:
    """Return a simulator that JAX compiles anew, with the present values of its attributes.

    The attributes of a callable object, or of an object whose method is the simulator, may change
    between two calls. A program that was compiled earlier would still use the old values. Plain
    functions are returned unchanged.
    """
    if isinstance(simulator, FunctionType) or hasattr(simulator, "__wrapped__"):
        return simulator
    return lambda key, theta: simulator(key, theta)
