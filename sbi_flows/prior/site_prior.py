"""Prior with one numpyro distribution per site, or from a numpyro model.

Public names: `SitePrior`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.typing import Key
from sbi_flows.prior.base import Layout, Prior
from sbi_flows.prior.checks import base_of, require_names, require_site
from sbi_flows.prior.circular import CircularMap
from sbi_flows.prior.maps import (
    IntervalMap,
    MapKind,
    SiteMap,
    keep_inside,
    map_kind,
    standard_shape,
)
from sbi_flows.prior.models import Model, is_same, sample_model
from sbi_flows.prior.sites import Site


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static part of a `SitePrior`.

    Attributes:
        layout: Names and shapes of the sites.
        kinds: Class of each site's map.
        model: The numpyro model that draws the sites; None without a model.
        dependent: Names of sites whose distributions depend on other sites.
    """

    layout: Layout
    kinds: tuple[MapKind, ...]
    model: Model | None
    dependent: frozenset[str]


@final
@jax.tree_util.register_pytree_node_class
class SitePrior(Prior):
    """Prior with one numpyro distribution per site, or from a numpyro model; see `as_prior`.

    Args:
        sites: Distribution of each site, by name.
        is_named: True if the simulator receives a dict of parameters, False if one array.
        model: The numpyro model that draws the sites; None without a model.
        dependent: Names of sites whose distributions depend on other sites.
        has_circles: Whether circular parameters have a circular coordinate; see `map_kind`.

    Raises:
        ValueError: A site has no density, or a parameter is out of range.
    """

    def __init__(
        self,
        sites: Mapping[str, dist.Distribution],
        *,
        is_named: bool,
        model: Model | None = None,
        dependent: frozenset[str] = frozenset(),
        has_circles: bool = True,
    ) -> None:
        for name, distribution in sites.items():
            require_site(name, distribution)
        wrapped = {name: Site(distribution) for name, distribution in sites.items()}
        kinds = [
            map_kind(site, is_dependent=name in dependent, has_circles=has_circles)
            for name, site in wrapped.items()
        ]
        standard = [
            standard_shape(kind, site) for kind, site in zip(kinds, wrapped.values(), strict=True)
        ]
        pairs = zip(kinds, standard, strict=True)
        entries = [kind for kind, shape in pairs for _ in range(math.prod(shape))]
        bounded = tuple(kind in (IntervalMap, CircularMap) for kind in entries)
        circular = tuple(kind is CircularMap for kind in entries) if CircularMap in kinds else ()
        shapes = tuple(site.shape for site in wrapped.values())
        layout = Layout(tuple(sites), shapes, tuple(standard), bounded, is_named, circular)
        require_names(layout.names, layout.labels)
        self._static = _Static(layout, tuple(kinds), model, dependent)
        self._sites = tuple(wrapped.values())

    def __repr__(self) -> str:
        """Show the name, distribution and shape of each site."""
        sites = ", ".join(
            f"{name}: {base_of(d).__class__.__name__}{list(self.event_shapes[name])}"
            for name, d in self.distributions.items()
        )
        return f"Prior({sites})"

    def tree_flatten(self) -> tuple[tuple[Site, ...], _Static]:
        """Return the sites as children, and the static part."""
        return self._sites, self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, sites: Any) -> SitePrior:
        """Rebuild a prior from its sites, without validating them."""
        prior = object.__new__(cls)
        prior._static, prior._sites = static, tuple(sites)
        return prior

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters."""
        return self._static.layout

    @property
    def mass(self) -> float:
        """Probability of the support: 1."""
        return 1.0

    @property
    def distributions(self) -> dict[str, dist.Distribution]:
        """Distribution of each site, by name."""
        return {n: s.distribution for n, s in zip(self.names, self._sites, strict=True)}

    @property
    def dependent(self) -> frozenset[str]:
        """Names of sites whose distributions depend on other sites."""
        return self._static.dependent

    @property
    def map_kinds(self) -> tuple[MapKind, ...]:
        """Class of the map that belongs to each of the d standard coordinates."""
        pairs = zip(self._static.kinds, self.layout.standard_shapes, strict=True)
        return tuple(kind for kind, shape in pairs for _ in range(math.prod(shape)))

    def matches(self, other: Prior) -> bool:
        """Return whether another prior has the same parameters and distributions."""
        if not isinstance(other, SitePrior):
            return False
        left, right = self._static, other._static
        pairs = zip(self.distributions.values(), other.distributions.values(), strict=False)
        return (left.layout, left.model) == (right.layout, right.model) and all(
            jax.tree.structure(a) == jax.tree.structure(b)
            and type(base_of(a)) is type(base_of(b))
            and is_same(a, b)
            for a, b in pairs
        )

    def unchecked_sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors (n, D)."""
        if self._static.model is not None:
            draw = self._static.model.function
            values = jax.vmap(lambda k: sample_model(draw, self.names, k))(jax.random.split(key, n))
        else:
            keys = jax.random.split(key, len(self.names))
            pairs = zip(self.distributions.items(), keys, strict=True)
            values = {name: site.sample(k, (n,)) for (name, site), k in pairs}
        supports = zip(self.names, self._sites, strict=True)
        return self.unchecked_flatten(
            {name: keep_inside(jnp.asarray(values[name]), s.support) for name, s in supports}
        )

    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support."""
        inside = jnp.all(jnp.isfinite(theta), axis=-1)
        values = self.unchecked_unflatten(theta)
        for site, value in zip(self._sites, values.values(), strict=True):
            ok = jnp.asarray(site.support(value))
            inside &= jnp.all(ok, axis=tuple(range(inside.ndim, ok.ndim)))
        return inside

    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D), which must be inside the support."""
        if self._static.model is not None:
            flat = jnp.reshape(theta, (-1, self.dim))
            return jnp.reshape(jax.vmap(self._log_density_model)(flat), theta.shape[:-1])
        total = jnp.zeros(theta.shape[:-1], theta.dtype)
        values = self.unchecked_unflatten(theta)
        for site, value in zip(self._sites, values.values(), strict=True):
            total += _site_log_prob(site, value, total.shape)
        return total

    def unchecked_site_log_probs(self, theta: Array) -> dict[str, Array]:
        """Compute the log density of each site at theta (*, D)."""
        if self.dependent:
            return {}
        batch, parts = theta.shape[:-1], {}
        centers = self.unchecked_unflatten(self.center(batch))
        values = self.unchecked_unflatten(theta)
        for site, (name, value) in zip(self._sites, values.items(), strict=True):
            ok = jnp.reshape(site.support(value), (*batch, -1)).all(axis=-1)
            wide = jnp.reshape(ok, (*batch, *(1,) * len(site.shape)))
            safe = jnp.where(wide, value, centers[name])
            parts[name] = jnp.where(ok, _site_log_prob(site, safe, batch), -jnp.inf)
        return parts

    def unchecked_from_standard(self, y: Array) -> Array:
        """Map standard coordinates (*, d) to parameters (*, D)."""
        parts = self.layout.split_standard(y)
        return self.unchecked_flatten(
            {name: site_map.forward(parts[name]) for name, site_map in self._maps()}
        )

    def unchecked_to_standard(self, theta: Array) -> Array:
        """Map parameters (*, D) to standard coordinates (*, d)."""
        values, batch = self.unchecked_unflatten(theta), theta.shape[:-1]
        sizes = map(math.prod, self.layout.standard_shapes)
        parts = [site_map.inverse(values[name]) for name, site_map in self._maps()]
        rows = [jnp.reshape(part, (*batch, n)) for part, n in zip(parts, sizes, strict=True)]
        return jnp.concatenate(rows, axis=-1)

    def unchecked_log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log Jacobian determinant at y (*, d), where theta = from_standard(y)."""
        parts, values = self.layout.split_standard(y), self.unchecked_unflatten(theta)
        dets = [site_map.log_det(parts[name], values[name]) for name, site_map in self._maps()]
        batch = y.shape[:-1]
        return sum((jnp.sum(d.reshape((*batch, -1)), axis=-1) for d in dets), jnp.zeros(batch))

    def _maps(self) -> list[tuple[str, SiteMap]]:
        """Build the map of each site; return pairs of name and map.

        Maps are built at each call and not stored, because their arrays may be traced.
        """
        triples = zip(self.names, self._static.kinds, self._sites, strict=True)
        return [(name, kind(site)) for name, kind, site in triples]

    def _log_density_model(self, theta: Array) -> Array:
        assert self._static.model is not None
        values = self.unchecked_unflatten(theta)
        model = self._static.model.function
        log_density, _ = numpyro.infer.util.log_density(model, (), {}, values)
        return log_density


def _site_log_prob(site: Site, value: Array, batch: tuple[int, ...]) -> Array:
    """Sum the log densities of a site's entries; the result has the shape `batch`."""
    log_prob = site.distribution.log_prob(value)
    return jnp.sum(jnp.reshape(log_prob, (*batch, -1)), axis=-1)
