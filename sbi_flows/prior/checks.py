"""What a prior is refused for before anything is drawn from it.

Public names: `require_site`, `require_names`, `require_parameters`, `require_model`,
`base_of`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.core import Tracer
from numpyro.distributions.constraints import is_dependent

from sbi_flows.core.checks import as_array, require_real

MOST_NAME = 256
"""Characters of a name."""

MOST_ENTRIES = 2**16
"""Numbers of the parameters together: each of them has a label."""


def require_site(name: str, site: dist.Distribution) -> None:
    """Refuse what has no density over numbers, or parameters that are none.

    Raises:
        ValueError: It is discrete, improper or a point mass, is over no number or too many, or a
            parameter of it is no real number or out of range.
    """
    kind = base_of(site).__class__.__name__
    if not isinstance(name, str) or not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise ValueError(
            f"prior: expected names of 1 to {MOST_NAME} characters that can be printed, got "
            f"{name!r:.80}"
        )
    if site.support is None or site.support.is_discrete:
        raise ValueError(
            f"prior site {name!r}: expected a continuous distribution, got the discrete {kind}"
        )
    for part in _parts(site):
        if isinstance(part, dist.Delta | dist.ImproperUniform | dist.Unit):
            raise ValueError(
                f"prior site {name!r}: expected a distribution with a density that can be drawn "
                f"from, got {type(part).__name__}"
            )
    shape = (*site.batch_shape, *site.event_shape)
    if not 1 <= math.prod(shape) <= MOST_ENTRIES:
        raise ValueError(
            f"prior site {name!r}: expected 1 to {MOST_ENTRIES:,} numbers, got shape {shape}"
        )
    require_parameters(name, site)


def require_names(names: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse a prior without parameters, or with two that are called the same.

    Raises:
        ValueError: It has none, or too many, or two of one label.
    """
    if not 1 <= len(labels) <= MOST_ENTRIES:
        raise ValueError(f"prior: expected 1 to {MOST_ENTRIES:,} parameters, got {len(labels)}")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(
            f"prior: expected parameters of different names, got {twice[0]!r} twice, of "
            f"{', '.join(map(repr, names))}"
        )


def require_parameters(name: str, site: dist.Distribution) -> None:
    """Refuse a distribution whose parameters numpyro would not take, or are no numbers of JAX.

    Raises:
        ValueError: A parameter is NaN or out of range, or of a dtype that JAX does not compute
            with.
    """
    leaves = jax.tree.leaves(site)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    for leaf in leaves:
        _require_held(name, leaf)
    with jax.ensure_compile_time_eval():
        for part in _parts(site):
            _require_range(name, part)


def require_model(model: Callable[[], Any]) -> None:
    """Refuse a class, and a function that has to be given something.

    Raises:
        ValueError: It is one.
    """
    if isinstance(model, type):
        raise ValueError(f"prior: expected a distribution, got the class {model.__name__}")
    try:
        signature = inspect.signature(model)
    except (ValueError, TypeError):  # of a function that was not written in Python
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"prior model: expected a function without arguments, got {error}"
        ) from None


def base_of(site: dist.Distribution) -> dist.Distribution:
    """The distribution within those that repeat, join or mask it."""
    while isinstance(site, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        site = site.base_dist
    return site


def _parts(site: Any) -> list[dist.Distribution]:
    """A distribution and those that it is made of."""
    inner = [part for part in vars(site).values() if isinstance(part, dist.Distribution)]
    return [site, *(deeper for part in inner for deeper in _parts(part))]


def _require_held(name: str, leaf: Any) -> None:
    where = f"prior site {name!r}: a parameter"
    array = as_array(where, leaf)
    require_real(where, array.dtype)
    if not isinstance(array, Array) and not array.dtype.isnative:
        raise ValueError(
            f"{where}: expected the machine's order of bytes, got dtype {array.dtype}; "
            "array.astype(float) brings it there"
        )


def _require_range(name: str, part: dist.Distribution) -> None:
    kind = type(part).__name__
    for argument, constraint in part.arg_constraints.items():
        values = part.__dict__.get(argument)
        if values is None or is_dependent(constraint):
            continue
        if isinstance(values, list | tuple) or not np.all(constraint(values)):
            raise ValueError(
                f"prior site {name!r}: expected an array or a number as {argument} of {kind}, and "
                f"none out of range, got {np.asarray(values)!s:.80}"
            )
    low = getattr(part.support, "lower_bound", None)
    high = getattr(part.support, "upper_bound", None)
    if low is None or high is None:
        return
    width = jnp.subtract(*jnp.broadcast_arrays(high, low))
    finite = not isinstance(part, dist.Uniform) or np.all(np.isfinite(width))
    if not np.all(width > 0) or not finite:
        raise ValueError(
            f"prior site {name!r}: expected bounds of {kind} with low < high, and a finite width, "
            f"got {np.asarray(low)!s:.80} and {np.asarray(high)!s:.80}"
        )
