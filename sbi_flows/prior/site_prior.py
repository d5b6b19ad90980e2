"""Prior with one numpyro distribution per site, or from a numpyro model.

Public names: `SitePrior`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
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
    SupportMap,
    map_kind,
    standard_shape,
)
from sbi_flows.prior.models import Model, is_same, sample_model
from sbi_flows.prior.sites import Site
from sbi_flows.prior.supports import clip_rounding, in_support, move_inside
from sbi_flows.prior.whitening import Whitening


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
        kinds: Class of each site's map; None to choose the default classes.
        whitening: Affine map of the coordinates of all `SupportMap` sites; None for the identity.
        offset: Offset of each of the D entries, see `Layout`. The sites are the distributions of
            the values minus the offset.
        has_circular_maps: Whether circular parameters get a `CircularMap`; see `map_kind`.

    Raises:
        ValueError: A site has no density, a parameter is out of range, or numpyro has no transform
            of a support.
    """

    def __init__(
        self,
        sites: Mapping[str, dist.Distribution],
        *,
        is_named: bool,
        model: Model | None = None,
        dependent: frozenset[str] = frozenset(),
        kinds: Sequence[MapKind] | None = None,
        whitening: Whitening | None = None,
        offset: tuple[float, ...] = (),
        has_circular_maps: bool = True,
    ) -> None:
        for name, distribution in sites.items():
            require_site(name, distribution)
        wrapped = {name: Site(distribution) for name, distribution in sites.items()}
        if kinds is None:
            kinds = [
                map_kind(site, is_dependent=name in dependent, has_circular_maps=has_circular_maps)
                for name, site in wrapped.items()
            ]
        pairs = zip(wrapped.items(), kinds, strict=True)
        standard = [_standard_shape(name, kind, site) for (name, site), kind in pairs]
        sizes = zip(kinds, map(math.prod, standard), strict=True)
        entries = [kind for kind, size in sizes for _ in range(size)]
        layout = Layout(
            tuple(sites),
            tuple(site.shape for site in wrapped.values()),
            tuple(standard),
            tuple(kind in (IntervalMap, CircularMap) for kind in entries),
            is_named,
            offset,
            tuple(kind is CircularMap for kind in entries) if CircularMap in kinds else (),
        )
        require_names(layout.names, layout.labels)
        self._static = _Static(layout, tuple(kinds), model, dependent)
        self._sites = tuple(wrapped.values())
        self._whitening = whitening

    def __repr__(self) -> str:
        """Show the name, distribution and shape of each site."""
        sites = ", ".join(
            f"{name}: {base_of(d).__class__.__name__}{list(self.event_shapes[name])}"
            for name, d in self.distributions.items()
        )
        return f"Prior({sites})"

    def tree_flatten(self) -> tuple[tuple[tuple[Site, ...], Whitening | None], _Static]:
        """Return the sites and the affine map as children, and the static part."""
        return (self._sites, self._whitening), self._static

    @classmethod
    def tree_unflatten(cls, static: _Static, children: Any) -> SitePrior:
        """Rebuild a prior from its children, without validating them."""
        prior = object.__new__(cls)
        prior._static = static
        prior._sites, prior._whitening = children
        return prior

    def with_maps(self, kinds: Sequence[MapKind], whitening: Whitening | None) -> SitePrior:
        """Return the same prior with other maps to standard coordinates."""
        return SitePrior(
            self.distributions,
            is_named=self.is_named,
            model=self._static.model,
            dependent=self.dependent,
            kinds=kinds,
            whitening=whitening,
            offset=self.layout.offset,
        )

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
    def supports(self) -> tuple[Any, ...]:
        """Support of each site, a numpyro constraint."""
        return tuple(site.support for site in self._sites)

    @property
    def dependent(self) -> frozenset[str]:
        """Names of sites whose distributions depend on other sites."""
        return self._static.dependent

    @property
    def is_model(self) -> bool:
        """True if a numpyro model draws the sites."""
        return self._static.model is not None

    @property
    def site_kinds(self) -> tuple[MapKind, ...]:
        """Class of each site's map."""
        return self._static.kinds

    @property
    def whitening(self) -> Whitening | None:
        """Affine map of the coordinates of all `SupportMap` sites; None for the identity."""
        return self._whitening

    @property
    def support_columns(self) -> np.ndarray:
        """Indices of the standard coordinates that belong to `SupportMap` sites."""
        return np.flatnonzero([kind is SupportMap for kind in self.map_kinds])

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
        same_static = (left.layout, left.model, left.kinds) == (
            right.layout,
            right.model,
            right.kinds,
        )
        return (
            same_static
            and is_same(self._whitening, other._whitening)
            and all(
                jax.tree.structure(a) == jax.tree.structure(b)
                and type(base_of(a)) is type(base_of(b))
                and is_same(a, b)
                for a, b in pairs
            )
        )

    def unchecked_center(self, batch: tuple[int, ...]) -> Array:
        """Return the point with standard coordinates 0, repeated to the shape (*batch, D)."""
        return self.unchecked_from_standard(jnp.zeros((*batch, self.standard_dim)))

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
            {n: clip_rounding(jnp.asarray(values[n]), s.support) for n, s in supports}
        )

    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support."""
        return jnp.all(self.unchecked_sites_contain(theta), axis=-1)

    def unchecked_sites_contain(self, theta: Array) -> Array:
        """Return whether each site's value in theta (*, D) is in its support, shape (*, S)."""
        batch, values = theta.shape[:-1], self.unchecked_unflatten(theta)
        inside = []
        for site, value in zip(self._sites, values.values(), strict=True):
            ok = in_support(site.support, value)
            finite = jnp.all(jnp.isfinite(value), axis=tuple(range(len(batch), value.ndim)))
            inside.append(finite & jnp.all(ok, axis=tuple(range(len(batch), ok.ndim))))
        return jnp.stack(inside, axis=-1)

    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D), which must be inside the support."""
        values = self._moved_inside(theta)
        if self._static.model is not None:
            flat = jnp.reshape(self.unchecked_flatten(values), (-1, self.dim))
            return jnp.reshape(jax.vmap(self._log_density_model)(flat), theta.shape[:-1])
        total = jnp.zeros(theta.shape[:-1], theta.dtype)
        for site, value in zip(self._sites, values.values(), strict=True):
            total += _site_log_prob(site, value, total.shape)
        return total

    def unchecked_site_log_probs(self, theta: Array) -> dict[str, Array]:
        """Compute the log density of each site at theta (*, D)."""
        if self.dependent:
            return {}
        batch, parts = theta.shape[:-1], {}
        centers = self.unchecked_unflatten(self.unchecked_center(batch))
        values = self.unchecked_unflatten(theta)
        for site, (name, value) in zip(self._sites, values.items(), strict=True):
            ok = jnp.reshape(in_support(site.support, value), (*batch, -1)).all(axis=-1)
            wide = jnp.reshape(ok, (*batch, *(1,) * len(site.shape)))
            safe = move_inside(jnp.where(wide, value, centers[name]), site.support)
            parts[name] = jnp.where(ok, _site_log_prob(site, safe, batch), -jnp.inf)
        return parts

    def unchecked_from_standard(self, y: Array) -> Array:
        """Map standard coordinates (*, d) to parameters (*, D)."""
        parts = self.layout.split_standard(self._unwhitened(y))
        return self.unchecked_flatten(
            {name: site_map.forward(parts[name]) for name, site_map in self._maps()}
        )

    def unchecked_to_standard(self, theta: Array) -> Array:
        """Map parameters (*, D) to standard coordinates (*, d)."""
        values, batch = self._moved_inside(theta), theta.shape[:-1]
        sizes = map(math.prod, self.layout.standard_shapes)
        parts = [site_map.inverse(values[name]) for name, site_map in self._maps()]
        rows = [jnp.reshape(part, (*batch, n)) for part, n in zip(parts, sizes, strict=True)]
        y = jnp.concatenate(rows, axis=-1)
        if self._whitening is None:
            return y
        columns = self.support_columns
        return y.at[..., columns].set(self._whitening.inverse(y[..., columns]))

    def unchecked_log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log Jacobian determinant at y (*, d), where theta = from_standard(y)."""
        parts = self.layout.split_standard(self._unwhitened(y))
        values = self._moved_inside(theta)
        dets = [site_map.log_det(parts[name], values[name]) for name, site_map in self._maps()]
        batch = y.shape[:-1]
        total = jnp.zeros(batch)
        if self._whitening is not None:
            total = total + jnp.broadcast_to(self._whitening.log_det(), batch)
        return sum((jnp.sum(d.reshape((*batch, -1)), axis=-1) for d in dets), total)

    def _unwhitened(self, y: Array) -> Array:
        """Replace whitened coordinates in y (*, d) by the coordinates of the sites' maps."""
        if self._whitening is None:
            return y
        columns = self.support_columns
        return y.at[..., columns].set(self._whitening.forward(y[..., columns]))

    def _moved_inside(self, theta: Array) -> dict[str, Array]:
        """Split theta (*, D) by name, and move values on the edge of a support inside."""
        if not jnp.issubdtype(theta.dtype, jnp.floating):
            theta = theta.astype(float)
        supports = zip(self.unchecked_unflatten(theta).items(), self._sites, strict=True)
        return {name: move_inside(value, site.support) for (name, value), site in supports}

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


def _standard_shape(name: str, kind: MapKind, site: Site) -> tuple[int, ...]:
    """Return the shape of a site's standard coordinates.

    Raises:
        ValueError: numpyro has no transform of the support.
    """
    try:
        return standard_shape(kind, site)
    except NotImplementedError:
        support = type(site.support).__name__.strip("_")
        raise ValueError(
            f"prior site {name!r}: expected a support with a transform from R^d in numpyro, got "
            f"{support} of {type(base_of(site.distribution)).__name__}; write a prior of "
            "unconstrained parameters, and compute this parameter in the simulator"
        ) from None


def _site_log_prob(site: Site, value: Array, batch: tuple[int, ...]) -> Array:
    """Sum the log densities of a site's entries; the result has the shape `batch`."""
    log_prob = site.distribution.log_prob(value)
    return jnp.sum(jnp.reshape(log_prob, (*batch, -1)), axis=-1)
