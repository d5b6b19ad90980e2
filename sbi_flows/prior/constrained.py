"""Prior restricted by a condition, sampled by rejection.

Public names: `constrained`, `ConstrainedPrior`, `require_no_condition`, `fill_by_rejection`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from sbi_flows.core.pytrees import is_traced
from sbi_flows.core.typing import Key
from sbi_flows.prior.base import Layout, Prior
from sbi_flows.prior.models import is_same_function
from sbi_flows.prior.prior import PriorLike, as_prior
from sbi_flows.prior.site_prior import SitePrior

NUM_MASS_DRAWS = 100_000
"""Number of prior draws from which the probability of a condition is estimated."""

MIN_ACCEPTANCE = 1e-4
"""Minimum probability of a condition under the base prior."""

MAX_ROUNDS = 10**6
"""Maximum number of rounds of proposals. About 10,000 suffice at the minimum probability."""

_CHUNK = 1000


@dataclasses.dataclass(frozen=True)
class _Condition:
    """Condition of a prior, static data of a pytree. Conditions are equal if the function is."""

    function: Callable[[Any], Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Condition) and is_same_function(self.function, other.function)

    def __hash__(self) -> int:
        return hash(self.function)


@final
@jax.tree_util.register_pytree_node_class
class ConstrainedPrior(Prior):
    """Prior restricted to the parameters that meet a condition; `constrained` builds it.

    The density is normalised over these parameters. Standard coordinates are those of the base
    prior. A posterior rejects draws that violate the condition, and divides its density by the
    fraction of accepted draws.

    Args:
        base: The base prior.
        condition: Function from one parameter vector, as the simulator receives it, to a bool.

    Attributes:
        base: The base prior.
        mass: Estimate of the condition's probability under the base prior, from 100,000 draws.
        mass_error: Standard error of `mass`.

    Raises:
        ValueError: The base prior is restricted already, the condition does not return a bool, or
            its probability is below 1e-4.
    """

    def __init__(self, base: Prior, condition: Callable[[Any], Any]) -> None:
        if not isinstance(base, SitePrior):
            raise ValueError(
                "prior: expected distributions or a model without a condition or a box, got "
                f"{base}; join all conditions by & in one function"
            )
        if base.layout.offset:
            raise ValueError(
                "prior: expected a prior without an offset, got "
                f"{base}, whose values need double precision; use "
                "jax.config.update('jax_enable_x64', True)"
            )
        if not callable(condition):
            raise ValueError(
                "condition: expected a function of theta that returns a bool, got "
                f"{type(condition).__name__}; write for example lambda theta: theta['a'] < 1"
            )
        self.base, self._condition = base, _Condition(condition)
        _require_bool(base, condition)
        accepted = _accepted(self._condition, base)
        mass = accepted / NUM_MASS_DRAWS
        if not is_traced(mass):
            mass = float(mass)
            if mass < MIN_ACCEPTANCE:
                raise ValueError(
                    f"condition: expected a probability of at least {MIN_ACCEPTANCE} under the "
                    f"prior, got {int(accepted)} of {NUM_MASS_DRAWS:,} draws that meet it; write a "
                    "narrower prior, whose draws meet the condition more often"
                )
        self._mass: Any = mass
        self._center: Any = np.zeros(base.dim)
        self._center = _medoid(self)

    def __repr__(self) -> str:
        """Show the base prior, and the probability of the condition with its standard error."""
        if isinstance(self._mass, Tracer):
            return f"{self.base} constrained"
        mass, error = float(self._mass), float(self.mass_error)
        return f"{self.base} constrained to {100 * mass:.3g}% +- {100 * error:.1g}% of its mass"

    def tree_flatten(self) -> tuple[tuple[SitePrior, Any, Any], _Condition]:
        """Return base prior, mass and center as children, and the condition."""
        return (self.base, self._mass, self._center), self._condition

    @classmethod
    def tree_unflatten(cls, condition: _Condition, children: Any) -> ConstrainedPrior:
        """Rebuild a prior from its children, without validating them."""
        prior = object.__new__(cls)
        prior._condition = condition
        prior.base, prior._mass, prior._center = children
        return prior

    def with_base(self, base: SitePrior) -> ConstrainedPrior:
        """Return this prior with the maps to standard coordinates of `base`.

        Args:
            base: The same base prior, with other maps to standard coordinates.
        """
        return ConstrainedPrior.tree_unflatten(self._condition, (base, self._mass, self._center))

    @property
    def layout(self) -> Layout:
        """Names and shapes of the parameters."""
        return self.base.layout

    @property
    def condition(self) -> Callable[[Any], Any]:
        """The condition, a function of one parameter vector as the simulator receives it."""
        return self._condition.function

    @property
    def mass(self) -> Any:
        """Estimate of the condition's probability under the base prior."""
        return self._mass

    @property
    def mass_error(self) -> Any:
        """Standard error of `mass`."""
        return (self._mass * (1.0 - self._mass) / NUM_MASS_DRAWS) ** 0.5

    def matches(self, other: Prior) -> bool:
        """Return whether another prior has the same base prior and the same condition."""
        return (
            isinstance(other, ConstrainedPrior)
            and self._condition == other._condition
            and self.base.matches(other.base)
        )

    def unchecked_center(self, batch: tuple[int, ...]) -> Array:
        """Return one point that meets the condition, repeated to the shape (*batch, D)."""
        return jnp.broadcast_to(jnp.asarray(self._center, float), (*batch, self.dim))

    def unchecked_sample(self, key: Key, n: int) -> Array:
        """Draw n parameter vectors (n, D) by rejection; NaN where no proposal was accepted."""

        def propose(keys: Key) -> tuple[Array, Array]:
            theta = self.base.unchecked_sample(keys[0], max(n, _CHUNK))[None]
            return theta, self.unchecked_contains(theta)

        return fill_by_rejection(key[None], propose, n, MAX_ROUNDS)[0]

    def unchecked_contains(self, theta: Array) -> Array:
        """Return whether theta (*, D) is in the support and meets the condition."""
        inside = self.base.unchecked_contains(theta)
        safe = jnp.where(inside[..., None], theta, self.base.unchecked_center(inside.shape))
        return inside & _meets(self._condition, self.base, safe)

    def unchecked_log_prob_inside(self, theta: Array) -> Array:
        """Compute the log density at theta (*, D), which must meet the condition."""
        return self.base.unchecked_log_prob_inside(theta) - jnp.log(self._mass)

    def unchecked_site_log_probs(self, theta: Array) -> dict[str, Array]:
        """Compute the log density of each site of the base prior at theta (*, D)."""
        return self.base.unchecked_site_log_probs(theta)

    def unchecked_from_standard(self, y: Array) -> Array:
        """Map standard coordinates (*, d) to parameters (*, D), which may violate the condition."""
        return self.base.unchecked_from_standard(y)

    def unchecked_to_standard(self, theta: Array) -> Array:
        """Map parameters (*, D) to standard coordinates (*, d)."""
        return self.base.unchecked_to_standard(theta)

    def unchecked_log_det(self, y: Array, theta: Array) -> Array:
        """Compute the log Jacobian determinant at y (*, d), where theta = from_standard(y)."""
        return self.base.unchecked_log_det(y, theta)


def constrained(prior: PriorLike, condition: Callable[[Any], Any]) -> ConstrainedPrior:
    """Restrict a prior to the parameters that meet a condition.

    Draws are made by rejection. The density is normalised by the condition's probability, which is
    estimated from 100,000 draws; `repr` shows its standard error. A posterior with this prior has
    density zero, and no draws, where the condition is False.

    Args:
        prior: The prior to restrict, in any form that `as_prior` accepts.
        condition: Function from theta, as the simulator receives it (a dict of named values, or
            one array), to a bool. JAX must be able to trace it, so write `&` for "and". Pass the
            same function object to equal priors, so that they share compiled programs.

    Returns:
        The restricted prior. A saved posterior with this prior needs it again:
        `load(path, prior=...)`.

    Raises:
        ValueError: The prior is restricted already, the condition does not return a bool, or its
            probability is below 1e-4.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> sides = {"a": dist.Uniform(0.0, 1.0), "b": dist.Uniform(0.0, 1.0)}
        >>> prior = sf.constrained(sides, lambda theta: theta["a"] < theta["b"])
        >>> draws = prior.sample(jax.random.key(0), 1000)
        >>> bool((draws[:, 0] < draws[:, 1]).all()), round(prior.mass, 1)
        (True, 0.5)
        >>> prior.log_prob(jax.numpy.array([0.9, 0.1]))
        Array(-inf, dtype=float32)
    """
    return ConstrainedPrior(as_prior(prior), condition)


def require_no_condition(prior: Prior, instead: str) -> None:
    """Raise ValueError if a prior has a condition, which transformed draws could violate.

    Args:
        prior: The prior.
        instead: Instruction for the user, for the error message.
    """
    if isinstance(prior, ConstrainedPrior):
        raise ValueError(
            "posterior: expected a prior without a condition, because draws are transformed and "
            f"could violate it, got {prior}; {instead}"
        )


def fill_by_rejection(
    keys: Key, propose: Callable[[Key], tuple[Array, Array]], n: int, rounds: int
) -> Array:
    """Draw n accepted proposals for each data set; NaN where the rounds do not suffice.

    Args:
        keys: One random key for each of B data sets, shape (B,).
        propose: Function from keys (B,) to proposals (B, m, D), and whether each is accepted
            (B, m).
        n: Number of accepted proposals for each data set.
        rounds: Maximum number of rounds.

    Returns:
        Accepted proposals in the order in which they were made, shape (B, n, D).
    """

    def insert(rows: Array, count: Array, proposals: Array, accepted: Array) -> Array:
        index = jnp.where(accepted, count + jnp.cumsum(accepted) - 1, n)
        return rows.at[index].set(proposals, mode="drop")

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rows, count, i = carry
        proposals, accepted = propose(jax.vmap(lambda key: jax.random.fold_in(key, i))(keys))
        rows = jax.vmap(insert)(rows, count, proposals, accepted)
        return rows, jnp.minimum(count + jnp.sum(accepted, axis=1), n), i + 1

    def is_unfinished(carry: tuple[Array, Array, Array]) -> Array:
        return jnp.any(carry[1] < n) & (carry[2] < rounds)

    like = jax.eval_shape(propose, keys)[0]
    rows = jnp.full((len(keys), n, like.shape[-1]), jnp.nan, like.dtype)
    first = (rows, jnp.zeros(len(keys), int), jnp.zeros((), int))
    return jax.lax.while_loop(is_unfinished, step, first)[0]


def _meets(condition: _Condition, base: SitePrior, theta: Array) -> Array:
    """Return whether theta (*, D) meets the condition, bool of shape (*)."""
    flat = jnp.reshape(theta, (-1, base.dim))
    met = jax.vmap(lambda row: condition.function(base.unchecked_structured(row)))(flat)
    return jnp.reshape(met, theta.shape[:-1])


def _require_bool(base: SitePrior, condition: Callable[[Any], Any]) -> None:
    """Raise ValueError unless a condition can be traced and returns one bool."""
    row = jax.eval_shape(lambda: jnp.zeros(base.dim))
    try:
        result = jax.eval_shape(lambda theta: condition(base.unchecked_structured(theta)), row)
    except Exception as error:
        raise ValueError(
            "condition: expected a function of theta that JAX can trace, got "
            f"{type(error).__name__}: {str(error)[:200]}; write & for `and`, and jax.numpy for "
            "numpy"
        ) from error
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape != () or str(dtype) != "bool":
        raise ValueError(
            "condition: expected a function that returns one bool for one parameter vector, got "
            f"{type(result).__name__ if shape is None else f'{dtype} of shape {shape}'}; write a "
            "comparison, and jax.numpy.all for arrays"
        )


@partial(jax.jit, static_argnums=0)
def _accepted(condition: _Condition, base: SitePrior) -> Array:
    """Count how many of `NUM_MASS_DRAWS` draws of the base prior meet the condition."""

    def count(key: Key) -> Array:
        return jnp.sum(_meets(condition, base, base.unchecked_sample(key, _CHUNK)))

    key = jax.random.key(2, impl="threefry2x32")
    return jnp.sum(jax.lax.map(count, jax.random.split(key, NUM_MASS_DRAWS // _CHUNK)))


@jax.jit
def _medoid(prior: ConstrainedPrior) -> Array:
    """Return the draw (D,) that is closest to the mean of 64 draws in standard coordinates."""
    theta = prior.unchecked_sample(jax.random.key(3, impl="threefry2x32"), 64)
    y = prior.unchecked_to_standard(theta)
    distance = jnp.sum((y - jnp.mean(y, axis=0)[None]) ** 2, axis=1)
    return theta[jnp.argmin(distance)]
