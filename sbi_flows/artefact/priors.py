"""Codec of priors.

The structure of a prior (names, shapes and bounds of its parameters) is always saved. The
distributions are saved if they are classes of numpyro and the prior has no condition. Otherwise the
user supplies the prior again when the file is loaded. This prior must have the saved structure, and
map a few fixed points in standard coordinates to the saved parameters. The maps to standard
coordinates are saved unless they are the default ones, as in files of earlier versions.

Public names: `encode`, `decode`, `circular_of`, `tensor_names`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.artefact import distributions, prior_maps
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.prior_maps import MAX_SITES
from sbi_flows.artefact.strict import (
    expect_fields,
    expect_integer,
    expect_list,
    expect_number,
    expect_type,
)
from sbi_flows.core.errors import ArtefactError
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.checks import MAX_ENTRIES, MAX_NAME_LENGTH, require_site
from sbi_flows.prior.constrained import ConstrainedPrior
from sbi_flows.prior.prior import Prior, SitePrior

MAX_COMPUTED = 2**22
"""Maximum number of values that distributions may hold in addition to twice the number of values in
the file. A damaged file could otherwise make constructors fill the memory."""

POINTS = 5
"""Number of fixed points at which the map from standard coordinates to parameters is saved."""

TOLERANCE = 1e-3
"""Maximum difference between parameters at the fixed points, relative to the range of their values.
It allows for rounding errors in another precision."""

_POINTS, _LOW, _HIGH = "prior/points", "prior/low", "prior/high"


def encode(prior: Prior, tensors: Tensors) -> dict[str, Any]:
    """Convert a prior to JSON data; its arrays become tensors."""
    base = prior.base if isinstance(prior, BoxPrior | ConstrainedPrior) else prior
    assert isinstance(base, SitePrior)
    sites, missing = None, None
    arrays: Tensors = {}
    try:
        if isinstance(prior, ConstrainedPrior):
            raise ValueError("its condition is a function")
        sites = _sites(base, arrays)
        tensors |= arrays
    except ValueError as error:
        missing = str(error)
    if isinstance(prior, BoxPrior):
        tensors |= {_LOW: prior.low, _HIGH: prior.high}
    tensors[_POINTS] = np.asarray(_points(prior), np.float64)
    maps = prior_maps.encode(base, tensors)
    # written only if they are needed, so that older versions can read the other files
    extras: dict[str, Any] = {"circular": list(prior.circular)} if prior.circular else {}
    extras |= {"maps": maps} if maps else {}
    extras |= {"offset": list(prior.layout.offset)} if prior.layout.offset else {}
    extras |= {"mass": float(prior.mass)} if isinstance(prior, ConstrainedPrior) else {}
    return {
        "named": prior.is_named,
        "names": list(prior.names),
        "shapes": [list(prior.event_shapes[name]) for name in prior.names],
        "bounded": list(prior.bounded),
        "cut": isinstance(prior, BoxPrior),
        "sites": sites,
        "missing": missing,
        **extras,
    }


def tensor_names(value: Any) -> set[str]:
    """Return the names of all tensors to which the JSON data of a prior refer."""
    names = set(distributions.tensor_names(value)) | {_POINTS}
    names |= prior_maps.tensor_names(value.get("maps"))
    return names | {_LOW, _HIGH} if value.get("cut") is True else names


def circular_of(value: Any) -> tuple[bool, ...]:
    """Return whether each standard coordinate of a saved prior is circular.

    The result is empty without circular parameters, and for files from before `sf.Circular`.

    Raises:
        ArtefactError: The data are malformed.
    """
    value = expect_type("prior", value, dict, "an object")
    if "circular" not in value:
        return ()
    flags = expect_list("prior.circular", value["circular"], MAX_ENTRIES)
    flags = tuple(expect_type("prior.circular", flag, bool, "truth values") for flag in flags)
    if not any(flags) or len(flags) != len(expect_list("prior", value.get("bounded"), MAX_ENTRIES)):
        raise ArtefactError(
            f"prior.circular: expected a flag for each coordinate, one true, got {flags!s:.80}"
        )
    return flags


def decode(value: Any, tensors: Mapping[str, np.ndarray], user_prior: Prior | None) -> Prior:
    """Return the prior that JSON data describe, or the user's prior if one was supplied.

    Args:
        value: The data.
        tensors: The arrays of the prior, by name.
        user_prior: Prior that the user supplied, or None.

    Returns:
        The user's prior if there is one, otherwise the prior that the data describe. If the saved
        prior was restricted to a box, the returned prior is restricted to the same box.

    Raises:
        ArtefactError: The data are malformed, the user's prior differs from the saved prior, or the
            data contain no distributions and the user supplied no prior.
    """
    keys = ("named", "names", "shapes", "bounded", "cut", "sites", "missing")
    circular = circular_of(value)
    extras = {"maps": None, "mass": None, "offset": [], "circular": []}
    extras |= expect_type("prior", value, dict, "an object")
    maps, mass, offset, _ = (extras.pop(name) for name in ("maps", "mass", "offset", "circular"))
    value = extras
    named, names, shapes, bounded, cut, sites, missing = expect_fields("prior", value, *keys)
    names = [_name(name) for name in expect_list("prior.names", names, MAX_SITES)]
    shapes = [_shape(shape) for shape in expect_list("prior.shapes", shapes, MAX_SITES)]
    if not names or len(set(names)) != len(names) or len(shapes) != len(names):
        raise ArtefactError("prior.names: expected distinct names, each with a shape")
    expect_integer("prior: number of parameters", sum(map(math.prod, shapes)), 1, MAX_ENTRIES)
    expect_type("prior.named", named, bool, "a truth value")
    expect_type("prior.cut", cut, bool, "a truth value")
    offset = _offset(offset, sum(map(math.prod, shapes)))
    expected = f"a prior of {', '.join(map(_described, names, shapes))}"
    if user_prior is not None:
        prior = user_prior.base if cut and isinstance(user_prior, BoxPrior) else user_prior
        if (list(prior.names), list(prior.event_shapes.values())) != (names, shapes):
            raise ArtefactError(f"prior: expected {expected}, got {prior}")
        prior = prior_maps.with_maps(prior, maps, tensors, bool(circular))
    elif sites is None:
        raise ArtefactError(
            f"its prior could not be saved ({missing!s:.200}): load(path, prior=...) takes it, "
            f"{expected}"
        )
    else:
        sites = expect_list("prior.sites", sites, MAX_SITES)
        if len(sites) != len(names):
            raise ArtefactError(f"prior.sites: expected {len(names)}, got {len(sites)}")
        pairs = zip(names, shapes, sites, strict=True)
        distributions_by_name = {n: _site(n, shape, s, tensors) for n, shape, s in pairs}
        prior = SitePrior(
            distributions_by_name, is_named=named, offset=offset, has_circular_maps=bool(circular)
        )
        prior = prior_maps.with_maps(prior, maps, tensors, bool(circular))
    if cut:
        prior = _cut(prior, tensors)
    structure = (prior.is_named, list(prior.names), list(prior.event_shapes.values()))
    is_same = structure == (named, names, shapes) and list(prior.bounded) == bounded
    is_same &= prior.circular == circular
    if not is_same or type(prior) not in (SitePrior, BoxPrior, ConstrainedPrior):
        raise ArtefactError(f"prior: expected {expected}, got {prior}")
    _require_same_condition(prior, mass, expected)
    if user_prior is not None:
        _require_same_offset(prior, offset, expected)
        _require_same_points(prior, tensors, expected)
    return prior


def _offset(value: Any, dim: int) -> tuple[float, ...]:
    """Read the offset of the D = `dim` parameters; an empty tuple without an offset.

    Raises:
        ArtefactError: The list has another length, or contains anything but finite numbers.
    """
    numbers = expect_list("prior.offset", value, MAX_ENTRIES)
    if len(numbers) not in (0, dim):
        raise ArtefactError(f"prior.offset: expected {dim} numbers, got {len(numbers)}")
    if not all(abs(expect_number("prior.offset", number)) < 1e300 for number in numbers):
        raise ArtefactError(f"prior.offset: expected numbers below 1e300, got {numbers!s:.80}")
    return tuple(map(float, numbers))


def _sites(prior: SitePrior, tensors: Tensors) -> list[Any]:
    """Convert the distributions of a prior to JSON data from which they can be rebuilt.

    Raises:
        ValueError: A distribution cannot be rebuilt from JSON data; the message says why.
    """
    if prior.dependent:
        raise ValueError(f"a model in which {', '.join(sorted(prior.dependent))} depend on others")
    sites = []
    for name, site in prior.distributions.items():
        start, copied = len(tensors), Tensors()
        sites.append(distributions.encode(name, site, tensors))
        new_names = list(tensors)[start:]
        copy = distributions.decode(name, sites[-1], tensors)
        # a constructor may change its arguments, or set other state: compare with a rebuilt copy
        copied |= dict.fromkeys(map(str, range(start)), np.zeros(0))
        is_same = distributions.encode(name, copy, copied) == sites[-1]
        if not is_same or any(tensors[n].tobytes() != copied[n].tobytes() for n in new_names):
            raise ValueError(f"{name}: {type(site).__name__} cannot be rebuilt from its arguments")
    return sites


def _site(
    name: str, shape: tuple[int, ...], value: Any, tensors: Mapping[str, np.ndarray]
) -> dist.Distribution:
    """Build the distribution of one site. First `jax.eval_shape` checks its size without arrays."""
    arrays_used = {n: tensors[n] for n in distributions.tensor_names(value) if n in tensors}
    sizes, max_size = [], MAX_COMPUTED + 2 * sum(array.size for array in arrays_used.values())

    def trial(arrays: Mapping[str, Any]) -> None:
        site = distributions.decode(name, value, arrays)
        if not isinstance(site, dist.Distribution):
            raise ArtefactError(f"prior site {name!r}: expected a distribution")
        size = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(site))
        sizes.append(((*site.batch_shape, *site.event_shape), size))

    jax.eval_shape(trial, arrays_used)
    actual_shape, size = sizes[0]
    if actual_shape != shape or size > max_size:
        raise ArtefactError(f"prior site {name!r}: expected shape {shape}, got {actual_shape}")
    site = distributions.decode(name, value, arrays_used)
    try:
        require_site(name, site)
    except ValueError as error:
        raise ArtefactError(str(error)) from None
    if any(np.any(np.isnan(np.asarray(leaf, float))) for leaf in jax.tree.leaves(site)):
        raise ArtefactError(f"prior site {name!r}: expected numbers, got NaN")
    return site


def _cut(prior: Prior, tensors: Mapping[str, np.ndarray]) -> BoxPrior:
    """Restrict a prior to the box that is saved in the file."""
    if isinstance(prior, BoxPrior):
        return BoxPrior(prior.base, tensors[_LOW], tensors[_HIGH])
    return BoxPrior(prior, tensors[_LOW], tensors[_HIGH])


def _points(prior: Prior) -> Any:
    """Compute the parameters (POINTS, D) of the fixed points in standard coordinates."""
    count = POINTS * prior.standard_dim
    coordinates = 1.5 * np.cos(np.arange(1.0, count + 1.0)).reshape(POINTS, -1)
    return _from_standard(prior, jnp.asarray(coordinates))


@jax.jit
def _from_standard(prior: Prior, y: Array) -> Array:
    return prior.unchecked_from_standard(y)


def _require_same_points(prior: Prior, tensors: Mapping[str, np.ndarray], expected: str) -> None:
    """Raise ArtefactError if the user's prior maps the fixed points to other parameters."""
    points, saved = np.asarray(_points(prior), np.float64), tensors[_POINTS]
    if saved.shape != points.shape or saved.dtype != np.float64:
        raise ArtefactError("prior: expected points to compare it at, got none")
    spread = np.ptp(saved, axis=0, keepdims=True) + 1e-30
    if not np.all(np.abs(points - saved) <= TOLERANCE * spread):
        raise ArtefactError(
            f"prior: expected {expected} with the distributions that the posterior was fitted to, "
            f"got other ones in {prior}"
        )


def _require_same_offset(prior: Prior, offset: tuple[float, ...], expected: str) -> None:
    """Raise ArtefactError if the user's prior has another offset than the saved prior."""
    if prior.layout.offset != offset:
        raise ArtefactError(
            f"prior: expected {expected} in the precision of the file, got {prior} with another "
            "offset; set jax_enable_x64 as it was set when the file was written"
        )


def _require_same_condition(prior: Prior, mass: Any, expected: str) -> None:
    """Raise ArtefactError unless a prior has a condition of probability `mass` (None: none)."""
    if (mass is not None) != isinstance(prior, ConstrainedPrior):
        wanted = "with" if mass is not None else "without"
        raise ArtefactError(f"prior: expected {expected} {wanted} a condition, got {prior}")
    if isinstance(prior, ConstrainedPrior):
        mass = expect_number("prior.mass", mass)
        if not abs(prior.mass - mass) <= 6.0 * max(prior.mass_error, 1e-5):
            raise ArtefactError(
                f"prior: expected a condition of probability {mass:.3g}, as in the fit, got "
                f"{prior.mass:.3g} in {prior}; pass the prior of the fit"
            )


def _name(value: Any) -> str:
    name = expect_type("prior.names", value, str, "a name")
    expect_integer("prior.names: length", len(name), 0, MAX_NAME_LENGTH)
    return name


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(
        expect_integer("prior.shapes", n, 0, MAX_ENTRIES)
        for n in expect_list("prior.shapes", value, 16)
    )


def _described(name: str, shape: tuple[int, ...]) -> str:
    return f"{name}{list(shape)}"
