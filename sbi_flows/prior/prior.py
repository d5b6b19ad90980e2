"""Build a prior from numpyro distributions or from a numpyro model: `as_prior`.

Public names: `as_prior`, `PriorLike`; also `Prior`, `SitePrior` and `labels`, which are defined in
other files of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpyro.distributions as dist

from sbi_flows.prior.base import Prior as Prior
from sbi_flows.prior.base import labels as labels
from sbi_flows.prior.checks import require_free_names, require_model, require_parameters
from sbi_flows.prior.models import Model, is_same, sample_model, trace_model
from sbi_flows.prior.offsets import split_offsets
from sbi_flows.prior.site_prior import SitePrior as SitePrior
from sbi_flows.prior.trial import validated

PriorLike = Any
"""A numpyro `Distribution`, a dict `{name: Distribution}`, a numpyro model or a `Prior`."""


def as_prior(prior: PriorLike) -> Prior:
    """Turn a numpyro distribution, a dict of them or a numpyro model into a `Prior`.

    Args:
        prior: One continuous distribution; a dict `{name: distribution}`; a numpyro model function
            without arguments whose sample sites are all latent; or a `Prior`, returned unchanged.

    Returns:
        The prior. Batch axes of a distribution become axes of the parameter's value.

    Raises:
        ValueError: A site is discrete, observed, or has a support that depends on another site; a
            parameter of a distribution is out of range; the model raises an error; or a trial of
            1,000 draws fails: draws are outside the stated support, log densities are not finite,
            or single precision cannot represent the values.

    Example:
        >>> import numpyro.distributions as dist
        >>> as_prior(dist.Uniform(-1, 1).expand([2])).labels
        ('theta[0]', 'theta[1]')
    """
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, dist.Distribution):
        return _from_sites({"theta": prior}, is_named=False)
    if isinstance(prior, Mapping):
        if not prior:
            raise ValueError("prior: expected at least one parameter, got an empty dict")
        for name, site in prior.items():
            if not isinstance(name, str) or not isinstance(site, dist.Distribution):
                raise ValueError(
                    f"prior[{name!r}]: expected a str name and a numpyro Distribution, "
                    f"got {type(site).__name__}"
                )
        return _from_sites(prior, is_named=True)
    if callable(prior):
        return _from_model(prior)
    raise ValueError(
        "prior: expected a numpyro Distribution, a dict of them or a numpyro model, "
        f"got {type(prior).__name__}"
    )


def _from_sites(sites: Mapping[str, dist.Distribution], *, is_named: bool) -> Prior:
    """Build a prior from distributions by name, and validate it with draws."""
    require_free_names(sites)
    distributions, offset = split_offsets(sites)
    return validated(SitePrior(distributions, is_named=is_named, offset=offset))


def _from_model(model: Callable[[], Any]) -> Prior:
    """Build a prior from a model.

    The model is traced with two seeds. A site whose distribution differs between the two traces
    depends on other sites.
    """
    require_model(model)
    first, second = (trace_model(model, seed) for seed in (0, 1))
    require_free_names(first)
    if set(first) != set(second):
        raise ValueError("prior model: expected the same sample sites at every call")
    for name, site in first.items():
        require_parameters(name, site)
    dependent = frozenset(n for n in first if not is_same(first[n], second[n]))
    for name in dependent:
        if not is_same(first[name].support, second[name].support):
            raise ValueError(f"prior site {name!r}: its support depends on another parameter")
    prior = SitePrior(first, is_named=True, model=Model(model, first, second), dependent=dependent)
    try:
        jax.eval_shape(lambda key: sample_model(model, prior.names, key), jax.random.key(0))
    except Exception as error:
        raise ValueError(
            f"prior model: expected one that JAX can trace, got {type(error).__name__}: "
            f"{str(error)[:200]}"
        ) from error
    return validated(prior)
