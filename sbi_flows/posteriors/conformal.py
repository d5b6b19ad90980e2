"""Conformal sets: regions of high density whose coverage equals their stated level.

Public names: `conformal`, `ConformalPosterior`.

At each data set, the negative log density of the true parameters is ranked among the negative log
densities of posterior draws. The rank, expressed as a normal quantile, is the score of the data
set. The scores of the calibration data sets and of a new data set are exchangeable for any
posterior. A new score is therefore at most the k-th smallest of N scores with probability at least
k / (N + 1), and exactly k / (N + 1) if no scores are equal.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.pytrees import is_traced, register_pytree
from sbi_flows.core.record import ReadOnlyDict
from sbi_flows.core.typing import Key, Obs
from sbi_flows.posteriors.adapter import PosteriorLike, as_posterior
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.codec_calibrated import Calibration, calibrated_layer, calibration_of
from sbi_flows.posteriors.codec_conformal import CONFORMAL
from sbi_flows.posteriors.derived import Derived
from sbi_flows.posteriors.passes import chunks_of, continuous_ranks, usable
from sbi_flows.posteriors.quantile_maps import quantiles_of
from sbi_flows.posteriors.reuse import warn_of_reuse
from sbi_flows.posteriors.writing import content_of
from sbi_flows.simulations.fingerprints import UsedRows
from sbi_flows.simulations.simulations import Simulations, observation_shape


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ConformalPosterior(Derived):
    """Posterior with credible sets whose coverage was measured on simulations.

    Draws and densities are those of the base posterior. The set with coverage `level` is a region
    of highest density of the base posterior. That region's level is adjusted to give the coverage.

    Attributes:
        posterior: The base posterior.
        scores: Scores of the calibration data sets, increasing, shape (N,).
        num_failed: Number of simulations that failed and were left out.
        draws: Number of posterior draws at each data set. The log density of given parameters is
            ranked among the log densities of these draws.
        record: Facts about the calibration, in addition to the base posterior's record.
        calibration_rows: Fingerprints of the calibration simulations; None if not known.
    """

    posterior: AbstractPosterior
    scores: np.ndarray
    num_failed: int
    draws: int
    _key: Key
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    calibration_rows: UsedRows | None = None

    codec: ClassVar[LayerCodec] = CONFORMAL

    @property
    def num_simulations(self) -> int:
        """Number N of calibration data sets."""
        return len(self.scores)

    def __repr__(self) -> str:
        """Show the base posterior, and the levels of its regions used as conformal sets."""
        if is_traced(self.scores):
            return f"ConformalPosterior({self.posterior})"
        levels = [c for c in (0.5, 0.8, 0.95) if c <= _largest(self.num_simulations)]
        sets = ", ".join(f"{c:.0%} is its {self.level(c):.2%}" for c in levels)
        return (
            f"ConformalPosterior({self.posterior}, calibrated on {self.num_simulations:,} "
            f"simulations, {self.num_failed:,} failed; regions of highest density: {sets})"
        )

    @property
    def used_rows(self) -> UsedRows | None:
        """Fingerprints of the simulations that the fit and the corrections used."""
        rows = self.posterior.used_rows
        return rows if self.calibration_rows is None else self.calibration_rows.union(rows)

    @property
    def has_own_regions(self) -> bool:
        """Always True: the credible regions are the conformal sets."""
        return True

    def is_single(self, x: Obs) -> bool:
        """Return whether x is one observation, not a batch; raise ValueError if it is neither."""
        return self.posterior.is_single(x)

    def spaces(self, x: Obs) -> tuple[np.ndarray, ...]:
        """Return features (B, C) and, if there is an embedding, its output (B, F)."""
        return self.posterior.spaces(x)

    def present_fraction(self, x: Obs) -> np.ndarray | None:
        """Return the fraction of entries that each observation has; None if none may be missing."""
        return self.posterior.present_fraction(x)

    def to_saved(self) -> SavedPosterior:
        """Return the data that `save` writes to the file.

        Raises:
            ValueError: A part of the posterior cannot be saved.
        """
        counts = (self.num_simulations, self.num_failed, self.draws)
        calibration = Calibration(*counts, self._key, self.record, self.calibration_rows)
        arrays = {"scores": np.asarray(self.scores, np.float64)}
        return content_of(self.posterior).derive(calibrated_layer(CONFORMAL, calibration, arrays))

    @classmethod
    def from_layer(cls, posterior: AbstractPosterior, layer: Layer) -> ConformalPosterior:
        """Rebuild a conformal posterior from its layer in a file.

        Args:
            posterior: The base posterior.
            layer: The layer.
        """
        _, num_failed, draws, key, record, rows = calibration_of(layer)
        facts = ReadOnlyDict(record)
        return cls(posterior, layer.tensors["scores"], num_failed, draws, key, facts, rows)

    def _bind(self, x: Obs) -> tuple[Any, bool]:
        return self.posterior._bind(x)

    def level(self, level: float) -> float:
        """Return the level of the base posterior's region of highest density with coverage `level`.

        Args:
            level: Probability that a set contains the true parameters, at most N / (N + 1).

        Returns:
            The level of the region. It is larger than `level` if the base posterior is
            over-confident.

        Raises:
            ValueError: The level is not between 0 and 1, or is above N / (N + 1).
        """
        return float(special.ndtr(self._bound(level)))

    def contains(self, theta: Any, x: Obs, level: float) -> Array:
        """Return whether parameters are in the set with coverage `level`.

        The set of a larger level contains the sets of all smaller levels. The density of the
        parameters is ranked among the densities of posterior draws. These draws are made with a
        stored random key, so that repeated calls give the same result. For parameters at the edge
        of a set, the result for a single observation may differ from the result for the same
        observation in a batch.

        Args:
            theta: As for `Posterior.log_prob`.
            x: One observation (*event) or a batch (B, *event).
            level: Probability that a set contains the true parameters.

        Returns:
            Bool, with the shape of theta without its last axis.

        Raises:
            ValueError: An argument is invalid; see `level` and `log_prob`.
            SbiFlowsError: The base posterior returned NaN.
        """
        bound = self._bound(level)
        return self.score(theta, x) <= bound

    def score(self, theta: Any, x: Obs) -> Array:
        """Compute the score of theta at x.

        The negative log density of theta is ranked among the negative log densities of posterior
        draws at x. The score is this rank, expressed as a normal quantile.

        Args:
            theta: As for `Posterior.log_prob`.
            x: One observation (*event) or a batch (B, *event).

        Returns:
            Scores, with the shape of theta without its last axis; infinite outside the prior's
            support.

        Raises:
            SbiFlowsError: The base posterior returned NaN.
        """
        return _score(self._key, self.posterior, theta, x, self.draws)

    def credible_levels(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return the level of the smallest set that contains each true theta.

        Args:
            key: Random key. The scores determine a level only up to an interval of width
                1 / (N + 1); the level is drawn uniformly from this interval.
            theta: The true parameter vector of each observation, shape (B, D).
            x: A batch (B, *event).

        Returns:
            Levels in (0, 1), shape (B,). They are uniformly distributed if theta comes from the
            prior and x from the simulator.
        """
        new = _scores(self._key, self.posterior, Simulations(theta, x), self.draws)
        below = np.searchsorted(self.scores, new, side="left")
        equal = np.searchsorted(self.scores, new, side="right") - below
        return continuous_ranks(key, below, equal, self.num_simulations)

    def density_ranks(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Return `credible_levels`, which was called `density_ranks` in earlier versions."""
        return self.credible_levels(key, theta, x)

    def _bound(self, level: float) -> Any:
        """Return the largest score in the set with coverage `level`."""
        n = self.num_simulations
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number between 0 and 1, got {level}")
        if level > _largest(n):
            raise ValueError(
                f"level: expected at most {_largest(n):.4g}, the most that {n} calibration "
                f"simulations allow, got {level}"
            )
        return self.scores[order_of(level, n) - 1]


register_pytree(
    ConformalPosterior,
    leaves=("posterior", "scores", "_key"),
    static=("draws", "num_failed"),
    facts={"record": {}, "calibration_rows": None},
)


def conformal(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 200,
    progress: bool = False,
) -> ConformalPosterior:
    """Calibrate credible sets with guaranteed coverage on held-out simulations.

    This is split conformal prediction. The set of level c contains the true parameters with
    probability ceil((N + 1) c) / (N + 1), for any N and any posterior. This probability is an
    average over valid data sets simulated from the prior, over calibration simulations and over
    random keys. For one given collection of N calibration simulations, the coverage differs from
    this average; the standard deviation is about sqrt(c (1 - c) / (N + 2)). Nothing is guaranteed
    at a single observation: sets may be too small for some data sets and too large for others. The
    sets of a poor posterior are large.

    Args:
        key: Random key.
        posterior: The base posterior; its density need not be normalised.
        simulations: New pairs (theta, x) from the prior and the simulator; failed simulations are
            left out and counted. Do not use training simulations: the sets would be too small.
        draws: Number of posterior draws at each data set, at least 20, among which the true
            parameters are ranked by density. The coverage is also right for few draws, but the
            sets are then somewhat larger.
        progress: Show a progress bar.

    Returns:
        A posterior with `contains(theta, x, level)`.

    Raises:
        ValueError: Fewer than 50 simulations succeeded, `draws` is below 20, or the number of
            parameters differs from the posterior's.
        SbiFlowsError: The base posterior returned NaN.

    References:
        Lei et al. 2018, Distribution-Free Predictive Inference for Regression, arXiv:1604.04173,
        theorem 2. Vovk 2012, Conditional validity of inductive conformal predictors,
        arXiv:1209.2673 (for the standard deviation of the coverage).

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 600)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(
        ...     jax.random.key(1), sims[:500], progress=False
        ... )
        >>> sets = sf.conformal(jax.random.key(2), posterior, sims[500:])
        >>> sets.contains(jax.numpy.array([[0.0, 0.0], [0.0, 9.0]]), jax.numpy.zeros(2), 0.9)
        Array([ True, False], dtype=bool)
    """
    posterior = as_posterior(posterior, observation_shape(simulations.x))
    valid = usable(posterior, simulations, draws)
    warn_of_reuse(posterior, simulations, "simulations")
    rank_key, key = jax.random.split(key)
    scores = np.sort(_scores(key, posterior, valid, draws, progress=progress))
    counts = (len(simulations) - len(valid), draws)
    rows = UsedRows.of(valid, posterior.prior)
    return ConformalPosterior(posterior, scores, *counts, rank_key, calibration_rows=rows)


def order_of(level: float, n: int) -> int:
    """Return the smallest k for which the k-th smallest of n scores gives coverage `level`.

    Example:
        >>> order_of(0.9, 9), order_of(0.5, 100)
        (9, 51)
    """
    # subtract 1e-9 because rounding may put the product slightly above an integer
    return math.ceil((n + 1) * level - 1e-9)


def _largest(n: int) -> float:
    return n / (n + 1)


def _scores(
    key: Key,
    posterior: AbstractPosterior,
    simulations: Simulations,
    draws: int,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Compute the scores (N,) of the true parameters of N data sets, in chunks of equal length."""
    entries, chunks = draws * simulations.theta.shape[1], []
    for chunk_key, rows, count in chunks_of(key, len(simulations), entries, "calibrate", progress):
        part = simulations[rows]
        chunks.append(np.asarray(_score(chunk_key, posterior, part.theta, part.x, draws))[:count])
    return np.concatenate(chunks).astype(np.float64)


def _score(key: Key, posterior: AbstractPosterior, theta: Any, x: Obs, draws: int) -> Array:
    log_prob = posterior.log_prob(theta, x)
    others = posterior.sample_and_log_prob(key, x, draws)[1]
    scores = _ranked(log_prob, others)
    if not is_traced(scores) and bool(jnp.any(jnp.isnan(scores))):
        raise SbiFlowsError("the posterior gave NaN, or draws without a density")
    return scores


@jax.jit
def _ranked(log_prob: Array, others: Array) -> Array:
    """Compute the scores of `log_prob` (*), ranked among log densities of draws (n,) or (B, n)."""
    batch = others.shape[:-1]
    rows = -log_prob.reshape((*batch, -1))
    return quantiles_of(-others).score(rows)[0].reshape(log_prob.shape)
