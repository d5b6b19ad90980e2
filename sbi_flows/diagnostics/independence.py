"""Test of independence by sequential prediction: can features predict scores of later rows?

Internal names: `Rows`, `Dependence`, `dependence`, `detectable_nats`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from scipy import special

from sbi_flows.diagnostics.predictors import best_regression, predict_all

STARTS = (0.25, 0.5, 0.75)
"""Fraction of the rows that the regressions are trained on before each block is predicted."""

DETECTABLE_TOTAL_NATS = 100.0
"""Smallest sum of the information over all rows that the test finds in 95% of cases (measured)."""


MAX_STANDARDISED = 10.0
"""Limit of a standardised feature; values beyond it are clipped."""


class Dependence(NamedTuple):
    """Dependence of T scores on features.

    Attributes:
        p_value: P-values of the hypothesis that a score is independent of the features, not
            corrected for the number T, shape (T,).
        nats: Predicted log density of a score minus its standard normal log density, mean over
            the second half of the rows, shape (T,). Its expectation is a lower bound of the
            mutual information of score and features.
        terms: The same for each row of the second half, shape (N / 2, T).
    """

    p_value: np.ndarray
    nats: np.ndarray
    terms: np.ndarray


class Rows(NamedTuple):
    """Data sets of the test.

    Attributes:
        features: Summaries of the observations, shape (N, P).
        scores: Normal scores of the ranks of truths among posterior draws, shape (N, T).
        theta: True parameters, shape (N, D).
        mean: Posterior means, shape (N, D).
        sd: Posterior standard deviations, shape (N, D).
    """

    features: np.ndarray
    scores: np.ndarray
    theta: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    def at(self, rows: np.ndarray | slice) -> Rows:
        """Return the selected rows."""
        return Rows(*(values[rows] for values in self))


def dependence(rng: np.random.Generator, rows: Rows) -> Dependence:
    """Test whether scores are independent of the data, and estimate their mutual information.

    Rows are put in random order. Several regressions are trained on the first rows, and predict the
    next block; then they are trained on all rows so far. The likelihood ratio of their mixture
    to the standard normal distribution has the expectation 1 under independence. By Ville's
    inequality its inverse is a p-value, for any regression and any number of rows.

    Scores are first replaced by their normal scores among the preceding rows. These are
    independent and exactly standard normal if the rows are exchangeable. An error that is the same
    at all data sets, such as a constant bias, has therefore no effect.

    Args:
        rng: Random numbers.
        rows: The data sets.

    References:
        Dawid 1984, Statistical Theory: The Prequential Approach, J. R. Stat. Soc. A 147.
        Ramdas et al. 2023, Game-Theoretic Statistics and Safe Anytime-Valid Inference,
        arXiv:2210.01948, section 2 (tests by likelihood ratios, Ville's inequality).
        Vovk, Gammerman & Shafer 2005, Algorithmic Learning in a Random World (sequential ranks).
    """
    rows = rows.at(rng.permutation(len(rows.features)))
    rows = rows._replace(scores=_sequential_scores(rng, rows.scores))
    cuts = [int(share * len(rows.features)) for share in (*STARTS, 1.0)]
    totals: np.ndarray | None = None
    gains = []
    for start, stop in itertools.pairwise(cuts):
        known, new = rows.at(slice(0, start)), rows.at(slice(start, stop))
        features, points = _with_predictions(known, new)
        predictions = predict_all(rng, features, known.scores, points)
        each = np.stack([p.log_prob(new.scores) for p in predictions])
        totals = np.zeros(each[:, 0].shape) if totals is None else totals
        weights = special.log_softmax(totals, axis=0)
        gains.append(special.logsumexp(weights[:, None] + each, axis=0))
        totals = totals + each.sum(axis=1)
    log_ratio = sum(g.sum(axis=0) for g in gains)
    terms = np.concatenate(gains[1:])
    return Dependence(np.exp(-np.maximum(log_ratio, 0.0)), terms.mean(axis=0), terms)


def _with_predictions(known: Rows, new: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Add features that relate the data to the posterior, shape (n, P + 3 D) and (m, P + 3 D).

    They are posterior means, logarithms of standard deviations, and the predictions of theta by a
    regression on the data, in posterior standard deviations from the posterior mean. The prediction
    of a row does not depend on its own truth.
    """
    center, scale = known.theta.mean(axis=0), known.theta.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    targets = np.clip((known.theta - center) / scale, -MAX_STANDARDISED, MAX_STANDARDISED)
    predictions = best_regression(known.features, targets, new.features)
    both = []
    for rows, predicted in zip((known, new), predictions, strict=True):
        sd = np.maximum(rows.sd / scale, np.finfo(np.float32).tiny)
        mean = np.clip((rows.mean - center) / scale, -MAX_STANDARDISED, MAX_STANDARDISED)
        distance = np.clip((predicted - mean) / sd, -MAX_STANDARDISED, MAX_STANDARDISED)
        both.append(np.concatenate([rows.features, mean, np.log(sd), distance], axis=1))
    return both[0], both[1]


def detectable_nats(rows: int) -> float:
    """Return the smallest information that `dependence` finds in 95% of cases."""
    return DETECTABLE_TOTAL_NATS / rows


def _sequential_scores(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """Replace each of the values (N, T) by its normal score among itself and all preceding rows."""
    ranks = np.empty(values.shape)
    for t, column in enumerate(values.T):
        ranks[:, t] = np.tril(column[:, None] > column[None], -1).sum(axis=1)
    steps = np.arange(1, len(values) + 1)[:, None]
    return special.ndtri((ranks + rng.uniform(1e-9, 1.0 - 1e-9, values.shape)) / steps)
