"""Direction in which the width of a joint posterior is most wrong.

Internal names: `JointWidth`, `joint_width`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from sbi_flows.diagnostics.ranks import Ranks

MIN_CONTRAST = 0.08
"""Smallest difference of a direction's log width and the mean one for the direction to be named."""

MIN_COEFFICIENT, MAX_NAMED = 0.4, 3
"""Smallest coefficient, relative to the largest, of a parameter that a direction names; and the
maximum number of such parameters."""


class JointWidth(NamedTuple):
    """Width of a joint posterior divided by the correct width.

    Attributes:
        width: The width; below 1 if the posterior is too narrow.
        direction: The combination of parameters, in posterior standard deviations, that has this
            width, for example "alpha - beta"; None if all directions have about the same width.
    """

    width: float
    direction: str | None


def joint_width(ranks: Ranks) -> JointWidth | None:
    """Return the most wrong width and its direction.

    The result is None for a single parameter, or without ranks among halves of the draws.

    Residuals of the truths are whitened by the posterior's covariance, so that for a correct
    posterior their normal scores have the identity as covariance matrix. The direction
    is the eigenvector of the covariance matrix of one half of the data sets whose eigenvalue is the
    most wrong. Widths are measured on the other half, because the largest eigenvalue of a noisy
    matrix is too large.
    """
    half = ranks.half
    if half is None or len(ranks.labels) < 2:
        return None
    scores = special.ndtri(half.residual)
    halves = scores[::2], scores[1::2]
    values, vectors = np.linalg.eigh(np.cov(halves[0].T))
    worst = int(np.argmax(np.abs(np.log(np.maximum(values, np.finfo(float).tiny)))))
    log_widths = -0.5 * np.log(np.var(halves[1] @ vectors, axis=0))
    overall = float(np.mean(log_widths))
    # three standard errors of the logarithm of a width that half of the data sets give
    if abs(log_widths[worst] - overall) < max(MIN_CONTRAST, 3.0 / np.sqrt(len(scores))):
        return JointWidth(float(np.exp(overall)), None)
    coefficients = vectors[:, worst] @ half.whitening
    return JointWidth(float(np.exp(log_widths[worst])), _combination(coefficients, ranks.labels))


def _combination(coefficients: np.ndarray, labels: Sequence[str]) -> str:
    """Return a combination of parameters in words, with the signs of the coefficients (D,)."""
    relative = coefficients / np.abs(coefficients).max()
    named = np.flatnonzero(np.abs(relative) >= MIN_COEFFICIENT)
    if len(named) > MAX_NAMED:
        largest = np.sort(np.argsort(-np.abs(relative))[:MAX_NAMED]).tolist()
        names = ", ".join(str(labels[i]) for i in largest)
        return f"a combination of {len(named)} parameters ({names}, ...)"
    sign = np.sign(relative * relative[named[0]])
    text = str(labels[named[0]])
    for i in named[1:].tolist():
        text += f" {'+' if sign[i] > 0 else '-'} {labels[i]}"
    return text
