"""Recalibration by ranks: draws are moved so that every parameter's ranks are uniform.

Public names: `recalibrate`, `RecalibratedPosterior`.

At a data set x a smooth map T_x, taken from the posterior's draws there, brings each parameter to
scores z in which it is about standard normal. Over all data sets, H takes the quantiles of the
scores of draws to those of the scores of true parameters; it is the identity where the posterior
is right. A draw theta is moved to T_x(H(T_x^-1(theta))). For a posterior that is 1.5 times too
narrow H(z) = 1.5 z, for one that lies a standard deviation too high H(z) = z - 1; other shapes are
corrected as well. H is the same at all data sets, T_x is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.typing import Key, Obs
from sbi_flows.posteriors.base import Derived, PosteriorLike
from sbi_flows.posteriors.codec_calibrated import Calibration, calibrated_layer, calibration_of
from sbi_flows.posteriors.codec_recalibrated import RECALIBRATED, quantiles_in
from sbi_flows.posteriors.passes import chunks_of, usable
from sbi_flows.posteriors.quantile_maps import Quantiles, quantile_map, quantiles_of
from sbi_flows.posteriors.writing import content_of
from sbi_flows.prior.maps import HALF_WIDTH
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations

SMOOTH = {"spacing": 0.75, "furthest": 1.5}
"""Knots of T_x: the fewer they are, the less of its noise is in the density."""

COMPARED = 20
"""Draws at each data set, other ones than those of T_x, whose scores truths are compared with."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RecalibratedPosterior(Derived):
    """A posterior whose draws are those of another, moved parameter by parameter.

    Its density is that of the moved draws exactly. T_x is taken from draws at x by a key of this
    object's own, so that answers are the same every time; for one observation and for a batch that
    holds it the draws, and so T_x, differ a little.

    Attributes:
        posterior: The posterior that it was made of.
        correction: H, for each of the d coordinates.
        num_simulations: Calibration data sets N.
        num_failed: Simulations left out because they failed.
        draws: Draws at each data set that T_x is taken from.
        record: What is known of it beyond the record of that posterior.
    """

    posterior: PosteriorLike
    correction: Quantiles
    num_simulations: int
    num_failed: int
    draws: int
    _key: Key
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        """What it was made of."""
        return (
            f"RecalibratedPosterior({self.posterior}, ranks of {self.num_simulations:,} "
            f"simulations, {self.num_failed:,} failed)"
        )

    def sample(self, key: Key, x: Obs, n: int) -> Array:
        """Draw as `Posterior.sample` does: (n, D), or (B, n, D) for a batch."""
        theta = self.posterior.sample(key, x, n)
        return self._moved(theta, x)[0]

    def sample_and_log_prob(self, key: Key, x: Obs, n: int) -> tuple[Array, Array]:
        """Draw as `sample` does, with the log density (n,) or (B, n) of each draw."""
        theta, log_prob = self.posterior.sample_and_log_prob(key, x, n)
        moved, log_det = self._moved(theta, x)
        return moved, log_prob - log_det

    def log_prob(self, theta: Any, x: Obs) -> Array:
        """Log density in the parameters' own units, as `Posterior.log_prob` says.

        Args:
            theta: For one observation: shape (*, D). For a batch: (B, D) or (B, n, D).
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Shape of theta without its last axis; -inf outside the prior's support.

        Raises:
            ValueError: A shape does not fit.
        """
        inside = self.prior.contains(theta)
        theta = jnp.asarray(theta, jnp.result_type(float))
        safe = jnp.where(inside[..., None], theta, self.prior.center(inside.shape))
        origin, log_det = self._moved(safe, x, back=True)
        return jnp.where(inside, self.posterior.log_prob(origin, x) + log_det, -jnp.inf)

    codec: ClassVar[LayerCodec] = RECALIBRATED

    def to_saved(self) -> SavedPosterior:
        """Return what a file says of the posterior.

        Raises:
            ValueError: A part of the posterior cannot be written.
        """
        counts = (self.num_simulations, self.num_failed, self.draws)
        calibration = Calibration(*counts, self._key, self.record)
        arrays = {name: np.asarray(knots) for name, knots in self.correction._asdict().items()}
        layer = calibrated_layer(RECALIBRATED, calibration, arrays)
        return content_of(self.posterior).derive(layer)

    @classmethod
    def from_layer(cls, posterior: PosteriorLike, layer: Layer) -> RecalibratedPosterior:
        """Rebuild the posterior from what a file says of it, and the posterior that it was made of.

        Args:
            posterior: The posterior that it was made of.
            layer: What was read from the file.
        """
        num_simulations, num_failed, draws, key, record = calibration_of(layer)
        counts = (num_simulations, num_failed, draws)
        facts = MappingProxyType(dict(record))
        return cls(posterior, quantiles_in(layer), *counts, key, facts)

    def _moved(self, theta: Array, x: Obs, *, back: bool = False) -> tuple[Array, Array]:
        """Moved parameters, the shape of theta, and the log determinants (*)."""
        draws = self.posterior.sample(self._key, x, self.draws)
        draws = draws.reshape(-1, *draws.shape[-2:])
        if theta.size % draws[:, 0].size:
            raise ValueError(
                f"theta: expected {len(draws)} rows as there are observations, got {theta.shape}"
            )
        rows = theta.reshape(len(draws), -1, self.prior.dim)
        moved, log_det = _move(self.prior, self.correction, draws, rows, back)
        return moved.reshape(theta.shape), log_det.reshape(theta.shape[:-1])


def recalibrate(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 1_000,
    progress: bool = False,
) -> RecalibratedPosterior:
    """Correct each parameter of a posterior by the ranks of truths in simulations.

    Repairs what `sbc` finds: posteriors that are too narrow or too wide, shifted or mis-shaped in
    the same way at all data sets. Each parameter's quantiles are then right on average over data
    sets from the prior (those whose simulation is valid), to within the 1 / sqrt(N) of any N
    simulations; at a single observation they need not be. Dependences between parameters stay as
    they were, in ranks, so that joint regions need not be right; `conformal` on top of this makes
    sets that are. A posterior that was right already gets a little worse, by the noise of the
    correction: about .01 nats a parameter with 200 simulations.

    Args:
        key: Random key.
        posterior: The posterior to correct.
        simulations: Fresh pairs (theta, x) from the prior and the simulator, not those that it was
            trained on; failed rows are left out and counted.
        draws: Draws of the posterior at each data set, at least 20, now and in every later call.
        progress: Show a progress bar.

    Returns:
        A posterior to draw from, with a density. Where the prior's support has fewer degrees of
        freedom than entries (a simplex), its standard coordinates are corrected, not the entries.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or parameters of
            another width than the posterior's.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Kuleshov, Fenner & Ermon 2018, Accurate Uncertainties for Deep Learning Using Calibrated
        Regression, arXiv:1807.00263, algorithm 1; here with quantiles that go on beyond the draws.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Uniform(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.1 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 600)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(
        ...     jax.random.key(1), sims[:500], progress=False
        ... )
        >>> better = sf.recalibrate(jax.random.key(2), posterior, sims[500:], draws=200)
        >>> better.sample(jax.random.key(3), sims.x[0], 5).shape
        (5, 2)
    """
    valid = usable(posterior, simulations, draws)
    own, key = jax.random.split(key)
    numbers, found = draws * valid.theta.shape[1], []
    for chunk_key, rows, kept in chunks_of(key, len(valid), numbers, "calibrate", progress):
        part = valid[rows]
        sample = posterior.sample(chunk_key, part.x, draws + COMPARED)
        found.append(np.asarray(_scores(posterior.prior, sample, part.theta))[:kept])
    scores = np.concatenate(found)
    bad = int(np.sum(~np.isfinite(scores).all(axis=(1, 2))))
    if bad:
        raise SbiFlowsError(
            f"the posterior of {bad} of {len(scores)} data sets gave draws that are not finite"
        )
    by_coordinate = jnp.moveaxis(jnp.asarray(scores), 1, 0)
    drawn = by_coordinate[:, :, 1:].reshape(len(by_coordinate), -1)
    correction = quantile_map(drawn, by_coordinate[:, :, 0])
    failed = len(simulations) - len(valid)
    return RecalibratedPosterior(posterior, correction, len(valid), failed, draws, own)


@jax.jit
def _scores(prior: Prior, draws: Array, theta: Array) -> Array:
    """Scores (B, d, 1 + m) of true parameters (B, D), and of m of the draws (B, n + m, D)."""
    compared = jnp.concatenate([theta[:, None], draws[:, :COMPARED]], axis=1)
    values = jnp.swapaxes(_free(prior, compared)[0], 1, 2)
    return _by_coordinate(prior, draws[:, COMPARED:]).score(values)[0]


@partial(jax.jit, static_argnums=4)
def _move(
    prior: Prior, correction: Quantiles, draws: Array, theta: Array, back: bool
) -> tuple[Array, Array]:
    """Move parameters (B, n, D), or back to where they came from; log determinants (B, n)."""
    u, into = _free(prior, theta)
    own = _by_coordinate(prior, draws)
    z, first = own.score(jnp.swapaxes(u, 1, 2))
    h = Quantiles(correction.scores[None], correction.values[None])
    z, second = h.score(z) if back else h.value(z)
    v, third = own.value(z)
    moved, out = _bound(prior, jnp.swapaxes(v, 1, 2))
    return moved, jnp.sum(first + second + third, axis=1) + out - into


def _by_coordinate(prior: Prior, draws: Array) -> Quantiles:
    """Quantiles (B, d, K) of draws (B, n, D), coordinate by coordinate."""
    return quantiles_of(jnp.swapaxes(_free(prior, draws)[0], 1, 2), **SMOOTH)


def _free(prior: Prior, theta: Array) -> tuple[Array, Array]:
    """Coordinates (*, d) that fill R^d, and the log determinant (*) of the way back."""
    y = prior.to_standard(theta)
    inside = 0.5 * (y / HALF_WIDTH + 1.0)
    eps = jnp.finfo(y.dtype).eps
    free = jnp.where(_bounded(prior, y), ndtri(jnp.clip(inside, eps, 1.0 - eps)), y)
    return free, _log_det(prior, free, theta)


def _bound(prior: Prior, free: Array) -> tuple[Array, Array]:
    """The way back from `_free`: parameters (*, D), and its log determinant (*)."""
    theta = prior.from_standard(_standard(prior, free))
    return theta, _log_det(prior, free, theta)


def _standard(prior: Prior, free: Array) -> Array:
    return jnp.where(_bounded(prior, free), HALF_WIDTH * (2.0 * ndtr(free) - 1.0), free)


def _log_det(prior: Prior, free: Array, theta: Array) -> Array:
    squeeze = math.log(2.0 * HALF_WIDTH) + norm.logpdf(free)
    squeezed = jnp.sum(jnp.where(_bounded(prior, free), squeeze, 0.0), axis=-1)
    return squeezed + prior.standard_log_det(_standard(prior, free), theta)


def _bounded(prior: Prior, like: Array) -> Array:
    return jnp.broadcast_to(jnp.asarray(prior.bounded), like.shape)
