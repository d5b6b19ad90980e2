"""Draws, densities and modes of every density and prior for fixed keys, compared with a record.

`python -m tests.golden.draws` writes `draws.json`, if it is not there. It was written at commit
c2dedf4, before posteriors and priors became pytrees: a change of the code must not change them. The
standard coordinates `y` of the priors without a CDF (Weibull, correlated normal, simplex, Cholesky
factor, ordered, model) were written again when these coordinates were whitened.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401  # isort: skip  before JAX: settings of the compiler
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import sbi_flows as sf
from tests.artefacts import ensemble, posterior
from tests.cases import DENSITIES, PRIORS

PATH = Path(__file__).parent / "draws.json"

FILM = sf.Film(width=8, blocks=1, frequencies=2)
MATCHED = {
    "CNF": sf.CNF(network=FILM),
    "FlowMatching": sf.FlowMatching(network=FILM, sampler=sf.Heun(steps=4)),
    "Diffusion": sf.Diffusion(network=FILM, sampler=sf.Ancestral(steps=4)),
}
SMALL = sf.MAF(transforms=1, hidden=(4,), context_width=4, context_blocks=1)
X = jnp.array([[0.3, 1.2, -0.7], [2.0, -0.1, 0.4]])
COMPOSED = "composed"


def density_posterior(density: Any) -> sf.Posterior:
    prior = sf.as_prior({"a": dist.Normal(1.0, 2.0), "b": dist.Uniform(0.0, 3.0)})
    return posterior(prior, ensemble(density, prior.bounded))


def _said_of_posterior(made: Any) -> dict[str, Any]:
    draws, log_prob = made.sample_and_log_prob(jax.random.key(1), X, 3)
    one = made.sample(jax.random.key(2), X[0], 3)
    return {
        "draws": draws,
        "log_prob": log_prob,
        "one": one,
        "at": made.log_prob(draws[:, 0], X),
        "map": made.map(X[0], starts=20, steps=5),
    }


def _said_of_prior(given: Any) -> dict[str, Any]:
    prior = sf.as_prior(given)
    draws = prior.sample(jax.random.key(3), 4)
    return {"draws": draws, "log_prob": prior.log_prob(draws), "y": prior.to_standard(draws)}


def _said_of_composed() -> dict[str, Any]:
    made = density_posterior(MATCHED["Diffusion"])
    return {"draws": sf.sample_composed(jax.random.key(4), made, X, 4, levels=8, steps=2)}


def _said_of_simulate() -> dict[str, Any]:
    def noisy(key: Any, theta: Any) -> Any:
        return theta["rate"] + jax.random.normal(key, (2,))

    sims = sf.simulate(jax.random.key(5), PRIORS["dict"](), noisy, 5, progress=False)
    return {"theta": sims.theta, "x": sims.x}


def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Name of each case, and the function that computes its arrays."""
    for name, density in {**DENSITIES, **MATCHED}.items():
        yield f"density {name}", lambda d=density: _said_of_posterior(density_posterior(d))
    for name, made in PRIORS.items():
        yield f"prior {name}", lambda m=made: _said_of_prior(m())
    yield COMPOSED, _said_of_composed
    yield "simulate", _said_of_simulate


def main() -> None:
    """Write the record."""
    said = {
        name: {part: np.asarray(value, float).tolist() for part, value in compute().items()}
        for name, compute in cases()
    }
    PATH.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "allow")  # as the mark `promotes` does
    if not PATH.exists():
        main()
