"""The library sbi as a contestant, and draws from its flow-matching estimator.

Public names: `SbiNPE`, `fmpe_sampler`, `torch_prior`, `tensor`, `silent`, `NoTracker`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sbi_flows as sf
from benchmarks.peers.contestant import Fit, Recipe, Watch
from sbi_flows.core.typing import Obs
from sbi_flows.observations.standardise import flatten_rows
from sbi_flows.prior.maps import HALF_WIDTH

ACCEPTANCE_DRAWS = 100
"""Number of draws per observation for estimating the flow's mass within the prior's support."""

MAX_DRAWS_PER_CALL = 100_000
"""Maximum number of draws in one call, summed over observations. sbi has the same limit."""


class SbiNPE:
    """Contestant that uses `sbi.inference.NPE` with its default standardisation.

    Flows of sbi have mass outside the prior's support (leakage). The `DirectPosterior` of sbi
    rejects draws outside the support, and divides densities by the mass within the support.
    """

    def __init__(self, prior: sf.Prior, recipe: Recipe) -> None:
        """Store the settings."""
        self._recipe, self._prior = recipe, torch_prior(prior)
        self._net: Any = None
        self._threads: int | None = None

    def describe(self) -> dict[str, Any]:
        """Describe the architecture, the coordinates and the number of parameters."""
        name, sizes = self._model()
        arguments = ", ".join(f"{k}={v}" for k, v in sizes.items())
        return {
            "density": f"posterior_nn({name!r}, {arguments})",
            "coordinates": "theta and x, standardised by mean and standard deviation",
            "validation": "complete batches of validation rows; the best weights are kept",
            "leakage": (
                "draws outside the support are rejected; log densities are corrected by sbi's "
                f"default for one observation, by {ACCEPTANCE_DRAWS} draws each for several"
            ),
            "threads": self._threads,
            "parameters": sum(p.numel() for p in self._net.parameters()),
            "versions": {name: importlib.metadata.version(name) for name in ("sbi", "torch")},
        }

    def fit(
        self,
        theta: np.ndarray,
        x: Obs,
        *,
        seed: int,
        epochs: int,
        patience: int,
        watch: Watch | None = None,
    ) -> Fit:
        """Call `NPE.train`. Its data loader calls `watch` at the end of each epoch.

        After the last epoch, sbi restores the best weights. The last call of `watch` uses these
        weights. The first fit also chooses the number of threads, which takes extra time.
        """
        rows, recipe = (tensor(theta), tensor(flatten_rows(x))), self._recipe
        if self._threads is None:
            self._threads = self._fastest_number_of_threads(rows)
        num_epochs = self._train(rows, seed, epochs, patience, watch)
        if watch is not None:
            watch()
        steps = int((1 - recipe.held_out) * len(theta)) // recipe.batch
        return Fit(num_epochs, num_epochs * steps)

    def _train(
        self, rows: tuple[Any, Any], seed: int, epochs: int, patience: int, watch: Watch | None
    ) -> int:
        """Train, and return the number of epochs."""
        import torch  # pyright: ignore[reportMissingImports]
        from sbi.inference import NPE  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        inference = NPE(
            density_estimator=self._build, tracker=NoTracker(), show_progress_bars=False
        )
        inference.append_simulations(*rows)
        recipe = self._recipe
        with silent():
            inference.train(
                training_batch_size=recipe.batch,
                learning_rate=recipe.learning_rate,
                validation_fraction=recipe.held_out,
                clip_max_norm=recipe.clip_norm,
                stop_after_epochs=patience,
                # sbi counts from zero, includes the last epoch, and needs a positive number
                max_num_epochs=max(1, epochs - 1),
                dataloader_kwargs=watch and {"collate_fn": self._collate(watch)},
            )
        self._net.eval()
        return inference.summary["epochs_trained"][-1]

    def _fastest_number_of_threads(self, rows: tuple[Any, Any]) -> int:
        """Set the number of torch threads to one or to the default, whichever trains faster.

        The threads wait for each other after every operation. If another process occupies a core,
        the waiting takes much longer than the operations.
        """
        import torch  # pyright: ignore[reportMissingImports]

        subset = tuple(r[: 3 * self._recipe.batch] for r in rows)
        seconds: dict[int, float] = {}
        self._train(subset, 0, 2, 2, None)  # the first fit includes torch's set-up
        for threads in (torch.get_num_threads(), 1):
            torch.set_num_threads(threads)
            start = time.perf_counter()
            self._train(subset, 0, 2, 2, None)
            seconds[threads] = time.perf_counter() - start
        fastest = min(seconds, key=lambda threads: seconds[threads])
        torch.set_num_threads(fastest)
        return fastest

    def sample(self, x: Obs, n: int, *, seed: int) -> np.ndarray:
        """Call `DirectPosterior.sample` for one observation, `sample_batched` for several."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        rows, posterior = tensor(flatten_rows(x)), self._posterior()
        if len(rows) == 1:
            draws = posterior.sample((n,), x=rows, show_progress_bars=False)[:, None]
        else:
            draws = posterior.sample_batched(
                (n,),
                x=rows,
                max_sampling_batch_size=max(1, MAX_DRAWS_PER_CALL // len(rows)),
                show_progress_bars=False,
            )
        return np.swapaxes(draws.numpy(), 0, 1)

    def log_prob(self, theta: np.ndarray, x: Obs) -> np.ndarray:
        """Call `DirectPosterior.log_prob` for one observation.

        For several observations, compute the log of the flow's density divided by the flow's mass
        within the prior's support. The seed is fixed, and the random state of torch is left
        unchanged.
        """
        import torch  # pyright: ignore[reportMissingImports]

        rows, values = tensor(flatten_rows(x)), tensor(theta)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            posterior = self._posterior()  # draws from the prior
            if len(rows) == 1:
                return posterior.log_prob(values[0], x=rows).numpy()[None]
            log_prob = posterior.log_prob_batched(
                torch.swapaxes(values, 0, 1), x=rows, norm_posterior=False
            )
            return (log_prob - torch.log(self._acceptance(rows))).numpy().T

    def _acceptance(self, rows: Any) -> Any:
        """Estimate the flow's mass within the prior's support (positive) for each observation."""
        import torch  # pyright: ignore[reportMissingImports]
        from sbi.utils.sbiutils import within_support  # pyright: ignore[reportMissingImports]

        draws = self._net.sample(torch.Size([ACCEPTANCE_DRAWS]), condition=rows)
        inside = within_support(self._prior, draws).float().mean(dim=0)
        return torch.clamp(inside, min=0.5 / ACCEPTANCE_DRAWS)

    def _model(self) -> tuple[str, dict[str, Any]]:
        """Return name and sizes of the flow: coupling from nflows, or autoregressive from zuko."""
        recipe = self._recipe
        sizes = {"num_transforms": recipe.transforms, "num_bins": recipe.bins}
        if not recipe.coupling:
            return "zuko_nsf", {**sizes, "hidden_features": recipe.hidden}
        # the conditioner is a residual network: one layer, then blocks of two layers
        blocks = max(1, len(recipe.hidden) - 1)
        return "nsf", {**sizes, "hidden_features": recipe.hidden[0], "num_blocks": blocks}

    def _build(self, theta: Any, x: Any) -> Any:
        from sbi.neural_nets import posterior_nn  # pyright: ignore[reportMissingImports]

        name, sizes = self._model()
        self._net = posterior_nn(name, **sizes)(theta, x)
        return self._net

    def _posterior(self) -> Any:
        from sbi.inference.posteriors import (  # pyright: ignore[reportMissingImports]
            DirectPosterior,
        )

        return DirectPosterior(self._net, self._prior, enable_transform=False)

    def _collate(self, watch: Watch) -> Callable[[list[Any]], Any]:
        """Make a collate function that calls `watch` at the first batch after each validation."""
        from torch.utils.data import default_collate  # pyright: ignore[reportMissingImports]

        was_validation = False

        def collate(rows: list[Any]) -> Any:
            nonlocal was_validation
            if was_validation and self._net.training:
                self._net.eval()
                watch()
                self._net.train()
            was_validation = not self._net.training
            return default_collate(rows)

        return collate


def fmpe_sampler(
    prior: sf.Prior, theta: np.ndarray, x: Obs, *, seed: int, epochs: int
) -> Callable[[Obs, int], np.ndarray]:
    """Fit the flow matching of sbi, `sbi.inference.FMPE`, with its default settings.

    Args:
        prior: The prior.
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event).
        seed: Seed of the fit.
        epochs: Maximum number of epochs.

    Returns:
        A function that takes one observation (*event) and a number n, solves the ODE of the flow,
        and returns n draws, shape (n, D).
    """
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.inference import FMPE  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    inference = FMPE(torch_prior(prior), tracker=NoTracker(), show_progress_bars=False)
    inference.append_simulations(tensor(theta), tensor(flatten_rows(x)))
    with silent():
        inference.train(max_num_epochs=epochs)
    posterior = inference.build_posterior()

    def draw(observed: Obs, n: int) -> np.ndarray:
        row = tensor(flatten_rows(jax.tree.map(lambda leaf: leaf[None], observed)))
        return posterior.sample((n,), x=row, show_progress_bars=False).numpy()

    return draw


class NoTracker:
    """Tracker that ignores all metrics, so that sbi writes no files."""

    log_dir = None

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def log_params(self, params: dict[str, Any]) -> None:
        """Do nothing."""

    def add_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""


def torch_prior(prior: sf.Prior) -> Any:
    """Convert the prior to torch. The posteriors of sbi use only its support."""
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.utils import BoxUniform  # pyright: ignore[reportMissingImports]

    if all(prior.bounded):
        corner = jnp.full(prior.standard_dim, HALF_WIDTH)
        return BoxUniform(*(tensor(prior.from_standard(sign * corner)) for sign in (-1.0, 1.0)))

    class TorchPrior(torch.distributions.Distribution):
        """Distribution without `support`. For sbi, the support is where log_prob is finite."""

        arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch asks for a class attribute

        def __init__(self) -> None:
            super().__init__(event_shape=torch.Size([prior.dim]), validate_args=False)

        def sample(self, sample_shape: Any = ()) -> Any:
            shape = tuple(sample_shape)
            draws = prior.sample(jax.random.key(0), int(np.prod(shape)))
            return tensor(draws).reshape(*shape, prior.dim)

        def log_prob(self, value: Any) -> Any:
            return tensor(prior.log_prob(value.detach().numpy()))

    return TorchPrior()


def tensor(values: Any) -> Any:
    """Convert an array to a torch tensor of float32."""
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(np.array(values, np.float32))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Suppress the output of sbi, and its warning that the maximum number of epochs is reached."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        yield
