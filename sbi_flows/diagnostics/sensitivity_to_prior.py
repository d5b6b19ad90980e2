"""How far would the posterior move with another prior, and with more or less weight on the data?

Public names: `prior_sensitivity`, `PriorSensitivity`, `Reweighted`.

Draws of the posterior are re-weighted: by the ratio of two priors, or by a power of the prior or of
the likelihood, which is the posterior over the prior up to a constant. Nothing is fitted anew.

Source: Kallioinen, Paananen, Buerkner & Vehtari 2023, "Detecting and Diagnosing Prior and
Likelihood Sensitivity with Power-Scaling" (arXiv:2107.14054).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sbi_flows.core.checks import require_count
from sbi_flows.core.errors import SbiFlowsError, WeightsUneven
from sbi_flows.core.tables import table
from sbi_flows.core.typing import Key, Obs
from sbi_flows.posteriors.base import PosteriorLike
from sbi_flows.posteriors.reweighting import Reweighting, cjs_distance, reweighted
from sbi_flows.prior.prior import Prior, PriorLike, as_prior

MIN_DRAWS = 500
PRIOR_DRAWS = 10_000

POWERS = (0.8, 1.25)
"""Powers whose effect is shown: weaker and stronger by the same factor."""

NEAR = 1.01
"""The power, and one over it, between which the sensitivity is a slope."""

SENSITIVE = 0.05
"""Sensitivity from which on it is worth a thought, as in section 2.4 of the source."""

FLAT = 1e-4
"""Largest difference of log weights that rounding makes."""


@dataclasses.dataclass(frozen=True)
class Reweighted:
    """The posterior under one set of weights.

    Attributes:
        name: What the weights are.
        shift: How far each mean moves, in posterior standard deviations, shape (D,).
        width: Ratio of the standard deviations, new over old, shape (D,).
        effective: Number of draws that the weighted ones are worth.
        pareto_k: Shape of the tail of the weights: see `reweighting`.
        reliable: Whether so many draws can tell. If not, shift and width are NaN.
        flat: Whether all weights are alike, so that nothing changes.
    """

    name: str
    shift: np.ndarray
    width: np.ndarray
    effective: float
    pareto_k: float
    reliable: bool
    flat: bool

    def cell(self, i: int) -> str:
        """Shift and width of a parameter in a few characters."""
        return f"{self.shift[i]:+.2f} x{self.width[i]:.2f}" if self.reliable else "?"

    def to_dict(self, parameters: tuple[str, ...]) -> dict[str, Any]:
        """Plain numbers, fit for JSON: None where it cannot be told."""

        def named(values: np.ndarray) -> dict[str, float | None]:
            told = values.tolist() if self.reliable else [None] * len(parameters)
            return dict(zip(parameters, told, strict=True))

        plain = {name: getattr(self, name) for name in ("effective", "pareto_k", "reliable")}
        return {"shift": named(self.shift), "width": named(self.width), **plain, "flat": self.flat}


@dataclasses.dataclass(frozen=True, repr=False)
class PriorSensitivity:
    """What `prior_sensitivity` found.

    Attributes:
        parameters: Names of the parameters (D,).
        rows: The posterior under each set of weights.
        sensitivity: By component ("prior", "likelihood", "prior of a"): slope of the cumulative
            Jensen-Shannon distance of each marginal with the binary logarithm of the component's
            power, shape (D,). Empty where another prior was given.
        notes: Sentences on what cannot be told, or needs no telling.
        draws: Number of draws.
    """

    parameters: tuple[str, ...]
    rows: tuple[Reweighted, ...]
    sensitivity: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    draws: int

    def __getitem__(self, name: str) -> Reweighted:
        """The row of a name."""
        named = {row.name: row for row in self.rows}
        if name not in named:
            raise KeyError(f"{name}: expected one of {', '.join(named)}")
        return named[name]

    @property
    def diagnosis(self) -> dict[str, str]:
        """Of each parameter that is sensitive to the prior, what that may mean."""
        if not self.sensitivity:
            return {}
        prior, likelihood = (self.sensitivity[c] >= SENSITIVE for c in ("prior", "likelihood"))
        meaning = ("the prior rules, the data say little", "prior and data may pull apart")
        pairs = zip(self.parameters, prior, likelihood, strict=True)
        return {name: meaning[int(both)] for name, sensitive, both in pairs if sensitive}

    def __repr__(self) -> str:
        """The text of `summary`."""
        return self.summary()

    def summary(self) -> str:
        """Shift and width of every parameter, what the weights are worth, and the notes."""
        whole = [row for row in self.rows if " of " not in row.name]
        places = range(len(self.parameters))
        columns = {row.name: [row.cell(i) for i in places] for row in whole}
        for name in ("prior", "likelihood") if self.sensitivity else ():
            columns[f"{name} sensitivity"] = [f"{v:.2f}" for v in self.sensitivity[name]]
        said = self.diagnosis
        if said:
            columns[""] = [said.get(name, "") for name in self.parameters]
        weights = {
            "worth": [f"{row.effective:.0f}" for row in self.rows],
            "Pareto k": [f"{row.pareto_k:.2f}" for row in self.rows],
            "moves most": [self._farthest(row) for row in self.rows],
        }
        return "\n".join(
            [
                f"sensitivity to the prior, {self.draws} draws re-weighted: shift of the mean in "
                "posterior sd, x change of the sd",
                table(self.parameters, columns),
                table([row.name for row in self.rows], weights),
                *self.notes,
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and text, fit for JSON."""
        named = {
            name: dict(zip(self.parameters, values.tolist(), strict=True))
            for name, values in self.sensitivity.items()
        }
        return {
            "rows": {row.name: row.to_dict(self.parameters) for row in self.rows},
            "sensitivity": named,
            "diagnosis": self.diagnosis,
            "notes": list(self.notes),
            "draws": self.draws,
        }

    def plot(self, ax: Any = None) -> Any:
        """Shifts as a heat map of parameters and weights, what cannot be told in grey; the axes."""
        from sbi_flows.plots.local import heat_map

        shifts = np.stack([row.shift for row in self.rows], axis=1)
        names = [row.name for row in self.rows]
        label = "shift of the mean (posterior sd)"
        return heat_map(shifts, rows=self.parameters, columns=names, label=label, ax=ax)

    def _farthest(self, row: Reweighted) -> str:
        if row.flat or not row.reliable:
            return "nothing" if row.flat else "?"
        size = np.maximum(np.abs(row.shift), np.abs(np.log(row.width)))
        return f"{self.parameters[int(np.argmax(size))]} {row.cell(int(np.argmax(size)))}"


def prior_sensitivity(
    key: Key,
    posterior: PosteriorLike,
    x: Obs,
    *,
    prior: PriorLike | None = None,
    draws: int = 4_000,
) -> PriorSensitivity:
    """See what another prior would make of the posterior at an observation, by re-weighting draws.

    Without `prior`, the prior and the likelihood are each raised to powers around 1: a parameter
    whose posterior moves with the prior's power owes something to the prior, one that moves with
    both may be where prior and data pull apart, and one that moves with neither is not learned from
    x. Where the prior is a product, each named parameter's own prior is raised alone as well.

    The likelihood is that of the fit: posterior density over prior density.

    Args:
        key: Random key.
        posterior: The posterior. Without `prior` its densities are evaluated, which for continuous
            flows takes an ODE a draw.
        x: One observation.
        prior: Another prior of the same parameters: what `as_prior` takes. It cannot be seen where
            the posterior's own prior is zero.
        draws: Number of draws, at least 500.

    Returns:
        Shifts and widths; printing shows them, `.plot()` draws them.

    Raises:
        ValueError: x is a batch or does not fit, the prior has other parameters, or there are too
            few draws.
        WeightsUneven: No draw is in the support of the other prior.
        SbiFlowsError: The posterior gave NaN, or draws outside the prior's support.

    References:
        Detecting and Diagnosing Prior and Likelihood Sensitivity with Power-Scaling,
        arXiv:2107.14054, equations 2 and 3 and section 2.4.

    Example:
        >>> import jax, numpyro.distributions as dist, sbi_flows as sf
        >>> prior = dist.Normal(0, 1).expand([1])
        >>> noisy = lambda key, theta: theta + 0.5 * jax.random.normal(key, (1,))
        >>> sims = sf.simulate(jax.random.key(0), prior, noisy, 500)
        >>> quick = sf.Training(max_epochs=2)
        >>> posterior, _ = sf.NPE(prior, training=quick, members=1).fit(jax.random.key(1), sims)
        >>> found = sf.prior_sensitivity(
        ...     jax.random.key(2), posterior, jax.numpy.array([0.3]),
        ...     prior=dist.Normal(1, 1).expand([1]),
        ... )
        >>> bool(found["new prior"].shift[0] > 0.2), found["new prior"].reliable
        (True, True)
    """
    require_count(MIN_DRAWS, draws=draws)
    old = posterior.prior
    draw_key, prior_key = jax.random.split(key)
    if prior is not None:
        new = _alternative(prior, old)
        theta = posterior.sample(draw_key, x, draws)
        return _under(prior_key, old, new, theta, _log_prior(old, theta))
    theta, log_posterior = posterior.sample_and_log_prob(draw_key, x, draws)
    log_prior = _log_prior(old, theta)
    log_posterior = _finite(log_posterior, "log densities that are not finite")
    sites = _sites(old, theta)
    parts = {"prior": log_prior, "likelihood": log_posterior - log_prior}
    parts |= {f"prior of {name}": own for name, own in sites.items() if len(sites) > 1}
    return _scaled(old, np.asarray(theta, np.float64), parts)


def _alternative(prior: PriorLike, old: Prior) -> Prior:
    """The other prior, of the same parameters as the old one."""
    new = as_prior(prior)
    if dict(new.event_shapes) != dict(old.event_shapes) or new.names != old.names:
        raise ValueError(f"prior: expected the parameters of {old}, in that order, got {new}")
    return new


def _log_prior(prior: Prior, theta: Any) -> np.ndarray:
    if theta.ndim != 2:
        raise ValueError("x: expected one observation, got a batch")
    return _finite(prior.log_prob(theta), "draws outside the support of its prior")


def _sites(prior: Prior, theta: Any) -> dict[str, np.ndarray]:
    named = prior.site_log_probs(theta).items()
    return {name: np.asarray(value, np.float64) for name, value in named}


def _finite(values: Any, got: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.all(np.isfinite(values)):
        raise SbiFlowsError(f"the posterior gave {got}")
    return values


def _under(key: Key, old: Prior, new: Prior, theta: Any, log_prior: np.ndarray) -> PriorSensitivity:
    """The posterior under another prior, and under that of each site that differs."""
    at, log_new = np.asarray(theta, np.float64), np.asarray(new.log_prob(theta), np.float64)
    if not np.any(np.isfinite(log_new)):
        raise WeightsUneven("prior: expected one that allows draws of the posterior, got none")
    ratios = {"new prior": log_new - log_prior}
    before, after = _sites(old, theta), _sites(new, theta)
    sites = {name: own - before[name] for name, own in after.items() if name in before}
    differ = {name: ratio for name, ratio in sites.items() if not _is_flat(ratio)}
    # where there is one of them, it is the same again
    if len(differ) > 1:
        ratios |= {f"new prior of {name}": ratio for name, ratio in differ.items()}
    rows = tuple(_row(name, at, ratio) for name, ratio in ratios.items())
    notes = _notes(old, rows)
    beyond = 1.0 - float(np.mean(np.asarray(old.contains(new.sample(key, PRIOR_DRAWS)))))
    if beyond > 0.001:
        notes += (
            f"new prior: {beyond:.1%} of it is outside the support of the posterior's own prior, "
            "where there are no draws to re-weight",
        )
    return PriorSensitivity(old.labels, rows, {}, notes, len(at))


def _scaled(prior: Prior, at: np.ndarray, parts: Mapping[str, np.ndarray]) -> PriorSensitivity:
    """The posterior with each component raised to powers."""
    rows = tuple(
        _row(f"{name} ** {power:g}", at, (power - 1.0) * log)
        for name, log in parts.items()
        for power in POWERS
    )
    sensitivity = {name: _slope(at, log) for name, log in parts.items()}
    return PriorSensitivity(prior.labels, rows, sensitivity, _notes(prior, rows), len(at))


def _slope(at: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Mean distance that the power `NEAR`, and one over it, make, over its binary logarithm."""
    if _is_flat(log):
        return np.zeros(at.shape[1])
    powers = (1.0 / NEAR, NEAR)
    apart = [cjs_distance(at, reweighted((p - 1.0) * log).weights) for p in powers]
    return (apart[0] + apart[1]) / (2.0 * math.log2(NEAR))


def _row(name: str, at: np.ndarray, log_ratio: np.ndarray) -> Reweighted:
    """Mean and width of draws (n, D) under weights, in units of their own."""
    n, dim = at.shape
    shift, width = np.zeros(dim), np.ones(dim)
    # rounding alone would be taken for a tail
    flat = _is_flat(log_ratio)
    found = Reweighting(np.full(n, 1.0 / n), float(n), 0.0) if flat else reweighted(log_ratio)
    if not found.reliable:
        shift, width = np.full((2, dim), np.nan)
    elif not flat:
        z = (at - at.mean(axis=0)) / at.std(axis=0)
        shift = found.weights @ z
        width = np.sqrt(found.weights @ (z - shift) ** 2)
    return Reweighted(
        name, shift, width, found.effective, found.pareto_k, bool(found.reliable), flat
    )


def _is_flat(log_ratio: np.ndarray) -> bool:
    return bool(np.all(np.isfinite(log_ratio)) and np.ptp(log_ratio) <= FLAT)


def _notes(prior: Prior, rows: tuple[Reweighted, ...]) -> tuple[str, ...]:
    notes = []
    flat = [row.name.split(" **")[0] for row in rows if row.flat]
    if flat:
        names = ", ".join(dict.fromkeys(flat))
        notes.append(
            f"{names}: uniform where the draws are, so that no power changes it; "
            "`prior=` compares with another prior"
            if "**" in rows[0].name
            else f"{names}: the same as the posterior's own where the draws are"
        )
    uneven = [row for row in rows if not row.reliable]
    notes += [
        f"{row.name}: the weights are too uneven to say, {row.effective:.0f} draws in effect and a "
        f"Pareto k of {row.pareto_k:.2f}; fit anew with that prior, or take more draws"
        if "likelihood" not in row.name
        else f"{row.name}: the weights are too uneven to say; more draws may help"
        for row in uneven
    ]
    if prior.mass < 1.0:
        notes.append(f"the prior is cut to {prior.mass:.2g} of its mass, and so are all others")
    return tuple(notes)
