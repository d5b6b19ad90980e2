"""Learning curve: would more simulations make the posterior better?

Public names: `learning_curve`, `LearningCurve`. Internal name: `extrapolate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.checks import require_memory, require_object
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.information import MIN_UNUSED
from sbi_flows.estimators.base import Estimator
from sbi_flows.estimators.fit_warnings import MIN_GAIN, outermost_fit
from sbi_flows.observations.standardise import rows_on_host
from sbi_flows.plots.curve import gain_curve
from sbi_flows.posteriors.adapter import as_posterior
from sbi_flows.posteriors.base import AbstractPosterior
from sbi_flows.posteriors.fresh import hidden_as_in_fit
from sbi_flows.simulations.simulations import Simulations, observation_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Fractions of the training rows in the fits."""

FACTORS = (2, 4, 10)
"""Multiples of the number of simulations for which the gain is predicted."""

MIN_ROWS, MAX_HELD_OUT_ROWS, HELD_OUT_FRACTION = 1_000, 2_000, 0.2
"""Minimum number of valid rows; maximum number and fraction of rows that no fit trains on."""

FIT_SD = 0.02
"""Standard deviation of the gain between fits to all training rows with different keys, in nats.

It is larger for fewer rows, in proportion to their number to the power -1/2.
"""

MIN_EXPONENT, MAX_EXPONENT = 0.3, 1.5
"""Range of the exponent of the power law; it is 1 for a regular parametric model."""

INTERVAL = (0.05, 0.95)
"""Quantiles of the interval of predicted gains."""

MAX_MISFIT = 9.0
"""Maximum squared distance of the gains from the best power law, in standard deviations."""

MAX_LEFT_OUT = 0.01
"""Maximum fraction of held-out rows with zero density."""


@dataclasses.dataclass(frozen=True, repr=False)
class LearningCurve:
    """Held-out log density against the number of simulations, and its extrapolation.

    Attributes:
        rows: Number of simulations of each of K fits, ascending, shape (K,).
        gain: Mean log density of the truths of held-out rows, posterior minus prior, in nats,
            shape (K,).
        error: Standard error of the difference between each gain and the last one, shape (K,).
        more: Larger numbers of simulations: all N, then 2 N, 4 N and 10 N, shape (F,).
        predicted: Predicted gain with each of them, in nats: lower end, median and upper end of
            the 90% interval, shape (F, 3).
        rise: Predicted gain with 2 N simulations minus that with N: lower end, median and upper
            end, shape (3,).
        misfit: Squared distance of the gains from the best power law, in standard deviations.
        num_held_out: Number of held-out rows.
        num_left_out: Number of these rows left out because the density of some fit is zero.
    """

    rows: np.ndarray
    gain: np.ndarray
    error: np.ndarray
    more: np.ndarray
    predicted: np.ndarray
    rise: np.ndarray
    misfit: float
    num_held_out: int
    num_left_out: int

    @property
    def doubt(self) -> str:
        """Reason why the prediction cannot be trusted; empty if there is none."""
        if self.gain[-1] < MIN_GAIN:
            return "the fits learned nothing from x"
        if self.num_left_out > MAX_LEFT_OUT * self.num_held_out:
            return f"the density of {self.num_left_out:,} held-out rows is zero"
        if self.misfit > MAX_MISFIT:
            return "the gains do not follow a power law"
        return ""

    @property
    def is_steepening(self) -> bool:
        """Return True if the last doubling of the simulations raised the gain most.

        A power law then predicts too little, because it flattens.
        """
        rises = np.diff(self.gain[-3:])
        return bool(rises[1] >= rises[0])

    @property
    def verdict(self) -> str:
        """One sentence: would twice as many simulations make the posterior better?"""
        if self.doubt:
            return f"cannot tell whether more simulations help: {self.doubt}"
        low, middle, high = self.rise
        double = f"{self.more[1]:,} simulations"
        if high < MIN_UNUSED:
            least = f"{MIN_UNUSED:.2g} nats"
            return f"enough simulations: with {double} the gain would rise by less than {least}"
        size = f"about {middle:.2g} nats ({low:.2g} to {high:.2g})"
        if low >= MIN_UNUSED and self.is_steepening:
            return (
                f"more simulations help: with {double} the gain would rise by {low:.2g} nats or "
                "more; the curve does not flatten yet"
            )
        if low >= MIN_UNUSED:
            return f"more simulations help: with {double} the gain would rise by {size}"
        return f"cannot tell whether more simulations help: {double} would add {size}"

    def __repr__(self) -> str:
        """Return the verdict and a table of measured and predicted gains."""
        left = f", {self.num_left_out} with zero density left out" * bool(self.num_left_out)
        measured = (
            f"{gain - self.gain[-1]:+.3f} +- {error:.3f}"
            for gain, error in zip(self.gain[:-1], self.error[:-1], strict=True)
        )
        columns = {
            "gain (nats)": [
                *(f"{gain:.3f}" for gain in self.gain),
                *(f"{low:.3f} to {high:.3f}, predicted" for low, _, high in self.predicted),
            ],
            "difference from the last fit": [*measured, *[""] * (1 + len(self.more))],
        }
        rows = [f"{n:,}" for n in (*self.rows, *self.more)]
        return f"{self.verdict}\n{self.num_held_out:,} held-out rows{left}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON data."""
        arrays = ("rows", "gain", "error", "more", "predicted", "rise")
        numbers = ("misfit", "num_held_out", "num_left_out")
        return {
            "verdict": self.verdict,
            **{name: getattr(self, name).tolist() for name in arrays},
            **{name: getattr(self, name) for name in numbers},
        }

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Plot the gains of the fits and the predicted gains.

        Args:
            ax: Axes to draw on; new axes by default.
        """
        return gain_curve(self.rows, self.gain, self.error, self.more, self.predicted, ax=ax)


def learning_curve(
    key: Key, estimator: Estimator, simulations: Simulations, *, progress: bool = True
) -> LearningCurve:
    """Fit to parts of the simulations, and predict the effect of more simulations.

    A fifth of the simulations (at most 2,000) is held out. The fits are to an eighth, a quarter, a
    half and all of the others. The gain is the mean log density of the truth, posterior minus
    prior, on held-out rows. Every fit compiles programs for its own number of rows.

    A power law, gain(n) = limit - c n^-b, is fitted to the gains. The exponent b is uniform
    beforehand on .3 to 1.5. The limit is that of the estimator: another network, an embedding or
    summaries of x may have a higher one. `sf.check` tests whether x contains information that the
    posterior does not use.

    Args:
        key: Random key.
        estimator: Estimator such as `sf.NPE` or `sf.Stack`; not `sf.Encoded`. If it has a
            checkpoint folder, a call with the same key and simulations as an interrupted one
            continues with the fit that was interrupted.
        simulations: At least 1,000 valid rows. Rows on disk are read into memory.
        progress: Show a progress bar.

    Raises:
        ValueError: There are too few valid rows, or a fit refuses the simulations.
        KeyboardInterrupt: A fit was interrupted.

    References:
        Hestness et al. 2017, Deep Learning Scaling is Predictable, Empirically, arXiv:1712.00409
        (the power law).

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([2])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (2,))
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> sims = sf.simulate(keys[0], prior, noisy, 1_000, progress=False)
        >>> flow, quick = sf.MAF(transforms=1), sf.Training(max_epochs=1)
        >>> npe = sf.NPE(prior, flow, training=quick, members=1)
        >>> curve = sf.learning_curve(keys[1], npe, sims, progress=False)
        >>> curve.rows.tolist()
        [100, 200, 400, 800]
    """
    sims = _checked(estimator, simulations)
    split_key, hide_key, fit_key = jax.random.split(key, 3)
    parts, held_out = _split(split_key, sims)
    sizes = [part.num_valid for part in parts]
    gains = []
    for i, part in enumerate(tqdm(parts, desc="learning curve", disable=not progress)):
        own = estimator.with_checkpoint_folder(f"learning-curve-{sizes[i]}")
        # only the last fit, to most simulations, warns of problems
        with contextlib.nullcontext() if i == len(parts) - 1 else outermost_fit():
            posterior, history = own.fit(
                jax.random.fold_in(fit_key, i), part, progress=False, summarise=False
            )
        if history.interrupted:
            raise KeyboardInterrupt
        hidden = hidden_as_in_fit(hide_key, posterior, held_out)
        gains.append(_gains(as_posterior(posterior, observation_shape(hidden.x)), hidden))
    return _curve(np.array(sizes), np.stack(gains), sims.num_valid)


def _curve(rows: np.ndarray, gains: np.ndarray, total: int) -> LearningCurve:
    """Make a learning curve.

    Args:
        rows: Numbers of rows of K fits, shape (K,).
        gains: Log densities of V held-out truths, posterior minus prior, shape (K, V).
        total: Number of all valid simulations.
    """
    finite = np.all(np.isfinite(gains), axis=0)
    used = gains[:, finite]
    if used.shape[1] < 2:
        raise ValueError(
            f"simulations: expected finite densities of held-out rows, got {used.shape[1]} in "
            f"{gains.shape[1]:,} rows"
        )
    gain, covariance = used.mean(axis=1), np.cov(used) / used.shape[1]
    more = total * np.array([1, *FACTORS])
    rises, misfit = extrapolate(rows, gain, covariance, int(rows[-1]), more)
    return LearningCurve(
        rows=rows,
        gain=gain,
        error=np.std(used - used[-1], axis=1) / np.sqrt(used.shape[1]),
        more=more,
        predicted=gain[-1] + rises,
        rise=extrapolate(rows, gain, covariance, total, more[1:2])[0][0],
        misfit=misfit,
        num_held_out=gains.shape[1],
        num_left_out=int(np.sum(~finite)),
    )


def extrapolate(
    rows: np.ndarray, gain: np.ndarray, covariance: np.ndarray, start: int, more: np.ndarray
) -> tuple[np.ndarray, float]:
    """Predict the increase of the gain from `start` rows to larger numbers of rows.

    Args:
        rows: Numbers of rows of K fits, ascending, shape (K,).
        gain: Gains in nats, shape (K,).
        covariance: Covariance of the errors of the gains, shape (K, K).
        start: Number of rows from which the increase counts.
        more: Larger numbers of rows, shape (F,).

    Returns:
        The 5%, 50% and 95% quantiles of the increase, shape (F, 3), and the squared distance of the
        gains from the best power law, in standard deviations.
    """
    precision = np.linalg.inv(covariance + np.diag(FIT_SD**2 * rows[-1] / rows))
    spread = float(np.ptp(gain)) + 2.0 * float(np.sqrt(np.max(np.diag(covariance)))) + FIT_SD
    exponent = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 25)[:, None]
    # the deficit of the last fit: how far it lies below the limit; uniform beforehand
    deficit = np.concatenate([[0.0], np.geomspace(1e-4, 4.0 * spread, 400)])
    limits = gain + deficit[:, None] * ((rows / rows[-1]) ** -exponent)[:, None]  # (25, 401, K)
    # the limit is uniform beforehand, and integrated out
    centre = (limits @ precision).sum(axis=-1) / precision.sum()
    residual = limits - centre[..., None]
    distance = np.sum((residual @ precision) * residual, axis=-1)
    weight = (np.exp(-0.5 * (distance - distance.min())) * np.gradient(deficit)).ravel()
    share = (start / rows[-1]) ** -exponent - (more / rows[-1]) ** -exponent  # (25, F)
    rise = deficit[:, None] * share[:, None]  # (25, 401, F)
    quantiles = [_quantiles(rise[..., f].ravel(), weight) for f in range(len(more))]
    return np.stack(quantiles), float(distance.min())


def _quantiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return lower end, median and upper end of the interval of weighted values."""
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    places = np.searchsorted(total, np.array([INTERVAL[0], 0.5, INTERVAL[1]]) * total[-1])
    return values[order][np.minimum(places, len(values) - 1)]


def _gains(posterior: AbstractPosterior, held_out: Simulations) -> np.ndarray:
    """Return the log density of held-out truths, posterior minus prior, shape (V,)."""
    log_prob = np.asarray(posterior.log_prob(held_out.theta, held_out.x), float)
    return log_prob - np.asarray(posterior.prior.log_prob(held_out.theta), float)


def _checked(estimator: Estimator, simulations: Simulations) -> Simulations:
    """Return the simulations with the parameters in the prior's order.

    Raises:
        ValueError: An argument has the wrong type, or there are too few valid rows.
    """
    require_object("estimator", estimator, Estimator, "an estimator such as sf.NPE")
    require_object("simulations", simulations, Simulations, "sf.Simulations")
    for leaf in jax.tree.leaves(simulations.x):
        require_memory("simulations", leaf.shape, leaf.dtype)
    count = simulations.num_valid
    if count < MIN_ROWS:
        raise ValueError(f"simulations: expected at least {MIN_ROWS:,} valid rows, got {count:,}")
    return simulations.aligned(estimator.prior)


def _split(key: Key, sims: Simulations) -> tuple[list[Simulations], Simulations]:
    """Return the rows of each fit, and held-out rows.

    Every part has its share of failed rows, because an emulator makes parameters rare where
    simulations fail.
    """
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    valid = np.asarray(sims.valid)
    rows, failed = (rng.permutation(np.flatnonzero(v)) for v in (valid, ~valid))
    count = min(MAX_HELD_OUT_ROWS, int(HELD_OUT_FRACTION * len(rows)))
    train = rows[count:]
    places = [
        np.concatenate([each[: round(fraction * len(each))] for each in (train, failed)])
        for fraction in FRACTIONS
    ]
    parts = [sims[np.sort(chosen)] for chosen in places]
    held_out = sims[np.sort(rows[:count])]
    return parts, held_out[_has_known_gaps(parts[0], held_out)] if sims.missing else held_out


def _has_known_gaps(smallest: Simulations, held_out: Simulations) -> np.ndarray:
    """Return which held-out rows lack only entries that some row of the smallest part lacks.

    A fit refuses an observation without an entry that none of its simulations lacked.
    """
    known = np.isnan(rows_on_host(smallest.only_valid().x)).any(axis=0)
    return ~np.any(np.isnan(rows_on_host(held_out.x)) & ~known, axis=1)
