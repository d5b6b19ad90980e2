"""Posterior bound to observations, with methods that are pure functions of keys and parameters.

Public names: `Bindable`, `AtObservation`, `split_draws`, `in_chunks`, `MAX_CALL_ENTRIES`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from sbi_flows.core.checks import as_random_key, require_count, require_memory
from sbi_flows.core.errors import SbiFlowsError, SolveFailed
from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import is_traced, register_pytree
from sbi_flows.core.typing import Key
from sbi_flows.posteriors.numpyro import PosteriorDistribution
from sbi_flows.posteriors.strays import warn_of_strays
from sbi_flows.prior.circular import HALF_WIDTH, wrap
from sbi_flows.prior.constrained import ConstrainedPrior
from sbi_flows.prior.prior import Prior

MAX_CALL_ENTRIES = 2**18
"""Maximum number of entries (draws times D) in one compiled call, which limits the memory."""


class Bindable(abc.ABC):
    """Abstract posterior that `AtObservation` calls, with methods for B bound observations.

    `bound` is a pytree of arrays with a leading axis of B observations.

    Attributes:
        prior: Prior of the parameters; it defines their names.
    """

    prior: Prior

    @property
    @abc.abstractmethod
    def needs_ode(self) -> bool:
        """Return True if a density needs an ODE solve, which evaluates a network many times."""

    @abc.abstractmethod
    def _sample(self, key: Key, bound: Any, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        """Draw (B, n, D); also return log densities (B, n), zeros if `with_log_prob` is False."""

    @abc.abstractmethod
    def _log_prob(self, theta: Array, bound: Any) -> Array:
        """Compute log densities (B, n) of theta (B, n, D); -inf outside the prior's support."""

    @abc.abstractmethod
    def _standard_log_prob(self, y: Array, bound: Any) -> Array:
        """Compute the log density (B,) per unit of theta, at standard coordinates y (B, d)."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AtObservation:
    """A posterior bound to one observation or to a batch of B; made by `posterior.at(x)`.

    The observations are already checked, standardised and compared with the training simulations.
    An `AtObservation` is a pytree of arrays and its methods are pure functions: use them inside
    `jax.jit`, `grad`, `vmap` and `lax.scan`, or pass the object as an argument. The
    docstrings of the methods give shapes for one observation; for a batch, results have one more
    axis (B) in front.

    Attributes:
        posterior: The posterior.
        bound: Prepared observations, a pytree of arrays with a leading axis of length B.
        is_single: True for one observation (B = 1), False for a batch.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 200, progress=False)
        >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> at = posterior.at(jnp.array([0.3, -0.2]))
        >>> jax.jit(at.sample, static_argnums=1)(jax.random.key(2), 5).shape
        (5, 2)
        >>> jax.grad(at.log_prob)(jnp.zeros(2)).shape
        (2,)
    """

    posterior: Bindable
    bound: Any
    is_single: bool

    def __repr__(self) -> str:
        """Show the posterior and, for a batch, the number of observations."""
        batch = "" if self.is_single else f", {self._count} observations"
        return f"AtObservation({self.posterior}{batch})"

    @property
    def prior(self) -> Prior:
        """Prior of the parameters; it defines their names."""
        return self.posterior.prior

    def sample(self, key: Key, n: int) -> Array | np.ndarray:
        """Draw n parameter vectors, shape (n, D), all inside the prior's support.

        Raises:
            ValueError: n is not positive, the draws do not fit in memory, or `key` is not a random
                key.
            SolveFailed: The ODE of a continuous flow was not solved. Inside a transformation such
                as `jit` these draws are NaN instead.
            SbiFlowsError: Fewer than about 1 in 1,000 draws meet the condition of a constrained
                prior. Inside a transformation these draws are NaN instead.
        """
        return self._draw(key, n, with_log_prob=False)[0]

    def sample_and_log_prob(self, key: Key, n: int) -> tuple[Array | np.ndarray, Array]:
        """Draw like `sample`; also return log densities (n,) of the draws, in nats."""
        return self._draw(key, n, with_log_prob=True)

    def log_prob(self, theta: Any) -> Array:
        """Compute the log density of theta, in nats; it is -inf outside the prior's support.

        Args:
            theta: Shape (*, D). For a batch: shape (B, D) or (B, n, D), where theta[b] belongs to
                observation b.

        Returns:
            Log densities, with the shape of theta without its last axis.

        Raises:
            ValueError: The shape of theta is wrong.
            SolveFailed: The ODE of a continuous flow was not solved. Inside a transformation such
                as `jit` these densities are NaN instead.
        """
        theta = self._checked(theta)
        if theta.size == 0:
            return jnp.zeros(theta.shape[:-1], theta.dtype)
        rows = theta.reshape(self._count, -1, self.prior.dim)
        log_prob = self.posterior._log_prob(rows, self.bound)
        return self._require_solved(log_prob, log_prob.reshape(theta.shape[:-1]))

    def map(
        self, *, key: Key | None = None, starts: int = 1000, steps: int = 200
    ) -> Array | np.ndarray:
        """Find the mode, shape (D,): refine the best of many draws by gradient ascent.

        Args:
            key: Random key for the draws. The default is a fixed key, so that repeated calls give
                the same result.
            starts: Number of draws.
            steps: Number of steps of Adam.

        Raises:
            ValueError: `starts` or `steps` is not positive.
        """
        require_count(1, starts=starts, steps=steps)
        key = jax.random.key(0) if key is None else key
        draws, log_prob = self._draw_relative(key, starts, with_log_prob=True)
        draws = draws.reshape(-1, starts, self.prior.dim)
        best = jnp.argmax(log_prob.reshape(-1, starts), axis=1)
        first = draws[jnp.arange(len(draws)), best]
        modes = in_chunks(
            partial(_ascend, steps, self.posterior), self.prior.dim, self.bound, first
        )[0]
        modes = self.prior.add_offset(modes)
        return modes[0] if self.is_single else modes

    def to_numpyro(self) -> PosteriorDistribution:
        """Return the posterior as a numpyro distribution, for use as the prior of another analysis.

        If the prior is a single distribution, a value has the shape of its parameter. If the prior
        has named parameters, a value is a flat vector (D,), and `posterior.prior.unflatten` splits
        it by name. The posterior has the same support as the prior. NUTS moves in the prior's
        standard coordinates.

        Raises:
            ValueError: The posterior is bound to a batch of observations, or the prior has an
                offset.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> import sbi_flows as sf
            >>> prior = dist.Uniform(0.0, 1.0).expand([2])
            >>> noisy = lambda key, theta: theta + 0.1 * jax.random.normal(key, (2,))
            >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 200, progress=False)
            >>> npe = sf.NPE(prior, sf.MAF(), training=sf.Training(max_epochs=1), members=1)
            >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
            >>> first = posterior.at(jnp.array([0.3, 0.6])).to_numpyro()
            >>> def second(y):
            ...     theta = numpyro.sample("theta", first)
            ...     numpyro.sample("y", dist.Normal(theta, 0.1).to_event(1), obs=y)
            >>> log_density, _ = numpyro.infer.util.log_density(
            ...     second, (jnp.array([0.4, 0.5]),), {}, {"theta": jnp.array([0.35, 0.55])}
            ... )
            >>> bool(jnp.isfinite(log_density))
            True
        """
        if not self.is_single:
            raise ValueError(
                f"x: expected one observation for a numpyro distribution, got {self._count}"
            )
        if self.prior.layout.offset:
            raise ValueError(
                f"prior: expected a prior without an offset, got {self.prior}, whose values single "
                "precision cannot represent; use jax.config.update('jax_enable_x64', True)"
            )
        return PosteriorDistribution(self.prior, self)

    @property
    def _count(self) -> int:
        """Number of observations B."""
        count = len(jax.tree.leaves(self.bound)[0])
        if self.is_single and count != 1:
            raise ValueError(
                f"at: expected one observation, got {count}: call posterior.at inside the function "
                "that jax.vmap maps, or give it a batch"
            )
        return count

    def _draw(self, key: Key, n: int, *, with_log_prob: bool) -> tuple[Array | np.ndarray, Array]:
        draws, log_prob = self._draw_relative(key, n, with_log_prob=with_log_prob)
        if self.is_single and not is_traced(draws):
            warn_of_strays(self.posterior, self.prior, draws)
        return self.prior.add_offset(draws), log_prob

    def _draw_relative(self, key: Key, n: int, *, with_log_prob: bool) -> tuple[Array, Array]:
        """Draw parameters minus the prior's offset; also return log densities, as in `_sample`."""
        require_count(1, n=n)
        key = as_random_key("key", key)
        require_memory("n", (self._count, int(n), self.prior.dim), jnp.result_type(float))
        draws, log_prob = self.posterior._sample(key, self.bound, n, with_log_prob)
        result = (draws[0], log_prob[0]) if self.is_single else (draws, log_prob)
        return self._require_solved(jnp.sum(draws, axis=-1) + log_prob, result)

    def _checked(self, theta: Any) -> Array:
        theta = self.prior.subtract_offset(theta)
        theta = theta.astype(jnp.result_type(float))
        dim, count = self.prior.dim, self._count
        if theta.ndim == 0 or theta.shape[-1] != dim:
            raise ValueError(
                f"theta: expected shape (*, {dim}) for {self.prior.labels}, got {theta.shape}"
            )
        if not self.is_single and (theta.ndim not in (2, 3) or len(theta) != count):
            raise ValueError(
                f"theta: expected ({count}, {dim}) or ({count}, n, {dim}) for a batch of {count} "
                f"observations, got {theta.shape}"
            )
        return theta

    def _require_solved(self, values: Array, result: Any) -> Any:
        """Return `result`; raise an error if `values` (B, *) contain NaN.

        Raises:
            SolveFailed: The ODE was not solved at some observations.
            SbiFlowsError: Too few draws meet the prior's condition at some observations.
        """
        is_constrained = isinstance(self.prior, ConstrainedPrior)
        if is_traced(values) or not (self.posterior.needs_ode or is_constrained):
            return result
        failed = np.flatnonzero(_any_nan(values))
        if len(failed):
            some = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
            if is_constrained and not self.posterior.needs_ode:
                raise SbiFlowsError(
                    "x: expected at least 1 in 1,000 draws to meet the prior's condition, got "
                    f"fewer at {len(failed)} of {len(values)} observations (numbers {some}); test "
                    "whether simulations under the prior resemble these observations, or fit with "
                    "more simulations"
                )
            raise SolveFailed(
                f"x: the ODE was not solved at {len(failed)} of {len(values)} observations "
                f"(numbers {some}); `.values` holds the results, with NaN. The density's "
                "sf.Solver(max_steps=...) allows more steps, a larger rtol and atol need fewer",
                values=result,
            )
        return result


register_pytree(AtObservation, leaves=("posterior", "bound"), static=("is_single",))


def split_draws(n: int, dim: int) -> tuple[int, int]:
    """Split n draws of `dim` entries into equal pieces, each small enough for one compiled call.

    Returns:
        Number of pieces, and number of draws in each piece.
    """
    each = max(1, MAX_CALL_ENTRIES // dim)
    count = math.ceil(n / each)
    return count, math.ceil(n / count)


def in_chunks(
    evaluate: Callable[[Any, Any], tuple], entries: int, bound: Any, other: Any
) -> tuple[Array, ...]:
    """Evaluate a function on equal chunks of observations and concatenate the results.

    The last chunk is padded, so that all chunks share one compiled program.

    Args:
        evaluate: Function that returns a tuple of arrays. Its arguments are a chunk of `bound` and
            the chunk of `other` for the same observations.
        entries: Number of array entries per observation, which determines the chunk size.
        bound: Pytree of arrays with a leading axis of B observations.
        other: Array with a leading axis of length B.
    """
    total = len(jax.tree.leaves(bound)[0])
    size = min(total, max(1, MAX_CALL_ENTRIES // entries))
    if size == total:
        return evaluate(bound, other)
    outputs = []
    for start in range(0, total, size):
        rows = np.arange(start, start + size) % total
        outputs.append(evaluate(*jax.tree.map(lambda leaf, r=rows: leaf[r], (bound, other))))
    return tuple(jnp.concatenate(parts)[:total] for parts in zip(*outputs, strict=True))


@jax.jit
def _any_nan(values: Array) -> Array:
    return jnp.any(jnp.isnan(values.reshape(len(values), -1)), axis=1)


@partial(jax.jit, static_argnums=0)
@full_precision
def _ascend(steps: int, posterior: Bindable, bound: Any, theta: Array) -> tuple[Array]:
    """Maximise the density with Adam, starting at theta (B, D); return the best points (B, D).

    The best point of an observation is the point of highest density that Adam visited. Adam moves
    in unconstrained coordinates.
    """
    prior = posterior.prior
    circular = jnp.asarray(prior.circular or (False,) * prior.standard_dim)[None]
    bounded = jnp.asarray(prior.bounded)[None] & ~circular
    optimiser = optax.adam(optax.cosine_decay_schedule(0.02, steps))

    def standard(u: Array) -> Array:
        y = jnp.where(bounded, HALF_WIDTH * jnp.tanh(u), u)
        return jnp.where(circular, wrap(u), y) if prior.circular else y

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        u, state, best, best_value = carry
        value, pull = jax.vjp(lambda v: posterior._standard_log_prob(standard(v), bound), u)
        better = value > best_value
        best = jnp.where(better[:, None], u, best)
        gradient = pull(-jnp.ones_like(value))[0]
        updates, state = optimiser.update(gradient, state)
        u = optax.apply_updates(u, updates)
        return (u, state, best, jnp.maximum(value, best_value)), None

    y = prior.unchecked_to_standard(theta)
    edge = 1.0 - 1e-6
    u = jnp.where(bounded, jnp.arctanh(jnp.clip(y / HALF_WIDTH, -edge, edge)), y)
    carry = (u, optimiser.init(u), u, jnp.full(len(u), -jnp.inf, u.dtype))
    (_, _, best, _), _ = jax.lax.scan(step, carry, None, length=steps)
    return (prior.unchecked_from_standard(standard(best)),)
