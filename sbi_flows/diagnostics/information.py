"""Test whether a posterior uses the information in the data.

A posterior that ignores the data can be calibrated. This test finds it: do the data predict where
the truth lies within the posterior?

Public name: `Information`. Internal names: `information_of`, `start_gain`, `late_gain`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import special
from threadpoolctl import threadpool_limits

from sbi_flows.core.tables import p_text
from sbi_flows.core.typing import Key, Obs
from sbi_flows.diagnostics.independence import Rows, dependence, detectable_nats
from sbi_flows.diagnostics.ranks import Ranks
from sbi_flows.diagnostics.sharpness import sharpness_of
from sbi_flows.diagnostics.summaries import summaries
from sbi_flows.diagnostics.uniformity import holm
from sbi_flows.estimators.fit_warnings import MIN_FALL, MIN_GAIN, fall_of

MIN_UNUSED = 0.05
"""Smallest unused information that is reported, in nats; one width is then about 5% too large."""

MAX_DETECTABLE = 0.25
"""If only larger amounts of unused information would be found, in nats, the test cannot tell."""

MAX_TEST_ROWS = 4_000
"""Maximum number of data sets that the test uses."""


@dataclasses.dataclass(frozen=True, repr=False)
class Information:
    """Information about the parameters that a posterior uses, and that it leaves unused.

    For an exact posterior, the rank of the truth among posterior draws is independent of the data.
    The test predicts normal scores of the ranks by regressions on the data and on summaries of the
    data: ridge regression, boosted trees and a small network. They are trained on some data sets
    and predict others. Scores that can be predicted contain information that the posterior does not
    use.

    Attributes:
        kind: "uses the data", "unused information", "no information" (the posterior equals the
            prior and no regression finds information either) or "cannot tell".
        labels: Names of the D parameters.
        unused_labels: Names of the parameters with unused information.
        unlearned: Names of the parameters whose posterior equals the prior.
        gain: Mean log density of the truth, posterior minus prior, in nats; NaN if the posterior
            has no normalised density, -inf if its density is zero at some truths.
        gain_error: Standard error of `gain`.
        start_gain: Gain over the linear-Gaussian start of the fit, in nats, on the rows that the
            fit held out; None if it is not known.
        late_gain: Increase of the held-out log density in the last tenth of the epochs, in nats,
            if training ended at `max_epochs`; None if it is not known.
        unused: Estimate of the unused information in nats: about all parameters jointly, or about
            one parameter if that is larger. Other regressions may find more.
        unused_error: Standard error of the joint estimate.
        p_value: P-value of each parameter, corrected for the number of tests (Holm), shape (D,).
        detectable: Amount of unused information, in nats, that the test finds in 95% of cases.
        level: Probability of reporting unused information for an exact posterior.

    References:
        Ramdas et al. 2023, Game-Theoretic Statistics and Safe Anytime-Valid Inference,
        arXiv:2210.01948 (the test, see `independence.dependence`).
    """

    kind: str
    labels: tuple[str, ...]
    unused_labels: tuple[str, ...]
    unlearned: tuple[str, ...]
    gain: float
    gain_error: float
    start_gain: float | None
    late_gain: float | None
    unused: float
    unused_error: float
    p_value: np.ndarray
    detectable: float
    level: float

    @property
    def only_linear(self) -> bool:
        """Return True if the network is not better than its linear-Gaussian start."""
        return self.start_gain is not None and self.start_gain < MIN_GAIN

    @property
    def verdict(self) -> str:
        """One sentence: does the posterior use the data?"""
        gain = _gain_text(self.gain)
        if self.kind == "unused information":
            found = (
                f"leaves information unused: about {_nats(self.unused)} nats or more, in "
                f"{', '.join(self.unused_labels)} (corrected p "
                f"{p_text(float(self.p_value.min()))}{'; ' * bool(gain)}{gain})"
            )
            return (
                f"learned nothing beyond the linear start and {found}" * self.only_linear or found
            )
        if self.kind == "cannot tell":
            return (
                "cannot tell whether it uses the data: with so few data sets, less than "
                f"{self.detectable:.2g} nats of unused information may be missed"
            )
        limit = f"a smooth dependence of {self.detectable:.2g} nats would be found"
        if self.kind == "no information":
            return (
                f"the posterior equals the prior, and no information is found in the data ({limit})"
            )
        nothing = f"; nothing learned about {', '.join(self.unlearned)}" * bool(self.unlearned)
        found = f"{gain}{', ' * bool(gain)}no unused information found ({limit})"
        linear = "; training did not improve on the linear start" * self.only_linear
        return f"uses the data: {found}{nothing}{linear}"

    @property
    def advice(self) -> tuple[str, ...]:
        """Recommended actions; empty if there are none."""
        late = ()
        if self.late_gain is not None and self.late_gain > MIN_FALL:
            late = (
                f"train longer: the held-out log density still rose by {self.late_gain:.2g} nats "
                "in the last epochs",
            )
        return (*filter(None, [self._advice]), *late)

    @property
    def _advice(self) -> str:
        if self.kind == "unused information":
            return (
                "give the estimator an embedding for this kind of data or summaries of x, a larger "
                "network or more simulations (sf.learning_curve predicts what these bring); see "
                "docs/trust.md"
            )
        if self.kind == "cannot tell":
            return f"check with more data sets: {self._rows_needed} or more"
        if self.kind == "no information":
            return "check that the simulator's output depends on the parameters"
        return ""

    @property
    def _rows_needed(self) -> int:
        return int(np.ceil(detectable_nats(1) / MAX_DETECTABLE / 10.0)) * 10

    def __repr__(self) -> str:
        """Return the verdict."""
        return self.verdict

    def to_dict(self) -> dict[str, Any]:
        """Return all results as JSON data."""
        names = ("kind", "gain", "gain_error", "start_gain", "late_gain", "unused")
        names += ("unused_error", "detectable")
        return {
            **{name: getattr(self, name) for name in names},
            "verdict": self.verdict,
            "unused_parameters": list(self.unused_labels),
            "p_values": dict(zip(self.labels, self.p_value.tolist(), strict=True)),
        }


def information_of(
    key: Key,
    ranks: Ranks,
    x: Obs,
    log_prior: np.ndarray,
    *,
    record: Mapping[str, Any],
    level: float,
) -> Information:
    """Test whether the posterior uses the information in the data.

    Args:
        key: Random key.
        ranks: Result of `draw_pass` with N data sets and `halves`.
        x: Their observations (N, *event).
        log_prior: Prior log density of the true parameters in nats, shape (N,).
        record: Record of the posterior's fit; empty if there is none.
        level: Probability of reporting unused information for an exact posterior.
    """
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    half, dim = ranks.half, len(ranks.labels)
    if half is None:
        raise ValueError("ranks: expected a draw pass with halves, got one without")
    some = np.sort(rng.permutation(len(half.theta))[:MAX_TEST_ROWS])
    scores = special.ndtri(np.concatenate([half.residual, half.uniform[:, 1:]], axis=1)[some])
    features = summaries(jax.tree.map(lambda a: np.asarray(a[some]), x))
    moments = (np.asarray(a[some], float) for a in (half.theta, half.mean, half.sd))
    # threads cost more than they gain for so few rows, and wait for each other on a busy machine;
    # the limit holds only for libraries that are loaded before
    importlib.import_module("sklearn.ensemble")
    importlib.import_module("sklearn.neural_network")
    with threadpool_limits(1):
        found = dependence(rng, Rows(features, scores, *moments))
    # residuals describe the parameters jointly; the first residual is the first parameter
    joint = found.terms[:, :dim].sum(axis=1)
    unused, error = float(joint.mean()), float(joint.std() / np.sqrt(len(joint)))
    detectable = detectable_nats(len(scores))
    adjusted = holm(found.p_value)
    p_value, names = _by_parameter(adjusted, ranks.labels, found.nats, level)
    gain, gain_error = _gain_over_prior(ranks, log_prior)
    kind, unlearned = "uses the data", sharpness_of(ranks).unlearned
    if names:
        unused = max(unused, float(found.nats[adjusted <= level].max()))
    if names and unused >= MIN_UNUSED:
        kind = "unused information"
    elif detectable > MAX_DETECTABLE:
        kind = "cannot tell"
    elif len(unlearned) == dim:
        kind = "no information"
    return Information(
        kind=kind,
        labels=ranks.labels,
        unlearned=unlearned,
        unused_labels=names if kind == "unused information" else (),
        gain=gain,
        gain_error=gain_error,
        start_gain=start_gain(record),
        late_gain=late_gain(record),
        unused=unused,
        unused_error=error,
        p_value=p_value,
        detectable=detectable,
        level=level,
    )


def start_gain(record: Mapping[str, Any]) -> float | None:
    """Return the gain over the linear start from a posterior's record, in nats; None if unknown."""
    history, estimator = record.get("history"), record.get("estimator")
    if not isinstance(history, Mapping) or not isinstance(estimator, Mapping):
        return None
    if history.get("likelihood") is not True or estimator.get("linear_start") is not True:
        return None
    start, best = history.get("start_loss"), history.get("mean_held_out_loss")
    try:
        gain = float(np.mean(np.asarray(start, float))) - float(best)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # the record of a file may hold anything
        return None
    return gain if np.isfinite(gain) else None


def late_gain(record: Mapping[str, Any]) -> float | None:
    """Return the increase of the held-out log density at the end of training, from a record.

    None if it is unknown, or if training ended for another reason than `max_epochs`.
    """
    history = record.get("history")
    if not isinstance(history, Mapping) or history.get("likelihood") is not True:
        return None
    if history.get("stop_reason") != "max_epochs":
        return None
    try:
        start = np.asarray(history.get("start_loss"), float)
        fall = fall_of(start, np.asarray(history.get("validation_loss"), float)).size
    except (TypeError, ValueError):  # the record of a file may hold anything
        return None
    return fall if np.isfinite(fall) else None


def _by_parameter(
    p: np.ndarray, labels: Sequence[str], nats: np.ndarray, level: float
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Combine the tests of a parameter: of its residual, and of the parameter itself.

    Returns:
        The smaller p-value of each parameter (D,), and the names of the parameters with unused
        information. If the test of some parameter itself rejects, those of residuals alone are not
        named: a residual also reflects the parameters that precede it.
    """
    dim = len(labels)
    residual, own = p[:dim], np.concatenate([p[:1], p[dim:]])
    own_nats = np.concatenate([nats[:1], nats[dim:]])
    smallest = np.minimum(residual, own)
    rejected = own <= level if np.any(own <= level) else residual <= level
    largest = own_nats[rejected].max(initial=0.0)
    # with enough data sets, tiny amounts are found in every parameter: name the largest
    named = rejected & ((own_nats >= 0.2 * largest) | (residual < own))
    order = [i for i in range(dim) if named[i]]
    return smallest, tuple(labels[i] for i in order)


def _gain_text(gain: float) -> str:
    """Describe the gain over the prior; empty if it is unknown."""
    if np.isnan(gain):
        return ""
    if gain == -np.inf:
        return "its density is zero at some truths"
    if gain < 0:
        return f"{_nats(-gain)} nats lost against the prior, because of its errors"
    return f"{_nats(gain)} nats gained over the prior"


def _nats(value: float) -> str:
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def _gain_over_prior(ranks: Ranks, log_prior: np.ndarray) -> tuple[float, float]:
    """Return the mean log density of the truths, posterior minus prior, and its standard error."""
    if ranks.log_prob is None:
        return float("nan"), float("nan")
    finite = np.isfinite(log_prior)
    gains = (np.asarray(ranks.log_prob, float) - log_prior)[finite]
    if len(gains) < 2 or np.any(np.isnan(gains)):
        return float("nan"), float("nan")
    if np.any(gains == -np.inf):
        return -float("inf"), float("nan")
    return float(gains.mean()), float(gains.std(ddof=1) / np.sqrt(len(gains)))
