"""The devices that a fit runs on, and the placement of its arrays.

Public names: `MEMBERS`, `make_mesh`, `shard_rows`, `place_on_mesh`, `to_numeric`, `from_numeric`,
`to_host`, `from_first_process`.

The members of an ensemble are independent of each other, so they are spread over the devices first.
Devices that are left share the rows of every batch and add up their gradients.
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
    """Make the device mesh of a fit; None for a single device.

    Args:
        members: Number of members.
        batch_size: Number of rows in a batch.
        max_devices: Maximum number of devices; None for all, including those of other processes.

    Returns:
        A mesh of as many devices as divide the work evenly.

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
    """Split the rows (B,) of a batch over the devices of a member."""
    if mesh is None:
        return places
    return jax.lax.with_sharding_constraint(places, NamedSharding(mesh, PartitionSpec(ROWS)))


def place_on_mesh(mesh: Mesh | None, tree: Any, *, over_members: bool) -> Any:
    """Place arrays on the devices of a mesh.

    Args:
        mesh: The mesh; None leaves the arrays where they are.
        tree: The arrays.
        over_members: Split the leading axis over the members; otherwise each device gets a copy.
    """
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(MEMBERS) if over_members else PartitionSpec())

    def put(leaf: Any) -> Array:
        return from_numeric(leaf, jax.device_put(np.asarray(to_numeric(leaf)), sharding))

    return jax.tree.map(put, tree)


def to_numeric(leaf: Any) -> Any:
    """Return the key data of random keys, which NumPy can hold; other arrays unchanged.

    The state of an optimiser can contain random keys.
    """
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def from_numeric(like: Any, values: Array) -> Array:
    """Invert `to_numeric`: wrap the values as random keys if `like` holds random keys."""
    if not _is_key(like):
        return values
    return jax.random.wrap_key_data(values, impl=jax.random.key_impl(like))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(leaf: Array) -> np.ndarray:
    """Gather an array on the host from all devices and processes."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(leaf, tiled=True))


def from_first_process(value: bytes | None) -> bytes | None:
    """Return the value of the first process in all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(-1 if value is None else len(value))))
    if size <= 0:
        return None if size else b""
    local = value if jax.process_index() == 0 and value is not None else bytes(size)
    received = broadcast_one_to_all(np.frombuffer(local, np.uint8))
    return np.asarray(received, np.uint8).tobytes()
