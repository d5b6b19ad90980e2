"""A numpyro model as a task: its latent sites are the parameters, its observed sites the data.

Public names: `from_numpyro`, `NumpyroTask`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.util import log_density

from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs
from sbi_flows.prior.prior import as_prior
from simulators.adapters import mcmc
from simulators.adapters.task import Task

Model = Callable[[], Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NumpyroTask(Task):
    """A task whose prior, simulator and exact posterior are those of one numpyro model.

    Attributes:
        model: The model without its data, a function of nothing.
        sites: Names of the observed sites.
    """

    model: Model
    sites: tuple[str, ...]

    def log_joint(self, theta: Mapping[str, Any], x: Obs) -> Array:
        """Log density of named parameters and an observation together, shape ()."""
        values = {k: jnp.asarray(v) for k, v in theta.items()}
        with jax.numpy_rank_promotion("allow"):
            return _log_joint(_Given(self.model, self.sites), values, x)


def from_numpyro(
    model: Callable[..., Any],
    observed: Sequence[str],
    *arguments: Any,
    data: Obs | None = None,
    name: str | None = None,
    citation: str = "a numpyro model",
) -> NumpyroTask:
    """Make a task of a numpyro model.

    Args:
        model: The model. Its continuous latent sites are the named parameters, those in plates as
            arrays; deterministic sites are left out.
        observed: Names of the sites that are data. They are simulated, whatever their `obs` is.
        arguments: Arguments of the model, other than its data where that may be left out.
        data: What was really observed: an array, or with several sites a dict; without, an
            observation is a simulation at a draw of the prior.
        name: Name of the task; that of the model by default.
        citation: Where the model comes from.

    Returns:
        The task: its simulator gives an array, or a dict of arrays where several sites are
        observed; its reference draws come from NUTS, which must converge.

    Raises:
        ValueError: There are no such sites, others have data, a latent site is discrete, the model
            has factors, or the data have another shape.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def coin(heads=None):
        ...     bias = numpyro.sample("bias", dist.Beta(2.0, 2.0))
        ...     numpyro.sample("heads", dist.Binomial(10, bias), obs=heads)
        >>> task = from_numpyro(coin, ["heads"], data=7)
        >>> task.labels, task.observation(1)
        (('bias',), Array(7, dtype=int32...))
        >>> round(float(task.reference(1, n=1000).mean()), 1)
        0.6
    """
    names = (observed,) if isinstance(observed, str) else tuple(observed)
    bare = partial(model, *arguments) if arguments else model
    first = _simulated_sites(bare, names)
    prior = as_prior(handlers.block(handlers.condition(bare, first), hide=list(names)))
    like = first[names[0]] if len(names) == 1 else first
    return NumpyroTask(
        name=name or getattr(model, "__name__", type(model).__name__),
        prior=prior,
        simulator=partial(_simulated, bare, names),
        citation=citation,
        sample_reference=mcmc.NutsReference(
            _Given(bare, names), prior.names, prepare=partial(jax.tree.map, jnp.asarray)
        ),
        num_observations=10 if data is None else 1,
        observed=None if data is None else (_fitting(data, like),),
        model=bare,
        sites=names,
    )


@dataclasses.dataclass(frozen=True)
class _Given:
    """The model of an observation, as NUTS takes it."""

    model: Model
    sites: tuple[str, ...]

    def __call__(self, x: Obs) -> None:
        handlers.condition(self.model, _named(self.sites, x))()


def _named(sites: tuple[str, ...], x: Obs) -> dict[str, Any]:
    return {sites[0]: x} if len(sites) == 1 else dict(x)


def _simulated(model: Model, sites: tuple[str, ...], key: Key, theta: dict[str, Array]) -> Obs:
    run = handlers.seed(handlers.substitute(model, theta), key)
    trace = handlers.trace(handlers.uncondition(run)).get_trace()
    x = {name: trace[name]["value"] for name in sites}
    return x[sites[0]] if len(sites) == 1 else x


def _simulated_sites(model: Model, sites: tuple[str, ...]) -> dict[str, Array]:
    """A simulation of the observed sites at a draw of the prior, if they are what they should be.

    Raises:
        ValueError: See `from_numpyro`.
    """
    run = handlers.uncondition(handlers.seed(model, jax.random.key(0)))
    with jax.numpy_rank_promotion("allow"):
        try:
            trace = handlers.trace(run).get_trace()
        except TypeError as error:
            raise ValueError(
                f"model: expected one that runs without its data, got {error}"
            ) from error
    sampled = {name: site for name, site in trace.items() if site["type"] == "sample"}
    missing = set(sites) - set(sampled)
    if missing or not sites:
        raise ValueError(f"observed: expected names out of {sorted(sampled)}, got {sorted(sites)}")
    others = [n for n, s in sampled.items() if n not in sites and s["infer"].get("was_observed")]
    if others:
        raise ValueError(
            f"observed: expected all sites with data, which factors cannot be, got none of {others}"
        )
    return {name: sampled[name]["value"] for name in sites}


def _fitting(data: Obs, like: Obs) -> Obs:
    """The data as arrays of the types and shapes that the model simulates.

    Raises:
        ValueError: They are of another shape.
    """
    if jax.tree.structure(data) != jax.tree.structure(like):
        raise ValueError(f"data: expected {_in_words(like)}, got {_in_words(data)}")

    def one(given: Any, wanted: Array) -> np.ndarray:
        value = np.asarray(given)
        if value.shape != wanted.shape:
            raise ValueError(f"data: expected shape {wanted.shape}, got {value.shape}")
        return value.astype(wanted.dtype)

    return jax.tree.map(one, data, like)


def _in_words(x: Obs) -> str:
    return f"a dict of {sorted(x)}" if isinstance(x, Mapping) else "an array"


@full_precision
def _log_joint(given: _Given, theta: dict[str, Array], x: Obs) -> Array:
    return log_density(given, (x,), {}, theta)[0]
