"""The prior: named parameters, a flat vector, and a bijection to standard coordinates.

Public names: `Prior`, `as_prior`, `labels`. A prior is given as a numpyro distribution, a dict of
them, or a numpyro model function with latent sites only; `as_prior` turns any of these into a
`Prior` once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from sbi_flows.core.checks import as_random_key, as_real_array, require_count, require_memory
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key
from sbi_flows.prior.checks import (
    base_of,
    require_model,
    require_names,
    require_parameters,
    require_site,
)
from sbi_flows.prior.maps import SiteMap, keep_inside, site_map

PriorLike = Any
"""A numpyro `Distribution`, a dict `{name: Distribution}`, a numpyro model or a `Prior`."""


class Prior:
    """A prior over D named parameters, held as one flat vector.

    Attributes:
        names: Name of each site, in the order in which they fill the flat vector.
        event_shapes: Shape of each site's value.
        labels: One label for each of the D entries: `alpha`, `beta[0]`, `beta[1]`.
        dim: D, the length of the flat vector.
        standard_dim: d, the length of the vector of standard coordinates (D, except where a
            support has fewer degrees of freedom, as a simplex has).
        bounded: Which of the d standard coordinates fill the interval (-sqrt 3, sqrt 3) rather
            than R.
        is_named: Whether the simulator receives a dict rather than one array.
        mass: Share of the prior that was given which this one holds: all, unless it was cut.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> prior = as_prior({"rate": dist.LogNormal(0, 1), "p": dist.Uniform(0, 1).expand([2])})
        >>> prior.labels
        ('rate', 'p[0]', 'p[1]')
        >>> prior.sample(jax.random.key(0), 5).shape
        (5, 3)
    """

    mass: float = 1.0

    def __init__(
        self,
        sites: Mapping[str, dist.Distribution],
        *,
        is_named: bool,
        model: Callable[[], Any] | None = None,
        dependent: frozenset[str] = frozenset(),
    ) -> None:
        """Validate the sites and build one bijection a site; use `as_prior` instead."""
        for name, site in sites.items():
            require_site(name, site)
        self.names = tuple(sites)
        self.event_shapes = {n: (*d.batch_shape, *d.event_shape) for n, d in sites.items()}
        self.is_named = is_named
        self._sites = dict(sites)
        self._model, self._dependent = model, dependent
        self._maps: dict[str, SiteMap] = {
            n: site_map(d, dependent=n in dependent) for n, d in sites.items()
        }
        self._sizes = [math.prod(self.event_shapes[n]) for n in self.names]
        self._standard = [m.standard_shape for m in self._maps.values()]
        self.dim = sum(self._sizes)
        self.standard_dim = sum(math.prod(s) for s in self._standard)
        self.labels = tuple(label for n in self.names for label in labels(n, self.event_shapes[n]))
        self.bounded = tuple(
            m.bounded for m in self._maps.values() for _ in range(math.prod(m.standard_shape))
        )
        require_names(self.names, self.labels)

    def __repr__(self) -> str:
        """Name the sites, their distributions and shapes."""
        sites = ", ".join(
            f"{n}: {base_of(d).__class__.__name__}{list(self.event_shapes[n])}"
            for n, d in self._sites.items()
        )
        return f"Prior({sites})"

    def matches(self, other: Prior) -> bool:
        """Whether the other has the same parameters with the same distributions."""
        pairs = [(site, other._sites.get(name)) for name, site in self._sites.items()]
        return (
            type(self) is type(other)
            and self.event_shapes == other.event_shapes
            and self.is_named == other.is_named
            and self._model is other._model
            and all(type(base_of(a)) is type(base_of(b)) and _same(a, b) for a, b in pairs)
        )

    def sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors, none outside the support.

        Returns:
            Array of shape (n, D).

        Raises:
            ValueError: `key` is no random key, or n no number of draws that there is room for.
        """
        key = as_random_key("key", key)
        require_count(0, n=n)
        require_memory("n", (n, self.dim), jnp.result_type(float))
        return _sample(self, key, n)

    def log_prob(self, theta: ArrayLike) -> Array:
        """Log density at theta of shape (*, D); -inf outside the support; shape (*)."""
        theta = self._checked(theta)
        if not theta.size:  # numpyro reshapes with -1, which no rows cannot
            return jnp.zeros(theta.shape[:-1])
        inside = self.contains(theta)
        safe = jnp.where(inside[..., None], theta, self.center(theta.shape[:-1]))
        return jnp.where(inside, self._log_prob_inside(safe), -jnp.inf)

    def site_log_probs(self, theta: ArrayLike) -> dict[str, Array]:
        """Log density (*) of each site's own value at theta (*, D), by name.

        They are those of the prior before it was cut, if it was; there are none where the
        distribution of one site depends on the value of another.
        """
        theta = self._checked(theta)
        if self._dependent:
            return {}
        batch, parts = theta.shape[:-1], {}
        inside = self.unflatten(self.center(batch))
        for name, value in self.unflatten(theta).items():
            ok = jnp.reshape(self._sites[name].support(value), (*batch, -1)).all(axis=-1)
            wide = jnp.reshape(ok, (*batch, *(1,) * len(self.event_shapes[name])))
            safe = jnp.where(wide, value, inside[name])
            parts[name] = jnp.where(ok, self._site_log_prob(name, safe, batch), -jnp.inf)
        return parts

    def contains(self, theta: ArrayLike) -> Array:
        """Whether theta of shape (*, D) is finite and in the support; bool of shape (*)."""
        theta = self._checked(theta)
        inside = jnp.all(jnp.isfinite(theta), axis=-1)
        for name, value in self.unflatten(theta).items():
            ok = self._sites[name].support(value)
            inside &= jnp.all(ok, axis=tuple(range(inside.ndim, ok.ndim)))
        return inside

    def flatten(self, values: Mapping[str, Any]) -> Array:
        """Join named values `{name: (*, *event)}` into flat vectors (*, D)."""
        if not isinstance(values, Mapping) or set(self.names) ^ set(values):
            got = sorted(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"values: expected parameters {sorted(self.names)}, got {got}")
        parts = []
        for name in self.names:
            shape = self.event_shapes[name]
            value = jnp.asarray(as_real_array(name, values[name]))
            batch = value.shape[: value.ndim - len(shape)]
            if value.shape != (*batch, *shape):
                raise ValueError(f"{name}: expected shape (*, *{shape}), got {value.shape}")
            parts.append(jnp.reshape(value, (*batch, math.prod(shape))))
        return jnp.concatenate(parts, axis=-1)

    def unflatten(self, theta: ArrayLike) -> dict[str, Array]:
        """Split flat vectors (*, D) into named values `{name: (*, *event)}`."""
        theta = self._checked(theta)
        return self._split(theta, self._sizes, list(self.event_shapes.values()))

    def structured(self, theta: ArrayLike) -> Array | dict[str, Array]:
        """What the simulator receives: the named dict, or the array of a single distribution."""
        values = self.unflatten(theta)
        return values if self.is_named else values[self.names[0]]

    def from_standard(self, y: ArrayLike) -> Array:
        """Map standard coordinates (*, standard_dim) to parameters (*, D), never outside."""
        y = jnp.asarray(as_real_array("y", y))
        y = y if jnp.issubdtype(y.dtype, jnp.floating) else y.astype(float)
        if y.ndim == 0 or y.shape[-1] != self.standard_dim:
            raise ValueError(f"y: expected shape (*, {self.standard_dim}), got {y.shape}")
        parts = self._split(y, [math.prod(s) for s in self._standard], self._standard)
        return self.flatten({n: self._maps[n].forward(v) for n, v in parts.items()})

    def to_standard(self, theta: ArrayLike) -> Array:
        """Map parameters (*, D) inside the support to standard coordinates (*, standard_dim).

        There the prior has mean 0 and variance 1 wherever it has a CDF: standard normal on an
        unbounded support, uniform on (-sqrt 3, sqrt 3) on an interval.
        """
        values = self.unflatten(theta)
        batch = jnp.shape(theta)[:-1]
        parts = [self._maps[n].inverse(v) for n, v in values.items()]
        sizes = map(math.prod, self._standard)
        rows = [jnp.reshape(p, (*batch, n)) for p, n in zip(parts, sizes, strict=True)]
        return jnp.concatenate(rows, axis=-1)

    def standard_log_det(self, y: ArrayLike, theta: ArrayLike) -> Array:
        """Log absolute determinant of the Jacobian of `from_standard`.

        Args:
            y: Standard coordinates, shape (*, d).
            theta: The parameters that belong to them, shape (*, D).

        Returns:
            Shape (*).
        """
        parts = self._split(y, [math.prod(s) for s in self._standard], self._standard)
        values = self.unflatten(theta)
        dets = [self._maps[n].log_det(v, values[n]) for n, v in parts.items()]
        batch = jnp.shape(y)[:-1]
        return sum((jnp.sum(d.reshape((*batch, -1)), axis=-1) for d in dets), jnp.zeros(batch))

    def _checked(self, theta: ArrayLike) -> Array:
        theta = jnp.asarray(as_real_array("theta", theta))
        if theta.ndim == 0 or theta.shape[-1] != self.dim:
            raise ValueError(
                f"theta: expected shape (*, {self.dim}) for {self.labels}, got {theta.shape}"
            )
        return theta

    def center(self, batch: tuple[int, ...] = ()) -> Array:
        """A point inside the support, repeated to (*batch, D)."""
        return self.from_standard(jnp.zeros((*batch, self.standard_dim)))

    def _split(self, flat: ArrayLike, sizes: list[int], shapes: list) -> dict[str, Array]:
        flat = jnp.asarray(flat)
        batch, parts, start = flat.shape[:-1], {}, 0
        for name, size, shape in zip(self.names, sizes, shapes, strict=True):
            parts[name] = jnp.reshape(flat[..., start : start + size], (*batch, *shape))
            start += size
        return parts

    def _log_prob_inside(self, theta: Array) -> Array:
        if self._model is not None:
            flat = jnp.reshape(theta, (-1, self.dim))
            return jnp.reshape(jax.vmap(self._log_density_model)(flat), theta.shape[:-1])
        total = jnp.zeros(theta.shape[:-1], theta.dtype)
        for name, value in self.unflatten(theta).items():
            total += self._site_log_prob(name, value, total.shape)
        return total

    def _site_log_prob(self, name: str, value: Array, batch: tuple[int, ...]) -> Array:
        log_prob = self._sites[name].log_prob(value)
        return jnp.sum(jnp.reshape(log_prob, (*batch, -1)), axis=-1)

    def _sample_rows(self, key: Key, n: int) -> Array:
        if self._model is not None:
            values = jax.vmap(self._sample_model)(jax.random.split(key, n))
        else:
            keys = jax.random.split(key, len(self.names))
            sites = zip(self._sites.items(), keys, strict=True)
            values = {name: site.sample(k, (n,)) for (name, site), k in sites}
        supports = {name: site.support for name, site in self._sites.items()}
        return self.flatten({name: keep_inside(v, supports[name]) for name, v in values.items()})

    def _sample_model(self, key: Key) -> dict[str, Array]:
        trace = numpyro.handlers.trace(numpyro.handlers.seed(self._model, key)).get_trace()
        return {n: trace[n]["value"] for n in self.names}

    def _log_density_model(self, theta: Array) -> Array:
        values = self.unflatten(theta)
        log_density, _ = numpyro.infer.util.log_density(self._model, (), {}, values)
        return log_density


def as_prior(prior: PriorLike) -> Prior:
    """Turn a numpyro distribution, a dict of them or a numpyro model into a `Prior`.

    Args:
        prior: One continuous distribution; a dict `{name: distribution}`; a numpyro model function
            without arguments whose sample sites are all latent; or a `Prior`, returned unchanged.

    Returns:
        The prior, with batch axes of a distribution counted as part of its value.

    Raises:
        ValueError: A site is discrete, observed, or has a support that depends on another site; a
            parameter of a distribution is out of range; or a model does not run.

    Example:
        >>> import numpyro.distributions as dist
        >>> as_prior(dist.Uniform(-1, 1).expand([2])).labels
        ('theta[0]', 'theta[1]')
    """
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, dist.Distribution):
        return Prior({"theta": prior}, is_named=False)
    if isinstance(prior, Mapping):
        if not prior:
            raise ValueError("prior: expected at least one parameter, got an empty dict")
        for name, site in prior.items():
            if not isinstance(name, str) or not isinstance(site, dist.Distribution):
                raise ValueError(
                    f"prior[{name!r}]: expected a str name and a numpyro Distribution, "
                    f"got {type(site).__name__}"
                )
        return Prior(prior, is_named=True)
    if callable(prior):
        return _from_model(prior)
    raise ValueError(
        "prior: expected a numpyro Distribution, a dict of them or a numpyro model, "
        f"got {type(prior).__name__}"
    )


@partial(jax.jit, static_argnums=(0, 2))
@full_precision
def _sample(prior: Prior, key: Key, n: int) -> Array:
    # one program: op by op, a truncated distribution compiles for seconds
    return prior._sample_rows(key, n)


def _from_model(model: Callable[[], Any]) -> Prior:
    """Trace a model twice: sites whose distribution changes depend on other sites."""
    require_model(model)
    first, second = (_trace(model, seed) for seed in (0, 1))
    if set(first) != set(second):
        raise ValueError("prior model: expected the same sample sites at every call")
    for name, site in first.items():
        require_parameters(name, site)
    dependent = frozenset(n for n in first if not _same(first[n], second[n]))
    for name in dependent:
        if not _same(first[name].support, second[name].support):
            raise ValueError(f"prior site {name!r}: its support depends on another parameter")
    prior = Prior(first, is_named=True, model=model, dependent=dependent)
    try:
        jax.eval_shape(prior._sample_model, jax.random.key(0))
    except Exception as error:
        raise ValueError(
            f"prior model: expected one that JAX can trace, got {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    return prior


def _trace(model: Callable[[], Any], seed: int) -> dict[str, dist.Distribution]:
    key = jax.random.key(seed)
    try:
        trace = numpyro.handlers.trace(numpyro.handlers.seed(model, key)).get_trace()
    except Exception as error:
        raise ValueError(
            f"prior model: expected one that runs, got {type(error).__name__}: {str(error)[:200]}"
        ) from error
    sites = {n: s for n, s in trace.items() if s["type"] == "sample"}
    observed = [n for n, s in sites.items() if s["is_observed"]]
    if observed:
        raise ValueError(f"prior model: expected latent sample sites only, got observed {observed}")
    if not sites:
        raise ValueError("prior model: expected at least one sample site, got none")
    return {n: s["fn"] for n, s in sites.items()}


def _same(a: Any, b: Any) -> bool:
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        jnp.shape(x) == jnp.shape(y) and bool(jnp.all(jnp.asarray(x) == jnp.asarray(y)))
        for x, y in zip(left, right, strict=True)
    )


def labels(name: str, shape: tuple[int, ...]) -> list[str]:
    """Labels of the entries of a parameter: `alpha`, or `beta[0]`, `beta[1]`."""
    if not shape:
        return [name]
    import numpy as np

    return [f"{name}[{','.join(map(str, i))}]" for i in np.ndindex(*shape)]
