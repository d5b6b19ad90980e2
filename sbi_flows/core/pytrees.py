"""Registration of classes as JAX pytrees, detection of tracers, and text that describes arrays.

Public names: `register_pytree`, `is_traced`, `describe_arrays`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.core import Tracer


class _Unchecked:
    """Data of a pytree that do not affect any computation, for example a name.

    All instances compare equal, so that JAX uses one compiled program for objects that differ only
    in these data.
    """

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unchecked)

    def __hash__(self) -> int:
        return 0


def register_pytree(
    kind: type,
    *,
    leaves: Sequence[str],
    static: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Register a class as a pytree by the names of its attributes.

    When JAX rebuilds an object, the constructor is not called, because it would validate tracers.

    Args:
        kind: The class.
        leaves: Attributes that are arrays or pytrees of arrays.
        static: Attributes that are compiled into programs: hashable values, or trees of them.
        facts: Replacement value of each attribute that affects no computation, by name. Objects
            that differ only in these attributes share one compiled program. An object that a
            jitted function returns has the replacement values.
    """
    defaults = dict(facts or {})

    def flatten(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in leaves]
        structure = [jax.tree.flatten(getattr(node, name)) for name in static]
        fixed = tuple((tuple(parts), tree) for parts, tree in structure)
        known = not is_traced([child for _, child in children])
        values = [getattr(node, name) if known else value for name, value in defaults.items()]
        return children, (fixed, _Unchecked(tuple(values)))

    def unflatten(structure: Any, children: Any) -> Any:
        fixed, unchecked = structure
        node = object.__new__(kind)
        values = [jax.tree.unflatten(tree, parts) for parts, tree in fixed]
        names = (*leaves, *static, *defaults)
        for name, value in zip(names, (*children, *values, *unchecked.values), strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)


def is_traced(*trees: Any) -> bool:
    """Return whether any leaf is a tracer: an array with a known shape and unknown values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> seen = []
        >>> _ = jax.jit(lambda x: seen.append(is_traced(x)) or x)(jnp.ones(2))
        >>> seen, is_traced(jnp.ones(2))
        ([True], False)
    """
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def describe_arrays(tree: Any) -> str:
    """Describe dtype and shape of a row of each array of a tree, with the keys of dicts.

    Example:
        >>> import numpy as np
        >>> describe_arrays({"image": np.zeros((3, 8, 8)), "pair": (np.ones(3), np.ones((3, 2)))})
        '{image: float64[8, 8], pair: (float64[], float64[2])}'
    """
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{key}: {describe_arrays(v)}' for key, v in tree.items())}}}"
    if isinstance(tree, list | tuple):
        return f"({', '.join(map(describe_arrays, tree))})"
    return f"{tree.dtype}{list(tree.shape[1:])}"
