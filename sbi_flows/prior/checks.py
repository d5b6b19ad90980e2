"""Checks of the distributions and models that a prior is built from.

Public names: `require_site`, `require_names`, `require_free_names`, `require_parameters`,
`require_model`, `base_of`.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.core import Tracer
from numpyro.distributions.constraints import is_dependent

from sbi_flows.core.checks import as_array, require_real

MAX_NAME_LENGTH = 256
"""Maximum number of characters in a site's name."""

_WITHOUT_DENSITY: tuple[type, ...] = tuple(
    getattr(dist, name)
    for name in ("Delta", "ImproperUniform", "Unit", "HurdleProbs", "HurdleLogits")
    if hasattr(dist, name)  # older versions of numpyro lack some
)
"""Distributions that cannot be sampled, or that have atoms of positive probability."""

RESERVED_NAMES = ("chain", "draw")

MAX_ENTRIES = 2**16
"""Maximum number D of parameters, which limits the number of labels."""


def require_site(name: str, site: dist.Distribution) -> None:
    """Raise ValueError unless a distribution has a density and can be sampled.

    A discrete or improper distribution and a point mass are errors. So are a value with no entries
    or more than `MAX_ENTRIES`, and a parameter that is out of range or not finite.

    Args:
        name: Name of the site.
        site: Distribution of the site.
    """
    kind = base_of(site).__class__.__name__
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(
            f"prior: expected names of 1 to {MAX_NAME_LENGTH} characters that can be printed, got "
            f"{name!r:.80}"
        )
    if site.support is None or site.support.is_discrete:
        raise ValueError(
            f"prior site {name!r}: expected a continuous distribution, got the discrete {kind}"
        )
    for part in _parts(site):
        if isinstance(part, _WITHOUT_DENSITY):
            raise ValueError(
                f"prior site {name!r}: expected a distribution with a density that can be drawn "
                f"from, got {type(part).__name__}"
            )
    shape = (*site.batch_shape, *site.event_shape)
    if not 1 <= math.prod(shape) <= MAX_ENTRIES:
        raise ValueError(
            f"prior site {name!r}: expected 1 to {MAX_ENTRIES:,} numbers, got shape {shape}"
        )
    require_parameters(name, site)


def require_names(names: Sequence[str], labels: Sequence[str]) -> None:
    """Raise ValueError if a prior has no parameters, too many parameters, or two equal labels.

    Args:
        names: Names of the sites.
        labels: Labels of the D parameters.
    """
    if not 1 <= len(labels) <= MAX_ENTRIES:
        raise ValueError(f"prior: expected 1 to {MAX_ENTRIES:,} parameters, got {len(labels)}")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise ValueError(
            f"prior: expected parameters of different names, got {twice[0]!r} twice, of "
            f"{', '.join(map(repr, names))}"
        )


def require_free_names(names: Iterable[Any]) -> None:
    """Raise ValueError if a parameter has the name of an axis of draws in ArviZ."""
    for name in names:
        if name in RESERVED_NAMES:
            raise ValueError(
                f"prior: expected names other than {' and '.join(RESERVED_NAMES)}, which ArviZ "
                f"uses for the axes of draws, got {name!r}; rename the parameter"
            )


def require_parameters(name: str, site: dist.Distribution) -> None:
    """Raise ValueError unless the parameters of a distribution are finite and in range.

    If a parameter is traced (inside `jit`, for example), nothing is checked.

    Args:
        name: Name of the site.
        site: Distribution of the site.
    """
    leaves = jax.tree.leaves(site)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return
    for leaf in leaves:
        _require_dtype(name, leaf)
    with jax.ensure_compile_time_eval():
        for part in _parts(site):
            _require_range(name, part)
            _require_bounds(name, part)
            for transform in getattr(part, "transforms", ()):
                for leaf in jax.tree.leaves(transform):
                    _require_finite(name, f"a parameter of {type(transform).__name__}", leaf)


def require_model(model: Callable[[], Any]) -> None:
    """Raise ValueError if a model is a class, or a function with required arguments."""
    if isinstance(model, type):
        raise ValueError(f"prior: expected a distribution, got the class {model.__name__}")
    try:
        signature = inspect.signature(model)
    except (ValueError, TypeError):  # functions not written in Python have no signature
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ValueError(
            f"prior model: expected a function without arguments, got {error}"
        ) from None


def base_of(site: dist.Distribution) -> dist.Distribution:
    """Return the distribution inside the wrappers `Independent`, `expand` and `mask`."""
    while isinstance(site, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        site = site.base_dist
    return site


def _parts(site: Any) -> list[dist.Distribution]:
    """Return a distribution and all distributions that it contains."""
    inner = [part for part in vars(site).values() if isinstance(part, dist.Distribution)]
    return [site, *(deeper for part in inner for deeper in _parts(part))]


def _require_dtype(name: str, leaf: Any) -> None:
    """Raise ValueError unless JAX supports the dtype of a parameter."""
    where = f"prior site {name!r}: a parameter"
    array = as_array(where, leaf)
    require_real(where, array.dtype)
    if not isinstance(array, Array) and not array.dtype.isnative:
        raise ValueError(
            f"{where}: expected native byte order, got dtype {array.dtype}; convert it by "
            "array.astype(float)"
        )


def _require_range(name: str, part: dist.Distribution) -> None:
    """Raise ValueError if a distribution's argument is not finite or violates its constraint.

    Bounds of a truncated distribution may be infinite.
    """
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
        if not (argument in ("low", "high") and hasattr(part, "base_dist")):
            _require_finite(name, f"{argument} of {kind}", values)


def _require_finite(name: str, argument: str, values: Any) -> None:
    """Raise ValueError unless an argument is finite in JAX's precision (float32 or float64)."""
    if not np.all(np.isfinite(jnp.asarray(values))):
        raise ValueError(
            f"prior site {name!r}: expected finite numbers as {argument}, got "
            f"{np.asarray(values)!s:.80}"
        )


def _require_bounds(name: str, part: dist.Distribution) -> None:
    """Raise ValueError unless low < high, with a finite width if the distribution is uniform."""
    kind = type(part).__name__
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
