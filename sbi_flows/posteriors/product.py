"""Score of the product of posteriors at several observations of one parameter vector.

Internal name: `Product`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
from jax import Array

from sbi_flows.densities.conditional import Conditional
from sbi_flows.densities.matching import Matching
from sbi_flows.densities.samplers import VelocityFunction, score
from sbi_flows.prior.prior import Prior


class Product(NamedTuple):
    """Product of the posteriors at N observations, divided by the prior to the power N - 1.

    Attributes:
        prior: The prior.
        velocity: Velocity as a function of points (n, N, d) and an angle (the position on the path
            from noise to data).
        each: Map from noise coordinates to standard coordinates, one for each observation: batch
            shape (N,).
        middle: Map from noise coordinates to standard coordinates for the mean observation.
            Langevin dynamics runs in the noise coordinates of `middle`, where the product is close
            to a Gaussian and the bounds of the prior are far away.
        count: Number of observations N.
    """

    prior: Prior
    velocity: VelocityFunction
    each: distrax.Bijector
    middle: distrax.Bijector
    count: int

    @classmethod
    def of(cls, prior: Prior, model: Conditional, features: Array) -> Product:
        """Build the product for observations with features (N, C)."""
        density = model.density
        assert isinstance(density, Matching)
        velocity = density.velocity(model.context(features), None)
        each, middle = model.start_bijector(features), model.start_bijector(features, at_mean=True)
        function = partial(velocity, arrays=velocity.arrays)
        return cls(prior, function, each, middle, len(features))

    def score(self, w: Array, angle: Array) -> Array:
        """Compute the score (n, d) of the product at points w (n, d).

        Points and score are in the noise coordinates of `middle`; `angle` gives the noise level.
        """
        y = self.middle.forward(w)

        def parts(y: Array) -> tuple[Array, Array]:
            points = jnp.broadcast_to(y[:, None], (len(y), self.count, y.shape[1]))
            z, log_det = self.each.inverse_and_log_det(points)
            theta = self.prior.unchecked_from_standard(y)
            prior = self.prior.unchecked_log_prob(theta) + self.prior.unchecked_log_det(y, theta)
            return z, jnp.sum(log_det, axis=1) + (1 - self.count) * prior

        (z, log_density), pull = jax.vjp(parts, y)
        scores = score(z, self.velocity(z, angle), angle)
        return self._moved(y, pull((scores, jnp.ones_like(log_density)))[0])

    def _moved(self, y: Array, score: Array) -> Array:
        """Transform a score (n, d) from standard coordinates to noise coordinates of `middle`."""
        (w, log_det), pull = jax.vjp(self.middle.inverse_and_log_det, y)
        # change of variables: the density of w has the inverse determinant
        score = score - pull((jnp.zeros_like(w), jnp.ones_like(log_det)))[0]
        rows = jnp.eye(w.shape[1], dtype=w.dtype)
        none = jnp.zeros_like(log_det)
        jacobian = jax.vmap(lambda row: pull((jnp.broadcast_to(row, w.shape), none))[0])(rows)
        # entry j of w depends on the entries of y up to j: dw_j / dy_i at (n, i, j)
        upper = jnp.moveaxis(jacobian, 0, -1)
        return jax.scipy.linalg.solve_triangular(upper, score[..., None])[..., 0]
