"""Fits of equal sizes share all compiled programs, whatever the objects that describe them."""

import dataclasses

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.core.compilation import drop_old_programs
from sbi_flows.estimators import truncated
from tests.training.test_training import COMPILED

pytestmark = pytest.mark.promotes


def prior(scale: float = 1.0) -> dict[str, dist.Distribution]:
    """A new prior at each call, with the same structure."""
    return {"place": dist.Normal(0.0, scale).expand([2]), "rate": dist.Uniform(0.0, scale)}


def noisy(key, theta):
    return theta["place"] + theta["rate"] + 0.3 * jax.random.normal(key, (2,))


def npe(scale: float = 1.0, **settings) -> sf.NPE:
    """A new estimator at each call, with settings made anew."""
    training = sf.Training(max_epochs=2, batch_size=32, **settings.pop("training", {}))
    density = settings.pop("density", sf.MAF(transforms=1, hidden=(8,), context_width=0))
    return sf.NPE(prior(scale), density, training=training, members=2, **settings)


def simulations(scale: float = 1.0, seed: int = 0) -> sf.Simulations:
    return sf.simulate(jax.random.key(seed), prior(scale), noisy, 200, progress=False)


def fit(estimator, sims, seed: int = 1):
    return estimator.fit(jax.random.key(seed), sims, progress=False)


KINDS = {
    "MAF": lambda scale: npe(scale),
    "mixture": lambda scale: npe(scale, density=sf.GaussianMixture(components=2, width=8)),
    "flow matching": lambda scale: npe(
        scale, density=sf.FlowMatching(network=sf.Film(width=8, blocks=1))
    ),
    "without a linear start": lambda scale: npe(scale, linear_start=False),
    "screening": lambda scale: npe(scale, screening=0.9),
    "stack": lambda scale: sf.Stack(
        [npe(scale), npe(scale, density=sf.GaussianMixture(components=2, width=8))]
    ),
    "emulator": lambda scale: npe(
        scale,
        emulator=sf.Emulator(
            densities=(sf.MAF(transforms=1, hidden=(8,), context_width=0),),
            training=sf.Training(max_epochs=2, batch_size=32),
            simulations=300,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_fit_with_a_prior_made_anew_compiles_nothing(kind):
    """An equal prior, and one with other parameters."""
    first, second = simulations(), simulations(2.0, seed=3)
    # after fits to many sizes in this process, the first fit would drop programs
    drop_old_programs((200, 200))
    posterior, _ = fit(KINDS[kind](1.0), first)
    posterior.sample(jax.random.key(2), first.x[0], 50)
    again, others = KINDS[kind](1.0), KINDS[kind](2.0)
    COMPILED.clear()
    repeated, _ = fit(again, first)
    other, _ = fit(others, second, seed=5)
    assert COMPILED == []
    jax.tree.map(np.testing.assert_array_equal, posterior.weights, repeated.weights)
    assert other.prior.labels == posterior.prior.labels


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """An estimator that uses the first rows only, so that all rounds have the same sizes."""

    inner: sf.NPE
    rows: int
    counts: list[int]

    @property
    def prior(self):
        return self.inner.prior

    @property
    def members(self):
        return self.inner.members

    @property
    def validation_fraction(self):
        return self.inner.validation_fraction

    def fit(self, key, simulations, *, progress=True, summarise=True):
        first = jax.tree.map(lambda leaf: np.asarray(leaf)[: self.rows], simulations)
        sims = sf.Simulations(first.theta, first.x)
        before = len(COMPILED)
        result = self.inner.fit(key, sims, progress=progress, summarise=summarise)
        self.counts.append(len(COMPILED) - before)
        return result

    def with_prior(self, prior):
        return dataclasses.replace(self, inner=self.inner.with_prior(prior))

    def with_checkpoint_folder(self, name):
        return dataclasses.replace(self, inner=self.inner.with_checkpoint_folder(name))


@pytest.mark.slow
def test_further_rounds_of_the_same_sizes_compile_nothing():
    """The fit of each round; the first one has another kind of prior, which is not cut."""
    estimator = FirstRows(npe(training={"learning_rate": 1e-2}), 190, [])
    x, settings = np.array([0.4, 0.2], np.float32), {"simulations": 200, "progress": False}
    _, rounds = sf.truncated_rounds(
        jax.random.key(0), estimator, noisy, x, rounds=5, shrink_below=1.0, **settings
    )
    assert len(rounds) == 5
    assert estimator.counts[0] > 0
    assert estimator.counts[2:] == [0, 0, 0]
    assert rounds[2].mass > rounds[3].mass


@pytest.mark.slow
def test_a_whole_further_round_compiles_nothing(monkeypatch):
    """Simulations, fit, draws and the next box, with the new rows alone in each round."""
    counts, of_round = [], truncated._of_round

    def counted(estimator, r, prior):
        counts.append(len(COMPILED))
        return of_round(estimator, r, prior)

    monkeypatch.setattr(truncated, "_inside", lambda prior, parts: parts[-1])
    monkeypatch.setattr(truncated, "_of_round", counted)
    x, settings = np.array([0.4, 0.2], np.float32), {"simulations": 180, "progress": False}
    _, rounds = sf.truncated_rounds(
        jax.random.key(0), npe(), noisy, x, rounds=5, shrink_below=1.0, **settings
    )
    assert [r.rows for r in rounds] == [180] * 5
    # from the fit of the third round on
    assert counts[1] > counts[0]
    assert len({*counts[2:], len(COMPILED)}) == 1
    assert rounds[2].mass > rounds[3].mass
