"""Discrepancies of the user's own between an observation and simulations at draws.

Public names: `Discrepancies`, `Discrepancy`, `checked`, `judged`, `two_sided`.

Source: Gelman, Meng & Stern 1996, "Posterior predictive assessment of model fitness via realized
discrepancies" (Statistica Sinica 6:733), equation 6 for those of the parameters too.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import as_real_tree
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Obs
from sbi_flows.diagnostics.uniformity import holm
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations

Discrepancy: TypeAlias = Callable[..., Any]
"""`x -> number`, or `(x, theta) -> number`, of one observation."""

Checked: TypeAlias = dict[str, tuple[Discrepancy, int]]
"""Functions by name, each with its number of arguments."""


@dataclasses.dataclass(frozen=True, repr=False)
class Discrepancies:
    """What K discrepancies say of an observation, beside n simulations at draws.

    Attributes:
        labels: Their names (K,).
        p: Two-sided tail probability of each, shape (K,): twice the share of draws at which the
            simulation is beyond the observation, on the rarer side. Of discrepancies of the
            parameters both are evaluated at the draw.
        simulated: Of the simulations, shape (n, K).
        observed: Of the observation, shape (n, K): the same at all draws, unless it depends on the
            parameters.
    """

    labels: tuple[str, ...]
    p: np.ndarray
    simulated: np.ndarray
    observed: np.ndarray

    @property
    def adjusted(self) -> np.ndarray:
        """The p-values, corrected for their number (Holm), shape (K,)."""
        return holm(self.p)

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """A table: observed, and the median and central 90% of the simulations."""
        low, middle, high = np.quantile(self.simulated, [0.05, 0.5, 0.95], axis=0)
        bands = zip(low, high, strict=True)
        columns = {
            "observed": [f"{v:.4g}" for v in np.median(self.observed, axis=0)],
            "simulated": [f"{v:.4g}" for v in middle],
            "90%": [f"{a:.4g} to {b:.4g}" for a, b in bands],
            "p": [p_text(float(p)) for p in self.p],
            "p (Holm)": [p_text(float(p)) for p in self.adjusted],
        }
        return table(self.labels, columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON; the simulations are left out."""
        quantiles = np.quantile(self.simulated, [0.05, 0.5, 0.95], axis=0).T.tolist()
        observed = np.median(self.observed, axis=0).tolist()
        values = zip(self.labels, observed, quantiles, self.p, self.adjusted, strict=True)
        return {
            name: {
                "observed": own,
                "simulated_quantiles": dict(zip(("0.05", "0.5", "0.95"), row, strict=True)),
                "p": float(p),
                "adjusted_p": float(corrected),
            }
            for name, own, row, p, corrected in values
        }

    def plot(self) -> Any:
        """Histograms of the simulations with the observation as a line; a figure."""
        from sbi_flows.plots.local import histograms

        titles = [f"{m}: p {p_text(float(p))}" for m, p in zip(self.labels, self.p, strict=True)]
        return histograms(self.simulated, self.observed, titles=titles)


def two_sided(simulated: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Two-sided tail probabilities (K,) of observed numbers among simulated ones (n, K).

    Args:
        simulated: Shape (n, K).
        observed: Shape (1, K), or (n, K) where each is compared with one simulation.
    """
    n = len(simulated)
    below = np.mean(simulated < observed, axis=0) + np.mean(simulated <= observed, axis=0)
    # the middle of the ties, and never beyond what so many simulations can say
    position = (0.5 * below * n + 0.5) / (n + 1)
    return np.minimum(1.0, 2.0 * np.minimum(position, 1.0 - position))


def checked(discrepancies: Mapping[str, Discrepancy] | None, prior: Prior, x: Obs) -> Checked:
    """What the user gave, traced on one observation; nothing is computed.

    Raises:
        ValueError: It is no dict of functions of one or two arguments, each of one real number.
    """
    if discrepancies is None:
        return {}
    if not isinstance(discrepancies, Mapping) or not discrepancies:
        raise ValueError(
            f"discrepancies: expected a dict of functions by name, got {discrepancies!r}"
        )
    like = jax.tree.map(jnp.asarray, as_real_tree("x", x))
    theta = jax.eval_shape(lambda: prior.structured(prior.center()))
    return {name: (test, _arguments(name, test, like, theta)) for name, test in _all(discrepancies)}


def _all(discrepancies: Mapping) -> Any:
    for name, test in discrepancies.items():
        if not isinstance(name, str) or not callable(test):
            raise ValueError(
                f"discrepancies[{name!r}]: expected a str name and a function, got {test!r}"
            )
        yield name, test


def _arguments(name: str, test: Discrepancy, x: Obs, theta: Any) -> int:
    """Number of arguments of a discrepancy: 1 or 2."""
    count, field = _required(test), f"discrepancies[{name!r}]"
    if count not in (1, 2):
        raise ValueError(f"{field}: expected a function of x, or of x and theta, got {count}")
    try:
        # JAX keeps weak references to functions, which those of NumPy do not allow
        out = jax.eval_shape(lambda *given: test(*given), *(x, theta)[:count])
    except (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise ValueError(
            f"{field}: expected a function that JAX can trace, got {type(error).__name__}: {error}"
        ) from error
    real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if not real or out.shape != ():
        raise ValueError(f"{field}: expected one real number, got {getattr(out, 'shape', out)}")
    return count


def _required(test: Discrepancy) -> int:
    """Number of arguments that have to be given; 1 where nothing is known of them."""
    try:
        parameters = inspect.signature(test).parameters.values()
    except (TypeError, ValueError):
        return 1
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in places and p.default is inspect.Parameter.empty for p in parameters)


def judged(
    tests: Checked, prior: Prior, simulations: Simulations, observed: Obs
) -> Discrepancies | None:
    """Evaluate discrepancies at simulations and at a batch of the one observation.

    Raises:
        SbiFlowsError: One of them gave NaN.
    """
    if not tests:
        return None
    theta = prior.structured(simulations.theta)
    sides: tuple[list, list] = ([], [])
    for name, (test, count) in tests.items():
        for side, x in zip(sides, (simulations.x, observed), strict=True):
            side.append(_evaluated(name, test, count, x, theta))
    n = len(simulations)
    values, own = (np.stack([np.broadcast_to(v, n) for v in s], axis=1) for s in sides)
    return Discrepancies(tuple(tests), two_sided(values, own), values, own)


def _evaluated(name: str, test: Discrepancy, count: int, x: Obs, theta: Any) -> np.ndarray:
    """A discrepancy at observations (B, *event), B the number of parameters or 1."""
    if count == 1:
        values = jax.jit(jax.vmap(test))(x)
    elif len(jax.tree.leaves(x)[0]) == 1:
        one = jax.tree.map(lambda leaf: leaf[0], x)
        values = jax.jit(jax.vmap(test, in_axes=(None, 0)))(one, theta)
    else:
        values = jax.jit(jax.vmap(test))(x, theta)
    values = np.asarray(values, np.float64)
    wrong = int(np.sum(np.isnan(values)))
    if wrong:
        raise SbiFlowsError(
            f"discrepancies[{name!r}]: gave NaN at {wrong} of {len(values)} simulations or draws"
        )
    return values
