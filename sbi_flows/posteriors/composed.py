"""Composed posterior: several independent observations of one parameter vector.

Public names: `composed`, `ComposedPosterior`, `sample_composed`.

If x_1 ... x_N are independent given theta, p(theta | x_1 ... x_N) is proportional to
p(theta)^(1 - N) times the product of the p(theta | x_i). The score, which is the gradient of
its logarithm, is therefore a weighted sum of the scores of the p(theta | x_i) and of the prior. At
each noise level, the same sum of the noisy scores defines one density of a sequence, which starts
at a density that is easy to sample and ends at the composed posterior. A few steps of Langevin
dynamics at each noise level move the draws to the next density.

Source: Geffner, Papamakarios & Mnih 2023, "Compositional Score Modeling for Simulation-Based
Inference" (arXiv:2209.14249), equation 6 and algorithm 1. In contrast to the paper, the prior's
score is evaluated without noise at all levels; this changes only the intermediate densities.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.checks import as_array, require_count, require_object
from sbi_flows.core.frames import reorder_columns
from sbi_flows.core.precision import full_precision
from sbi_flows.core.pytrees import register_pytree
from sbi_flows.core.record import ReadOnlyDict
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.conditional import Blueprint, Weights, graph_of
from sbi_flows.densities.matching import Diffusion, FlowMatching
from sbi_flows.densities.paths import Path
from sbi_flows.posteriors import mixtures
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.bound import MAX_CALL_ENTRIES
from sbi_flows.posteriors.codec_composed import COMPOSED
from sbi_flows.posteriors.derived import Derived
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.product import Product
from sbi_flows.posteriors.writing import content_of
from sbi_flows.prior.constrained import require_no_condition
from sbi_flows.prior.prior import Prior

FIRST_RATIO, LAST_RATIO = 3.0, 0.03
"""Noise-to-signal ratios at the first and last level; smaller ratios are rare in training."""

STEP_SHARE = 1.0
"""Variance of a Langevin step relative to the stability limit at the largest curvature."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ComposedPosterior(Derived):
    """Posterior given a set of independent observations of one parameter vector.

    The base posterior is conditioned on one observation (*event). Here x is a set (N, *event) of
    such observations, for any N, or a batch of sets (B, N, *event). `log_prob` is the sum of the
    base posterior's log densities at the N observations minus (N - 1) times the prior's log
    density, up to a constant. Draws are made by Langevin dynamics, which is approximate. Check it
    by `sf.check(key, posterior, simulate_set)`; `simulate_set(key, theta)` returns (N, *event).

    Attributes:
        posterior: The base posterior; its densities are `FlowMatching` or `Diffusion`.
        levels: Number of noise levels.
        steps: Number of Langevin steps at each level.
        record: Facts about the composition, in addition to the base posterior's record.

    References:
        Compositional Score Modeling for Simulation-Based Inference, arXiv:2209.14249.
    """

    posterior: Posterior
    levels: int = 64
    steps: int = 4
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    codec: ClassVar[LayerCodec] = COMPOSED

    def __post_init__(self) -> None:
        """Raise ValueError if densities have no scores, or `levels` or `steps` is not positive."""
        require_object("posterior", self.posterior, Posterior, "an sf.Posterior")
        wanted = "a posterior of sf.FlowMatching or sf.Diffusion"
        for blueprint in self.posterior.blueprints:
            require_object("posterior", blueprint.density, (FlowMatching, Diffusion), wanted)
        require_count(1, levels=self.levels, steps=self.steps)
        require_no_condition(self.posterior.prior, "simulate sets, and fit an embedding of sets")

    def __repr__(self) -> str:
        """Show the base posterior, `levels` and `steps`."""
        return f"ComposedPosterior({self.posterior}, levels={self.levels}, steps={self.steps})"

    @property
    def has_own_regions(self) -> bool:
        """Always False: credible regions are those of highest density, the default regions."""
        return False

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Raise ValueError, because `has_own_regions` is False."""
        raise ValueError("posterior: expected one with credible regions of its own")

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one set; raise ValueError unless it is a set or a batch of sets."""
        return self._sets(x)[1]

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (n, C) of the n observations in x and, if any, the embedding's output."""
        return self.posterior.spaces(_flat(self._sets(x)[0]))

    def present_fraction(self, x: Obs) -> np.ndarray | None:
        """Return the fraction of entries that each observation has; None if none may be missing."""
        return self.posterior.present_fraction(_flat(self._sets(x)[0]))

    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
        fields = {"levels": int(self.levels), "steps": int(self.steps)}
        return content_of(self.posterior).derive(Layer(COMPOSED, fields, {}, self.record))

    @classmethod
    def from_layer(cls, posterior: AbstractPosterior, layer: Layer) -> ComposedPosterior:
        """Rebuild a composed posterior from its layer in a file.

        Args:
            posterior: The base posterior, a direct posterior.
            layer: The layer.
        """
        require_object("posterior", posterior, Posterior, "an sf.Posterior")
        record = ReadOnlyDict(layer.record)
        return cls(posterior, layer.fields["levels"], layer.fields["steps"], record)  # type: ignore[arg-type]

    def _sets(self, x: Obs) -> tuple[Obs, bool]:
        """Return sets (B, N, *event), and whether x was a single set."""
        x = reorder_columns("x", x, self.columns)
        like = jax.tree.leaves(self.posterior.observation)[0]
        first = next(iter(jax.tree.leaves(x)), None)
        if first is not None and np.ndim(first) == len(like.shape) + 2:
            if len({np.shape(leaf)[:2] for leaf in jax.tree.leaves(x)}) != 1:
                raise ValueError("x: expected sets (B, N, *event) of equal B and N, got others")
            sets = jax.tree.map(partial(as_array, "x"), x)
            flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sets)
            self.posterior._bind(flat)
            return sets, False
        if self.posterior.is_single(x):
            raise ValueError("x: expected a set of observations (N, *event), got one observation")
        return jax.tree.map(lambda a: as_array("x", a)[None], x), True

    def _bind(self, x: Obs) -> tuple[Array, bool]:
        """Return features (B, N, C), and whether x was a single set."""
        sets, single = self._sets(x)
        shape = jnp.shape(jax.tree.leaves(sets)[0])[:2]
        features = self.posterior.features(_flat(sets))
        return features.reshape(*shape, -1), single

    def _features_of(self, bound: Array) -> Array:
        return bound.reshape(-1, bound.shape[-1])

    def _sample(self, key: Key, bound: Array, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        if len(bound) == 1:
            draws = self._draw_set(key, bound[0], n)[None]
        else:
            keys = jax.random.split(key, len(bound))
            draws = jax.lax.map(lambda each: self._draw_set(each[0], each[1], n), (keys, bound))
        if not with_log_prob:
            return draws, jnp.zeros(draws.shape[:2], draws.dtype)
        return draws, self._log_prob(draws, bound)

    def _draw_set(self, key: Key, features: Array, n: int) -> Array:
        """Draw (n, D) given the features (N, C) of one set.

        The number of draws from each ensemble is proportional to its share.
        """
        posterior = self.posterior
        order_key, *keys = jax.random.split(key, 1 + len(posterior.weights))
        counts, fractions = mixtures.split_shares(posterior.shares, n)
        draws = []
        for i, blueprint in enumerate(posterior.blueprints):
            count = int(counts[i] + (fractions[i] > 0))
            weights = posterior.weights[i]
            plan = _Plan(
                blueprint, math.ceil(count / mixtures.count(weights)), self.levels, self.steps
            )
            given = blueprint.inputs(features)
            joined = _ensemble(plan, posterior.prior, weights, given, keys[i])
            # draws left over by equal shares come from any member with equal probability
            part_key = order_key if len(keys) == 1 else jax.random.fold_in(order_key, i)
            draws.append(joined[jax.random.permutation(part_key, len(joined))[:count]])
        if len(draws) == 1:
            return draws[0]
        return mixtures.choose(order_key, draws, counts=counts, fractions=fractions, n=n)

    def _log_prob(self, theta: Array, bound: Array) -> Array:
        count = bound.shape[1]
        repeated = jnp.repeat(theta, count, axis=0)
        each = self.posterior._log_prob(repeated, self._features_of(bound))
        product = jnp.sum(each.reshape(len(theta), count, -1), axis=1)
        prior = self.prior.unchecked_log_prob(theta)
        inside = jnp.isfinite(prior)
        return jnp.where(inside, product - (count - 1) * jnp.where(inside, prior, 0.0), -jnp.inf)

    def _standard_log_prob(self, y: Array, bound: Array) -> Array:
        return self._log_prob(self.prior.unchecked_from_standard(y)[:, None], bound)[:, 0]


register_pytree(
    ComposedPosterior, leaves=("posterior",), static=("levels", "steps"), facts={"record": {}}
)


def composed(posterior: Posterior, *, levels: int = 64, steps: int = 4) -> ComposedPosterior:
    """Turn a posterior given one observation into a posterior given a set of observations.

    The observations of a set must be independent given the parameters. One fit to single
    observations is enough for sets of any size, but the errors of the fit add up. For sets of more
    than about ten observations, simulate sets and train with an embedding of sets instead.

    Args:
        posterior: Posterior whose densities are `FlowMatching` or `Diffusion`, or a stack of these.
            Scores are composed for each member separately. The number of draws from a member is
            proportional to its weight in the mixture.
        levels: Number of noise levels.
        steps: Number of Langevin steps at each level.

    Raises:
        ValueError: The posterior has another kind of density, or `levels` or `steps` is not
            positive.

    References:
        Compositional Score Modeling for Simulation-Based Inference, arXiv:2209.14249.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0.0, 1.0).expand([1])
        >>> noisy = lambda key, theta: theta + jax.random.normal(key, (1,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 200, progress=False)
        >>> flow = sf.Diffusion(network=sf.Film(width=8, blocks=1))
        >>> npe = sf.NPE(prior, flow, training=sf.Training(max_epochs=1), members=1)
        >>> posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
        >>> together = composed(posterior, levels=4)
        >>> together.sample(jax.random.key(2), sims.x[:3], 5).shape
        (5, 1)
    """
    return ComposedPosterior(posterior, levels, steps)


def sample_composed(
    key: Key, posterior: Posterior, x: Obs, n: int, *, levels: int = 64, steps: int = 4
) -> Array | np.ndarray:
    """Draw from the posterior given a set of independent observations.

    Equivalent to `composed(posterior, levels=levels, steps=steps).sample(key, x, n)`.

    Args:
        key: Random key.
        posterior: Posterior whose densities are `FlowMatching` or `Diffusion`, or a stack of these.
        x: A set (N, *event) of observations, independent given the parameters.
        n: Number of draws.
        levels: Number of noise levels.
        steps: Number of Langevin steps at each level.

    Returns:
        Draws, shape (n, D).

    Raises:
        ValueError: The density has no score, x is not a set, or a number is not positive.
    """
    return composed(posterior, levels=levels, steps=steps).sample(key, x, n)


def _flat(sets: Obs) -> Obs:
    """Join the observations of all sets (B, N, *event) into one batch (B * N, *event)."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), sets)


class _Plan(NamedTuple):
    """Static settings for sampling one ensemble.

    Attributes:
        blueprint: Static description of the ensemble's members.
        each: Number of draws from each member.
        levels: Number of noise levels.
        steps: Number of Langevin steps at each level.
    """

    blueprint: Blueprint
    each: int
    levels: int
    steps: int


@partial(jax.jit, static_argnums=0)
@full_precision
def _ensemble(plan: _Plan, prior: Prior, weights: Weights, features: Array, key: Key) -> Array:
    """Draw from one ensemble given features (N, C); shape (members * each, D).

    The draws of a member follow each other in the result.
    """
    chunk = min(plan.each, max(1, MAX_CALL_ENTRIES // features.size))
    pieces = math.ceil(plan.each / chunk)

    def draw(inputs: tuple[Weights, Key]) -> Array:
        member, keys = inputs
        model = nnx.merge(graph_of(plan.blueprint), *member)
        product = Product.of(prior, model, features)
        walk = partial(_langevin, product, plan, model.density.path, chunk)
        y = jax.lax.map(walk, keys).reshape(pieces * chunk, -1)
        return prior.unchecked_from_standard(y)[: plan.each]

    members = mixtures.count(weights)
    theta = jax.lax.map(draw, (weights, jax.random.split(key, (members, pieces))))
    return theta.reshape(members * plan.each, -1)


def _langevin(product: Product, plan: _Plan, path: Path, n: int, key: Key) -> Array:
    """Draw (n, d) in standard coordinates by Langevin dynamics with decreasing noise."""
    first, last = path.ends
    ratios = np.geomspace(FIRST_RATIO, LAST_RATIO, plan.levels)
    angles = jnp.clip(jnp.arctan2(1.0, jnp.asarray(ratios)), first, last)
    first_key, key = jax.random.split(key)
    w = jax.random.normal(first_key, (n, plan.blueprint.sizes.dim)) / math.sqrt(product.count)

    def step(w: Array, inputs: tuple[Array, Key]) -> tuple[Array, None]:
        angle, key = inputs
        # the curvature of one noisy density is at most the inverse of the variance of its noise
        variance = STEP_SHARE * jnp.cos(angle) ** 2 / product.count
        noise = jax.random.normal(key, w.shape, w.dtype)
        drift = 0.5 * variance * product.score(w, angle)
        return w + drift + jnp.sqrt(variance) * noise, None

    angles = jnp.repeat(angles, plan.steps)
    w, _ = jax.lax.scan(step, w, (angles, jax.random.split(key, len(angles))))
    # one step along the ODE removes the noise of the last level
    left = 0.5 * jnp.cos(angles[-1]) ** 2 / product.count
    return product.middle.forward(w + left * product.score(w, angles[-1]))
