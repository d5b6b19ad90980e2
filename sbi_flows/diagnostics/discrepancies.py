"""User-defined discrepancies between an observation and posterior predictive simulations.

Public names: `Discrepancies`, `Discrepancy`. Internal names: `trace_discrepancies`,
`evaluate_discrepancies`, `two_sided_p_values`.

References:
    Gelman, Meng & Stern 1996, Posterior predictive assessment of model fitness via realized
    discrepancies, Statistica Sinica 6:733, equation 6 (discrepancies that depend on parameters).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sbi_flows.core.checks import as_real_array, as_tree
from sbi_flows.core.doubles import is_double
from sbi_flows.core.errors import SbiFlowsError
from sbi_flows.core.tables import p_text, table
from sbi_flows.core.typing import Obs
from sbi_flows.diagnostics.uniformity import holm
from sbi_flows.plots.local import histograms
from sbi_flows.prior.prior import Prior
from sbi_flows.simulations.simulations import Simulations

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Discrepancy: TypeAlias = Callable[..., Any]
"""Function `x -> number` or `(x, theta) -> number` of one observation, in JAX operations."""

QUANTILES = (0.05, 0.5, 0.95)
"""Quantiles of the simulated values that `summary` and `to_dict` show."""


class TracedDiscrepancy(NamedTuple):
    """A user-defined discrepancy that JAX has traced without an error.

    Attributes:
        name: Name of the discrepancy.
        function: The user's function.
        needs_theta: True for a function `(x, theta) -> number`.
    """

    name: str
    function: Discrepancy
    needs_theta: bool


@dataclasses.dataclass(frozen=True, repr=False)
class Discrepancies:
    """Values of K discrepancies for an observation and for n simulations at posterior draws.

    Attributes:
        labels: Names of the K discrepancies.
        p: Two-sided p-value of each observed value, shape (K,): twice the share of simulated values
            below the observed value, or twice the share above it if this is smaller. If a
            discrepancy depends on the parameters, simulation and observation are compared at the
            same draw.
        simulated: Discrepancies of the simulations, shape (n, K).
        observed: Discrepancies of the observation at each draw, shape (n, K); all rows are equal
            unless the discrepancy depends on the parameters.
    """

    labels: tuple[str, ...]
    p: np.ndarray
    simulated: np.ndarray
    observed: np.ndarray

    @property
    def adjusted(self) -> np.ndarray:
        """P-values with Holm's correction for the number of discrepancies, shape (K,)."""
        return holm(self.p)

    def __repr__(self) -> str:
        """Return the text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Return a table of observed values, simulated median and 90% interval, and p-values."""
        low, median, high = np.quantile(self.simulated, QUANTILES, axis=0)
        intervals = zip(low, high, strict=True)
        columns = {
            "observed": [f"{v:.4g}" for v in np.median(self.observed, axis=0)],
            "simulated": [f"{v:.4g}" for v in median],
            "90%": [f"{a:.4g} to {b:.4g}" for a, b in intervals],
            "p": [p_text(float(p)) for p in self.p],
            "p (Holm)": [p_text(float(p)) for p in self.adjusted],
        }
        return table(self.labels, columns)

    def to_dict(self) -> dict[str, Any]:
        """Return medians, quantiles and p-values by name as JSON data, without the simulations."""
        quantiles = np.quantile(self.simulated, QUANTILES, axis=0).T.tolist()
        medians = np.median(self.observed, axis=0).tolist()
        values = zip(self.labels, medians, quantiles, self.p, self.adjusted, strict=True)
        return {
            name: {
                "observed": median,
                "simulated_quantiles": dict(zip(map(str, QUANTILES), row, strict=True)),
                "p": float(p),
                "adjusted_p": float(adjusted),
            }
            for name, median, row, p, adjusted in values
        }

    def plot(self) -> Figure:
        """Plot histograms of the simulated values, with the observed value as a line."""
        titles = [f"{m}: p {p_text(float(p))}" for m, p in zip(self.labels, self.p, strict=True)]
        return histograms(self.simulated, self.observed, titles=titles)


def two_sided_p_values(simulated: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Compute two-sided p-values of observed values relative to simulated values.

    Args:
        simulated: Simulated values, shape (n, K).
        observed: Observed values, shape (1, K), or (n, K) to compare row by row.

    Returns:
        P-values, shape (K,). A simulated value equal to the observed value counts half as below and
        half as above. With n simulations, no p-value is below 1 / (n + 1).
    """
    n = len(simulated)
    below = np.mean(simulated < observed, axis=0) + np.mean(simulated <= observed, axis=0)
    position = (0.5 * below * n + 0.5) / (n + 1)
    return np.minimum(1.0, 2.0 * np.minimum(position, 1.0 - position))


def trace_discrepancies(
    discrepancies: Mapping[str, Discrepancy] | None, prior: Prior, x: Obs
) -> list[TracedDiscrepancy]:
    """Check user-defined discrepancies by tracing them with JAX on one observation.

    Raises:
        ValueError: `discrepancies` is not a dict of functions, or a function does not accept one or
            two arguments, or does not return one real number.
    """
    if discrepancies is None:
        return []
    if not isinstance(discrepancies, Mapping) or not discrepancies:
        raise ValueError(
            f"discrepancies: expected a dict of functions by name, got {discrepancies!r}"
        )
    for name, function in discrepancies.items():
        if not isinstance(name, str) or not callable(function):
            raise ValueError(
                f"discrepancies[{name!r}]: expected a str name and a function, got {function!r}"
            )
    x = jax.tree.map(jnp.asarray, as_tree("x", x, as_real_array))
    theta = jax.eval_shape(lambda: prior.structured(prior.center()))
    return [_traced(name, function, x, theta) for name, function in discrepancies.items()]


def _traced(name: str, function: Discrepancy, x: Obs, theta: Any) -> TracedDiscrepancy:
    """Trace one discrepancy, and check that it returns one real number.

    Raises:
        ValueError: JAX cannot trace the function, or the function does not return one real number.
    """
    count, field = _num_required_arguments(function), f"discrepancies[{name!r}]"
    if count not in (1, 2):
        raise ValueError(f"{field}: expected a function of x, or of x and theta, got {count}")
    try:
        # The lambda is needed because JAX cannot keep weak references to NumPy's functions.
        out = jax.eval_shape(lambda *args: function(*args), *(x, theta)[:count])
    except (jax.errors.JAXTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        raise ValueError(
            f"{field}: expected a function that JAX can trace, got {type(error).__name__}: {error}"
        ) from error
    is_real = hasattr(out, "dtype") and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    if not is_real or out.shape != ():
        raise ValueError(f"{field}: expected one real number, got {getattr(out, 'shape', out)}")
    return TracedDiscrepancy(name, function, needs_theta=count == 2)


def _num_required_arguments(function: Discrepancy) -> int:
    """Return the number of positional arguments without a default; 1 if it is unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def evaluate_discrepancies(
    traced: list[TracedDiscrepancy], prior: Prior, simulations: Simulations, observed: Obs
) -> Discrepancies | None:
    """Evaluate discrepancies at n simulations and at the observation.

    Args:
        traced: The discrepancies. If the list is empty, the function returns None.
        prior: The prior, which converts draws to the form that the simulator receives.
        simulations: Simulations at posterior draws, all successful.
        observed: A batch that consists of one observation.

    Raises:
        SbiFlowsError: A discrepancy is NaN.
    """
    if not traced:
        return None
    theta = prior.structured(simulations.theta)
    n = len(simulations)
    # JAX would round arrays in double precision before the function can subtract anything
    precision = jax.enable_x64(True) if _has_doubles((theta, simulations.x)) else nullcontext()
    with precision:
        columns = [
            [np.broadcast_to(_evaluate(d, x, theta), n) for d in traced]
            for x in (simulations.x, observed)
        ]
    values, observed_values = (np.stack(parts, axis=1) for parts in columns)
    labels = tuple(d.name for d in traced)
    p = two_sided_p_values(values, observed_values)
    return Discrepancies(labels, p, values, observed_values)


def _has_doubles(tree: Any) -> bool:
    """Return whether any array is in double precision on the host."""
    return any(map(is_double, jax.tree.leaves(tree)))


def _evaluate(discrepancy: TracedDiscrepancy, x: Obs, theta: Any) -> np.ndarray:
    """Evaluate a discrepancy for n parameter vectors, and for n observations or a single one.

    Returns:
        Values, shape (n,). The shape is (1,) if x is a single observation and the function does not
        depend on theta.
    """
    function = discrepancy.function
    if not discrepancy.needs_theta:
        values = jax.jit(jax.vmap(function))(x)
    elif len(jax.tree.leaves(x)[0]) == 1:
        single = jax.tree.map(lambda leaf: leaf[0], x)
        values = jax.jit(jax.vmap(function, in_axes=(None, 0)))(single, theta)
    else:
        values = jax.jit(jax.vmap(function))(x, theta)
    values = np.asarray(values, np.float64)
    num_nan = int(np.sum(np.isnan(values)))
    if num_nan:
        raise SbiFlowsError(
            f"discrepancies[{discrepancy.name!r}]: gave NaN at {num_nan} of {len(values)} "
            "simulations or draws"
        )
    return values
