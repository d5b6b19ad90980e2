"""Learning curve: would more simulations make the posterior better?

Public names: `learning_curve`, `LearningCurve`. Internal name: `extrapolate`.
"""

from __future__ import annotations

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
from sbi_flows.estimators.fit_warnings import outermost_fit
from sbi_flows.plots.curve import gain_curve
from sbi_flows.posteriors.fresh import hidden_as_in_fit
from sbi_flows.simulations.simulations import Simulations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)
"""Fractions of the training rows in the fits."""

FACTORS = (2, 4, 10)
"""Multiples of the present number of rows for which the gain is predicted."""

MIN_ROWS, MAX_HELD_OUT_ROWS, HELD_OUT_FRACTION = 1_000, 2_000, 0.2
"""Minimum number of valid rows; maximum number and fraction of rows that no fit trains on."""

FIT_SD = 0.02
"""Standard deviation of the gain between fits with different random keys, in nats."""

MIN_EXPONENT, MAX_EXPONENT = 0.3, 1.5
"""Range of the exponent of the power law; it is 1 for a regular parametric model."""

INTERVAL = (0.05, 0.95)
"""Quantiles of the interval of predicted gains."""


@dataclasses.dataclass(frozen=True, repr=False)
class LearningCurve:
    """Held-out log density against the number of simulations, and its extrapolation.

    Attributes:
        rows: Number of simulations of each of K fits, ascending, shape (K,).
        gain: Mean log density of the truths of held-out rows, posterior minus prior, in nats,
            shape (K,).
        error: Standard error of the difference between each gain and the last one, shape (K,).
        factors: Multiples of the largest number of simulations, shape (F,).
        rise: Predicted increase of the gain at each multiple, in nats: lower end, median and upper
            end of the 90% interval, shape (F, 3).
        num_held_out: Number of held-out rows.
        num_left_out: Number of held-out rows left out because the density of some fit is zero.
    """

    rows: np.ndarray
    gain: np.ndarray
    error: np.ndarray
    factors: np.ndarray
    rise: np.ndarray
    num_held_out: int
    num_left_out: int

    @property
    def verdict(self) -> str:
        """One sentence: would twice as many simulations make the posterior better?"""
        low, middle, high = self.rise[0]
        double = f"{2 * self.rows[-1]:,} simulations"
        if high < MIN_UNUSED:
            return f"enough simulations: with {double} the gain would rise by less than .05 nats"
        size = f"about {middle:.2g} nats ({low:.2g} to {high:.2g})"
        if low >= MIN_UNUSED:
            return f"more simulations help: with {double} the gain would rise by {size}"
        return f"cannot tell whether more simulations help: {double} would add {size}"

    def __repr__(self) -> str:
        """Return the verdict and a table of measured and predicted gains."""
        left = f"; {self.num_left_out} rows with zero density left out" * bool(self.num_left_out)
        more = [f"{f * self.rows[-1]:,} (predicted)" for f in self.factors]
        columns = {
            "gain (nats)": [
                *(f"{gain:.3f}" for gain in self.gain),
                *(f"{self.gain[-1] + middle:.3f}" for _, middle, _ in self.rise),
            ],
            "difference from the last fit": [
                *(
                    f"{gain - self.gain[-1]:+.3f} +- {error:.3f}"
                    for gain, error in zip(self.gain[:-1], self.error[:-1], strict=True)
                ),
                "",
                *(f"{low:+.3f} to {high:+.3f}" for low, _, high in self.rise),
            ],
        }
        rows = [*(f"{n:,}" for n in self.rows), *more]
        return f"{self.verdict}\n{self.num_held_out:,} held-out rows{left}\n{table(rows, columns)}"

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON data."""
        arrays = ("rows", "gain", "error", "factors", "rise")
        return {
            "verdict": self.verdict,
            **{name: getattr(self, name).tolist() for name in arrays},
            "num_held_out": self.num_held_out,
            "num_left_out": self.num_left_out,
        }

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Plot the gains of the fits and the predicted gains.

        Args:
            ax: Axes to draw on; new axes by default.
        """
        more = self.factors * self.rows[-1]
        return gain_curve(self.rows, self.gain, self.error, more, self.gain[-1] + self.rise, ax=ax)


def learning_curve(
    key: Key, estimator: Estimator, simulations: Simulations, *, progress: bool = True
) -> LearningCurve:
    """Fit to an eighth, a quarter, a half and all of the simulations, and extrapolate.

    A fifth of the rows (at most 2,000) is held out from all fits. The four fits together take about
    twice the time of the last one, plus compilation.

    The gain is extrapolated by a power law, gain(n) = limit - c n^-b, with all exponents b from .3
    to 1.5 and all c >= 0 equally likely beforehand. The limit is that of the estimator: another
    network, an embedding or summaries of x may have a higher one. `sf.check` tests for this.

    Args:
        key: Random key.
        estimator: Estimator such as `sf.NPE`. If it has a checkpoint folder, an interrupted call
            continues with the fit that was interrupted.
        simulations: At least 1,000 valid rows. Rows on disk are read into memory.
        progress: Show a progress bar.

    Raises:
        ValueError: There are too few valid rows.
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
    sims = _valid_rows(estimator, simulations)
    row_key, hide_key, fit_key = jax.random.split(key, 3)
    rng = np.random.default_rng(np.asarray(jax.random.bits(row_key, (4,))))
    order = rng.permutation(len(sims))
    count = min(MAX_HELD_OUT_ROWS, int(HELD_OUT_FRACTION * len(sims)))
    held_out, train = sims[np.sort(order[:count])], order[count:]
    sizes = [round(fraction * len(train)) for fraction in FRACTIONS]
    gains = np.stack(
        [
            _gains(
                jax.random.fold_in(fit_key, i),
                hide_key,
                estimator.with_checkpoint_folder(f"learning-curve-{size}"),
                sims[np.sort(train[:size])],
                held_out,
            )
            for i, size in enumerate(tqdm(sizes, desc="learning curve", disable=not progress))
        ]
    )
    finite = np.all(np.isfinite(gains), axis=0)
    if not np.any(finite):
        raise ValueError(
            f"simulations: expected finite densities of held-out rows, got none in {count:,} rows"
        )
    used = gains[:, finite]
    error = np.std(used - used[-1], axis=1) / np.sqrt(used.shape[1])
    rows, gain = np.array(sizes), used.mean(axis=1)
    return LearningCurve(
        rows=rows,
        gain=gain,
        error=error,
        factors=np.array(FACTORS),
        rise=extrapolate(rows, gain, error, np.array(FACTORS)),
        num_held_out=count,
        num_left_out=int(np.sum(~finite)),
    )


def extrapolate(
    rows: np.ndarray, gain: np.ndarray, error: np.ndarray, factors: np.ndarray
) -> np.ndarray:
    """Predict the increase of the gain at multiples of the largest number of rows.

    Args:
        rows: Numbers of rows n of K fits, ascending, shape (K,).
        gain: Gains in nats, shape (K,).
        error: Standard errors of the differences to the last gain, shape (K,).
        factors: Multiples of the largest number of rows, shape (F,).

    Returns:
        The 5%, 50% and 95% quantiles of the increase, shape (F, 3).
    """
    variance = np.square(error) + FIT_SD**2
    largest = 4.0 * float(np.ptp(gain)) + 10.0 * FIT_SD
    exponent = np.linspace(MIN_EXPONENT, MAX_EXPONENT, 25)[:, None]
    # the deficit of the last fit: how far it lies below the limit
    deficit = np.linspace(0.0, largest, 801)[None]
    shape = (rows / rows[-1]) ** -exponent[..., None]  # (25, 1, K)
    # residuals after the limit, which is uniform beforehand, is integrated out
    limits = gain + deficit[..., None] * shape  # (25, 801, K)
    centre = np.average(limits, axis=-1, weights=1.0 / variance)[..., None]
    log_weight = -0.5 * np.sum((limits - centre) ** 2 / variance, axis=-1)
    weight = np.exp(log_weight - log_weight.max()).ravel()
    rise = deficit[..., None] * (1.0 - factors ** -exponent[..., None])  # (25, 801, F)
    return np.stack([_quantiles(rise[..., f].ravel(), weight) for f in range(len(factors))])


def _quantiles(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return lower end, median and upper end of the interval of weighted values."""
    order = np.argsort(values)
    total = np.cumsum(weight[order])
    places = np.searchsorted(total, np.array([INTERVAL[0], 0.5, INTERVAL[1]]) * total[-1])
    return values[order][np.minimum(places, len(values) - 1)]


def _gains(
    key: Key, hide_key: Key, estimator: Estimator, train: Simulations, held_out: Simulations
) -> np.ndarray:
    """Fit, and return the log density of held-out rows, posterior minus prior, shape (V,)."""
    # inside `outermost_fit`, the fits give no warnings of their own
    with outermost_fit():
        posterior, history = estimator.fit(key, train, progress=False, summarise=False)
    if history.interrupted:
        raise KeyboardInterrupt
    hidden = hidden_as_in_fit(hide_key, posterior, held_out)
    log_prob = np.asarray(posterior.log_prob(hidden.theta, hidden.x), float)
    return log_prob - np.asarray(posterior.prior.log_prob(hidden.theta), float)


def _valid_rows(estimator: Estimator, simulations: Simulations) -> Simulations:
    """Return the valid rows.

    Raises:
        ValueError: An argument has the wrong type, or there are too few valid rows.
    """
    require_object("estimator", estimator, Estimator, "an estimator such as sf.NPE")
    require_object("simulations", simulations, Simulations, "sf.Simulations")
    for leaf in jax.tree.leaves(simulations.x):
        require_memory("simulations", leaf.shape, leaf.dtype)
    valid = simulations.aligned(estimator.prior).only_valid()
    if len(valid) < MIN_ROWS:
        raise ValueError(
            f"simulations: expected at least {MIN_ROWS:,} valid rows, got {len(valid)}"
        )
    return valid
