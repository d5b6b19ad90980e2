"""Codec of the maps between parameters and standard coordinates of a prior.

Public names: `encode`, `tensor_names`, `with_maps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sbi_flows.artefact.distributions import Tensors
from sbi_flows.artefact.strict import expect_fields, expect_list
from sbi_flows.core.errors import ArtefactError
from sbi_flows.prior.constrained import ConstrainedPrior
from sbi_flows.prior.maps import MapKind, SupportMap
from sbi_flows.prior.prior import Prior, SitePrior
from sbi_flows.prior.whitening import Whitening

MAX_SITES = 1024
"""Maximum number of sites of a prior."""

_WHITENING = {name: f"prior/whitening/{name}" for name in Whitening._fields}


def tensor_names(maps: Any) -> set[str]:
    """Return the names of all tensors to which the JSON data of the maps refer."""
    if not isinstance(maps, dict) or not isinstance(maps.get("whitening"), list):
        return set()
    return {_WHITENING[str(part)] for part in maps["whitening"] if str(part) in _WHITENING}


def encode(prior: SitePrior, tensors: Tensors) -> dict[str, Any] | None:
    """Convert the maps to standard coordinates to JSON data; None if all are the default ones."""
    if prior.whitening is None and prior.site_kinds == _default_kinds(prior, bool(prior.circular)):
        return None
    parts = {} if prior.whitening is None else prior.whitening._asdict()
    arrays = {name: np.asarray(a, np.float64) for name, a in parts.items() if a is not None}
    tensors |= {_WHITENING[name]: array for name, array in arrays.items()}
    return {"kinds": [kind.__name__ for kind in prior.site_kinds], "whitening": list(arrays)}


def _default_kinds(prior: SitePrior, has_circular_maps: bool) -> tuple[MapKind, ...]:
    settings = {"dependent": prior.dependent, "has_circular_maps": has_circular_maps}
    return SitePrior(prior.distributions, is_named=prior.is_named, **settings).site_kinds


def with_maps(
    prior: Prior, maps: Any, tensors: Mapping[str, np.ndarray], has_circular_maps: bool
) -> Prior:
    """Return a prior with the maps of a file; without `maps`, with the default ones.

    Raises:
        ArtefactError: The maps are malformed, or do not fit the prior.
    """
    if isinstance(prior, ConstrainedPrior):
        base = with_maps(prior.base, maps, tensors, has_circular_maps)
        assert isinstance(base, SitePrior)
        return prior if base is prior.base else prior.with_base(base)
    if not isinstance(prior, SitePrior):
        return prior
    default = found = _default_kinds(prior, has_circular_maps)
    whitening = None
    if maps is not None:
        kinds, parts = expect_fields("prior.maps", maps, "kinds", "whitening")
        names = expect_list("prior.maps.kinds", kinds, MAX_SITES)
        if len(names) != len(default):
            raise ArtefactError(f"prior.maps.kinds: expected {len(default)} maps, got {len(names)}")
        # every site can be mapped through its support
        wanted = [{kind.__name__, SupportMap.__name__} for kind in default]
        if not all(isinstance(n, str) and n in w for n, w in zip(names, wanted, strict=True)):
            raise ArtefactError(
                f"prior.maps.kinds: expected maps that fit {prior}, got {names!s:.80}"
            )
        pairs = zip(names, default, strict=True)
        found = tuple(SupportMap if name == SupportMap.__name__ else kind for name, kind in pairs)
        columns = prior.with_maps(found, None).support_columns
        whitening = _whitening(parts, len(columns), tensors)
    same = found == prior.site_kinds and _is_equal(prior.whitening, whitening)
    return prior if same else prior.with_maps(found, whitening)


def _whitening(parts: Any, size: int, tensors: Mapping[str, np.ndarray]) -> Whitening | None:
    """Read the affine map of `size` coordinates from a file."""
    parts = expect_list("prior.maps.whitening", parts, len(_WHITENING))
    if not parts:
        return None
    if parts not in (["loc", "scale"], ["loc", "scale", "lower"]):
        raise ArtefactError(
            f"prior.maps.whitening: expected loc, scale and possibly lower, got {parts!s:.80}"
        )
    shapes = {"loc": (size,), "scale": (size,), "lower": (size, size)}
    arrays = {}
    for part in parts:
        array = tensors[_WHITENING[part]]
        if array.dtype != np.float64 or array.shape != shapes[part]:
            raise ArtefactError(
                f"{_WHITENING[part]}: expected float64 numbers {shapes[part]}, got "
                f"{array.dtype}{array.shape}"
            )
        if not np.all(np.isfinite(array)):
            raise ArtefactError(f"{_WHITENING[part]}: expected finite numbers, got NaN or inf")
        arrays[part] = array
    lower = arrays.get("lower", np.ones((1, 1)))
    positive = [arrays["scale"], np.diagonal(lower)]
    if any(np.any(values <= 0.0) for values in positive) or size == 0:
        raise ArtefactError(f"prior.maps.whitening: expected positive scales, got {positive!s:.80}")
    if np.any(np.triu(lower, 1)):
        raise ArtefactError(
            "prior/whitening/lower: expected a lower triangular matrix, got another"
        )
    return Whitening(**arrays)


def _is_equal(a: Whitening | None, b: Whitening | None) -> bool:
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(map(np.array_equal, left, right))
