"""`python -m benchmarks peer-embeddings`: sbi and BayesFlow with their embeddings, in one process.

All libraries get the same simulations of a set and of an image, and each peer trains about as long
as this library did; sbi may stop early, and BayesFlow trains for at most 100 epochs. The peers have
their default networks. The set embedding of sbi is corrected, and averages over trials; x is
standardised before the fit; BayesFlow gets the prior's standard coordinates, and a batch size of
200. Trials are hidden once for the peers, and anew in every batch for this library, whose settings
(`benchmarks/suite/embedded.py`) were chosen on other observations.

Public names: `run`, `PEERS`, `TASKS`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

import sbi_flows as sf
import simulators
from benchmarks.demonstrations.observations import CASES, c2st_scores, draws_of
from benchmarks.peers.sbi_npe import NoTracker, silent, tensor, torch_prior
from benchmarks.suite.embedded import SETTINGS, embedded
from benchmarks.suite.records import BadInput, provenance, writable_folder, write_json
from sbi_flows.core.typing import Key, Obs

TASKS = ("drift_diffusion", "random_field")
SEED = 25
HELD_OUT = 0.1
"""Fraction of the simulations for the validation of BayesFlow; sbi has the same default."""

MAX_COLUMNS = 4
"""An observation (n, C) with at most this number of columns is a set of trials, not an image."""

Draw: TypeAlias = Callable[[Key, Obs, int], np.ndarray]
"""Function of a random key, an observation, and the number n of draws; it returns (n, D)."""


def run(folder: Path, names: Sequence[str] = TASKS) -> dict[str, Any]:
    """Fit each library to each task, and write `peer-embeddings.json`.

    Args:
        folder: Folder of the record. Tasks of an earlier record that are not run again are kept.
        names: Names of the tasks.

    Returns:
        The record. A library that is not installed has no entry.

    Raises:
        BadInput: A task is not one of `TASKS`, or the folder is not writable.
    """
    unknown = sorted(set(names) - set(TASKS))
    if unknown:
        raise BadInput(f"--tasks: expected names out of {', '.join(TASKS)}; got {unknown[0]}")
    path = writable_folder(folder, "--results") / "peer-embeddings.json"
    earlier = json.loads(path.read_text())["tasks"] if path.exists() else {}
    record = {**provenance(), "kind": "peer-embeddings", "tasks": earlier}
    for i, name in enumerate(TASKS):
        if name not in names:
            continue
        for results in _compare(jax.random.fold_in(jax.random.key(SEED), i), name):
            record["tasks"][name] = results
            write_json(path, record)  # after each library
    return record


def _compare(key: Key, name: str) -> Iterator[dict[str, Any]]:
    """Fit one library after the other to a task; yield the results so far after each."""
    case, task = CASES[name], simulators.get(name)
    keys = jax.random.split(key, 4)
    sims = sf.simulate(keys[0], task.prior, task.simulator, case.simulations, progress=False)
    pattern = SETTINGS[name].get("missing")
    # the peers do not hide trials themselves
    shown = sims if pattern is None else sims.hide(keys[1], pattern)
    began = time.perf_counter()
    posterior, history = embedded(task).fit(keys[2], sims)
    limit = time.perf_counter() - began
    ours = partial(draws_of, posterior)
    described = {"fit_seconds": limit, "epochs": history.epochs}
    results = {"ours": _result(keys[3], name, ours, described)}
    made = {"simulations": case.simulations, "libraries": results}
    yield made
    prior, theta = posterior.prior, np.asarray(shown.theta)
    for library, fit in PEERS.items():
        if importlib.util.find_spec(library) is None:
            print(f"{library}: not installed, skipped", file=sys.stderr)
            continue
        draw, described = fit(prior, theta, np.asarray(shown.x), limit)
        described["version"] = importlib.metadata.version(library)
        results[library] = _result(keys[3], name, draw, described)
        yield made


def _result(key: Key, name: str, draw: Draw, described: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a fit, with its C2ST at the observations of the task."""
    case, task = CASES[name], simulators.get(name)
    scores = {
        kind: c2st_scores(jax.random.fold_in(key, j), task, draw, observe)
        for j, (kind, observe) in enumerate(case.kinds.items())
    }
    result = {**described, "c2st": scores}
    print(f"{name}: {result}", flush=True)
    return result


def _fit_sbi(prior: sf.Prior, theta: np.ndarray, x: np.ndarray, limit: float) -> tuple[Draw, dict]:
    """Fit `sbi.inference.NPE` with its default flow and its embedding for sets or images."""
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.inference import NPE  # pyright: ignore[reportMissingImports]
    from sbi.neural_nets import posterior_nn  # pyright: ignore[reportMissingImports]
    from sbi.samplers.rejection.rejection import (  # pyright: ignore[reportMissingImports]
        accept_reject_sample,
    )
    from sbi.utils import within_support  # pyright: ignore[reportMissingImports]

    center, scale = _location_and_scale(x)
    support, net = torch_prior(prior), None

    def train(epochs: int) -> int:
        nonlocal net
        torch.manual_seed(SEED)
        embedding = _sbi_embedding(x.shape[1:])
        build = posterior_nn("maf", z_score_x="none", embedding_net=embedding)
        inference = NPE(density_estimator=build, tracker=NoTracker(), show_progress_bars=False)
        rows = tensor(theta), tensor((x - center) / scale)
        inference.append_simulations(*rows, exclude_invalid_x=False)
        with silent():
            # sbi counts from zero, and includes the last epoch
            net = inference.train(max_num_epochs=max(1, epochs - 1))
        return inference.summary["epochs_trained"][-1]

    epochs = _epochs_within(limit, train)
    began = time.perf_counter()
    trained = train(epochs)
    seconds = time.perf_counter() - began

    def draw(key: Key, x: Obs, n: int) -> np.ndarray:
        torch.manual_seed(int(jax.random.randint(key, (), 0, 2**31 - 1)))
        row = tensor((np.asarray(x)[None] - center) / scale)
        assert net is not None
        # as `DirectPosterior` of sbi 0.27 does, which refuses NaN that its embedding accepts
        drawn = accept_reject_sample(
            proposal=net.sample,
            accept_reject_fn=partial(within_support, support),
            num_samples=n,
            show_progress_bars=False,
            proposal_sampling_kwargs={"condition": row},
        )[0]
        return drawn.reshape(n, -1).detach().numpy()

    return draw, {"fit_seconds": seconds, "epochs": trained}


def _sbi_embedding(shape: tuple[int, ...]) -> Any:
    """Return the embedding of sbi for a set of trials or an image.

    sbi 0.27 counts the trials of a set with several columns wrongly: rows of a batch get the counts
    of others. Here the counts are right.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.neural_nets import embedding_nets  # pyright: ignore[reportMissingImports]

    if not _is_set(shape):
        return embedding_nets.CNNEmbedding(shape)

    class Invariant(embedding_nets.PermutationInvariantEmbedding):
        def forward(self, x: Any) -> Any:
            present = ~torch.isnan(x).all(-1, keepdim=True)
            embedded = self.trial_net(torch.nan_to_num(x, nan=0.0)) * present.float()
            counts = present.sum(1).float()
            return self.fc_subnet(torch.cat([embedded.sum(1) / counts, counts], dim=1))

    trial = embedding_nets.FCEmbedding(shape[-1], output_dim=20)
    return Invariant(trial, 20, aggregation_fn="mean")


def _fit_bayesflow(
    prior: sf.Prior, theta: np.ndarray, x: np.ndarray, limit: float
) -> tuple[Draw, dict]:
    """Fit `bayesflow.BasicWorkflow` with its coupling flow and its network for sets or images.

    The flow gets the prior's unbounded coordinates. A further column marks the trials that are
    present.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import bayesflow  # pyright: ignore[reportMissingImports]
    import keras  # pyright: ignore[reportMissingImports]

    center, scale = _location_and_scale(x)
    is_set = _is_set(x.shape[1:])

    def inputs(rows: np.ndarray) -> np.ndarray:
        rows = np.asarray((rows - center) / scale, np.float32)
        if not is_set:
            return rows[..., None]
        present = ~np.isnan(rows[..., :1])
        return np.concatenate([np.nan_to_num(rows), present], axis=-1).astype(np.float32)

    networks = bayesflow.networks
    y, values = np.asarray(prior.to_standard(jnp.asarray(theta))), inputs(x)
    cut = int(len(y) * (1 - HELD_OUT))
    rows = {"theta": y[:cut], "x": values[:cut]}, {"theta": y[cut:], "x": values[cut:]}
    flow = None

    def train(epochs: int) -> None:
        nonlocal flow
        keras.utils.set_random_seed(SEED)
        network = networks.DeepSet() if is_set else networks.ConvolutionalNetwork()
        flow = bayesflow.BasicWorkflow(
            inference_network=networks.CouplingFlow(),
            summary_network=network,
            inference_variables=["theta"],
            summary_variables=["x"],
        )
        flow.fit_offline(rows[0], epochs=epochs, batch_size=200, validation_data=rows[1], verbose=0)

    epochs = min(100, _epochs_within(limit, train))
    began = time.perf_counter()
    train(epochs)
    seconds = time.perf_counter() - began

    def draw(key: Key, x: Obs, n: int) -> np.ndarray:
        keras.utils.set_random_seed(int(jax.random.randint(key, (), 0, 2**31 - 1)))
        assert flow is not None
        drawn = flow.sample(conditions={"x": inputs(np.asarray(x)[None])}, num_samples=n)
        return np.asarray(prior.from_standard(jnp.asarray(drawn["theta"][0])))

    return draw, {"fit_seconds": seconds, "epochs": epochs}


def _location_and_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation: of each column of trials, or of all pixels."""
    axes = (0, 1) if _is_set(x.shape[1:]) else None
    return np.nanmean(x, axis=axes), np.nanstd(x, axis=axes)


def _is_set(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[-1] <= MAX_COLUMNS


def _epochs_within(limit: float, train: Callable[[int], Any]) -> int:
    """Return the number of epochs that fit into the limit in seconds.

    The time of an epoch is half the difference of the times of fits of 4 and of 2 epochs, which
    does not contain the time of compilation.
    """
    seconds = []
    for epochs in (2, 4):
        began = time.perf_counter()
        train(epochs)
        seconds.append(time.perf_counter() - began)
    each = max((seconds[1] - seconds[0]) / 2, 0.1 * seconds[1] / 4)
    return max(2, round((limit - seconds[0]) / each) + 2)


PEERS: dict[str, Callable[..., tuple[Draw, dict]]] = {"sbi": _fit_sbi, "bayesflow": _fit_bayesflow}
