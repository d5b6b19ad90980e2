"""Regressions of standard normal scores on features: ridge, a small network, boosted trees.

Each predicts a normal distribution of the scores of new rows. Predictions are shrunk towards the
standard normal distribution by their errors at rows that were left out.

Internal names: `Prediction`, `predict_all`, `best_regression`.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

MIN_NETWORK_ROWS, MIN_BOOSTED_ROWS = 40, 120
"""Minimum number of training rows for the network, and for boosted trees."""

RIDGES = tuple(10.0 ** np.arange(-1.0, 5.0))
MAX_SQUARED_COLUMNS = 64
"""Maximum number of features whose squares are features of the ridge regression as well."""

SCREENED_COLUMNS = (4, 12, 40)
"""Ridge regressions also use only this number of features: those that correlate best."""

MAX_COMPONENTS = 40
"""Maximum number of principal components that the network reads."""

MAX_BOOSTED_COLUMNS, MAX_BOOSTED_SCORES = 32, 6
"""Maximum number of features that boosted trees read, and of scores that they predict."""

MIN_SD, MAX_SD = 0.02, 5.0


class Prediction(NamedTuple):
    """Normal distributions of T scores of m rows.

    Attributes:
        mean: Means, shape (m, T).
        sd: Standard deviations, shape (m, T).
    """

    mean: np.ndarray
    sd: np.ndarray

    def log_prob(self, scores: np.ndarray) -> np.ndarray:
        """Return log densities of scores (m, T) minus those of the standard normal distribution."""
        z = (scores - self.mean) / self.sd
        return 0.5 * (scores**2 - z**2) - np.log(self.sd)


class _Rows(NamedTuple):
    """Training rows, some of which are left out to measure errors, and rows to predict.

    Attributes:
        features: Features of all training rows, shape (n, P).
        scores: Scores of all training rows, shape (n, T).
        is_fit: True for the rows that are not left out, shape (n,).
        points: Features of the rows to predict, shape (m, P).
    """

    features: np.ndarray
    scores: np.ndarray
    is_fit: np.ndarray
    points: np.ndarray


def predict_all(
    rng: np.random.Generator, features: np.ndarray, scores: np.ndarray, points: np.ndarray
) -> list[Prediction]:
    """Return five predictions of the scores, each a normal distribution.

    They are: the standard normal distribution, ridge regression, a network, boosted trees for the
    mean, and boosted trees for mean and standard deviation. With too few rows, those of the network
    and of the trees are standard normal.

    Args:
        rng: Random numbers: they choose the rows that are left out, and initial weights.
        features: Features of the training rows, shape (n, P).
        scores: Scores of the training rows, shape (n, T).
        points: Features of the rows to predict, shape (m, P).
    """
    is_fit = np.ones(len(features), bool)
    is_fit[rng.choice(len(features), len(features) // 4, replace=False)] = False
    rows = _Rows(features, scores, is_fit, points)
    shape = (len(points), scores.shape[1])
    nothing = Prediction(np.zeros(shape), np.ones(shape))
    network, boosted = nothing, (nothing, nothing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn: the number of epochs is intended
        if len(features) >= MIN_NETWORK_ROWS:
            network = _network(int(rng.integers(2**31)), rows)
        if len(features) >= MIN_BOOSTED_ROWS:
            boosted = _boosted(rows, nothing)
    return [nothing, _ridge(rows), network, *boosted]


def _ridge(rows: _Rows) -> Prediction:
    """Predict means by `best_regression`."""
    out, fit = ~rows.is_fit, rows.is_fit
    inputs = np.concatenate([rows.features[out], rows.points])
    mean = best_regression(rows.features[fit], rows.scores[fit], inputs)[1]
    left_out = int(np.sum(out))
    return _shrunk(mean[:left_out], rows.scores[out], mean[left_out:])


def ridge_regression(
    features: np.ndarray, targets: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict targets by ridge regression on features and their squares.

    The penalty of each target is the one with the smallest leave-one-out error.

    Args:
        features: Features of the training rows, shape (n, P).
        targets: Targets of the training rows, shape (n, T).
        points: Features of the rows to predict, shape (m, P).

    Returns:
        Leave-one-out predictions of the training rows (n, T), and predictions (m, T).
    """
    if features.shape[1] <= MAX_SQUARED_COLUMNS:
        features = np.concatenate([features, features**2], axis=1)
        points = np.concatenate([points, points**2], axis=1)
    center, intercept = features.mean(axis=0), targets.mean(axis=0)
    u, s, vt = np.linalg.svd(features - center, full_matrices=False)
    rotated = u.T @ targets
    best = np.full(targets.shape[1], np.inf)
    left_out, coefficients = np.zeros(targets.shape), np.zeros(rotated.shape)
    for ridge in RIDGES:
        shrink = s**2 / (s**2 + ridge)
        leverage = (u**2) @ shrink + 1.0 / len(features)
        residual = targets - intercept - u @ (shrink[:, None] * rotated)
        error = residual / np.maximum(1.0 - leverage, 1e-3)[:, None]
        loss = np.mean(error**2, axis=0)
        is_better = loss < best
        best = np.where(is_better, loss, best)
        left_out = np.where(is_better, targets - error, left_out)
        solved = (s / (s**2 + ridge))[:, None] * rotated
        coefficients = np.where(is_better, solved, coefficients)
    return left_out, intercept + (points - center) @ vt.T @ coefficients


def best_regression(
    features: np.ndarray, targets: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Predict targets by ridge regressions on all features, or on those that correlate best.

    The number of features of each target is the one with the smallest leave-one-out error.
    Arguments and results are those of `ridge_regression`.
    """
    left_out, mean = ridge_regression(features, targets, points)
    correlation = _correlations(features, targets)
    for t in range(targets.shape[1]):
        target = targets[:, t : t + 1]
        for count in SCREENED_COLUMNS:
            if count >= features.shape[1]:
                continue
            columns = np.argsort(-correlation[:, t])[:count]
            new = ridge_regression(features[:, columns], target, points[:, columns])
            if np.mean((new[0] - target) ** 2) < np.mean((left_out[:, t : t + 1] - target) ** 2):
                left_out[:, t : t + 1], mean[:, t : t + 1] = new
    return left_out, mean


def _network(seed: int, rows: _Rows) -> Prediction:
    """Predict means by a network with one hidden layer that reads principal components."""
    from sklearn.neural_network import MLPRegressor

    inputs = np.concatenate([rows.features, rows.points])
    center = inputs.mean(axis=0)
    _, _, vt = np.linalg.svd(rows.features - center, full_matrices=False)
    inputs = (inputs - center) @ vt[:MAX_COMPONENTS].T
    inputs = inputs / np.maximum(inputs.std(axis=0), 1e-12)
    n, out = len(rows.features), ~rows.is_fit
    model = MLPRegressor(
        hidden_layer_sizes=(48,),
        alpha=0.3,
        batch_size=64,
        learning_rate_init=3e-3,
        max_iter=40,
        random_state=seed,
    )
    model.fit(inputs[:n][rows.is_fit], rows.scores[rows.is_fit])
    mean = model.predict(inputs).reshape(len(inputs), -1)
    return _shrunk(mean[:n][out], rows.scores[out], mean[n:])


def _boosted(rows: _Rows, nothing: Prediction) -> tuple[Prediction, Prediction]:
    """Predict by boosted trees: means alone, and means with standard deviations.

    Only the scores that correlate best with a feature are predicted; the others get `nothing`.
    """
    correlation = np.maximum(
        *(
            _correlations(rows.features, target).max(axis=0)
            for target in (rows.scores, rows.scores**2)
        )
    )
    alone, both = (Prediction(p.mean.copy(), p.sd.copy()) for p in (nothing, nothing))
    n, out = len(rows.features), ~rows.is_fit
    inputs = np.concatenate([rows.features, rows.points])
    for t in np.argsort(-correlation)[:MAX_BOOSTED_SCORES]:
        score = rows.scores[:, t]
        raw = _trees(rows, inputs, score, "squared_error")
        means = _shrunk(raw[:n][out, None], score[out, None], raw[:, None])
        squares = ((score - means.mean[:n, 0]) / means.sd[:n, 0]) ** 2
        variance = _trees(rows, inputs, np.maximum(squares, 1e-6), "gamma")
        factor = _variance_factor(squares[out], variance[:n][out], variance[n:])
        alone.mean[:, t] = both.mean[:, t] = means.mean[n:, 0]
        alone.sd[:, t] = means.sd[n:, 0]
        both.sd[:, t] = np.clip(means.sd[n:, 0] * np.sqrt(factor), MIN_SD, MAX_SD)
    return alone, both


def _trees(rows: _Rows, inputs: np.ndarray, target: np.ndarray, loss: str) -> np.ndarray:
    """Fit boosted trees to a target (n,) and predict it for all inputs, shape (n + m,)."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    fit_rows, fit_target = rows.features[rows.is_fit], target[rows.is_fit]
    correlation = _correlations(fit_rows, fit_target[:, None])[:, 0]
    columns = np.argsort(-correlation)[:MAX_BOOSTED_COLUMNS]
    model = HistGradientBoostingRegressor(
        loss=loss,
        max_iter=40,
        learning_rate=0.12,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        max_bins=32,
        early_stopping=False,
        random_state=0,
    )
    return model.fit(fit_rows[:, columns], fit_target).predict(inputs[:, columns])


def _correlations(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return absolute correlations of features (n, P) with targets (n, T), shape (P, T)."""
    a, b = features - features.mean(axis=0), targets - targets.mean(axis=0)
    norms = np.linalg.norm(a, axis=0)[:, None] * np.linalg.norm(b, axis=0)
    return np.abs(a.T @ b) / np.maximum(norms, 1e-12)


def _shrunk(left_out: np.ndarray, scores: np.ndarray, mean: np.ndarray) -> Prediction:
    """Shrink predicted means (m, T).

    The factor is the slope of the scores on the predictions at the rows left out, between 0 and 1;
    the standard deviation is that of the errors at these rows.
    """
    slope = np.sum(left_out * scores, axis=0) / np.maximum(np.sum(left_out**2, axis=0), 1e-12)
    slope = np.clip(slope, 0.0, 1.0)
    error = np.sqrt(np.mean((scores - slope * left_out) ** 2, axis=0))
    sd = np.where(slope > 0, np.clip(error, MIN_SD, 1.0), 1.0)
    return Prediction(slope * mean, np.broadcast_to(sd, mean.shape).copy())


def _variance_factor(squares: np.ndarray, left_out: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Return factors on the variances of new rows, shape (m,).

    A factor is c v^p, where v is the predicted variance. The power p, one of 0, 0.25, ..., 1, and
    the constant c maximise the likelihood of the rows left out. If p is 0, all factors are 1.
    """
    powers = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    logs = np.log(np.maximum(left_out, 1e-6))
    scales = np.array([np.mean(squares * np.exp(-p * logs)) for p in powers])
    loss = np.log(scales) + powers * np.mean(logs)
    best = int(np.argmin(loss))
    if best == 0:
        return np.ones(len(new))
    return scales[best] * np.maximum(new, 1e-6) ** powers[best]
