"""Write golden files of each version of the file format, and the draws of their posteriors.

`python -m tests.golden.make` writes the missing files only: an existing file is never replaced.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import sbi_flows as sf
from sbi_flows.densities.embedded import spaces_of
from sbi_flows.observations.typicality import fit_typicality
from sbi_flows.posteriors.quantile_maps import quantile_map
from tests.artefacts import ensemble, posterior

HERE = Path(__file__).parent


def spline() -> sf.Posterior:
    """Return a mixture of a spline flow and Gaussians, with named parameters and a dict as x."""
    prior = sf.as_prior(
        {
            "rate": dist.LogNormal(0.5, 0.7),
            "p": dist.Uniform(jnp.array([0.0, -1.0]), 2.0),
            "cut": dist.TruncatedNormal(1.0, 0.5, low=0.0),
        }
    )
    like = {"n": jax.ShapeDtypeStruct((), jnp.int32), "y": jax.ShapeDtypeStruct((2,), jnp.float32)}
    flow = sf.NSF(transforms=1, bins=3, hidden=(6,), context_width=4, context_blocks=1)
    mixture = sf.GaussianMixture(components=2, width=4, blocks=1)
    parts = (
        ensemble(flow, prior.bounded, like),
        ensemble(mixture, prior.bounded, like, kept=(0, 2)),
    )
    return posterior(prior, *parts, shares=(0.75, 0.25), like=like)


def matched() -> sf.Posterior:
    """Return flow matching with a sampler and a gate, for one array of parameters."""
    prior = sf.as_prior(dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    flow = sf.FlowMatching(
        network=sf.Film(width=6, blocks=1, frequencies=2), sampler=sf.Heun(steps=4)
    )
    made = posterior(prior, ensemble(flow, prior.bounded))
    rows = jax.random.normal(jax.random.key(0), (24, 3))
    (blueprint,), (weights,) = made.blueprints, made.weights
    summarise = partial(spaces_of, blueprint, weights)
    known = fit_typicality(jax.random.key(1), summarise, made.standardiser, rows)
    return dataclasses.replace(made, typicality=known)


def corrected() -> sf.ConformalPosterior:
    """Return a conformal posterior of a recalibrated mixture; one parameter is bounded."""
    prior = sf.as_prior({"a": dist.Normal(0.0, 2.0), "b": dist.Uniform(0.0, 1.0)})
    mixture = sf.GaussianMixture(components=2, width=4, blocks=1)
    made = posterior(prior, ensemble(mixture, prior.bounded))
    draws = jax.random.normal(jax.random.key(2), (2, 60))
    moved = sf.RecalibratedPosterior(
        made, quantile_map(draws, 1.5 * draws + 0.1), 60, 1, 20, jax.random.key(3)
    )
    scores = np.sort(np.asarray(jax.random.normal(jax.random.key(4), (59,)), np.float64))
    return sf.ConformalPosterior(moved, scores, 2, 20, jax.random.key(5), {"check": {"p": 0.5}})


def composed() -> sf.posteriors.ComposedPosterior:
    """Return a posterior given sets of observations, from flow matching."""
    return sf.posteriors.ComposedPosterior(matched(), 3, 2, {"check": {"p": 0.5}})


GOLDEN = {
    "spline-1": (spline, {"n": 3, "y": jnp.array([0.5, -1.0])}),
    "matched-1": (matched, jnp.array([0.3, 1.2, -0.7])),
    "corrected-2": (corrected, jnp.array([0.3, 1.2, -0.7])),
    "composed-3": (composed, jnp.array([[0.3, 1.2, -0.7], [0.1, 0.9, -0.4]])),
}
"""Function that makes the posterior, and an observation, by name and version of the format."""


def told(made: Any, name: str) -> dict[str, list]:
    """Return draws at the observation, their log densities, and facts of the kind of posterior."""
    x = GOLDEN[name][1]
    draws, log_prob = made.sample_and_log_prob(jax.random.key(7), x, 4)
    said = {"draws": np.asarray(draws).tolist(), "log_prob": np.asarray(log_prob).tolist()}
    if isinstance(made, sf.ConformalPosterior):
        said |= {"level": [made.level(0.5)], "score": made.score(draws, x).tolist()}
    elif made.typicality is not None and isinstance(made, sf.Posterior):
        said["p_value"] = [made.misspecification(x).p_value]
    return said


if __name__ == "__main__":
    said = json.loads((HERE / "said.json").read_text())
    for name, (make, _) in GOLDEN.items():
        if name not in said:
            make().save(HERE / f"{name}.sbif")
            said[name] = told(sf.load(HERE / f"{name}.sbif"), name)
    (HERE / "said.json").write_text(json.dumps(said, indent=1) + "\n")
