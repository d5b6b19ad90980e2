"""Trial of a prior: compare draws with the support, the density and the standard coordinates.

A distribution may state a wrong support, or its CDF may be too imprecise to invert. A trial with
about 1,000 draws finds such errors when the prior is built, before any simulation.

Public names: `validated`, `NUM_WHITENING_DRAWS`, `NUM_TRIAL_DRAWS`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array

from sbi_flows.core.doubles import LARGE, MAX_ROUNDING
from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import is_traced
from sbi_flows.prior.checks import base_of
from sbi_flows.prior.maps import HALF_WIDTH, MapKind, SupportMap
from sbi_flows.prior.offsets import TRUNCATED
from sbi_flows.prior.site_prior import SitePrior
from sbi_flows.prior.supports import transform_of
from sbi_flows.prior.whitening_fit import whitening_of

NUM_WHITENING_DRAWS = 4096
"""Number of draws from which the whitening map of a prior is estimated."""

NUM_TRIAL_DRAWS = 1024
"""Number of draws in a trial."""

_MAX_DRAW_ENTRIES = 2**22
"""Maximum number of entries of the draws, which limits the memory."""

ROUND_TRIP = 1e-4
"""Maximum error of a value that is mapped to standard coordinates and back, in units of the robust
standard deviation plus ten times the distance from the median."""

MAX_BAD_FRACTION = 0.005
"""Maximum fraction of draws that fail a test of the trial."""

MAX_EDGE_FRACTION = 0.95
"""Maximum fraction of draws whose standard coordinate is the same extreme value."""

_TRUSTED = (
    *(dist.Normal, dist.Uniform, dist.LogNormal, dist.HalfNormal, dist.Exponential),
    *(dist.Cauchy, dist.HalfCauchy, dist.Laplace, dist.Logistic, dist.Gumbel),
)
"""Distributions that are not validated: their maps consist of a few elementary functions."""


MIN_LOG_SCALE = 1e-3
"""Smallest scale of a log-normal distribution that needs no trial."""

_TRUSTED_SHAPES = {
    dist.Gamma: (("concentration",), 1.0, 50.0),
    dist.Beta: (("concentration1", "concentration0"), 1.0, 1000.0),
    dist.StudentT: (("df",), 1.0, 4.0),
}
"""Distributions that need no trial if their shape parameters are in a range: names of the
parameters, smallest and largest value. Tests run the trial at the ends of the ranges."""

MAX_BOUND = 4.0
"""Largest distance of the bound from the mean, in standard deviations, with which a normal
distribution truncated on one side needs no trial."""

MIN_WIDTH, MAX_NEAR_BOUND = 0.1, 1.0
"""Smallest width, and largest distance of the interval from the mean, in standard deviations, with
which a normal distribution truncated on both sides needs no trial."""


class _Trial(NamedTuple):
    """Results of a trial with n draws of a prior with S sites.

    Attributes:
        outside: Fraction of draws outside the stated support of each site, shape (S,).
        example: For each site, a draw outside the support of the site, if there is one, shape
            (S, D).
        bad_density: Fraction of draws whose log density is not finite.
        zero_density: Fraction of random points, drawn in standard coordinates and mapped to the
            support, whose log density is not finite.
        infinite: Fraction of draws whose standard coordinates are not finite, shape (S,).
        changed: Fraction of draws that change when they are mapped to standard coordinates and
            back, shape (S,).
        unresolved: Whether rounding errors are too large for the spread of the draws, shape (S,).
        at_edge: Fraction of draws with the same smallest or largest standard coordinate, shape
            (S,); the maximum over the entries of a site.
    """

    outside: Any
    example: Any
    bad_density: Any
    zero_density: Any
    infinite: Any
    changed: Any
    unresolved: Any
    at_edge: Any


def validated(prior: SitePrior) -> SitePrior:
    """Test a prior with its own draws; return it with tested maps to standard coordinates.

    If the CDF of a site is too imprecise to invert, the site gets a `SupportMap`. The coordinates
    of all `SupportMap` sites are whitened. A prior is returned unchanged if its parameters are
    traced, or if the maps of all its distributions are known to be accurate (see `_is_trusted`).

    Raises:
        ValueError: Draws are outside the stated support; log densities or standard coordinates are
            not finite; mapping draws to standard coordinates and back changes them; or a
            distribution does not implement `sample` or `log_prob`.
    """
    if is_traced(prior):
        return prior
    is_trusted = not prior.is_model and all(map(_is_trusted, prior.distributions.values()))
    return prior if is_trusted else _tested(prior)


def _tested(prior: SitePrior) -> SitePrior:
    """Run the trial of a prior with concrete parameters; see `validated`."""
    with _without_user_settings():
        theta = _call_implemented(
            prior, partial(_draw, min(NUM_WHITENING_DRAWS, _MAX_DRAW_ENTRIES // prior.dim))
        )
        kinds = list(prior.site_kinds)
        prior, trial = _call_implemented(prior, partial(_with_maps, kinds, theta))
        bad = (trial.infinite > MAX_BAD_FRACTION) | (trial.changed > MAX_BAD_FRACTION)
        pairs = zip(prior.distributions.values(), kinds, bad, strict=True)
        others = [
            SupportMap if is_bad and _has_transform(site.support) else kind
            for site, kind, is_bad in pairs
        ]
        if others != kinds and np.all(trial.outside == 0.0):
            prior, trial = _call_implemented(prior, partial(_with_maps, others, theta))
    _require_success(prior, trial)
    return prior


@contextlib.contextmanager
def _without_user_settings() -> Iterator[None]:
    """Suspend a trace and the user's debugging settings, so that a trial runs as usual.

    numpyro relies on rank promotion, and computes NaN in branches that it discards.
    """
    with contextlib.ExitStack() as stack:
        if is_traced(jnp.zeros(())):
            stack.enter_context(jax.ensure_compile_time_eval())
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(jax.debug_nans(False))
        yield


@partial(jax.jit, static_argnums=0)
@full_precision
def _draw(count: int, prior: SitePrior) -> Array:
    # a fixed generator, whatever the user's default is: equal priors have equal coordinates
    return prior.unchecked_sample(jax.random.key(0, impl="threefry2x32"), count)


def _with_maps(
    kinds: Sequence[MapKind], theta: Array, prior: SitePrior
) -> tuple[SitePrior, _Trial]:
    """Give a prior maps of these kinds, whiten it with its draws theta, and run the trial."""
    prior = prior.with_maps(kinds, None)
    whitening = whitening_of(prior, theta)
    prior = prior if whitening is None else prior.with_maps(kinds, whitening)
    return prior, _Trial(*(np.asarray(part) for part in _run_trial(prior, theta)))


def _is_trusted(distribution: dist.Distribution) -> bool:
    """Return whether the maps of a distribution are accurate, so that it needs no trial."""
    base = base_of(distribution)
    if isinstance(base, dist.LogNormal) and bool(np.any(np.asarray(base.scale) < MIN_LOG_SCALE)):
        return False  # the spread may be too small for the size of the values
    if type(base) in _TRUSTED_SHAPES:
        names, low, high = _TRUSTED_SHAPES[type(base)]
        shapes = [np.asarray(getattr(base, name), float) for name in names]
        return all(bool(np.all((a >= low) & (a <= high))) for a in shapes)
    if type(base) in TRUNCATED:
        inner: Any = base.base_dist
        bounds = [np.asarray(getattr(base, name), float) for name in TRUNCATED[type(base)]]
        if type(inner) is not dist.Normal:
            return False
        z = [(bound - np.asarray(inner.loc)) / np.asarray(inner.scale) for bound in bounds]
        if len(z) == 2:  # in a tail, the CDF is rounded
            is_central = (z[0] < MAX_NEAR_BOUND) & (z[1] > -MAX_NEAR_BOUND)
            return bool(np.all(is_central & (z[1] - z[0] > MIN_WIDTH)))
        return bool(np.all(np.abs(z[0]) < MAX_BOUND))
    return type(base) in _TRUSTED


def _has_transform(support: Any) -> bool:
    try:
        transform_of(support)
    except NotImplementedError:
        return False
    return True


def _call_implemented(prior: SitePrior, function: Any) -> Any:
    """Return function(prior). Convert numpyro's NotImplementedError to a ValueError."""
    try:
        return function(prior)
    except NotImplementedError as error:
        for name, site in prior.distributions.items():
            for method in ("sample", "log_prob"):
                _require_method(name, site, method)
        raise ValueError(
            f"prior: expected distributions with `sample` and `log_prob`, got {prior}, which "
            f"raises {error!r:.200}; use other distributions"
        ) from error


def _require_method(name: str, site: dist.Distribution, method: str) -> None:
    argument: Any = jax.random.key(0)
    try:
        if method == "log_prob":
            argument = jnp.zeros((*site.batch_shape, *site.event_shape))
        jax.eval_shape(getattr(site, method), argument)
    except NotImplementedError as error:
        raise ValueError(
            f"prior site {name!r}: expected a distribution with `sample` and `log_prob`, got "
            f"{type(base_of(site)).__name__} without `{method}`; use another distribution, or a "
            "subclass that defines it"
        ) from error


@jax.jit
@full_precision
def _run_trial(prior: SitePrior, theta: Array) -> _Trial:
    theta = theta[:NUM_TRIAL_DRAWS]
    inside = prior.unchecked_sites_contain(theta)
    y = prior.unchecked_to_standard(theta)
    normal = jax.random.normal(jax.random.key(1, impl="threefry2x32"), y.shape, y.dtype)
    bounded = jnp.broadcast_to(jnp.asarray(prior.bounded), y.shape)
    uniform = HALF_WIDTH * (2.0 * jax.scipy.special.ndtr(normal) - 1.0)
    both = prior.unchecked_from_standard(jnp.concatenate([y, jnp.where(bounded, uniform, normal)]))
    back, others = jnp.split(both, 2)
    log_prob = prior.unchecked_log_prob_inside(jnp.concatenate([theta, others]))
    no_density, zero = jnp.split(~jnp.isfinite(log_prob), 2)
    return _Trial(
        outside=jnp.mean(~inside, axis=0),
        example=theta[jnp.argmin(inside, axis=0)],
        bad_density=jnp.mean(no_density),
        zero_density=jnp.mean(zero | ~prior.unchecked_contains(others)),
        infinite=_per_site(~jnp.isfinite(y), prior.layout.standard_shapes),
        changed=_per_site(_is_changed(theta, back), prior.layout.shapes),
        unresolved=_is_unresolved(prior, theta),
        at_edge=_fraction_at_edge(y, prior.layout.standard_shapes),
    )


def _fraction_at_edge(y: Array, shapes: tuple[tuple[int, ...], ...]) -> Array:
    """Return the fraction of rows y (n, d) that share an extreme value, for each site (S,)."""
    extremes = [jnp.mean(y == edge(y, axis=0)[None], axis=0) for edge in (jnp.min, jnp.max)]
    largest = jnp.maximum(*extremes)
    return jnp.stack([jnp.max(largest[part]) for part in _columns(shapes)])


def _is_changed(theta: Array, back: Array) -> Array:
    """Return whether entries of theta (n, D) and of `back` differ by more than `ROUND_TRIP`."""
    median = jnp.nanmedian(theta, axis=0)[None]
    distance = jnp.abs(theta - median)
    sd = jnp.nanmedian(distance, axis=0)[None] / 0.67
    eps = 4.0 * jnp.finfo(theta.dtype).eps
    tolerance = ROUND_TRIP * (sd + 10.0 * distance) + eps * jnp.abs(theta)
    return ~(jnp.abs(back - theta) <= tolerance)


def _is_unresolved(prior: SitePrior, theta: Array) -> Array:
    """Return whether rounding errors are larger than a thousandth of the spread, shape (S,).

    Matrices are left out: some entries are the same in all draws, such as the diagonal of a
    correlation matrix, up to rounding.
    """
    low, middle, high = jnp.nanquantile(theta, jnp.asarray([0.25, 0.5, 0.75]), axis=0)
    size = jnp.abs(middle)
    spread = jnp.where(
        high > low, high - low, jnp.nanmax(theta, axis=0) - jnp.nanmin(theta, axis=0)
    )
    rounding = 0.5 * jnp.finfo(theta.dtype).eps * size
    flags = jnp.where(spread > 0, rounding > MAX_ROUNDING * spread, size > LARGE)
    parts = zip(prior.supports, _columns(prior.layout.shapes), strict=True)
    return jnp.stack([jnp.any(flags[c]) & (support.event_dim < 2) for support, c in parts])


def _per_site(flags: Array, shapes: tuple[tuple[int, ...], ...]) -> Array:
    """Return the largest fraction of rows (n, *) in which an entry of a site is flagged, (S,)."""
    fractions = jnp.mean(flags, axis=0)
    return jnp.stack([jnp.max(fractions[part]) for part in _columns(shapes)])


def _columns(shapes: tuple[tuple[int, ...], ...]) -> list[slice]:
    """Return a slice of the flat vector for each site."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [slice(end - math.prod(shape), end) for end, shape in zip(ends, shapes, strict=True)]


def _require_success(prior: SitePrior, trial: _Trial) -> None:
    """Raise ValueError if a trial failed. The message says which prior to write instead."""
    sites = list(prior.distributions.items())
    for i, (name, site) in enumerate(sites):
        kind, support = type(base_of(site)).__name__, type(site.support).__name__.strip("_")
        where = f"prior site {name!r}: expected"
        if trial.outside[i] > 0.0:
            value = prior.unchecked_unflatten(jnp.asarray(trial.example[i]))[name]
            raise ValueError(
                f"{where} draws inside the support that {kind} states ({support}), got "
                f"{_percent(trial.outside[i])} of them outside, for example "
                f"{np.asarray(value)!s:.80}; write a distribution whose `support` contains its "
                "draws, such as dist.MixtureSameFamily of components with the same support"
            )
        if trial.unresolved[i]:
            raise ValueError(
                f"{where} draws that {jnp.result_type(float)} resolves, got {kind}, whose spread "
                "is too small for the size of its values; use the difference from a fixed value as "
                "the parameter, and add the value in the simulator, or use "
                "jax.config.update('jax_enable_x64', True)"
            )
        spoilt = max(trial.infinite[i], trial.changed[i])
        if spoilt > MAX_BAD_FRACTION or trial.at_edge[i] > MAX_EDGE_FRACTION:
            raise ValueError(
                f"{where} draws that the floating-point precision can represent, got {kind}: "
                f"rounding moves {_percent(max(spoilt, trial.at_edge[i]))} of its draws to an edge "
                f"of the support ({support}) or changes their standard coordinates; write a prior "
                "of the logarithm (or the logit) of the parameter, and compute the parameter in "
                "the simulator"
            )
    names = ", ".join(map(repr, prior.names))
    if trial.bad_density > MAX_BAD_FRACTION:
        raise ValueError(
            f"prior site {names}: expected draws with a finite log density, got {prior}, where "
            f"{_percent(trial.bad_density)} of the draws have a log density that is NaN or "
            "infinite; restrict `sample` to the same values as `log_prob`, as "
            "sf.constrained(prior, condition) does, or use less extreme parameters"
        )
    if trial.zero_density > MAX_BAD_FRACTION:
        raise ValueError(
            f"prior site {names}: expected a finite log density everywhere in the stated support, "
            f"got NaN or infinity at {_percent(trial.zero_density)} of the points; define "
            "`support` as the set where `log_prob` is finite, or write a prior on the larger set "
            "and its condition: sf.constrained(prior, condition)"
        )


def _percent(fraction: Any) -> str:
    percent = 100.0 * float(fraction)
    return f"{percent:.0f}%" if percent >= 10.0 else f"{percent:.2g}%"
