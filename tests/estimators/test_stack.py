"""Stacks: the best weights, honest about what was held out, and what does not help is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from scipy import stats

import sbi_flows as sf
from sbi_flows.core.errors import SbiFlowsWarning, TrainingDiverged
from sbi_flows.estimators import rows
from sbi_flows.estimators.base import Estimator
from sbi_flows.estimators.stacking import _without_small, stacking_weights
from tests import cases

pytestmark = pytest.mark.promotes

PRIOR = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
TINY = sf.MAF(transforms=1, hidden=(8,), context_width=0)
MIXTURE = sf.GaussianMixture(components=2, width=8, blocks=1)
QUICK = sf.Training(max_epochs=2)


def noisy(key, theta):
    return theta + 0.5 * jax.random.normal(key, (2,))


@pytest.fixture(scope="module")
def simulations():
    return sf.simulate(jax.random.key(0), PRIOR, noisy, 600)


def npe(density=TINY, **settings):
    return sf.NPE(PRIOR, density, **{"training": QUICK, "members": 2, **settings})


@pytest.fixture(scope="module")
def fitted(simulations):
    return sf.Stack([npe(), npe(MIXTURE)]).fit(jax.random.key(1), simulations, progress=False)


def test_weights_of_a_known_mixture_are_recovered():
    rng = np.random.default_rng(0)
    first = rng.random(20_000) < 0.3
    x = np.where(first, rng.normal(0.0, 1.0, 20_000), rng.normal(3.0, 0.5, 20_000))
    parts = [stats.norm(0.0, 1.0), stats.norm(3.0, 0.5), stats.norm(0.0, 5.0)]
    log_density = np.stack([part.logpdf(x) for part in parts], axis=1)
    weights = stacking_weights(log_density)
    np.testing.assert_allclose(weights, [0.3, 0.7, 0.0], atol=0.015)

    # no other weights do better
    def loss(w):
        return -np.mean(np.logaddexp.reduce(log_density + np.log(w), axis=1))

    for other in rng.dirichlet(np.ones(3), 200):
        assert loss(np.maximum(weights, 1e-12)) <= loss(other) + 1e-6


def test_rows_that_one_model_rules_out_do_no_harm():
    weights = stacking_weights(np.array([[0.0, -np.inf], [-1.0, 0.0]] * 50))
    assert np.all(np.isfinite(weights)) and 0.5 < weights[0] < 1.0


def test_the_posterior_is_the_mixture_of_the_parts(fitted, simulations):
    posterior, history = fitted
    alone = [
        npe(kind).fit(jax.random.key(1), simulations, progress=False)[0] for kind in (TINY, MIXTURE)
    ]
    np.testing.assert_allclose(sum(history.shares), 1.0)
    theta, x = jax.random.normal(jax.random.key(2), (9, 2)), jnp.array([0.3, -0.8])
    parts = [np.asarray(p.log_prob(theta, x), float) for p in alone]
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp.reduce(np.stack(parts) + np.log(history.shares)[:, None], axis=0)
    np.testing.assert_allclose(posterior.log_prob(theta, x), mixed, atol=1e-4)
    assert "StackHistory(shares and held-out losses [" in repr(history)


def test_the_mixture_is_no_worse_than_any_part_on_held_out_rows(fitted):
    _, history = fitted
    assert history.mixture_loss <= np.min(history.held_out_loss) + 2e-3
    for own, part in zip(history.held_out_loss, history.histories, strict=True):
        # the rows that early stopping watched, in the units of theta
        assert own == pytest.approx(np.mean(part.best_loss), abs=0.02)


def test_the_same_rows_are_held_out(fitted):
    _, history = fitted
    first, second = (part.held_out for part in history.histories)
    np.testing.assert_array_equal(first, second)
    assert len(set(first.ravel())) == first.size == 120


def test_what_helps_little_weighs_little(simulations):
    """An estimator that does not train, beside one that does."""
    rng = np.random.default_rng(0)
    x = np.asarray(simulations.x)
    uneven = sf.Simulations(np.exp(x) * rng.normal(size=x.shape), x)
    poor = npe(MIXTURE, training=sf.Training(max_epochs=1, optimizer=optax.scale(0.0)))
    good = npe(TINY, training=sf.Training(max_epochs=20, batch_size=32, learning_rate=1e-2))
    posterior, history = sf.Stack([poor, good]).fit(jax.random.key(1), uneven, progress=False)
    assert history.shares[1] > 0.8
    assert len(posterior.blueprints) == np.sum(history.shares > 0)


def test_a_weight_below_one_in_a_hundred_is_dropped():
    np.testing.assert_allclose(
        _without_small(np.array([0.595, 0.005, 0.4])), [0.598, 0, 0.402], atol=1e-3
    )


def test_an_estimator_that_diverges_is_left_out(simulations):
    broken = npe(training=sf.Training(max_epochs=1, optimizer=optax.scale(jnp.nan)))
    with pytest.warns(SbiFlowsWarning, match="estimator 0 is left out: the loss was"):
        posterior, history = sf.Stack([broken, npe()]).fit(
            jax.random.key(1), simulations, progress=False
        )
    assert posterior.shares == (1.0,)
    np.testing.assert_array_equal(history.shares, [0.0, 1.0])
    assert history.histories[0] is None
    with pytest.raises(TrainingDiverged):
        sf.Stack([broken]).fit(jax.random.key(1), simulations, progress=False)


@dataclasses.dataclass(frozen=True)
class Counted:
    """An estimator of a user's own, which fits another one and counts its fits."""

    inner: sf.NPE
    fits: list = dataclasses.field(default_factory=list, compare=False)

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
        self.fits.append(summarise)
        return self.inner.fit(key, simulations, progress=progress, summarise=summarise)

    def with_prior(self, prior):
        return dataclasses.replace(self, inner=self.inner.with_prior(prior))

    def with_checkpoint_folder(self, name):
        return dataclasses.replace(self, inner=self.inner.with_checkpoint_folder(name))


def assert_same_posterior(one, other):
    assert one.shares == pytest.approx(other.shares)
    jax.tree.map(np.testing.assert_array_equal, one.weights, other.weights)


def test_an_estimator_of_a_users_own_can_be_stacked(fitted, simulations):
    own = Counted(npe(MIXTURE))
    posterior, history = sf.Stack([npe(), own]).fit(jax.random.key(1), simulations, progress=False)
    assert own.fits == [False]
    assert_same_posterior(posterior, fitted[0])
    np.testing.assert_array_equal(history.shares, fitted[1].shares)


def test_a_stack_of_stacks_is_the_mixture_of_all(fitted, simulations):
    inner = sf.Stack([npe(), npe(MIXTURE)])
    assert isinstance(inner, Estimator)
    nested = sf.Stack([inner, npe(MIXTURE, screening=0.9)])
    posterior, history = nested.fit(jax.random.key(1), simulations, progress=False)
    expected = tuple(history.shares[0] * share for share in fitted[1].shares if share)
    assert posterior.shares[: len(expected)] == pytest.approx(expected)
    assert sum(posterior.shares) == pytest.approx(1.0)
    assert history.histories[0].mixture_loss == fitted[1].mixture_loss
    assert -np.mean(history.histories[0].held_out_log_prob) == pytest.approx(
        fitted[1].mixture_loss, abs=1e-6
    )
    assert history.held_out.shape == history.held_out_log_prob.shape == (2, 60)


def test_the_training_rows_are_summarised_once(fitted, simulations, monkeypatch):
    summaries, fit_typicality = [], rows.fit_typicality

    def counted(*arguments):
        summaries.append(fit_typicality(*arguments))
        return summaries[-1]

    monkeypatch.setattr(rows, "fit_typicality", counted)
    posterior, _ = sf.Stack([npe(), npe(MIXTURE)]).fit(
        jax.random.key(1), simulations, progress=False
    )
    assert len(summaries) == 1 and posterior.typicality is summaries[0]
    alone, _ = npe().fit(jax.random.key(1), simulations, progress=False)
    assert len(summaries) == 2
    np.testing.assert_array_equal(alone.typicality.reference, posterior.typicality.reference)
    none, _ = npe().fit(jax.random.key(1), simulations, progress=False, summarise=False)
    assert none.typicality is None and len(summaries) == 2


@dataclasses.dataclass(frozen=True)
class OtherRows(Counted):
    """Holds out other rows than the key says."""

    def fit(self, key, simulations, **settings):
        return super().fit(jax.random.fold_in(key, 7), simulations, **settings)


@dataclasses.dataclass(frozen=True)
class OtherFeatures(Counted):
    """Standardises the observation in another way."""

    def fit(self, key, simulations, **settings):
        posterior, history = super().fit(key, simulations, **settings)
        scaled = posterior.standardiser._replace(scale=2.0 * posterior.standardiser.scale)
        return dataclasses.replace(posterior, standardiser=scaled), history


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherRows, "estimator: expected fits that hold out the same rows for the same key, got"),
        (OtherFeatures, "estimators: expected posteriors with the same standardiser, got"),
    ],
)
def test_posteriors_that_cannot_be_mixed_are_refused(simulations, kind, message):
    with pytest.raises(ValueError, match=message):
        sf.Stack([npe(), kind(npe())]).fit(jax.random.key(1), simulations, progress=False)


@pytest.mark.parametrize(
    ("estimators", "message"),
    [
        ([], "expected one or more estimators such as sf.NPE, got"),
        ([TINY], "expected one or more estimators such as sf.NPE, got"),
        ([npe(), npe(members=3)], r"expected the same members, got \[2, 3\]"),
        ([npe(), sf.NPE(dist.Normal(0.0, 1.0), members=2)], "expected the same prior, got"),
        (
            [sf.NPE(dist.Uniform(-1, 1)), sf.NPE(dist.Uniform(-2, 2))],
            r"expected the same prior, got Prior\(theta: Uniform\[\]\) and Prior",
        ),
        ([sf.NPE(dist.Normal(0, 1)), sf.NPE(dist.Cauchy(0, 1))], "same prior, got .*Cauchy"),
        (
            [npe(), npe(training=sf.Training(validation_fraction=0.2))],
            r"expected the same validation_fraction, got \[0.1, 0.2\]",
        ),
    ],
)
def test_estimators_that_cannot_be_compared_are_refused(estimators, message):
    with pytest.raises(ValueError, match=message):
        cases.unchecked(sf.Stack, estimators)
