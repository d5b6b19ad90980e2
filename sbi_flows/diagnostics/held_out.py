"""Cross-validated ranks: each member of an ensemble is tested on the rows that it held out.

Internal name: `ranks_of_members`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from sbi_flows.core.typing import Key
from sbi_flows.diagnostics.ranks import HalfRanks, Ranks, rank_valid
from sbi_flows.diagnostics.references import References, crude_references
from sbi_flows.estimators.base import FitHistory
from sbi_flows.posteriors import mixtures
from sbi_flows.posteriors.direct import Posterior
from sbi_flows.posteriors.fresh import hidden_as_in_fit
from sbi_flows.posteriors.passes import MIN_DATASETS
from sbi_flows.simulations.simulations import Simulations

MIN_SPREAD, MIN_CORRELATION = 0.2, 0.5
"""Densities of held-out rows, in nats, must correlate with those in the history if they vary."""


def ranks_of_members(
    key: Key,
    posterior: Any,
    simulations: Simulations,
    history: FitHistory,
    *,
    datasets: int,
    draws: int,
    progress: bool,
) -> tuple[Ranks, Simulations]:
    """Rank the truths of held-out rows among draws of the member that held them out.

    Args:
        key: Random key.
        posterior: The fitted posterior with M members.
        simulations: The valid simulations of the fit.
        history: History of the fit.
        datasets: Maximum number of rows in all.
        draws: Draws from each posterior.
        progress: Show progress bars.

    Returns:
        The ranks, and the rows that were used, member by member.

    Raises:
        ValueError: The sizes of history, posterior and simulations do not match, the
            posterior was not returned by an estimator, or fewer than `MIN_DATASETS` rows were held
            out.
    """
    if not isinstance(posterior, Posterior):
        raise ValueError(
            "posterior: expected the posterior that `fit` returned with the history, got "
            f"{type(posterior).__name__}"
        )
    _require_same_rows(posterior, simulations)
    row_key, reference_key, draw_key = jax.random.split(key, 3)
    rows = _rows_of_members(row_key, posterior, simulations, history, datasets)
    if posterior.missing.pattern is None:  # the history is about hidden entries otherwise
        _require_same_order(posterior, simulations, history)
    used = hidden_as_in_fit(key, posterior, simulations[np.concatenate(rows)])
    if len(used) < MIN_DATASETS:
        raise ValueError(
            f"history: expected at least {MIN_DATASETS} held-out rows, got {len(used)}; raise "
            "Training(validation_fraction=...) or the number of members"
        )
    references = crude_references(reference_key, used)
    parts, start = [], 0
    for member, chosen in enumerate(rows):
        stop = start + len(chosen)
        if stop > start:
            ranks = rank_valid(
                jax.random.fold_in(draw_key, member),
                _member(posterior, member),
                used[start:stop],
                draws=draws,
                references=References(references.points[start:stop], references.scale),
                density=True,
                halves=True,
                progress=progress,
            )
            parts.append(ranks)
        start = stop
    return _joined(parts), used


def _rows_of_members(
    key: Key, posterior: Posterior, simulations: Simulations, history: FitHistory, datasets: int
) -> list[np.ndarray]:
    """Choose at most `datasets` held-out rows, each for one member; return row numbers."""
    held_out = np.asarray(history.held_out)
    members = set(map(mixtures.count, posterior.weights))
    if held_out.ndim != 2 or members != {len(held_out)}:
        raise ValueError(
            "history: expected held-out rows of the posterior's "
            f"{', '.join(map(str, sorted(members)))} members, got shape {held_out.shape}"
        )
    if held_out.size and held_out.max() >= len(simulations):
        raise ValueError(
            f"simulations: expected those of the fit, at least {held_out.max() + 1} valid rows, "
            f"got {len(simulations)}"
        )
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    owner = np.full(len(simulations), -1)
    # members may share rows: each row goes to a random one of the members that held it out
    order = rng.permutation(held_out.size)
    owner[held_out.ravel()[order]] = order // held_out.shape[1]
    rows = np.flatnonzero(owner >= 0)
    chosen = rng.permutation(rows)[:datasets]
    return [np.sort(chosen[owner[chosen] == m]) for m in range(len(held_out))]


def _require_same_rows(posterior: Posterior, simulations: Simulations) -> None:
    """Raise ValueError if some simulations are not those of the fit."""
    if posterior.used_rows is None or posterior.used_rows.fraction < 1.0:
        return
    new = int(np.sum(~np.asarray(posterior.used_rows.among(simulations, posterior.prior))))
    if new:
        raise ValueError(
            f"simulations: expected those of the fit, got {new:,} other rows of "
            f"{len(simulations):,}"
        )


def _require_same_order(
    posterior: Posterior, simulations: Simulations, history: FitHistory
) -> None:
    """Raise ValueError if the rows are in another order than in the fit.

    Then the densities of held-out rows differ from those in the history.
    """
    some, known = simulations[history.held_out[0]], np.asarray(history.held_out_log_prob[0], float)
    now = np.asarray(_member(posterior, 0).log_prob(some.theta, some.x))
    finite = np.isfinite(now) & np.isfinite(known)
    if np.sum(finite) < 20 or np.std(known[finite]) < MIN_SPREAD:
        return
    if np.corrcoef(now[finite], known[finite])[0, 1] < MIN_CORRELATION:
        raise ValueError(
            "simulations: expected the rows in the order of the fit, got another order: the "
            "densities of held-out rows are not those in the history"
        )


def _joined(parts: list[Ranks]) -> Ranks:
    """Join the ranks of several members."""
    arrays = {}
    for name in _PER_ROW:
        values = [getattr(part, name) for part in parts]
        arrays[name] = None if values[0] is None else np.concatenate(values)
    sizes = [len(part.theta) for part in parts]
    halves = [part.half for part in parts if part.half is not None]
    whitening = np.average([half.whitening for half in halves], axis=0, weights=sizes)
    rows = zip(*(half[:-1] for half in halves), strict=True)
    half = HalfRanks._make([*map(np.concatenate, rows), whitening])
    return dataclasses.replace(parts[0], half=half, **arrays)


_PER_ROW = ("theta", "uniform", "density", "distance", "log_prob", "mean", "sd")


def _member(posterior: Posterior, member: int) -> Posterior:
    """Return the posterior of one member; of a stack, the mixture of this member of each fit."""
    weights = tuple(
        jax.tree.map(lambda leaf: leaf[member : member + 1], each) for each in posterior.weights
    )
    return dataclasses.replace(posterior, weights=weights)
