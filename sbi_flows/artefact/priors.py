"""The prior in an artefact: its distributions where they can be written, its structure in any case.

What is no distribution of numpyro's own is given by the user again, and compared with the record:
names, shapes and bounds, and where the prior maps a few points of its standard coordinates.

Public names: `encode`, `decode`, `referred`.
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

from sbi_flows.artefact import distributions
from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import checked, counted, fields, items
from sbi_flows.core.errors import ArtefactError
from sbi_flows.prior.box import BoxPrior
from sbi_flows.prior.checks import MOST_ENTRIES, MOST_NAME, require_site
from sbi_flows.prior.prior import Prior, SitePrior

MOST_SITES = 1024
"""Sites of a prior."""

MOST_SPARE = 2**22
"""Numbers that the distributions may hold beyond twice those that are written."""

POINTS = 5
"""At which the map from standard coordinates is recorded."""

TOLERANCE = 1e-3
"""Of that map, as a share of the spread of the points: devices and precisions differ."""

_POINTS, _LOW, _HIGH = "prior/points", "prior/low", "prior/high"


def encode(prior: Prior, tensors: Tensors) -> dict[str, Any]:
    """The prior as plain data; its arrays become tensors."""
    base = prior.base if isinstance(prior, BoxPrior) else prior
    assert isinstance(base, SitePrior)
    sites, missing = None, None
    own: Tensors = {}
    try:
        sites = _sites(base, own)
        tensors |= own
    except ValueError as error:
        missing = str(error)
    if isinstance(prior, BoxPrior):
        tensors |= {_LOW: prior.low, _HIGH: prior.high}
    tensors[_POINTS] = np.asarray(_points(prior), np.float64)
    return {
        "named": prior.is_named,
        "names": list(prior.names),
        "shapes": [list(prior.event_shapes[name]) for name in prior.names],
        "bounded": list(prior.bounded),
        "cut": isinstance(prior, BoxPrior),
        "sites": sites,
        "missing": missing,
    }


def referred(value: Any) -> set[str]:
    """Names of the tensors that the prior's data need."""
    found = set(distributions.referred(value)) | {_POINTS}
    return found | {_LOW, _HIGH} if value.get("cut") is True else found


def decode(value: Any, tensors: Mapping[str, np.ndarray], given: Prior | None) -> Prior:
    """The prior that the data describe, or the given one if it is as they say.

    Raises:
        ArtefactError: The data are malformed, or it is not.
    """
    keys = ("named", "names", "shapes", "bounded", "cut", "sites", "missing")
    named, names, shapes, bounded, cut, sites, missing = fields("prior", value, *keys)
    names = [_name(name) for name in items("prior.names", names, MOST_SITES)]
    shapes = [_shape(shape) for shape in items("prior.shapes", shapes, MOST_SITES)]
    if not names or len(set(names)) != len(names) or len(shapes) != len(names):
        raise ArtefactError("prior.names: expected different ones, each with a shape")
    counted("prior: number of parameters", sum(map(math.prod, shapes)), 1, MOST_ENTRIES)
    checked("prior.named", named, bool, "a truth value")
    checked("prior.cut", cut, bool, "a truth value")
    expected = f"a prior of {', '.join(map(_described, names, shapes))}"
    if given is not None:
        prior = given.base if cut and isinstance(given, BoxPrior) else given
    elif sites is None:
        raise ArtefactError(
            f"its prior could not be written ({missing!s:.200}): load(path, prior=...) takes it, "
            f"{expected}"
        )
    else:
        sites = items("prior.sites", sites, MOST_SITES)
        if len(sites) != len(names):
            raise ArtefactError(f"prior.sites: expected {len(names)}, got {len(sites)}")
        pairs = zip(names, shapes, sites, strict=True)
        prior = SitePrior({n: _site(n, shape, s, tensors) for n, shape, s in pairs}, is_named=named)
    if cut:
        prior = _cut(prior, tensors)
    found = (prior.is_named, prior.names, list(prior.event_shapes.values()), list(prior.bounded))
    if found != (named, tuple(names), shapes, bounded) or type(prior) not in (SitePrior, BoxPrior):
        raise ArtefactError(f"prior: expected {expected}, got {prior}")
    if given is not None:
        _compare(prior, tensors, expected)
    return prior


def _sites(prior: SitePrior, tensors: Tensors) -> list[Any]:
    """The distributions as plain data, if they can be made of them again.

    Raises:
        ValueError: They cannot; the message says why.
    """
    if prior.dependent:
        raise ValueError(f"a model in which {', '.join(sorted(prior.dependent))} depend on others")
    found = []
    for name, site in prior.distributions.items():
        start, again = len(tensors), Tensors()
        found.append(distributions.encode(name, site, tensors))
        own = list(tensors)[start:]
        copy = distributions.decode(name, found[-1], tensors)
        # what a constructor changes, or keeps elsewhere, shows when the copy is written as well
        again |= dict.fromkeys(map(str, range(start)), np.zeros(0))
        same = distributions.encode(name, copy, again) == found[-1]
        if not same or any(tensors[n].tobytes() != again[n].tobytes() for n in own):
            raise ValueError(f"{name}: {type(site).__name__} is not made again by its arguments")
    return found


def _site(
    name: str, shape: tuple[int, ...], value: Any, tensors: Mapping[str, np.ndarray]
) -> dist.Distribution:
    """One distribution; its size is known before any array of it is made."""
    own = {n: tensors[n] for n in distributions.referred(value) if n in tensors}
    sizes, spare = [], MOST_SPARE + 2 * sum(array.size for array in own.values())

    def trial(arrays: Mapping[str, Any]) -> None:
        site = distributions.decode(name, value, arrays)
        if not isinstance(site, dist.Distribution):
            raise ArtefactError(f"prior site {name!r}: expected a distribution")
        held = sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(site))
        sizes.append(((*site.batch_shape, *site.event_shape), held))

    jax.eval_shape(trial, own)
    found, held = sizes[0]
    if found != shape or held > spare:
        raise ArtefactError(f"prior site {name!r}: expected shape {shape}, got {found}")
    site = distributions.decode(name, value, own)
    try:
        require_site(name, site)
    except ValueError as error:
        raise ArtefactError(str(error)) from None
    if any(np.any(np.isnan(np.asarray(leaf, float))) for leaf in jax.tree.leaves(site)):
        raise ArtefactError(f"prior site {name!r}: expected numbers, got NaN")
    return site


def _cut(prior: Prior, tensors: Mapping[str, np.ndarray]) -> BoxPrior:
    if isinstance(prior, BoxPrior):
        return BoxPrior(prior.base, tensors[_LOW], tensors[_HIGH])
    return BoxPrior(prior, tensors[_LOW], tensors[_HIGH])


def _points(prior: Prior) -> Any:
    """Parameters (POINTS, D) at fixed standard coordinates."""
    count = POINTS * prior.standard_dim
    places = 1.5 * np.cos(np.arange(1.0, count + 1.0)).reshape(POINTS, -1)
    return _from_standard(prior, jnp.asarray(places))


@jax.jit
def _from_standard(prior: Prior, y: Array) -> Array:
    return prior.unchecked_from_standard(y)


def _compare(prior: Prior, tensors: Mapping[str, np.ndarray], expected: str) -> None:
    found, there = np.asarray(_points(prior), np.float64), tensors[_POINTS]
    if there.shape != found.shape or there.dtype != np.float64:
        raise ArtefactError("prior: expected the points that it is compared at, got none")
    spread = np.ptp(there, axis=0, keepdims=True) + 1e-30
    if not np.all(np.abs(found - there) <= TOLERANCE * spread):
        raise ArtefactError(
            f"prior: expected {expected} with the distributions that the posterior was fitted to, "
            f"got others in {prior}"
        )


def _name(value: Any) -> str:
    name = checked("prior.names", value, str, "a name")
    counted("prior.names: length", len(name), 0, MOST_NAME)
    return name


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(
        counted("prior.shapes", n, 0, MOST_ENTRIES) for n in items("prior.shapes", value, 16)
    )


def _described(name: str, shape: tuple[int, ...]) -> str:
    return f"{name}{list(shape)}"
