"""Adapter from a numpyro model to a task: latent sites are parameters, observed sites are data.

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
from sbi_flows.prior import as_prior
from simulators.adapters import mcmc
from simulators.adapters.task import Task

Model = Callable[[], Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NumpyroTask(Task):
    """Task whose prior, simulator and exact posterior come from one numpyro model.

    Attributes:
        model: The model without its data, a function without arguments.
        sites: Names of the observed sites.
    """

    model: Model
    sites: tuple[str, ...]

    def log_joint(self, theta: Mapping[str, Any], x: Obs) -> Array:
        """Compute the joint log density of named parameters theta and an observation x, shape ().

        Args:
            theta: Value of each latent site.
            x: The observation, as the task's simulator returns it.
        """
        values = {k: jnp.asarray(v) for k, v in theta.items()}
        with jax.numpy_rank_promotion("allow"):
            return _log_joint(_Conditioned(self.model, self.sites), values, x)


def from_numpyro(
    model: Callable[..., Any],
    observed: Sequence[str],
    *arguments: Any,
    data: Obs | None = None,
    name: str | None = None,
    citation: str = "a numpyro model",
) -> NumpyroTask:
    """Make a task from a numpyro model.

    Args:
        model: The model. Its continuous latent sites are the named parameters; sites in plates are
            arrays. Deterministic sites are ignored.
        observed: Names of the observed sites. The simulator draws them and ignores their `obs`.
        arguments: Positional arguments of the model, without the data if the data are optional.
        data: The real observation: an array, or a dict if there are several observed sites. By
            default, observations are simulated at draws of the prior.
        name: Name of the task, by default that of the model.
        citation: Source of the model.

    Returns:
        The task. Its simulator returns an array, or a dict of arrays if there are several observed
        sites. Its reference draws come from NUTS.

    Raises:
        ValueError: An observed site does not exist, a site that is not in `observed` has data, a
            latent site is discrete, the model has factors, or `data` does not have the shape of a
            simulation.

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
    sites = (observed,) if isinstance(observed, str) else tuple(observed)
    no_data_model = partial(model, *arguments) if arguments else model
    simulated = _simulate_sites(no_data_model, sites)
    conditioned = handlers.condition(no_data_model, simulated)
    prior = as_prior(handlers.block(conditioned, hide=list(sites)))
    template = simulated[sites[0]] if len(sites) == 1 else simulated
    return NumpyroTask(
        name=name or getattr(model, "__name__", type(model).__name__),
        prior=prior,
        simulator=partial(_simulate, no_data_model, sites),
        citation=citation,
        sample_reference=mcmc.NutsReference(
            _Conditioned(no_data_model, sites),
            prior.names,
            prepare=partial(jax.tree.map, jnp.asarray),
        ),
        num_observations=10 if data is None else 1,
        observed=None if data is None else (_as_simulated(data, template),),
        model=no_data_model,
        sites=sites,
    )


@dataclasses.dataclass(frozen=True)
class _Conditioned:
    """Model as a function of the observation, as `nuts` takes it."""

    model: Model
    sites: tuple[str, ...]

    def __call__(self, x: Obs) -> None:
        handlers.condition(self.model, _named(self.sites, x))()


def _named(sites: tuple[str, ...], x: Obs) -> dict[str, Any]:
    return {sites[0]: x} if len(sites) == 1 else dict(x)


def _simulate(model: Model, sites: tuple[str, ...], key: Key, theta: dict[str, Array]) -> Obs:
    """Simulate the observed sites at theta; return a dict if there are several sites."""
    run = handlers.seed(handlers.substitute(model, theta), key)
    trace = handlers.trace(handlers.uncondition(run)).get_trace()
    x = {name: trace[name]["value"] for name in sites}
    return x[sites[0]] if len(sites) == 1 else x


def _simulate_sites(model: Model, sites: tuple[str, ...]) -> dict[str, Array]:
    """Simulate the observed sites at a draw of the prior, after checking that they exist.

    Raises:
        ValueError: See `from_numpyro`.
    """
    run = handlers.uncondition(handlers.seed(model, jax.random.key(0)))
    with jax.numpy_rank_promotion("allow"):
        try:
            trace = handlers.trace(run).get_trace()
        except TypeError as error:
            raise ValueError(
                f"model: expected a model that runs without its data, got {error}"
            ) from error
    sampled = {name: site for name, site in trace.items() if site["type"] == "sample"}
    missing = set(sites) - set(sampled)
    if missing or not sites:
        raise ValueError(f"observed: expected names out of {sorted(sampled)}, got {sorted(sites)}")
    others = [n for n, s in sampled.items() if n not in sites and s["infer"].get("was_observed")]
    if others:
        raise ValueError(
            f"observed: expected every site with data, got {sorted(sites)}, which leaves out "
            f"{others} (factors are not supported)"
        )
    return {name: sampled[name]["value"] for name in sites}


def _as_simulated(data: Obs, template: Obs) -> Obs:
    """Convert the data to arrays of the dtypes that the model simulates.

    Raises:
        ValueError: The data do not have the shape of a simulation.
    """
    if jax.tree.structure(data) != jax.tree.structure(template):
        raise ValueError(f"data: expected {_in_words(template)}, got {_in_words(data)}")

    def convert(leaf: Any, expected: Array) -> np.ndarray:
        value = np.asarray(leaf)
        if value.shape != expected.shape:
            raise ValueError(f"data: expected shape {expected.shape}, got {value.shape}")
        return value.astype(expected.dtype)

    return jax.tree.map(convert, data, template)


def _in_words(x: Obs) -> str:
    return f"a dict of {sorted(x)}" if isinstance(x, Mapping) else "an array"


@full_precision
def _log_joint(model: _Conditioned, theta: dict[str, Array], x: Obs) -> Array:
    return log_density(model, (x,), {}, theta)[0]
