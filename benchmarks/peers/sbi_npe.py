"""Neural posterior estimation of sbi, and draws of its flow matching.

Public names: `SbiNPE`, `fmpe_sampler`.
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
"""Number of draws per observation to estimate the flow's mass inside the prior's support."""

MAX_DRAWS_PER_CALL = 100_000
"""Maximum number of draws per call, over all observations; sbi has the same limit."""


class SbiNPE:
    """`sbi.inference.NPE` with its default standardisation and its `DirectPosterior`.

    Its flows have mass outside the prior's support (leakage). Draws outside are rejected, and
    densities are divided by the mass inside, as in sbi's own `log_prob`.
    """

    def __init__(self, prior: sf.Prior, recipe: Recipe) -> None:
        """Store the settings."""
        self._recipe, self._prior = recipe, _torch_prior(prior)
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
        """Call `NPE.train`; its data loader calls `watch` when an epoch has ended.

        The last call of `watch` comes after the fit, with the best weights, which sbi restores. The
        first fit also chooses the number of threads, which takes additional time.
        """
        rows, recipe = (_tensor(theta), _tensor(flatten_rows(x))), self._recipe
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
            density_estimator=self._build, tracker=_NoTracker(), show_progress_bars=False
        )
        inference.append_simulations(*rows)
        recipe = self._recipe
        with _silent():
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
        """Set torch's threads to one or to its default, whichever is faster for a few steps.

        Torch's threads wait for each other after every operation. If another process occupies a
        core, this takes much longer than the operations.
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
        """Call `DirectPosterior.sample`, or `sample_batched` for several observations."""
        import torch  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        rows, posterior = _tensor(flatten_rows(x)), self._posterior()
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
        """Call `DirectPosterior.log_prob`, or compute it from its parts for several observations.

        The calculation uses a fixed seed, and does not change torch's random state.
        """
        import torch  # pyright: ignore[reportMissingImports]

        rows, values = _tensor(flatten_rows(x)), _tensor(theta)
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
        """Estimate the flow's mass inside the prior's support for each observation; never zero."""
        import torch  # pyright: ignore[reportMissingImports]
        from sbi.utils.sbiutils import within_support  # pyright: ignore[reportMissingImports]

        draws = self._net.sample(torch.Size([ACCEPTANCE_DRAWS]), condition=rows)
        inside = within_support(self._prior, draws).float().mean(dim=0)
        return torch.clamp(inside, min=0.5 / ACCEPTANCE_DRAWS)

    def _model(self) -> tuple[str, dict[str, Any]]:
        """Return name and sizes of the network: nflows' coupling or zuko's autoregressive flow."""
        recipe = self._recipe
        sizes = {"num_transforms": recipe.transforms, "num_bins": recipe.bins}
        if not recipe.coupling:
            return "zuko_nsf", {**sizes, "hidden_features": recipe.hidden}
        # the conditioner is a residual network of one layer and blocks of two
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
        """Make a collate function that calls `watch` at the first batch after a validation."""
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
    """Fit `sbi.inference.FMPE` with its defaults.

    Args:
        prior: The prior.
        theta: Parameters, shape (N, D).
        x: Observations, shape (N, *event).
        seed: Seed of the fit.
        epochs: Maximum number of epochs.

    Returns:
        A function of one observation (*event) and n that returns draws by the ODE, shape (n, D).
    """
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.inference import FMPE  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    inference = FMPE(_torch_prior(prior), tracker=_NoTracker(), show_progress_bars=False)
    inference.append_simulations(_tensor(theta), _tensor(flatten_rows(x)))
    with _silent():
        inference.train(max_num_epochs=epochs)
    posterior = inference.build_posterior()

    def draw(observed: Obs, n: int) -> np.ndarray:
        row = _tensor(flatten_rows(jax.tree.map(lambda leaf: leaf[None], observed)))
        return posterior.sample((n,), x=row, show_progress_bars=False).numpy()

    return draw


class _NoTracker:
    """Tracker of sbi that ignores all metrics, so that no files are written."""

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


def _torch_prior(prior: sf.Prior) -> Any:
    """Convert the prior to torch; a posterior of sbi uses its support only."""
    import torch  # pyright: ignore[reportMissingImports]
    from sbi.utils import BoxUniform  # pyright: ignore[reportMissingImports]

    if all(prior.bounded):
        corner = jnp.full(prior.standard_dim, HALF_WIDTH)
        return BoxUniform(*(_tensor(prior.from_standard(sign * corner)) for sign in (-1.0, 1.0)))

    class TorchPrior(torch.distributions.Distribution):
        """Distribution without `support`, so that sbi checks whether the log density is finite."""

        arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch asks for a class attribute

        def __init__(self) -> None:
            super().__init__(event_shape=torch.Size([prior.dim]), validate_args=False)

        def sample(self, sample_shape: Any = ()) -> Any:
            shape = tuple(sample_shape)
            draws = prior.sample(jax.random.key(0), int(np.prod(shape)))
            return _tensor(draws).reshape(*shape, prior.dim)

        def log_prob(self, value: Any) -> Any:
            return _tensor(prior.log_prob(value.detach().numpy()))

    return TorchPrior()


def _tensor(values: Any) -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    return torch.from_numpy(np.array(values, np.float32))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress sbi's output and its warning at the maximum number of epochs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.filterwarnings("ignore", "Maximum number of epochs")
        yield
