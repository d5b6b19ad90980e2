"""JAX simulators: compiled, side by side, on all devices of this process.

A device simulates blocks of `LANES` rows one after another on a CPU, and all of its rows at once on
an accelerator. Rows have nothing to say to each other, so each device runs the program of a single
one on its share of them, and a row is the same, bit for bit, on however many there are. (On
accelerators, whose kernels are chosen by the number of rows, it may differ in its last digits.)

Public names: `CHUNK`, `LANES`, `Spread`, `spread`, `spread_for_store`, `simulate_call`,
`with_present_state`.
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

CHUNK = 16_384
"""Simulations of a device in one compiled call; the same shape for every chunk."""

LANES = 256
"""Simulations side by side on a CPU: their arrays stay in its cache, and an adaptive solver takes
as many steps as the slowest of a few, not of thousands. Accelerators take a whole chunk at once."""

_ROWS = PartitionSpec("rows")


class Spread(NamedTuple):
    """Number of rows that one compiled call takes, and the devices that share them, if several."""

    rows: int
    mesh: Mesh | None


def spread(n: int) -> Spread:
    """How to simulate n rows: in one call that is little longer, or in several of one length.

    All devices of this process take part, as long as each has `LANES` rows to simulate; the default
    device alone where the user has chosen one, by `jax.default_device` say.
    """
    if n <= LANES:
        return Spread(n, None)
    return _in_blocks(-(-n // LANES), max(1, CHUNK // LANES))


def spread_for_store(chunk: int) -> Spread:
    """How to simulate for a store of such chunks: always in calls of one length.

    It is no shorter for fewer rows, which might be rounded in another way.
    """
    blocks = max(-(-chunk // LANES), len(_devices()))
    return _in_blocks(blocks, blocks)


def _in_blocks(blocks: int, most: int) -> Spread:
    """So many blocks in calls, of which a device takes no more than `most`."""
    devices = _devices()
    each = min(-(-blocks // len(devices)), most)
    count = min(-(-blocks // each), len(devices))
    mesh = Mesh(np.array(devices[:count]), ("rows",)) if count > 1 else None
    return Spread(count * each * LANES, mesh)


def simulate_call(
    prior: Prior, simulator: Simulator, keys: Key, theta: Array, mesh: Mesh | None
) -> Obs:
    """The observations of a call's keys and parameters (N, D), N as `spread` says."""
    if mesh is None:
        return _on_one(prior, simulator, keys, theta)
    shares = jax.device_put((keys, theta), NamedSharding(mesh, _ROWS))
    x = _on_all(prior, simulator, mesh, *shares)
    # what comes after is not meant to run on all of them
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), x)


@partial(jax.jit, static_argnums=1)
@full_precision
def _on_one(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    return _share(prior, simulator, keys, theta)


@partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _on_all(prior: Prior, simulator: Simulator, mesh: Mesh, keys: Key, theta: Array) -> Obs:
    share = partial(_share, prior, simulator)
    # unchecked: a loop of the simulator's may start at constants, which are the same everywhere
    split = jax.shard_map(share, mesh=mesh, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)
    return split(keys, theta)


def _share(prior: Prior, simulator: Simulator, keys: Key, theta: Array) -> Obs:
    """What one device does."""
    inputs = (keys, prior.structured(theta))
    if jax.default_backend() != "cpu" or len(theta) <= LANES:
        return jax.vmap(simulator)(*inputs)
    return jax.lax.map(lambda one: simulator(*one), inputs, batch_size=LANES)


def _devices() -> list[Any]:
    chosen = getattr(jax.config, "jax_default_device", None)
    return jax.local_devices() if chosen is None else [chosen]


def with_present_state(simulator: Simulator) -> Simulator:
    """A simulator that compiled programs do not take for an earlier one.

    A method, or an object that is called, may have other attributes by now; programs that were
    compiled for it would not see that. Plain functions are known by themselves.
    """
    if isinstance(simulator, FunctionType) or hasattr(simulator, "__wrapped__"):
        return simulator
    return lambda key, theta: simulator(key, theta)
