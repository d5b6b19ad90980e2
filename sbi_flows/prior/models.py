"""numpyro models that draw the parameters of a prior.

Public names: `Model`, `trace_model`, `sample_model`, `is_same`, `is_same_function`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from sbi_flows.core.typing import Key
from sbi_flows.prior.checks import base_of
from sbi_flows.prior.sites import Site


class Model:
    """A numpyro model function as static data of a pytree.

    Two models are equal if they are the same function and their traces have equal parameters. The
    traces are compared because a function may read variables that change between two calls of
    `as_prior`. After such a change the two models differ, and JAX compiles a new program.

    Args:
        function: The model, without arguments.
        *traces: Results of `trace_model` for several seeds: distributions of the sites by name.

    Attributes:
        function: The model function.
        fingerprint: For each trace, the names of the sites and the parameters of their
            distributions.
    """

    def __init__(
        self, function: Callable[[], Any], *traces: Mapping[str, dist.Distribution]
    ) -> None:
        self.function = function
        self.fingerprint = tuple(map(_fingerprint, traces))

    def __eq__(self, other: object) -> bool:
        """Return whether another model has the same function and an equal fingerprint."""
        return self is other or (
            isinstance(other, Model)
            and is_same_function(self.function, other.function)
            and self.fingerprint == other.fingerprint
        )

    def __hash__(self) -> int:
        """Return the hash of the fingerprint."""
        return hash(self.fingerprint)


def trace_model(model: Callable[[], Any], seed: int) -> dict[str, dist.Distribution]:
    """Run a model once and return the distributions of its sites by name.

    Raises:
        ValueError: The model raises an error, has no sample site, or has an observed site.
    """
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


def sample_model(model: Callable[[], Any], names: tuple[str, ...], key: Key) -> dict[str, Any]:
    """Draw one value of each named site from a model."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, key)).get_trace()
    return {name: trace[name]["value"] for name in names}


def is_same(a: Any, b: Any) -> bool:
    """Return whether two distributions, or two constraints, have the same parameters."""
    left, right = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(left) == len(right) and all(
        jnp.shape(x) == jnp.shape(y) and bool(jnp.all(jnp.asarray(x) == jnp.asarray(y)))
        for x, y in zip(left, right, strict=True)
    )


def _fingerprint(sites: Mapping[str, dist.Distribution]) -> tuple[Any, ...]:
    """Return the name, the class and the parameters (as bytes) of each distribution in a trace."""
    return tuple(
        (name, type(base_of(site)), *map(_bytes_of, _leaves_of(site)))
        for name, site in sites.items()
    )


def _leaves_of(site: dist.Distribution) -> list[Any]:
    """Return the parameters, in the same order in every process unless `Site` has no leaves."""
    return jax.tree.leaves(Site(site)) or jax.tree.leaves(site)


def _bytes_of(leaf: Any) -> tuple[Any, ...]:
    """Return dtype, shape and bytes of a parameter."""
    array = np.asarray(leaf)
    return array.dtype.str, array.shape, array.tobytes()


def is_same_function(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Return whether two functions, or two bound methods, are identical."""
    if isinstance(a, MethodType) and isinstance(b, MethodType):
        # Python makes a new object at each access to a bound method
        return a.__self__ is b.__self__ and a.__func__ is b.__func__
    return a is b
