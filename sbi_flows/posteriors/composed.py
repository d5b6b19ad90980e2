"""Several independent observations at one parameter: their scores add up.

Public names: `sample_composed`.

With x_1 ... x_N independent given theta, p(theta | x_1 ... x_N) is proportional to
p(theta)^(1 - N) times the product of the p(theta | x_i), so its score is a sum. The same sum of the
scores on the way from noise to data is not that of a noisy product, but leads from a density that
is easy to one that is wanted: at each level of noise a few steps of Langevin dynamics follow it.

Source: Geffner, Papamakarios & Mnih 2023, "Compositional Score Modeling for Simulation-Based
Inference" (arXiv:2209.14249), equation 6 and algorithm 1. Here the prior is that of the data at all
levels: only the two ends matter.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from sbi_flows.core.checks import require_count, require_object
from sbi_flows.core.precision import full_precision
from sbi_flows.core.typing import Key, Obs
from sbi_flows.densities.conditional import Blueprint, Conditional, Weights, graph_of
from sbi_flows.densities.matching import Diffusion, FlowMatching, Matching
from sbi_flows.densities.paths import Path
from sbi_flows.densities.samplers import VelocityFunction, score
from sbi_flows.posteriors import mixtures
from sbi_flows.posteriors.direct import ENTRIES, Posterior
from sbi_flows.prior.prior import Prior

FIRST, LAST = 3.0, 0.03
"""Ratios of noise to signal from the first to the last level; training sees few smaller ones."""

STEP = 1.0
"""A step's variance as a share of what is stable at the largest curvature that a level can have."""


def sample_composed(
    key: Key, posterior: Posterior, x: Obs, n: int, *, levels: int = 64, steps: int = 4
) -> Array:
    """Draw from the posterior given all of several independent observations of one parameter.

    A posterior that was fitted to single observations serves for any number of them. Its errors add
    up, though: with more than some ten, simulate sets of observations and embed them instead.

    Args:
        key: Random key.
        posterior: One of `FlowMatching` or `Diffusion`, or a stack of these; each member composes
            scores of its own and gives its share of the draws.
        x: A batch (N, *event) of observations, independent given the parameters.
        n: Number of draws.
        levels: Number of levels of noise.
        steps: Steps of Langevin dynamics at each.

    Returns:
        Shape (n, D).

    Raises:
        ValueError: A density of the posterior is of another kind, x is no batch of observations, or
            a number is not positive.

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
        >>> sample_composed(jax.random.key(2), posterior, sims.x[:3], 5, levels=4).shape
        (5, 1)
    """
    require_object("posterior", posterior, Posterior, "an sf.Posterior")
    for blueprint in posterior.blueprints:
        wanted = "a posterior of sf.FlowMatching or sf.Diffusion"
        require_object("posterior", blueprint.density, (FlowMatching, Diffusion), wanted)
    require_count(1, n=n, levels=levels, steps=steps)
    if posterior.is_single(x):
        raise ValueError("x: expected a batch of observations, got one")
    features = posterior.features(x)
    order_key, *keys = jax.random.split(key, 1 + len(posterior.weights))
    parts = zip(posterior.blueprints, posterior.weights, posterior.shares, keys, strict=True)
    draws = []
    for blueprint, weights, share, own in parts:
        each = math.ceil(n * share / mixtures.count(weights))
        plan = _Plan(blueprint, each, levels, steps)
        draws.append(
            _ensemble(plan, posterior.prior, weights, blueprint.select_features(features), own)
        )
    found = jnp.concatenate(draws)
    # what is left over by whole shares comes from any of the members alike
    return found[jax.random.permutation(order_key, len(found))[:n]]


class _Plan(NamedTuple):
    """What is static about the draws of an ensemble."""

    blueprint: Blueprint
    each: int
    levels: int
    steps: int


@partial(jax.jit, static_argnums=0)
@full_precision
def _ensemble(plan: _Plan, prior: Prior, weights: Weights, features: Array, key: Key) -> Array:
    """Draws (members * each, D), those of one member after those of another."""
    chunk = min(plan.each, max(1, ENTRIES // features.size))
    pieces = math.ceil(plan.each / chunk)

    def one(inputs: tuple[Weights, Key]) -> Array:
        own, keys = inputs
        model = nnx.merge(graph_of(plan.blueprint), *own)
        product = _Product.of(prior, model, features)
        draw = partial(_langevin, product, plan, model.density.path, chunk)
        y = jax.lax.map(draw, keys).reshape(pieces * chunk, -1)
        return prior.unchecked_from_standard(y)[: plan.each]

    members = mixtures.count(weights)
    theta = jax.lax.map(one, (weights, jax.random.split(key, (members, pieces))))
    return theta.reshape(members * plan.each, -1)


class _Product(NamedTuple):
    """Densities of noisy points, one an observation, and the prior that each of them counts.

    Attributes:
        prior: The prior.
        velocity: Velocity at points (n, N, d) and an angle.
        each: Maps from noise to standard coordinates, of batch shape (N,).
        middle: That of the mean observation, in whose noise the draws move: there their product is
            close to a Gaussian, and a face of the prior is far away.
        count: Number of observations N.
    """

    prior: Prior
    velocity: VelocityFunction
    each: distrax.Bijector
    middle: distrax.Bijector
    count: int

    @classmethod
    def of(cls, prior: Prior, model: Conditional, features: Array) -> _Product:
        """The product for observations of features (N, C)."""
        density = model.density
        assert isinstance(density, Matching)
        velocity = density.velocity(model.context(features), None)
        each, middle = model.start_bijector(features), model.start_bijector(features, at_mean=True)
        function = partial(velocity, arrays=velocity.arrays)
        return cls(prior, function, each, middle, len(features))

    def score(self, w: Array, angle: Array) -> Array:
        """Score of the product of what noisy points have for densities, at w (n, d)."""
        y = self.middle.forward(w)

        def parts(y: Array) -> tuple[Array, Array]:
            own = jnp.broadcast_to(y[:, None], (len(y), self.count, y.shape[1]))
            z, log_det = self.each.inverse_and_log_det(own)
            theta = self.prior.from_standard(y)
            prior = self.prior.log_prob(theta) + self.prior.standard_log_det(y, theta)
            return z, jnp.sum(log_det, axis=1) + (1 - self.count) * prior

        (z, log_density), pull = jax.vjp(parts, y)
        scores = score(z, self.velocity(z, angle), angle)
        return self._moved(y, pull((scores, jnp.ones_like(log_density)))[0])

    def _moved(self, y: Array, score: Array) -> Array:
        """A score (n, d) in standard coordinates, in those of the middle's noise."""
        (w, log_det), pull = jax.vjp(self.middle.inverse_and_log_det, y)
        # the density of w has one over the determinant of what leads to w
        score = score - pull((jnp.zeros_like(w), jnp.ones_like(log_det)))[0]
        rows = jnp.eye(w.shape[1], dtype=w.dtype)
        none = jnp.zeros_like(log_det)
        jacobian = jax.vmap(lambda row: pull((jnp.broadcast_to(row, w.shape), none))[0])(rows)
        # entry j of w depends on the entries of y up to j: dw_j / dy_i at (n, i, j)
        upper = jnp.moveaxis(jacobian, 0, -1)
        return jax.scipy.linalg.solve_triangular(upper, score[..., None])[..., 0]


def _langevin(product: _Product, plan: _Plan, path: Path, n: int, key: Key) -> Array:
    """Draws (n, d) in standard coordinates: from noise to data in levels of falling noise."""
    first, last = path.ends
    ratios = np.geomspace(FIRST, LAST, plan.levels)
    angles = jnp.clip(jnp.arctan2(1.0, jnp.asarray(ratios)), first, last)
    first_key, key = jax.random.split(key)
    w = jax.random.normal(first_key, (n, plan.blueprint.sizes.dim)) / math.sqrt(product.count)

    def step(w: Array, inputs: tuple[Array, Key]) -> tuple[Array, None]:
        angle, key = inputs
        # what one noisy density can have for curvature is at most one over its noise's variance
        variance = STEP * jnp.cos(angle) ** 2 / product.count
        noise = jax.random.normal(key, w.shape, w.dtype)
        drift = 0.5 * variance * product.score(w, angle)
        return w + drift + jnp.sqrt(variance) * noise, None

    angles = jnp.repeat(angles, plan.steps)
    w, _ = jax.lax.scan(step, w, (angles, jax.random.split(key, len(angles))))
    # the noise that is left goes along the ODE, in one step
    left = 0.5 * jnp.cos(angles[-1]) ** 2 / product.count
    return product.middle.forward(w + left * product.score(w, angles[-1]))
