"""Loop over the epochs of a fit, with progress bar, checkpoints, early stopping and interrupts.

Public names: `fit`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.core.typing import Key
from sbi_flows.core.warn import warn_user
from sbi_flows.densities.conditional import (
    Blueprint,
    Weights,
    has_likelihood_loss,
    initial_weights,
    needs_ode,
    unravel_weights,
)
from sbi_flows.densities.ode import SolverStats
from sbi_flows.training.checkpoint import Checkpoint
from sbi_flows.training.data import FitKeys, TrainingData
from sbi_flows.training.devices import to_host
from sbi_flows.training.ensemble import Ensemble
from sbi_flows.training.fingerprint import parts
from sbi_flows.training.group import Best
from sbi_flows.training.history import History
from sbi_flows.training.settings import Training


def fit(
    keys: FitKeys,
    blueprint: Blueprint,
    training: Training,
    data: TrainingData,
    *,
    members: int = 1,
    progress: bool = True,
    label: str = "fit",
    name: str = "fit",
) -> tuple[Weights, History]:
    """Train an ensemble of models.

    The members differ in initial weights, order of the data and validation rows.

    Args:
        keys: Random keys.
        blueprint: Description of the model of each member.
        training: Settings of the fit.
        data: Training data.
        members: Number of members M.
        progress: Show a progress bar.
        label: Text in front of the progress bar.
        name: Name of the file of this fit in the folder `training.checkpoint`.

    Returns:
        The best weights of each member, and the history of the fit.

    Raises:
        ValueError: There are too few rows to hold any out, or the checkpoint belongs to another
            fit.
        TrainingDiverged: A loss was not finite. The attribute `state` of the error holds the best
            `Weights` so far.
        CheckpointSpoilt: The checkpoint is damaged.
    """
    began = time.perf_counter()
    file = _checkpoint(keys, blueprint, training, data, members, name)
    saved = file.read() if file else None
    if file and saved is not None and "result/params" in saved:
        result = _saved_result(file, saved, blueprint, members)
    else:
        with Ensemble(keys, blueprint, training, data, members) as ensemble:
            run = _Run(ensemble, blueprint, training, file)
            result = run.result(keys.epochs, saved, progress=progress, label=label)
    seconds = time.perf_counter() - began
    params = unravel_weights(blueprint, result.params)
    weights = Weights(*jax.device_put((params, result.rest)))  # device_put compiles nothing
    return weights, result.history(seconds, has_likelihood=has_likelihood_loss(blueprint))


class _Result(NamedTuple):
    """Result of a fit as host arrays; E is the number of epochs.

    Attributes:
        params: Best weights, shape (M, P).
        rest: Arrays that are not trained, with a leading axis M.
        train: Training losses, shape (E, M).
        validation: Validation losses, shape (E, M).
        start_loss: Validation losses before the first epoch, shape (M,).
        held_out: Row numbers of the validation rows, shape (M, V).
        held_out_loss: Losses of the validation rows, shape (M, V).
        stop_reason: Reason why the fit ended.
        solver_steps: Number of solver steps for each entry of `held_out_loss`, shape (M, V); None
            if the density needs no ODE.
        solver_evaluations: Number of network evaluations for each entry of `held_out_loss`, shape
            (M, V); None if the density needs no ODE.
    """

    params: np.ndarray
    rest: Any
    train: np.ndarray
    validation: np.ndarray
    start_loss: np.ndarray
    held_out: np.ndarray
    held_out_loss: np.ndarray
    stop_reason: str
    solver_steps: np.ndarray | None
    solver_evaluations: np.ndarray | None

    def history(self, seconds: float, *, has_likelihood: bool) -> History:
        """Return the history of the fit."""
        stacked = np.concatenate([self.start_loss[None], self.validation])
        return History(
            train_loss=self.train,
            validation_loss=self.validation,
            start_loss=self.start_loss,
            held_out=self.held_out,
            held_out_loss=self.held_out_loss,
            best_epoch=np.argmin(stacked, axis=0),
            epochs=len(self.train),
            seconds=seconds,
            stop_reason=self.stop_reason,
            likelihood=has_likelihood,
            solver_steps=self.solver_steps,
            solver_evaluations=self.solver_evaluations,
        )


class _Losses(NamedTuple):
    """Training and validation losses of one epoch, shape (M,) each."""

    train: np.ndarray
    validation: np.ndarray


class _Progress(NamedTuple):
    """Best weights so far, and losses of all epochs so far.

    Weights and losses are replaced together. After an interrupt, they therefore belong to the same
    epoch.
    """

    best: tuple[Best, ...]
    losses: tuple[_Losses, ...]


class _Run:
    """Training of an ensemble, from the first epoch or from a checkpoint.

    Args:
        ensemble: The members.
        blueprint: Description of the model of each member.
        training: Settings of the fit.
        file: Checkpoint to which states are written; None for no checkpoint.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        blueprint: Blueprint,
        training: Training,
        file: Checkpoint | None,
    ) -> None:
        """Check that the losses before the first epoch are finite."""
        self._ensemble, self._blueprint = ensemble, blueprint
        self._training, self._file = training, file
        self._row_offsets = np.asarray(ensemble.offsets.validation)
        offsets = np.stack([ensemble.offsets.train, self._row_offsets.mean(axis=1)])
        # offsets are only added to losses that are negative log densities
        self._offsets = offsets * has_likelihood_loss(blueprint)
        self._start_loss = ensemble.best_loss + self._offsets[1]
        _require_finite(self._start_loss, 0, ensemble)

    def result(
        self,
        epoch_key: Key,
        saved: Mapping[str, np.ndarray] | None,
        *,
        progress: bool,
        label: str,
    ) -> _Result:
        """Train until the fit ends or is interrupted, and evaluate the validation rows.

        Args:
            epoch_key: Base key of the epochs.
            saved: Arrays of the checkpoint; None to start at the first epoch.
            progress: Show a progress bar.
            label: Text in front of the progress bar.
        """
        ensemble, losses = self._ensemble, () if saved is None else self._resume(saved)
        done = _Progress(ensemble.best, losses)
        epochs = range(len(losses), self._training.max_epochs)
        bar = tqdm(
            epochs if ensemble.running.any() else (),
            desc=label,
            unit="epoch",
            disable=not progress,
            initial=len(losses),
            total=self._training.max_epochs,
        )
        try:
            with bar:
                for progress_made in self._epochs(epoch_key, losses, bar):
                    done = progress_made
            reason = "max_epochs" if ensemble.running.any() else "patience"
            if self._file and needs_ode(self._blueprint):  # what follows may take long
                self._file.save_now(partial(self._state, done.losses))
        except KeyboardInterrupt:
            reason = "interrupted"
        try:
            held_out_loss, solver_stats = _validation_losses(ensemble, done.best, self._blueprint)
        except KeyboardInterrupt:  # the weights exist
            reason, solver_stats = "interrupted", None
            held_out_loss = np.full(self._row_offsets.shape, np.nan)
        result = self._result(done, held_out_loss + self._row_offsets, reason, solver_stats)
        if self._file and reason != "interrupted":
            self._file.save_now(partial(_to_save, result))
        return result

    def _epochs(
        self, epoch_key: Key, losses: tuple[_Losses, ...], bar: tqdm
    ) -> Iterator[_Progress]:
        """Train for one epoch after another, and yield the progress after each epoch."""
        ensemble = self._ensemble
        for epoch in bar:
            means = ensemble.epoch(jax.random.fold_in(epoch_key, epoch))
            last = _Losses(*(np.stack(means) + self._offsets))
            _require_finite(np.concatenate(last), epoch + 1, ensemble)
            losses = (*losses, last)
            yield _Progress(ensemble.best, losses)
            bar.set_postfix(
                train=f"{last.train.mean():.3f}", validation=f"{last.validation.mean():.3f}"
            )
            if self._file:
                self._file.save(epoch + 1, partial(self._state, losses))
            if not ensemble.running.any():
                return

    def _state(self, losses: tuple[_Losses, ...]) -> dict[str, Any]:
        """Return the arrays that a checkpoint saves between two epochs."""
        train, validation = _stacked(losses, len(self._start_loss))
        return {
            "train": train,
            "validation": validation,
            "members": self._ensemble.snapshot(),
        }

    def _resume(self, saved: Mapping[str, np.ndarray]) -> tuple[_Losses, ...]:
        """Restore the members from a checkpoint; return the losses of all earlier epochs."""
        assert self._file is not None
        like = {"members": self._ensemble.snapshot()}
        self._ensemble.resume(self._file.filled(like, saved)["members"])
        return tuple(map(_Losses, saved["train"], saved["validation"]))

    def _result(
        self,
        done: _Progress,
        held_out_loss: np.ndarray,
        reason: str,
        solver_stats: SolverStats | None,
    ) -> _Result:
        params, rest = self._ensemble.arrays(done.best)
        train, validation = _stacked(done.losses, len(self._start_loss))
        return _Result(
            params=params,
            rest=rest,
            train=train,
            validation=validation,
            start_loss=self._start_loss,
            held_out=self._ensemble.held_out,
            held_out_loss=held_out_loss,
            stop_reason=reason,
            solver_steps=None if solver_stats is None else np.asarray(solver_stats.steps),
            solver_evaluations=None
            if solver_stats is None
            else np.asarray(solver_stats.evaluations),
        )


def _checkpoint(
    keys: FitKeys,
    blueprint: Blueprint,
    training: Training,
    data: TrainingData,
    members: int,
    name: str,
) -> Checkpoint | None:
    """Return the checkpoint of a fit; None if the settings give no checkpoint folder."""
    if training.checkpoint is None:
        return None
    stream_rows = None if data.stream is None else len(data.stream.rows)
    fingerprint = parts(
        keys.user,
        blueprint,
        training,
        data.arrays,
        members=members,
        member_rows=data.member_rows,
        stream_rows=stream_rows,
    )
    return Checkpoint(training, name, fingerprint)


def _to_save(result: _Result) -> dict[str, Any]:
    """Return the arrays that a checkpoint saves at the end of a fit."""
    return {
        "train": result.train,
        "validation": result.validation,
        "result": {
            "params": result.params,
            "rest": result.rest,
            "start_loss": result.start_loss,
            "held_out": result.held_out,
            "held_out_loss": result.held_out_loss,
            "ended_by_patience": np.array([result.stop_reason == "patience"]),
            "solver_steps": result.solver_steps,
            "solver_evaluations": result.solver_evaluations,
        },
    }


def _saved_result(
    file: Checkpoint, saved: Mapping[str, np.ndarray], blueprint: Blueprint, members: int
) -> _Result:
    """Read the result of a finished fit from its checkpoint, without computing anything."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    rest = jax.eval_shape(lambda key: dict(initial_weights(blueprint, key, None)[1]), key)
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((members, *a.shape), a.dtype), rest)
    return _Result(
        params=saved["result/params"],
        rest=file.filled({"result": {"rest": stacked}}, saved)["result"]["rest"],
        train=saved["train"],
        validation=saved["validation"],
        start_loss=saved["result/start_loss"],
        held_out=saved["result/held_out"],
        held_out_loss=saved["result/held_out_loss"],
        stop_reason="patience" if saved["result/ended_by_patience"][0] else "max_epochs",
        solver_steps=saved.get("result/solver_steps"),
        solver_evaluations=saved.get("result/solver_evaluations"),
    )


def _validation_losses(
    ensemble: Ensemble, best: tuple[Best, ...], blueprint: Blueprint
) -> tuple[np.ndarray, SolverStats | None]:
    """Return losses (M, V) of the validation rows without offsets, and statistics of ODE solves."""
    if not needs_ode(blueprint):
        return np.concatenate([to_host(b.cross_losses) for b in best]), None
    losses, solver_stats = ensemble.densities(best)
    if has_likelihood_loss(blueprint):
        return np.concatenate([to_host(b.cross_losses) for b in best]), solver_stats
    unsolved = int(np.sum(np.isnan(losses)))
    if unsolved:
        warn_user(
            f"held_out_loss: the ODE was not solved for {unsolved} of {losses.size} rows",
            SbiFlowsWarning,
        )
    return losses, solver_stats


def _stacked(losses: tuple[_Losses, ...], members: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack the losses of all epochs: training and validation losses, shape (E, M) each."""
    if not losses:
        return np.zeros((0, members)), np.zeros((0, members))
    train, validation = (np.stack(values) for values in zip(*losses, strict=True))
    return train, validation


def _require_finite(values: np.ndarray, epoch: int, ensemble: Ensemble) -> None:
    if not np.all(np.isfinite(values)):
        raise TrainingDiverged(
            f"the loss was not finite in epoch {epoch}; the last finite weights are kept in "
            f"`.state`. A smaller learning rate or clip_norm may help{ensemble.divergence_advice}",
            epoch=epoch,
            state=ensemble.weights(ensemble.best),
        )
