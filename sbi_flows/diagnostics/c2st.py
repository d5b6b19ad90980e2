"""Classifier two-sample test (C2ST) between posterior draws and reference draws.

Public names: `c2st`, `c2st_jax`, `SklearnMLP`, `CompiledMLP`, `ClassifierBackend`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_flows.diagnostics.c2st_compiled import CompiledMLP
from sbi_flows.diagnostics.c2st_data import (
    ClassifierBackend,
    LabelledRows,
    each_pair,
    labelled_rows,
)


@dataclasses.dataclass(frozen=True)
class SklearnMLP:
    """Scikit-learn's multilayer perceptron, the classifier that published C2ST values use.

    Attributes:
        jobs: Number of folds trained in parallel, each in its own process; -1 uses every core.
            The accuracy does not depend on this number.
    """

    jobs: int | None = None

    def accuracies(self, pairs: Sequence[LabelledRows], seed: int) -> np.ndarray:
        """Cross-validate on each pair of sets; return the accuracies, shape (pairs, folds)."""
        from sklearn.model_selection import cross_val_score
        from sklearn.neural_network import MLPClassifier
        from threadpoolctl import threadpool_limits

        scores = []
        # Products of matrices this small are slower on several BLAS threads.
        with threadpool_limits(1):
            for pair in pairs:
                width = 10 * pair.x.shape[1]
                network = MLPClassifier(
                    hidden_layer_sizes=(width, width),
                    activation="relu",
                    solver="adam",
                    max_iter=10_000,
                    random_state=seed,
                )
                options = {"cv": pair.folds, "scoring": "accuracy", "n_jobs": self.jobs}
                scores.append(cross_val_score(network, pair.x, pair.y, **options))
        return np.stack(scores)


def c2st(
    reference: Any,
    samples: Any,
    *,
    folds: int = 5,
    seed: int = 1,
    jobs: int | None = None,
    backend: ClassifierBackend | None = None,
) -> Any:
    """Compute the accuracy of a classifier that separates two sets of draws (C2ST-MLP).

    A perceptron with two hidden layers of width 10 D (relu, Adam, at most 10,000 epochs) is trained
    on draws that are standardised by the reference's mean and standard deviation. The result is the
    mean accuracy in a cross-validation with shuffled folds. 0.5 means that the sets cannot be
    distinguished; 1 means that they do not overlap. With 10,000 draws in each set, the standard
    error is about 0.0035 if both sets have the same distribution. Do not compare the result with
    accuracies of other classifiers, such as random forests.

    Args:
        reference: Draws of the reference posterior in any units, shape (N, D), or (B, N, D) for B
            pairs of sets.
        samples: Draws to test, in the same units, shape (M, D) or (B, M, D). If M = N, a classifier
            that guesses has an accuracy of 0.5.
        folds: Number of folds of the cross-validation.
        seed: Seed of the folds and of the network's initial weights.
        jobs: Number of folds that the default backend trains in parallel; see `SklearnMLP`.
        backend: Implementation of the classifier. `SklearnMLP(jobs)`, the default, takes about a
            minute for ten parameters on one core. `CompiledMLP()` trains the same network in JAX.
            It is faster, especially for many pairs, and its results differ only by rounding errors.

    Returns:
        The mean accuracy over the folds, between 0 and 1: a float, or shape (B,) for B pairs.

    Raises:
        ValueError: The arrays are not finite or have wrong shapes, there are fewer rows than
            folds, or `jobs` is given together with a backend.

    References:
        Lopez-Paz and Oquab 2017, Revisiting Classifier Two-Sample Tests, arXiv:1610.06545.
        Lueckmann et al. 2021, Benchmarking Simulation-Based Inference, arXiv:2101.04653 (the
        network and its settings).

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(80, 1))
        >>> c2st(draws[:40], draws[40:] + 10.0)
        1.0
        >>> draws = np.random.default_rng(0).normal(size=(3, 80, 1))
        >>> c2st(draws[:, :40], draws[:, 40:] + 10.0, backend=CompiledMLP())
        array([1., 1., 1.])
    """
    if backend is None:
        backend = SklearnMLP(jobs)
    elif jobs is not None:
        raise ValueError("jobs: expected None beside a backend, got both; use SklearnMLP(jobs)")
    is_batch = 3 in (np.ndim(reference), np.ndim(samples))
    sets = each_pair(reference, samples) if is_batch else [(reference, samples)]
    pairs = [labelled_rows(*pair, folds, seed) for pair in sets]
    means = np.mean(backend.accuracies(pairs, seed), axis=1)
    return means if is_batch else float(means[0])


def c2st_jax(reference: Any, samples: Any, *, folds: int = 5, seed: int = 1) -> Any:
    """Return `c2st` with `backend=CompiledMLP()`; an earlier name that still works."""
    return c2st(reference, samples, folds=folds, seed=seed, backend=CompiledMLP())
