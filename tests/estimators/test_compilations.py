"""A second fit of the same sizes compiles nothing, whatever the values of its prior."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.compilation import drop_old_programs
from sbi_flows.prior.box import BoxPrior
from tests.compilations import count_compilations

pytestmark = pytest.mark.promotes

SMALL = sf.MAF(transforms=1, hidden=(4,), context_width=4, context_blocks=1)


def wide(scale: float = 1.0) -> sf.Prior:
    return sf.as_prior({"a": dist.LogNormal(0.1, scale), "b": dist.Uniform(0.0, scale).expand([2])})


def box(high: float = 1.0) -> sf.Prior:
    return BoxPrior(wide(), [-1.0, -1.0, -1.0], [1.0, high, 1.0])


def noisy(key, theta):
    return jnp.append(theta["b"], theta["a"]) + jax.random.normal(key, (3,))


def fit_and_draw(seed: int, prior: sf.Prior) -> None:
    key = jax.random.key(seed)
    sims = sf.simulate(key, prior, noisy, 100, progress=False)
    npe = sf.NPE(prior, SMALL, training=sf.Training(max_epochs=1), members=1)
    posterior, _ = npe.fit(key, sims, progress=False)
    draws, _ = posterior.sample_and_log_prob(key, sims.x[0], 10)
    posterior.log_prob(draws, sims.x[0])


PRIORS: dict[str, tuple[Callable[[], sf.Prior], Callable[[], sf.Prior]]] = {
    "made anew": (wide, wide),
    "with other parameters": (wide, lambda: wide(2.0)),
    "another box": (box, lambda: box(0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_a_second_fit_compiles_nothing(name):
    first, second = PRIORS[name]
    # after fits to many sizes in this process, the first fit would drop programs
    drop_old_programs((100, 100))
    fit_and_draw(0, first())
    with count_compilations() as compiled:
        fit_and_draw(1, second())
    assert compiled == []
