"""Which devices a fit runs on, and how its arrays lie on them.

Public names: `MEMBERS`, `mesh_of`, `split_rows`, `on_mesh`, `words_of`, `from_words`,
`to_host`, `of_first`.

Members of an ensemble have nothing to say to each other, so they are spread first; devices that are
left share the rows of every batch, and add up their gradients.
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
"""Names of the mesh's axes."""


def mesh_of(members: int, batch: int, devices: int | None) -> Mesh | None:
    """The mesh for a fit; None where there is a single device.

    Args:
        members: Number of members.
        batch: Rows a step.
        devices: Most devices to use; all of them, those of other processes included, for None.

    Returns:
        A mesh of as many of the devices as divide the work evenly.

    Raises:
        ValueError: There are fewer devices than that.
    """
    found = jax.devices()
    if devices is not None and devices > len(found):
        raise ValueError(f"devices: expected at most the {len(found)} there are, got {devices}")
    count = len(found) if devices is None else devices
    over_members = max(k for k in range(1, min(count, members) + 1) if members % k == 0)
    over_rows = math.gcd(count // over_members, batch)
    if over_members * over_rows == 1:
        return None
    used = np.array(found[: over_members * over_rows])
    return Mesh(used.reshape(over_members, over_rows), (MEMBERS, ROWS))


def split_rows(mesh: Mesh | None, places: Array) -> Array:
    """Say that each device of a member takes its share of these rows (B,)."""
    if mesh is None:
        return places
    return jax.lax.with_sharding_constraint(places, NamedSharding(mesh, PartitionSpec(ROWS)))


def on_mesh(mesh: Mesh | None, tree: Any, *, members: bool) -> Any:
    """The arrays on the mesh's devices: one member's with that member, or all on each."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, PartitionSpec(MEMBERS) if members else PartitionSpec())

    def put(leaf: Any) -> Array:
        return from_words(leaf, jax.device_put(np.asarray(words_of(leaf)), sharding))

    return jax.tree.map(put, tree)


def words_of(leaf: Any) -> Any:
    """An array that NumPy can hold: of keys, which an optimiser's state may have, their words."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def from_words(like: Any, words: Array) -> Array:
    """An array such as this one, of what `words_of` gave."""
    if not _is_key(like):
        return words
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_host(leaf: Array) -> np.ndarray:
    """The whole of an array, wherever its parts are."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(leaf, tiled=True))


def of_first(value: bytes | None) -> bytes | None:
    """What the first of several processes has, in all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(-1 if value is None else len(value))))
    if size <= 0:
        return None if size else b""
    mine = value if jax.process_index() == 0 and value is not None else bytes(size)
    sent = np.frombuffer(mine, np.uint8)
    return np.asarray(broadcast_one_to_all(sent), np.uint8).tobytes()
