"""Run JAX simulators in compiled calls on all devices of this process.

On a CPU, a device simulates batches of `CPU_BATCH_ROWS` rows one after another; an accelerator
simulates all of its rows at once. Rows are independent, so each device runs the program of a single
device on its share of the rows. A row is the same, bit for bit, on any number of devices. (On
accelerators, whose kernels depend on the number of rows, it may differ in the last digits.)

Public names: `MAX_CALL_ROWS`, `CPU_BATCH_ROWS`, `CallPlan`, `plan_calls`, `plan_store_calls`,
`trace_outputs`, `simulate_call`, `with_current_state`.
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
"""Rows in one vectorised batch on a CPU. Their arrays stay in its cache, and an adaptive solver
takes as many steps as the slowest row of a small batch, not the slowest of thousands."""

_ROWS = PartitionSpec("rows")


class CallPlan(NamedTuple):
    """Number of rows of one compiled call, and the devices that share them if there are several."""

    rows: int
    mesh: Mesh | None


def plan_calls(n: int) -> CallPlan:
    """Choose the size of compiled calls for n rows: one call hardly longer, or several equal ones.

    All devices of this process take part, as long as each has `CPU_BATCH_ROWS` rows to simulate. If
    the user has chosen a device, with `jax.default_device` for example, it is used alone.
    """
    if n <= CPU_BATCH_ROWS:
        return CallPlan(n, None)
    return _plan_batches(-(-n // CPU_BATCH_ROWS), max(1, MAX_CALL_ROWS // CPU_BATCH_ROWS))


def plan_store_calls(chunk_rows: int) -> CallPlan:
    """Choose the size of compiled calls for a store with chunks of this many rows.

    The size is the same for any number of rows: a shorter call might round differently.
    """
    batches = max(-(-chunk_rows // CPU_BATCH_ROWS), len(_devices()))
    return _plan_batches(batches, batches)


def _plan_batches(batches: int, max_per_device: int) -> CallPlan:
    """Divide batches among devices, of which each takes at most so many in one call."""
    devices = _devices()
    per_device = min(-(-batches // len(devices)), max_per_device)
    count = min(-(-batches // per_device), len(devices))
    mesh = Mesh(np.array(devices[:count]), ("rows",)) if count > 1 else None
    return CallPlan(count * per_device * CPU_BATCH_ROWS, mesh)


def trace_outputs(key: Key, prior: Prior, simulator: Simulator, plan: CallPlan) -> Any:
    """Trace one call of `simulate_call`, and return shape and dtype of one row of its outputs.

    JAX keeps the trace: the call itself compiles it, and does not trace the simulator again.

    Args:
        key: Random key, of the kind that the call will have.
        prior: The prior.
        simulator: The simulator.
        plan: Size of the call, and its devices.

    Returns:
        A tree of `jax.ShapeDtypeStruct`.

    Raises:
        Exception: Whatever JAX or the simulator raises during the trace.
    """
    sharding = None if plan.mesh is None else NamedSharding(plan.mesh, _ROWS)
    split = jax.eval_shape(lambda key: jax.random.split(key, plan.rows), key)
    keys = jax.ShapeDtypeStruct(split.shape, split.dtype, sharding=sharding)
    shape, dtype = (plan.rows, prior.dim), jnp.result_type(float)
    theta = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    if plan.mesh is None:
        traced = _on_one_device.trace(prior, simulator, keys, theta)
    else:
        traced = _on_all_devices.trace(prior, simulator, plan.mesh, keys, theta)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), traced.out_info)


def simulate_call(
    prior: Prior, simulator: Simulator, keys: Key, theta: Array, mesh: Mesh | None
) -> Obs:
    """Simulate one call's keys (N,) and parameters (N, D), N being the `rows` of its plan."""
    if mesh is None:
        return _on_one_device(prior, simulator, keys, theta)
    shares = jax.device_put((keys, theta), NamedSharding(mesh, _ROWS))
    x = _on_all_devices(prior, simulator, mesh, *shares)
    # later computations on x run on the default device alone
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), x)


@partial(jax.jit, static_argnums=1)
@full_precision
def _on_one_device(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    return _simulate_share(prior, simulator, keys, theta)


@partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _on_all_devices(prior: Prior, simulator: Simulator, mesh: Mesh, keys: Key, theta: Array) -> Obs:
    share = partial(_simulate_share, prior, simulator)
    # check_vma: a loop of the simulator may start at constants, which do not vary over devices
    split = jax.shard_map(share, mesh=mesh, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)
    return split(keys, theta)


def _simulate_share(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    """Simulate the rows of one device."""
    inputs = (keys, prior.unchecked_structured(theta))
    if jax.default_backend() != "cpu" or len(theta) <= CPU_BATCH_ROWS:
        return jax.vmap(simulator)(*inputs)
    return jax.lax.map(lambda row: simulator(*row), inputs, batch_size=CPU_BATCH_ROWS)


def _devices() -> list[Any]:
    """Return the devices that simulate."""
    default = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices() if default is None else [default]


def with_current_state(simulator: Simulator) -> Simulator:
    """Return a simulator that JAX compiles again if its attributes may have changed.

    The attributes of a callable object, or of the object of a method, may change between two calls.
    A program that was compiled before would not see the change. Plain functions are returned
    unchanged.
    """
    if isinstance(simulator, FunctionType) or hasattr(simulator, "__wrapped__"):
        return simulator
    return lambda key, theta: simulator(key, theta)
