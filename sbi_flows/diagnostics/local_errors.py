"""What is wrong with a posterior near one observation, in numbers and in words.

Public names: `Near`, `Errors`, `errors_of`, `findings_of`, `verdict_of`.

A classifier says whether truths and draws differ; shifts, widths and correlations of both, at the
same data sets, say in what. The same permutations of their labels show what comes by chance.
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

POINTS = 20
"""Points along each parameter that probabilities are averaged around."""

LEAST, BESIDE = 0.05, 0.2
"""Smallest effect that is named, and its least sureness as a share of that of the surest one."""


class Near(NamedTuple):
    """Truths and draws at the k data sets nearest to an observation.

    Attributes:
        truth: In standard deviations of the posterior from its mean, shape (k, D).
        draw: Likewise.
        weight: Weights, shape (k,).
        swapped: Which are swapped: none, then by each of P permutations, shape (k, 1 + P).
    """

    truth: np.ndarray
    draw: np.ndarray
    weight: np.ndarray
    swapped: np.ndarray


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of the D parameters, and of their pairs, near one observation.

    Attributes:
        shift: How far the posterior lies too high, in its own standard deviations, shape (D,).
        width: How many times too wide it is, shape (D,); below 1 is too narrow.
        correlation: How much too high the correlation of each pair is, shape (D (D - 1) / 2,).
        sure: Shifts, logarithms of widths and correlations, in standard deviations of the same of
            permuted labels.
        p: P-values of these, corrected for their number.
        points: Means of the parameter in `POINTS` equal groups of draws, shape (D, K).
        curve: Mean probability of being a true parameter in each group, shape (D, K).
        band: 5% and 95% points of the same of permuted labels, shape (2, D, K).
    """

    shift: np.ndarray
    width: np.ndarray
    correlation: np.ndarray
    sure: np.ndarray
    p: np.ndarray
    points: np.ndarray
    curve: np.ndarray
    band: np.ndarray

    @property
    def p_shift(self) -> np.ndarray:
        """P-values of the shifts, shape (D,)."""
        return self.p[: len(self.shift)]

    @property
    def p_width(self) -> np.ndarray:
        """P-values of the widths, shape (D,)."""
        return self.p[len(self.shift) : 2 * len(self.shift)]


def errors_of(near: Near, draws: np.ndarray, probability: np.ndarray) -> Errors:
    """Errors at one observation.

    Args:
        near: The near data sets.
        draws: Draws at the observation, shape (n, D).
        probability: Of each of being a true parameter, by the classifiers, shape (n, 1 + P).

    References:
        Westfall & Young 1993, Resampling-Based Multiple Testing, for the correction (max-T).
    """
    dim = draws.shape[1]
    effects = _effects(near)
    center, spread = effects[1:].mean(axis=0), np.maximum(effects[1:].std(axis=0), 1e-12)
    # the true labels among the others, or they would be farther out than those are by construction
    away = effects - effects.mean(axis=0)
    away = np.abs(away) / np.maximum(effects.std(axis=0), 1e-12)
    beyond = np.sum(away[1:].max(axis=1)[:, None] >= away[0], axis=0)
    points, curves = _along(draws, probability)
    return Errors(
        shift=effects[0, :dim],
        width=np.exp(effects[0, dim : 2 * dim]),
        correlation=effects[0, 2 * dim :],
        sure=(effects[0] - center) / spread,
        p=(1 + beyond) / len(effects),
        points=points,
        curve=curves[..., 0],
        band=np.quantile(curves[..., 1:], (0.05, 0.95), axis=-1),
    )


def _effects(near: Near) -> np.ndarray:
    """Shifts, logarithms of widths and correlations of draws less truths, shape (1 + P, .)."""
    dim = near.truth.shape[1]
    pairs = np.triu_indices(dim, 1)
    truth, draw = (_products(z, pairs) for z in (near.truth, near.draw))
    weight = (near.weight / near.weight.sum())[:, None]
    # what a swap takes from one side it gives to the other
    moved = near.swapped.T.astype(float) @ (weight * (draw - truth))
    sides = [np.sum(weight * truth, axis=0) + moved, np.sum(weight * draw, axis=0) - moved]
    (mean, sd, correlation), (own_mean, own_sd, own) = (_moments(m, pairs, dim) for m in sides)
    # in single draws' own standard deviations, which a frame of few draws is a little off
    parts = ((own_mean - mean) / own_sd, np.log(own_sd / sd), own - correlation)
    return np.concatenate(parts, axis=1)


def _products(z: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.concatenate([z, z**2, z[:, pairs[0]] * z[:, pairs[1]]], axis=1)


def _moments(
    means: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means, standard deviations and correlations from means of `_products`."""
    mean, squares, products = np.split(means, [dim, 2 * dim], axis=1)
    sd = np.sqrt(np.maximum(squares - mean**2, 1e-12))
    i, j = pairs
    return mean, sd, (products - mean[:, i] * mean[:, j]) / (sd[:, i] * sd[:, j])


def _along(draws: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means in groups of draws, in order of each parameter: (D, K) and (D, K, 1 + P)."""
    groups = [np.array_split(np.argsort(column, kind="stable"), POINTS) for column in draws.T]
    points = [[column[g].mean() for g in own] for column, own in zip(draws.T, groups, strict=True)]
    curves = [[probability[g].mean(axis=0) for g in own] for own in groups]
    return np.array(points), np.array(curves)


def findings_of(
    errors: Errors, labels: Sequence[str], p_value: float, level: float
) -> tuple[Finding, ...]:
    """What is wrong, the surest first; nothing where the test of the whole does not reject."""
    if p_value > level:
        return ()
    effects = np.concatenate([errors.shift, np.log(errors.width), errors.correlation])
    enough = np.abs(errors.sure) >= BESIDE * np.abs(errors.sure).max()
    named = np.flatnonzero((errors.p <= level) & (np.abs(effects) >= LEAST) & enough)
    dim, pairs = len(labels), list(itertools.combinations(labels, 2))
    found = []
    for i in named[np.argsort(-np.abs(errors.sure[named]), kind="stable")].tolist():
        p, effect, name = float(errors.p[i]), float(effects[i]), str(labels[i % dim])
        if i < dim:
            found.append(Finding(BIASED, name, p, effect, "shift"))
        elif i < 2 * dim:
            kind = UNDER if effect > 0 else OVER
            found.append(Finding(kind, name, p, float(np.exp(effect)), "width"))
        else:
            name = " and ".join(pairs[i - 2 * dim])
            found.append(Finding(SHAPE, name, p, effect, "correlation"))
    return tuple(found) or (Finding(SHAPE, None, p_value, None, "classifier"),)


def verdict_of(
    findings: Sequence[Finding], labels: Sequence[str], p_value: float, level: float
) -> str:
    """The findings in one sentence."""
    test = f"local C2ST p {p_text(p_value)}, level {level:g}"
    if not findings:
        return f"consistent with the true posterior at this observation ({test})"
    pairs = [f for f in findings if f.test == "correlation"]
    others = [f for f in findings if f.test != "correlation"]
    said = [verdict.verdict_of(others, (), labels, level)] if others else []
    for f in pairs[:3]:
        side = "high" if f.effect is not None and f.effect > 0 else "low"
        size = f"{abs(f.effect or 0.0):.2f} too {side}; corrected p {p_text(f.p_value)}"
        said.append(f"correlation of {f.parameter} wrong ({size})")
    more = f", and of {len(pairs) - 3} other pairs" if len(pairs) > 3 else ""
    return f"not the true posterior at this observation ({test}): {'; '.join(said)}{more}"
