"""Search for silent errors: random priors and units of the data, compared with known posteriors.

`python -m tests.random_units 300` fits a small network to 300 random problems, and prints those
whose posterior is wrong without a warning. A problem is a prior, with a location and a scale over
many orders of magnitude, and one observation x = offset + scale (u + noise / 2) in a random dtype.
Here u is the parameter in units of the prior. The posterior is known from weighted draws of the
prior, made by NumPy in double precision.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import sbi_flows as sf

NOISE = 0.5
ROWS, DRAWS, EXACT_DRAWS = 2_000, 4_000, 400_000
MAX_SHIFT, MAX_RATIO = 0.3, 1.3
"""Largest error of a median, in sds of the posterior, and of the ratio of two sds."""

CENTRAL = (0.03, 0.97)
"""Range of the quantiles from which the observation is drawn."""

QUICK = {"training": sf.Training(max_epochs=12, patience=4), "members": 2}


class Problem(NamedTuple):
    """A prior with draws from it, and the first parameter in the prior's own units.

    Attributes:
        text: Description.
        prior: What the user writes.
        sample: Function from a NumPy generator and n to draws (n, D) in double precision.
        location: Location of the first parameter.
        width: Width of the first parameter.
    """

    text: str
    prior: Any
    sample: Callable[[np.random.Generator, int], np.ndarray]
    location: float
    width: float


class Outcome(NamedTuple):
    """Result of a problem: `right`, `warned`, `refused` or `wrong`, and a description."""

    kind: str
    text: str


def _power(rng: np.random.Generator, low: float, high: float) -> float:
    return float(10.0 ** rng.uniform(low, high))


def _far(rng: np.random.Generator, width: float) -> float:
    """Return a location: zero, or far from zero in units of the width."""
    return float(rng.choice([0.0, 1.0]) * rng.normal() * width * _power(rng, 0, 9))


def _column(values: np.ndarray) -> np.ndarray:
    return values[:, None]


def _normal(rng: np.random.Generator) -> Problem:
    s = _power(rng, -12, 12)
    m = _far(rng, s)
    return Problem(
        f"Normal({m}, {s})",
        dist.Normal(m, s).expand([1]),
        lambda g, n: _column(m + s * g.normal(size=n)),
        m,
        s,
    )


def _uniform(rng: np.random.Generator) -> Problem:
    w = _power(rng, -12, 12)
    low = _far(rng, w)
    return Problem(
        f"Uniform({low}, {low + w})",
        dist.Uniform(low, low + w).expand([1]),
        lambda g, n: _column(low + w * g.uniform(size=n)),
        low + w / 2,
        w / 3,
    )


def _lognormal(rng: np.random.Generator) -> Problem:
    m, s = float(np.log(_power(rng, -12, 12))), float(rng.uniform(0.1, 0.8))
    return Problem(
        f"LogNormal({m}, {s})",
        dist.LogNormal(m, s).expand([1]),
        lambda g, n: _column(np.exp(m + s * g.normal(size=n))),
        np.exp(m),
        s * np.exp(m),
    )


def _gamma(rng: np.random.Generator) -> Problem:
    a, rate = float(rng.uniform(1.0, 6.0)), _power(rng, -12, 12)
    return Problem(
        f"Gamma({a}, {rate})",
        dist.Gamma(a, rate).expand([1]),
        lambda g, n: _column(g.gamma(a, size=n) / rate),
        a / rate,
        a**0.5 / rate,
    )


def _beta(rng: np.random.Generator) -> Problem:
    a, b = (float(v) for v in rng.uniform(0.3, 5.0, 2))
    return Problem(
        f"Beta({a}, {b})",
        dist.Beta(a, b).expand([1]),
        lambda g, n: _column(g.beta(a, b, size=n)),
        a / (a + b),
        0.25,
    )


def _half_normal(rng: np.random.Generator) -> Problem:
    s = _power(rng, -12, 12)
    return Problem(
        f"HalfNormal({s})",
        dist.HalfNormal(s).expand([1]),
        lambda g, n: _column(np.abs(s * g.normal(size=n))),
        0.7 * s,
        s,
    )


def _student(rng: np.random.Generator) -> Problem:
    df, s = float(rng.uniform(3.0, 9.0)), _power(rng, -12, 12)
    m = _far(rng, s)
    return Problem(
        f"StudentT({df}, {m}, {s})",
        dist.StudentT(df, m, s).expand([1]),
        lambda g, n: _column(m + s * g.standard_t(df, size=n)),
        m,
        s,
    )


def _multivariate(rng: np.random.Generator) -> Problem:
    s, r = np.array([_power(rng, -6, 6), _power(rng, -6, 6)]), float(rng.uniform(-0.9, 0.9))
    covariance = np.outer(s, s) * np.array([[1.0, r], [r, 1.0]])
    lower = np.linalg.cholesky(covariance)
    return Problem(
        f"MultivariateNormal(sds {s}, correlation {r:.2f})",
        dist.MultivariateNormal(jnp.zeros(2), covariance_matrix=jnp.asarray(covariance)),
        lambda g, n: g.normal(size=(n, 2)) @ lower.T,
        0.0,
        float(s[0]),
    )


def _hierarchy(rng: np.random.Generator) -> Problem:
    s = _power(rng, -12, 12)

    def model() -> None:
        sigma = numpyro.sample("sigma", dist.HalfNormal(s))
        numpyro.sample("f", dist.Normal(0.0, sigma))

    def sample(g: np.random.Generator, n: int) -> np.ndarray:
        sigma = np.abs(s * g.normal(size=n))
        return np.stack([sigma, sigma * g.normal(size=n)], axis=1)

    return Problem(f"hierarchy of scale {s}", model, sample, 0.7 * s, s)


PRIORS = (
    *(_normal, _uniform, _lognormal, _gamma, _beta, _half_normal, _student),
    *(_multivariate, _hierarchy),
)


def _observations(rng: np.random.Generator) -> tuple[str, Callable[[np.ndarray], Any]]:
    """Return a description of the units of x, and the function that expresses u in these units."""
    dtype = str(rng.choice(["float64", "float64", "float32", "int64", "jax"]))
    limits = {"float64": (-300, 300), "float32": (-30, 30), "int64": (3, 15), "jax": (-30, 30)}
    scale = _power(rng, *limits[dtype])
    most = {"float64": 1e11, "float32": 1e3, "int64": 1e2, "jax": 1e3}[dtype]
    offset = float(rng.choice([0.0, 1.0])) * scale * _power(rng, 0, np.log10(most))

    def express(u: np.ndarray) -> Any:
        x = offset + scale * u
        if dtype == "jax":
            return jnp.asarray(x, jnp.float32)
        return (np.round(x) if dtype == "int64" else x).astype(dtype)

    return f"x = {offset:.3g} + {scale:.3g} u in {dtype}", express


def try_one(seed: int) -> Outcome:
    """Fit one random problem, and compare its posterior with the known one."""
    rng = np.random.default_rng(seed)
    problem = PRIORS[seed % len(PRIORS)](rng)
    units, express = _observations(rng)
    text = f"{seed}: {problem.text}, {units}"
    theta = problem.sample(rng, ROWS + 1)
    u = (theta[:, :1] - problem.location) / problem.width
    u = _observed_last(rng, u + NOISE * rng.normal(size=u.shape))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            prior = sf.as_prior(problem.prior)
            sims = sf.Simulations(theta[:-1], express(u[:-1]))
            npe = sf.NPE(prior, sf.MAF(transforms=1, hidden=(16,)), **QUICK)
            posterior, _ = npe.fit(jax.random.key(seed), sims, progress=False)
            x = express(u[-1:])[0]
            draws = posterior.sample(jax.random.key(seed + 1), x, DRAWS)
        except (ValueError, sf.errors.SbiFlowsError) as error:
            return Outcome("refused", f"{text}: {error}")
    shift, ratio = _errors(rng, problem, u[-1, 0], np.asarray(draws, float)[:, 0])
    text = f"{text}: {shift:.2f} sd off, {ratio:.2f} times as wide"
    if shift < MAX_SHIFT and 1 / MAX_RATIO < ratio < MAX_RATIO:
        return Outcome("right", text)
    words = [w for w in caught if issubclass(w.category, sf.SbiFlowsWarning)]
    return Outcome("warned", f"{text}: {words[0].message}") if words else Outcome("wrong", text)


def _observed_last(rng: np.random.Generator, u: np.ndarray) -> np.ndarray:
    """Replace the last row, the observation, by a random value within `CENTRAL` of the others.

    In the tails, the error of a fit to so few rows is larger than the errors of interest.
    """
    u[-1] = np.quantile(u[:-1, 0], rng.uniform(*CENTRAL))
    return u


def _errors(
    rng: np.random.Generator, problem: Problem, u: float, draws: np.ndarray
) -> tuple[float, float]:
    """Return the error of the median in sds, and the ratio of the widths, by quantiles."""
    exact = problem.sample(rng, EXACT_DRAWS)[:, 0]
    z = (u - (exact - problem.location) / problem.width) / NOISE
    order = np.argsort(exact)
    share = np.cumsum(np.exp(-0.5 * z[order] ** 2))
    levels = np.array([0.16, 0.5, 0.84])
    low, middle, high = exact[order][np.searchsorted(share, levels * share[-1])]
    a, b, c = np.quantile(draws, levels)
    return abs(b - middle) / (0.5 * (high - low)), (c - a) / (high - low)


def main() -> None:
    """Try random problems, and print those that are not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    counts: dict[str, int] = {}
    for seed in range(arguments.first, arguments.first + arguments.count):
        outcome = try_one(seed)
        counts[outcome.kind] = counts.get(outcome.kind, 0) + 1
        if outcome.kind != "right":
            print(f"{outcome.kind} {outcome.text}", flush=True)
    print(counts)


if __name__ == "__main__":
    main()
