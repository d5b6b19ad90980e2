"""Errors of a posterior near one observation, and a sentence that describes them.

The classifiers test whether true parameters and posterior draws differ. This module measures the
differences in mean, width and correlation. Permuted labels give the null distribution of these
differences.

Internal names: `LocalPairs`, `LocalErrors`, `errors_of`, `findings_of`, `verdict_of`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sbi_flows.core.tables import p_text
from sbi_flows.diagnostics import verdict
from sbi_flows.diagnostics.verdict import BIASED, OVER, SHAPE, UNDER, Finding

CURVE_POINTS = 20
"""Number of groups of sorted draws, along each parameter, in which probabilities are averaged."""

MIN_EFFECT, MIN_RELATIVE_Z = 0.05, 0.2
"""Minimum size of a reported effect, and its minimum z-score relative to the largest z-score."""

MAX_NAMED_PAIRS = 3
"""Largest number of pairs with a wrong correlation that a verdict names."""


class LocalPairs(NamedTuple):
    """Truths and posterior draws for the k data sets nearest to an observation.

    Attributes:
        truth: Truths in posterior standard deviations from the posterior mean, shape (k, D).
        draw: Draws in the same units, shape (k, D).
        weight: Weight of each data set, shape (k,).
        is_swapped: True where the labels of a pair are swapped, shape (k, 1 + P). The first column
            is False everywhere; the others are P permutations.
    """

    truth: np.ndarray
    draw: np.ndarray
    weight: np.ndarray
    is_swapped: np.ndarray


@dataclasses.dataclass(frozen=True)
class LocalErrors:
    """Errors of D parameters and their pairs near one observation.

    An effect is a shift, the logarithm of a width, or a correlation; there are
    E = 2 D + D (D - 1) / 2 of them, in this order.

    Attributes:
        shift: Posterior mean minus true mean in posterior standard deviations, shape (D,).
        width: Posterior width divided by correct width, shape (D,).
        correlation: Posterior correlation minus true correlation of each pair, shape
            (D (D - 1) / 2,).
        z: Z-scores of the effects, shape (E,). Permuted labels give the mean and the standard
            deviation that define a z-score.
        p: P-values of the effects, corrected for the number of effects (max-T), shape (E,).
        points: Means of each parameter in K equal groups of its sorted draws, shape (D, K).
        curve: Mean probability of "true parameter" in each of these K groups, shape (D, K).
        band: 5% and 95% quantiles of the curves under permuted labels, shape (2, D, K).
    """

    shift: np.ndarray
    width: np.ndarray
    correlation: np.ndarray
    z: np.ndarray
    p: np.ndarray
    points: np.ndarray
    curve: np.ndarray
    band: np.ndarray

    @property
    def p_shift(self) -> np.ndarray:
        """Corrected p-values of the shifts, shape (D,)."""
        return self.p[: len(self.shift)]

    @property
    def p_width(self) -> np.ndarray:
        """Corrected p-values of the widths, shape (D,)."""
        return self.p[len(self.shift) : 2 * len(self.shift)]

    @property
    def sure(self) -> np.ndarray:
        """Z-scores of the effects, shape (E,); `z` under its earlier name."""
        return self.z


def errors_of(pairs: LocalPairs, draws: np.ndarray, probability: np.ndarray) -> LocalErrors:
    """Compute the errors at one observation.

    Args:
        pairs: Truths and draws for the nearest data sets.
        draws: Posterior draws at the observation, shape (n, D).
        probability: Probability that each draw is a true parameter, shape (n, 1 + P). The first
            column is from the classifier of true labels, the others are from classifiers of
            permuted labels.

    References:
        Westfall & Young 1993, Resampling-Based Multiple Testing (the max-T correction).
    """
    dim = draws.shape[1]
    effects = _effects(pairs)
    null_mean, null_sd = effects[1:].mean(axis=0), np.maximum(effects[1:].std(axis=0), 1e-12)
    # The p-values use moments that include the true labels, so that all rows are exchangeable.
    z = np.abs(effects - effects.mean(axis=0)) / np.maximum(effects.std(axis=0), 1e-12)
    num_larger = np.sum(z[1:].max(axis=1)[:, None] >= z[0], axis=0)
    points, curves = _mean_curves(draws, probability)
    return LocalErrors(
        shift=effects[0, :dim],
        width=np.exp(effects[0, dim : 2 * dim]),
        correlation=effects[0, 2 * dim :],
        z=(effects[0] - null_mean) / null_sd,
        p=(1 + num_larger) / len(effects),
        points=points,
        curve=curves[..., 0],
        band=np.quantile(curves[..., 1:], (0.05, 0.95), axis=-1),
    )


def _effects(pairs: LocalPairs) -> np.ndarray:
    """Compute shift, log width and correlation of draws relative to truths, shape (1 + P, E)."""
    dim = pairs.truth.shape[1]
    indices = np.triu_indices(dim, 1)
    truth, draw = (_monomials(z, indices) for z in (pairs.truth, pairs.draw))
    weight = (pairs.weight / pairs.weight.sum())[:, None]
    # A swapped pair adds this difference to the truths' mean and subtracts it from the draws'.
    moved = pairs.is_swapped.T.astype(float) @ (weight * (draw - truth))
    truth_means = np.sum(weight * truth, axis=0) + moved
    draw_means = np.sum(weight * draw, axis=0) - moved
    mean, sd, correlation = _moments(truth_means, indices, dim)
    draw_mean, draw_sd, draw_correlation = _moments(draw_means, indices, dim)
    # Divide by the sd of these draws, because the sd from the few draws of a frame is inaccurate.
    shift, log_width = (draw_mean - mean) / draw_sd, np.log(draw_sd / sd)
    return np.concatenate([shift, log_width, draw_correlation - correlation], axis=1)


def _monomials(z: np.ndarray, indices: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return coordinates, their squares, and products of two coordinates, shape (k, E)."""
    return np.concatenate([z, z**2, z[:, indices[0]] * z[:, indices[1]]], axis=1)


def _moments(
    means: np.ndarray, indices: tuple[np.ndarray, np.ndarray], dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Convert means of `_monomials` to means, standard deviations and correlations."""
    mean, squares, products = np.split(means, [dim, 2 * dim], axis=1)
    sd = np.sqrt(np.maximum(squares - mean**2, 1e-12))
    i, j = indices
    return mean, sd, (products - mean[:, i] * mean[:, j]) / (sd[:, i] * sd[:, j])


def _mean_curves(draws: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average draws and probabilities in groups along each parameter.

    Returns:
        Mean parameter (D, K) and mean probability (D, K, 1 + P) of each group.
    """
    groups = [np.array_split(np.argsort(column, kind="stable"), CURVE_POINTS) for column in draws.T]
    columns = zip(draws.T, groups, strict=True)
    points = [[column[g].mean() for g in parts] for column, parts in columns]
    curves = [[probability[g].mean(axis=0) for g in parts] for parts in groups]
    return np.array(points), np.array(curves)


def findings_of(
    errors: LocalErrors, labels: Sequence[str], p_value: float, level: float
) -> tuple[Finding, ...]:
    """Return the errors of the posterior, the most significant first.

    The result is empty if the test of the joint posterior does not reject.
    """
    if p_value > level:
        return ()
    effects = np.concatenate([errors.shift, np.log(errors.width), errors.correlation])
    is_large = np.abs(effects) >= MIN_EFFECT
    is_relevant = np.abs(errors.z) >= MIN_RELATIVE_Z * np.abs(errors.z).max()
    reported = np.flatnonzero((errors.p <= level) & is_large & is_relevant)
    dim, pairs = len(labels), list(itertools.combinations(labels, 2))
    findings = []
    for i in reported[np.argsort(-np.abs(errors.z[reported]), kind="stable")].tolist():
        p, effect, name = float(errors.p[i]), float(effects[i]), str(labels[i % dim])
        if i < dim:
            findings.append(Finding(BIASED, name, p, effect, "shift"))
        elif i < 2 * dim:
            kind = UNDER if effect > 0 else OVER
            findings.append(Finding(kind, name, p, float(np.exp(effect)), "width"))
        else:
            name = " and ".join(pairs[i - 2 * dim])
            findings.append(Finding(SHAPE, name, p, effect, "correlation"))
    return tuple(findings) or (Finding(SHAPE, None, p_value, None, "classifier"),)


def verdict_of(
    findings: Sequence[Finding],
    errors: LocalErrors,
    labels: Sequence[str],
    p_value: float,
    level: float,
) -> str:
    """Return the findings as one sentence."""
    test = f"local C2ST p {p_text(p_value)}, level {level:g}"
    if not findings:
        return f"consistent with the true posterior at this observation ({test})"
    if findings[0].test == "classifier":
        return f"not the true posterior at this observation ({test}): {_shape_text(errors, labels)}"
    pairs = [f for f in findings if f.test == "correlation"]
    others = [f for f in findings if f.test != "correlation"]
    clauses = [verdict.verdict_of(others, (), labels, level)] if others else []
    for f in pairs[:MAX_NAMED_PAIRS]:
        side = "high" if f.effect is not None and f.effect > 0 else "low"
        size = f"{abs(f.effect or 0.0):.2f} too {side}; corrected p {p_text(f.p_value)}"
        clauses.append(f"correlation of {f.parameter} wrong ({size})")
    rest = len(pairs) - MAX_NAMED_PAIRS
    more = f", and of {rest} other pairs" if rest > 0 else ""
    return f"not the true posterior at this observation ({test}): {'; '.join(clauses)}{more}"


def _shape_text(errors: LocalErrors, labels: Sequence[str]) -> str:
    """Describe an error that is no shift, width or correlation: where draws are missing."""
    above, below = errors.curve - errors.band[1], errors.band[0] - errors.curve
    worst = int(np.argmax(np.maximum(above, below)))
    i, k = divmod(worst, above.shape[1])
    if max(above[i, k], below[i, k]) <= 0.0:
        return "mis-shaped jointly; no test of a single parameter or of a correlation rejects"
    amount = "few" if above[i, k] > below[i, k] else "many"
    return (
        f"mis-shaped, for example too {amount} draws near {labels[i]} = {errors.points[i, k]:.3g}"
    )
