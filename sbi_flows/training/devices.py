"""Device mesh of a fit, and placement of arrays on it.

Public names: `MEMBERS`, `make_mesh`, `shard_rows`, `place_on_mesh`, `to_numeric`, `from_numeric`,
`to_host`, `from_first_process`.

The members of an ensemble are independent, so they are distributed over the devices first. If there
are more devices than members, several devices share the rows of each batch of a member and add up
their gradients.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MEMBERS, ROWS = "members", "rows"
"""Names of the axes of the mesh."""


def make_mesh(members: int, batch_size: int, max_devices: int | None) -> Mesh | None:
    """Make the device mesh of a fit.

    Args:
        members: Number of members.
        batch_size: Number of rows in a batch.
        max_devices: Maximum number of devices. None uses all devices, also of other processes.

    Returns:
        Mesh with the axes `MEMBERS` and `ROWS`, over which the members, and the rows of a batch,
        are distributed evenly; None for one device.

    Raises:
        ValueError: `max_devices` is larger than the number of devices.
    """
    devices = jax.devices()
    if max_devices is not None and max_devices > len(devices):
        raise ValueError(
            f"devices: expected at most {len(devices)}, the number of devices, got {max_devices}"
        )
    count = len(devices) if max_devices is None else max_devices
    over_members = max(k for k in range(1, min(count, members) + 1) if members % k == 0)
    over_rows = math.gcd(count // over_members, batch_size)
    if over_members * over_rows == 1:
        return None
    used = np.array(devices[: over_members * over_rows])
    return Mesh(used.reshape(over_members, over_rows), (MEMBERS, ROWS))


def shard_rows(mesh: Mesh | None, places: Array) -> Array:
    """Distribute the row numbers (B,) of a batch over the devices that share a member."""
    if mesh is None:
        return places
    return jax.lax.with_sharding_constraint(places, NamedSharding(mesh, PartitionSpec(ROWS)))


def place_on_mesh(mesh: Mesh | None, tree: Any, *, over_members: bool) -> Any:
    """Place arrays on the devices of a mesh.

    Args:
        mesh: The mesh; None leaves the arrays where they are.
        tree: The arrays.
        over_members: Whether the leading axis is the axis of members, which is then distributed
            over the devices. Otherwise each device gets a copy of all arrays.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(MEMBERS) if over_members else PartitionSpec())

    def put(leaf: Any) -> Array:
        return from_numeric(leaf, jax.device_put(np.asarray(to_numeric(leaf)), sharding))

    return jax.tree.map(put, tree)


def to_numeric(leaf: Any) -> Any:
    """Convert random keys to numbers, which NumPy can hold; return other arrays unchanged.

    This is needed because the state of an optimiser can contain random keys.
    """
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def from_numeric(like: Any, values: Array) -> Array:
    """Invert `to_numeric`: convert the values to random keys if `like` contains random keys."""
    if not _is_key(like):
        return values
    return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(leaf: Array) -> np.ndarray:
    """Copy an array from all devices and processes to the host, as one NumPy array."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(leaf, tiled=True))


def from_first_process(value: bytes | None) -> bytes | None:
    """Send the value of the first process to all processes, and return it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(-1 if value is None else len(value))))
    if size <= 0:
        return None if size else b""
    local = value if jax.process_index() == 0 and value is not None else bytes(size)
    received = broadcast_one_to_all(np.frombuffer(local, np.uint8))
    return np.asarray(received, np.uint8).tobytes()
