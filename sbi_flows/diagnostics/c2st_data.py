"""Input of a classifier two-sample test: checks, standardisation and division into folds.

Internal names: `Fold`, `LabelledRows`, `ClassifierBackend`, `labelled_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sbi_flows.core.checks import require_real


class Fold(NamedTuple):
    """Row numbers of one fold of a cross-validation.

    Attributes:
        train: Training rows, shape (n,).
        test: Test rows, shape (m,).
    """

    train: np.ndarray
    test: np.ndarray


class LabelledRows(NamedTuple):
    """Two standardised sets of draws as the input of a classifier.

    Attributes:
        x: All draws, the reference first, float32, shape (N + M, D).
        y: Labels, 0 for the reference and 1 for the samples, shape (N + M,).
        folds: Folds of the cross-validation.
    """

    x: np.ndarray
    y: np.ndarray
    folds: tuple[Fold, ...]


@runtime_checkable
class ClassifierBackend(Protocol):
    """Implementation of the classifier of `c2st`."""

    def accuracies(self, pairs: Sequence[LabelledRows], seed: int) -> np.ndarray:
        """Cross-validate a classifier for each pair of sets.

        Args:
            pairs: B labelled pairs of sets, all with the same number F of folds.
            seed: Seed of the initial weights.

        Returns:
            Accuracy in each fold, shape (B, F).
        """
        ...


def labelled_rows(reference: Any, samples: Any, folds: int, seed: int) -> LabelledRows:
    """Check two sets of draws, standardise them and split them into shuffled folds.

    Raises:
        ValueError: The sets are not finite arrays (N, D) and (M, D), or have too few rows.
    """
    from sklearn.model_selection import KFold

    reference, samples = _checked_sets(reference, samples, folds)
    x = _standardised(reference, samples)
    y = np.repeat([0, 1], [len(reference), len(samples)])
    split = KFold(n_splits=folds, shuffle=True, random_state=seed).split(x)
    return LabelledRows(x, y, tuple(Fold(*fold) for fold in split))


def each_pair(reference: Any, samples: Any) -> Iterator[tuple[Any, Any]]:
    """Yield B pairs of sets (N, D) and (M, D) from arrays (B, N, D) and (B, M, D).

    Raises:
        ValueError: An array has another shape, the two arrays differ in B, or B is 0.
    """
    shapes = np.shape(reference), np.shape(samples)
    is_batch = len(shapes[0]) == len(shapes[1]) == 3 and shapes[0][0] == shapes[1][0] > 0
    if not is_batch:
        raise ValueError(
            "reference and samples: expected (N, D) and (M, D), or (B, N, D) and (B, M, D), got "
            f"{shapes[0]} and {shapes[1]}"
        )
    yield from zip(reference, samples, strict=True)


def _checked_sets(reference: Any, samples: Any, folds: int) -> tuple[np.ndarray, np.ndarray]:
    reference, samples = _checked("reference", reference), _checked("samples", samples)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"samples: expected {reference.shape[1]} columns as in reference, "
            f"got {samples.shape[1]}"
        )
    if folds < 2 or min(len(reference), len(samples)) < folds:
        raise ValueError(
            f"folds: expected between 2 and the number of rows, got {folds} for "
            f"{len(reference)} reference and {len(samples)} sample rows"
        )
    return reference, samples


def _checked(name: str, draws: Any) -> np.ndarray:
    draws = np.asarray(draws)
    require_real(name, draws.dtype)
    if draws.ndim != 2 or 0 in draws.shape:
        raise ValueError(
            f"{name}: expected numbers of shape (N, D), got {draws.dtype}{draws.shape}"
        )
    if not np.all(np.isfinite(draws)):
        bad = int(np.sum(~np.isfinite(draws).all(axis=1)))
        raise ValueError(f"{name}: expected finite values, got {bad} rows with NaN or inf")
    return draws.astype(np.float64)  # so that large offsets cancel exactly


def _standardised(reference: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Standardise both sets by the reference's mean and standard deviation, shape (N + M, D).

    A column that is constant in the reference is centred but not scaled.
    """
    sd = reference.std(axis=0, ddof=1)
    sd = np.where(sd > 0, sd, 1.0)
    rows = (np.concatenate([reference, samples]) - reference.mean(axis=0)) / sd
    return rows.astype(np.float32)  # as in the published benchmark, and twice as fast
