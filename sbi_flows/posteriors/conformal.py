"""Conformal sets: regions of high density that hold the truth as often as they say.

Public names: `conformal`, `ConformalPosterior`.

How unlikely a truth is under its posterior is its score: the normal score of its log density among
those of draws at the same data set. Scores of calibration data sets and of a new one are
exchangeable, whatever the posterior is; so the k-th smallest of N of them bounds a new one with
probability k / (N + 1), neither less nor, without ties, more.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import special

from sbi_flows.artefact.layers import Layer, LayerCodec, SavedPosterior
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.typing import Key, Obs
from sbi_flows.posteriors.base import Derived, PosteriorLike
from sbi_flows.posteriors.codec_calibrated import Calibration, calibrated_layer, calibration_of
from sbi_flows.posteriors.codec_conformal import CONFORMAL
from sbi_flows.posteriors.passes import chunks_of, continuous_ranks, usable
from sbi_flows.posteriors.quantile_maps import quantiles_of
from sbi_flows.posteriors.writing import content_of
from sbi_flows.simulations.simulations import Simulations


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ConformalPosterior(Derived):
    """A posterior with credible sets that were measured on simulations.

    Draws and densities are those of the posterior that it was made of. Its sets are that one's
    regions of highest density, of another level than their own.

    Attributes:
        posterior: The posterior that it was made of.
        scores: Scores of the calibration data sets, increasing, shape (N,).
        num_failed: Simulations left out because they failed.
        draws: Draws that a density is ranked among.
        record: What is known of it beyond the record of that posterior.
    """

    posterior: PosteriorLike
    scores: np.ndarray
    num_failed: int
    draws: int
    _key: Key
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_simulations(self) -> int:
        """Number N of calibration data sets."""
        return len(self.scores)

    def __repr__(self) -> str:
        """What it was made of, and what its sets amount to."""
        levels = [c for c in (0.5, 0.8, 0.95) if c <= _largest(self.num_simulations)]
        sets = ", ".join(f"{c:.0%} is its {self.level(c):.2%}" for c in levels)
        return (
            f"ConformalPosterior({self.posterior}, calibrated on {self.num_simulations:,} "
            f"simulations, {self.num_failed:,} failed; regions of highest density: {sets})"
        )

    def sample(self, key: Key, x: Obs, n: int) -> Array:
        """Draws of the posterior that it was made of, (n, D) or (B, n, D): uncorrected."""
        return self.posterior.sample(key, x, n)

    def log_prob(self, theta: Any, x: Obs) -> Array:
        """Log density of the posterior that it was made of: uncorrected."""
        return self.posterior.log_prob(theta, x)

    def sample_and_log_prob(self, key: Key, x: Obs, n: int) -> tuple[Array, Array]:
        """Draws with their log densities, both uncorrected."""
        return self.posterior.sample_and_log_prob(key, x, n)

    def level(self, level: float) -> float:
        """Level of the posterior's own region of highest density that is the set of `level`.

        Args:
            level: Probability that a set holds the truth, at most N / (N + 1).

        Returns:
            More than `level` where the posterior is over-confident.

        Raises:
            ValueError: A level outside (0, 1), or one that takes more simulations.
        """
        return float(special.ndtr(self._bound(level)))

    def contains(self, theta: Any, x: Obs, level: float) -> Array:
        """Whether parameters are in the set of `level`.

        The sets of a larger level hold those of a smaller. Densities are ranked among draws by a
        key of this object's own: the answer is the same every time, but at the edge of a set not
        always for one observation and for a batch that holds it.

        Args:
            theta: As for `Posterior.log_prob`.
            x: One observation (*event) or a batch (B, *event).
            level: Probability that a set holds the truth.

        Returns:
            Bool, the shape of theta without its last axis.

        Raises:
            ValueError: As `level` and `log_prob` do.
            SbiFlowsError: The posterior gave NaN.
        """
        bound = self._bound(level)
        return self.score(theta, x) <= bound

    def score(self, theta: Any, x: Obs) -> Array:
        """Normal score of the negative log density of theta among those of draws at x.

        Args:
            theta: As for `Posterior.log_prob`.
            x: One observation (*event) or a batch (B, *event).

        Returns:
            The shape of theta without its last axis; infinite outside the prior's support.

        Raises:
            SbiFlowsError: The posterior gave NaN.
        """
        return _score(self._key, self.posterior, theta, x, self.draws)

    def density_ranks(self, key: Key, theta: Any, x: Obs) -> np.ndarray:
        """Level of the smallest set that holds each truth; `coverage` and `check` ask for it.

        Args:
            key: Random key: places a level within its step of 1 / (N + 1).
            theta: One parameter vector for each observation, shape (B, D).
            x: A batch (B, *event).

        Returns:
            Values in (0, 1), shape (B,), uniform for truths from the prior.
        """
        new = _scores(self._key, self.posterior, Simulations(theta, x), self.draws)
        below = np.searchsorted(self.scores, new, side="left")
        equal = np.searchsorted(self.scores, new, side="right") - below
        return continuous_ranks(key, below, equal, self.num_simulations)

    codec: ClassVar[LayerCodec] = CONFORMAL

    def to_saved(self) -> SavedPosterior:
        """Return what a file says of the posterior.

        Raises:
            ValueError: A part of the posterior cannot be written.
        """
        counts = (self.num_simulations, self.num_failed, self.draws)
        calibration = Calibration(*counts, self._key, self.record)
        arrays = {"scores": np.asarray(self.scores)}
        return content_of(self.posterior).derive(calibrated_layer(CONFORMAL, calibration, arrays))

    @classmethod
    def from_layer(cls, posterior: PosteriorLike, layer: Layer) -> ConformalPosterior:
        """Rebuild the posterior from what a file says of it, and the posterior that it was made of.

        Args:
            posterior: The posterior that it was made of.
            layer: What was read from the file.
        """
        _, num_failed, draws, key, record = calibration_of(layer)
        facts = MappingProxyType(dict(record))
        return cls(posterior, layer.tensors["scores"], num_failed, draws, key, facts)

    def _bound(self, level: float) -> float:
        """The largest score inside the set of a level."""
        n = self.num_simulations
        if not 0 < level < 1:
            raise ValueError(f"level: expected a number between 0 and 1, got {level}")
        if level > _largest(n):
            raise ValueError(
                f"level: expected at most {_largest(n):.4g}, which {n} calibration simulations "
                f"can vouch for, got {level}"
            )
        return float(self.scores[order_of(level, n) - 1])


def conformal(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    *,
    draws: int = 200,
    progress: bool = False,
) -> ConformalPosterior:
    """Credible sets with the coverage that they promise, from simulations that were not trained on.

    On average over data sets from the prior (those whose simulation is valid), over calibration
    simulations and over keys, the set of a level c holds the truth with probability
    ceil((N + 1) c) / (N + 1), at any N and however wrong the posterior is: split conformal
    prediction. With the N simulations at hand it does so with a probability that scatters around
    that by sqrt(c (1 - c) / (N + 2)). Nothing is said of a single observation: at some the sets may
    be too small, as long as they are too large at others. A poor posterior has large sets.

    Args:
        key: Random key.
        posterior: The posterior to correct; its density may be unnormalised.
        simulations: Fresh pairs (theta, x) from the prior and the simulator; failed rows are left
            out and counted. Those that the posterior was trained on would make sets too small.
        draws: Draws of the posterior at each data set, at least 20, among whose densities that of
            the truth is ranked. Fewer are as safe, and somewhat larger sets.
        progress: Show a progress bar.

    Returns:
        A posterior with `contains(theta, x, level)`.

    Raises:
        ValueError: Fewer than 50 simulations that succeeded, fewer than 20 draws, or parameters of
            another width than the posterior's.
        SbiFlowsError: The posterior gave NaN.

    References:
        Lei et al. 2018, Distribution-Free Predictive Inference for Regression, arXiv:1604.04173,
        theorem 2. Vovk 2012, Conditional validity of inductive conformal predictors,
        arXiv:1209.2673 (the scatter).

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
    valid = usable(posterior, simulations, draws)
    own, key = jax.random.split(key)
    scores = _scores(key, posterior, valid, draws, progress=progress)
    return ConformalPosterior(posterior, np.sort(scores), len(simulations) - len(valid), draws, own)


def order_of(level: float, n: int) -> int:
    """Which of n scores, by size, bounds a new one with a probability of at least `level`.

    Example:
        >>> order_of(0.9, 9), order_of(0.5, 100)
        (9, 51)
    """
    # a product that rounding lifted above a whole number is that number
    return math.ceil((n + 1) * level - 1e-9)


def _largest(n: int) -> float:
    return n / (n + 1)


def _scores(
    key: Key,
    posterior: PosteriorLike,
    simulations: Simulations,
    draws: int,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Scores of the truths of N data sets, shape (N,), in chunks of one shape."""
    numbers, found = draws * simulations.theta.shape[1], []
    for own, rows, kept in chunks_of(key, len(simulations), numbers, "calibrate", progress):
        part = simulations[rows]
        found.append(np.asarray(_score(own, posterior, part.theta, part.x, draws))[:kept])
    return np.concatenate(found).astype(np.float64)


def _score(key: Key, posterior: PosteriorLike, theta: Any, x: Obs, draws: int) -> Array:
    log_prob = posterior.log_prob(theta, x)
    others = posterior.sample_and_log_prob(key, x, draws)[1]
    scores = _ranked(log_prob, others)
    if bool(jnp.any(jnp.isnan(scores))):
        raise SbiFlowsError("the posterior gave NaN, or draws without a density")
    return scores


@jax.jit
def _ranked(log_prob: Array, others: Array) -> Array:
    """Normal scores (*) of negative log densities among those of draws (n,), or (B, n) each."""
    batch = others.shape[:-1]
    rows = -log_prob.reshape((*batch, -1))
    return quantiles_of(-others).score(rows)[0].reshape(log_prob.shape)
