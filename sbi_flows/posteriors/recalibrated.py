"""Recalibration by ranks: move draws so that the ranks of each parameter are uniform.

Public names: `recalibrate`, `RecalibratedPosterior`.

At a data set x, a smooth map T_x takes standard normal scores z to each parameter; it is made of
the posterior's draws at x. Over all data sets, a map H takes quantiles of the scores of draws to
the quantiles of the scores of true parameters; it is the identity for a calibrated posterior. A
draw theta is moved to T_x(H(T_x^-1(theta))). For a posterior that is 1.5 times too narrow,
H(z) = 1.5 z; for one that lies a standard deviation too high, H(z) = z - 1; other shapes are
corrected as well. H is the same at all data sets, T_x is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtr, ndtri
from jax.scipy.stats import norm

from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.pytrees import register_pytree
from sbi_flows.core.typing import Key, Obs
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior
from sbi_flows.posteriors.base import AbstractPosterior, Derived
from sbi_flows.posteriors.codec_calibrated import Calibration, calibrated_layer, calibration_of
from sbi_flows.posteriors.codec_recalibrated import RECALIBRATED, quantiles_in
from sbi_flows.posteriors.passes import chunks_of, usable
from sbi_flows.posteriors.quantile_maps import Quantiles, quantile_map, quantiles_of
from sbi_flows.posteriors.writing import content_of
from sbi_flows.prior.maps import HALF_WIDTH
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations, observation_shape

SMOOTH = {"spacing": 0.75, "furthest": 1.5}
"""Knots of T_x: few knots keep the noise of its draws out of the density."""

COMPARED_DRAWS = 20
"""Number of further draws at each data set, whose scores are compared with those of truths."""


class _Bound(NamedTuple):
    """What is kept of observations.

    Attributes:
        inner: What the posterior within keeps.
        draws: Its draws that T_x is made of, shape (B, m, D).
    """

    inner: Any
    draws: Array


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RecalibratedPosterior(Derived):
    """Posterior whose draws are those of another one, moved parameter by parameter.

    Its density is exactly that of the moved draws. T_x is made of draws at x with a random key that
    belongs to this object, so that answers are the same every time; the draws, and so T_x, differ
    a little between one observation and a batch that contains it.

    Attributes:
        posterior: The posterior that is corrected.
        correction: H, for each of the d standard coordinates.
        num_simulations: Number N of calibration data sets.
        num_failed: Number of simulations that failed and were left out.
        draws: Number of draws at each data set that T_x is made of.
        record: Facts beyond the record of that posterior.
    """

    posterior: AbstractPosterior
    correction: Quantiles
    num_simulations: int
    num_failed: int
    draws: int
    _key: Key
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    codec: ClassVar[LayerCodec] = RECALIBRATED

    def __repr__(self) -> str:
        """The corrected posterior, and the number of calibration data sets."""
        return (
            f"RecalibratedPosterior({self.posterior}, ranks of {self.num_simulations:,} "
            f"simulations, {self.num_failed:,} failed)"
        )

    @property
    def has_own_regions(self) -> bool:
        """False: credible regions are those of highest density."""
        return False

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Raise ValueError: only a posterior with credible regions of its own gives levels."""
        raise ValueError("posterior: expected one with credible regions of its own")

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""
        return self.posterior.is_single(x)

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (B, C) and, with an embedding, the output (B, F) of its first member."""
        return self.posterior.spaces(x)

    def to_saved(self) -> SavedPosterior:
        """Return the content of a file of this posterior.

        Raises:
            ValueError: A part of the posterior cannot be written.
        """
        counts = (self.num_simulations, self.num_failed, self.draws)
        calibration = Calibration(*counts, self._key, self.record)
        arrays = {name: np.asarray(knots) for name, knots in self.correction._asdict().items()}
        layer = calibrated_layer(RECALIBRATED, calibration, arrays)
        return content_of(self.posterior).derive(layer)

    @classmethod
    def from_layer(cls, posterior: AbstractPosterior, layer: Layer) -> RecalibratedPosterior:
        """Rebuild a posterior from its layer of a file.

        Args:
            posterior: The posterior within.
            layer: The layer.
        """
        num_simulations, num_failed, draws, key, record = calibration_of(layer)
        counts = (num_simulations, num_failed, draws)
        facts = MappingProxyType(dict(record))
        return cls(posterior, quantiles_in(layer), *counts, key, facts)

    def _bind(self, x: Obs) -> tuple[_Bound, bool]:
        inner, single = self.posterior._bind(x)
        draws = self.posterior._sample(self._key, inner, self.draws, False)[0]
        return _Bound(inner, draws), single

    def _features_of(self, bound: _Bound) -> Array:
        return self.posterior._features_of(bound.inner)

    def _sample(self, key: Key, bound: _Bound, n: int, with_log_prob: bool) -> tuple[Array, Array]:
        theta, log_prob = self.posterior._sample(key, bound.inner, n, with_log_prob)
        moved, log_det = _move(self.prior, self.correction, bound.draws, theta, False)
        return moved, log_prob - log_det if with_log_prob else log_prob

    def _log_prob(self, theta: Array, bound: _Bound) -> Array:
        inside = self.prior.contains(theta)
        safe = jnp.where(inside[..., None], theta, self.prior.center(inside.shape))
        origin, log_det = _move(self.prior, self.correction, bound.draws, safe, True)
        log_prob = self.posterior._log_prob(origin, bound.inner) + log_det
        return jnp.where(inside, log_prob, -jnp.inf)

    def _standard_log_prob(self, y: Array, bound: _Bound) -> Array:
        return self._log_prob(self.prior.from_standard(y)[:, None], bound)[:, 0]


register_pytree(
    RecalibratedPosterior,
    leaves=("posterior", "correction", "_key"),
    static=("draws", "num_simulations", "num_failed"),
    facts={"record": {}},
)


def recalibrate(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 1_000,
    progress: bool = False,
) -> RecalibratedPosterior:
    """Correct each parameter of a posterior by the ranks of true parameters in simulations.

    This repairs the errors that `sbc` finds: a posterior that is too narrow, too wide, shifted or
    mis-shaped in the same way at all data sets. Afterwards the quantiles of each parameter are
    right on average over data sets from the prior (those whose simulation is valid), to within a
    statistical error of about 1 / sqrt(N) for N simulations. At a single observation they need not
    be. The dependence between parameters is unchanged in ranks, so joint regions need not be
    right: apply `conformal` to the result for joint regions. A posterior that was calibrated
    already gets a little worse, by the noise of the correction: about .01 nats a parameter with 200
    simulations.

    Args:
        key: Random key.
        posterior: The posterior to correct.
        simulations: Fresh pairs (theta, x) from the prior and the simulator, not the training
            simulations; failed rows are left out and counted.
        draws: Number of draws of the posterior at each data set, at least 20, for this fit and for
            every later observation.
        progress: Show a progress bar.

    Returns:
        The corrected posterior. Where the prior's support has fewer degrees of freedom than entries
        (a simplex), its standard coordinates are corrected, not the entries.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or parameters of
            another width than the posterior's.
        SbiFlowsError: The posterior gave draws that are not finite.

    References:
        Kuleshov, Fenner & Ermon 2018, Accurate Uncertainties for Deep Learning Using Calibrated
        Regression, arXiv:1807.00263, algorithm 1; here quantiles are extrapolated beyond the draws.

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
    posterior = as_posterior(posterior, observation_shape(simulations.x))
    valid = usable(posterior, simulations, draws)
    map_key, key = jax.random.split(key)
    entries, chunks = draws * valid.theta.shape[1], []
    for chunk_key, rows, count in chunks_of(key, len(valid), entries, "calibrate", progress):
        part = valid[rows]
        sample = posterior.sample(chunk_key, part.x, draws + COMPARED_DRAWS)
        chunks.append(np.asarray(_scores(posterior.prior, sample, part.theta))[:count])
    scores = np.concatenate(chunks)
    bad = int(np.sum(~np.isfinite(scores).all(axis=(1, 2))))
    if bad:
        raise SbiFlowsError(
            f"the posterior of {bad} of {len(scores)} data sets gave draws that are not finite"
        )
    by_coordinate = jnp.moveaxis(jnp.asarray(scores), 1, 0)
    drawn = by_coordinate[:, :, 1:].reshape(len(by_coordinate), -1)
    correction = quantile_map(drawn, by_coordinate[:, :, 0])
    failed = len(simulations) - len(valid)
    return RecalibratedPosterior(posterior, correction, len(valid), failed, draws, map_key)


@jax.jit
def _scores(prior: Prior, draws: Array, theta: Array) -> Array:
    """Compute scores (B, d, 1 + m) of truths (B, D) and of m of the draws (B, n + m, D)."""
    compared = jnp.concatenate([theta[:, None], draws[:, :COMPARED_DRAWS]], axis=1)
    values = jnp.swapaxes(_free(prior, compared)[0], 1, 2)
    return _by_coordinate(prior, draws[:, COMPARED_DRAWS:]).score(values)[0]


@partial(jax.jit, static_argnums=4)
def _move(
    prior: Prior, correction: Quantiles, draws: Array, theta: Array, back: bool
) -> tuple[Array, Array]:
    """Move parameters (B, n, D) forward or back; return them with log determinants (B, n)."""
    u, into = _free(prior, theta)
    at_x = _by_coordinate(prior, draws)
    z, first = at_x.score(jnp.swapaxes(u, 1, 2))
    h = Quantiles(correction.scores[None], correction.values[None])
    z, second = h.score(z) if back else h.value(z)
    v, third = at_x.value(z)
    moved, out = _bound(prior, jnp.swapaxes(v, 1, 2))
    return moved, jnp.sum(first + second + third, axis=1) + out - into


def _by_coordinate(prior: Prior, draws: Array) -> Quantiles:
    """Compute the quantiles (B, d, K) of draws (B, n, D), coordinate by coordinate."""
    return quantiles_of(jnp.swapaxes(_free(prior, draws)[0], 1, 2), **SMOOTH)


def _free(prior: Prior, theta: Array) -> tuple[Array, Array]:
    """Return unconstrained coordinates (*, d), and the log determinant (*) of the inverse map."""
    y = prior.to_standard(theta)
    inside = 0.5 * (y / HALF_WIDTH + 1.0)
    eps = jnp.finfo(y.dtype).eps
    free = jnp.where(_bounded(prior, y), ndtri(jnp.clip(inside, eps, 1.0 - eps)), y)
    return free, _log_det(prior, free, theta)


def _bound(prior: Prior, free: Array) -> tuple[Array, Array]:
    """Invert `_free`: return parameters (*, D), and the log determinant (*)."""
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
