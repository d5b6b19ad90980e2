"""One distribution of a prior as a pytree: its parameters are leaves, everything else is static.

numpyro's distributions are already pytrees. `Site` solves four problems of these pytrees:

- numpyro orders the leaves by a set of names, so that the order differs between processes. A
  process then cannot use the programs that another process stored in JAX's compilation cache on
  disk. `Site` sorts the leaves.
- numpyro assumes that a traced scale is positive, so that an affine transform with a negative scale
  gets the wrong support. `Site` determines the support once, from concrete values.
- JAX's description of a tree (`PyTreeDef`) contains the same unsorted order. If it is pickled,
  another process assigns parameters to the wrong fields. `Site` pickles the distribution instead.
- A distribution class from outside numpyro may have attributes that are not leaves. `Site` treats
  such a distribution as static and compares it by identity.

Public names: `Site`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

_KNOWN_PACKAGES = {"numpyro", "sbi_flows"}
"""Packages in which every parameter of a distribution, transform or constraint is a leaf."""


@dataclasses.dataclass(frozen=True)
class _Structure:
    """Static part of a site.

    Attributes:
        tree: Tree of (distribution, support) with the parameters as leaves.
        order: For each leaf in the order of `Site`, its position in numpyro's order.
    """

    tree: Any
    order: tuple[int, ...]

    def unflatten(self, leaves: tuple[Any, ...]) -> tuple[dist.Distribution, Any]:
        """Rebuild the pair (distribution, support) from leaves in the order of `Site`."""
        placed = [None] * len(leaves)
        for position, leaf in zip(self.order, leaves, strict=True):
            placed[position] = leaf
        return jax.tree.unflatten(self.tree, placed)


class _Opaque:
    """Static part of a site without leaves; compared by identity, not by value."""

    def __init__(self, distribution: dist.Distribution) -> None:
        self.distribution = distribution


@jax.tree_util.register_pytree_node_class
class Site:
    """A distribution and its support, as a pytree of the distribution's parameters.

    Args:
        distribution: A numpyro distribution.

    Attributes:
        shape: Shape of a value: the distribution's batch axes, then its event axes.
    """

    def __init__(self, distribution: dist.Distribution) -> None:
        self._set(distribution, distribution.support)

    def _set(self, distribution: dist.Distribution, support: Any) -> None:
        self.shape = (*distribution.batch_shape, *distribution.event_shape)
        pair = (distribution, support)
        self._static: _Structure | _Opaque = _Opaque(distribution)
        self._leaves: tuple[Any, ...] = ()
        if _is_transparent(distribution):
            leaves, tree = jax.tree.flatten(pair)
            order = _order(tree)
            self._static = _Structure(tree, order)
            self._leaves = tuple(_as_real(leaves[i]) for i in order)
        self._pair: tuple[dist.Distribution, Any] | None = pair

    def __getstate__(self) -> tuple[dist.Distribution, Any]:
        """Return the distribution and its support, for pickle and copy."""
        return self._parts()

    def __setstate__(self, pair: tuple[dist.Distribution, Any]) -> None:
        """Set the distribution and its support, and flatten them in this process."""
        self._set(*pair)

    @property
    def distribution(self) -> dist.Distribution:
        """The distribution, with its parameters taken from the leaves."""
        return self._parts()[0]

    @property
    def support(self) -> Any:
        """Support of the distribution, a numpyro constraint."""
        return self._parts()[1]

    def _parts(self) -> tuple[dist.Distribution, Any]:
        pair = self._pair
        if pair is None:
            # this creates no array, so storing the pair cannot leak a tracer
            assert isinstance(self._static, _Structure)
            pair = self._pair = self._static.unflatten(self._leaves)
        return pair

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, tuple[int, ...]]]:
        """Return the parameters as leaves, and the static part."""
        return self._leaves, (self._static, self.shape)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, tuple[int, ...]], leaves: Any) -> Site:
        """Rebuild a site from leaves, without validating them."""
        site = object.__new__(cls)
        site._static, site.shape = static
        site._leaves, site._pair = tuple(leaves), None
        if isinstance(site._static, _Opaque):
            distribution = site._static.distribution
            site._pair = (distribution, distribution.support)
        return site


def _as_real(leaf: Any) -> Any:
    """Convert integers to floats, so that `Normal(0, 1)` reuses programs of `Normal(0.0, 1.0)`."""
    if isinstance(leaf, bool | float):
        return leaf
    if isinstance(leaf, int):
        return float(leaf)
    if isinstance(leaf, Array) and jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(jnp.result_type(float))
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "iu":
        return np.asarray(leaf, np.float64)
    return leaf


def _is_transparent(distribution: dist.Distribution) -> bool:
    """Return whether the leaves of a distribution include all its parameters."""
    return all(
        type(part).__module__.partition(".")[0] in _KNOWN_PACKAGES
        and not any(_is_function(value) for value in vars(part).values())
        for part in _parts_of((distribution, distribution.support))
    )


def _is_function(value: Any) -> bool:
    # variables in the closure of a function may change while the function object stays the same
    return callable(value) and not isinstance(value, dist.Distribution | Transform | Constraint)


def _parts_of(value: Any) -> list[Any]:
    """Return a value and all distributions, transforms and constraints inside it."""
    kinds = (dist.Distribution, Transform, Constraint)
    if isinstance(value, kinds):
        return [value, *(part for inner in vars(value).values() for part in _parts_of(inner))]
    if isinstance(value, list | tuple):
        return [part for inner in value for part in _parts_of(inner)]
    return []


def _order(tree: Any) -> tuple[int, ...]:
    """Return the positions of the leaves, with the fields of each distribution sorted by name."""
    count = tree.num_leaves
    found: list[int] = []
    _collect(jax.tree.unflatten(tree, range(count)), found)
    return tuple(found) if sorted(found) == list(range(count)) else tuple(range(count))


def _collect(node: Any, found: list[int]) -> None:
    if isinstance(node, dist.Distribution):
        for name in sorted(type(node).gather_pytree_data_fields()):
            _collect(node.__dict__.get(name), found)
        return
    for leaf in jax.tree.leaves(node, is_leaf=lambda n: isinstance(n, dist.Distribution)):
        if isinstance(leaf, dist.Distribution):
            _collect(leaf, found)
        elif type(leaf) is int:
            found.append(leaf)
