"""Members of an ensemble are checked on the rows that each held out."""

import jax
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.diagnostics.held_out import _member, _rows_of_members

SIMS_KEY, FIT_KEY, STACK_KEY, CHECK_KEY = jax.random.split(jax.random.key(31), 4)


def noisy(key, theta):
    return theta + 0.5 * jax.random.normal(key, (2,))


@pytest.fixture(scope="module")
def fitted():
    prior = sf.as_prior(dist.Normal(0.0, 1.0).expand([2]))
    sims = sf.simulate(SIMS_KEY, prior, noisy, 1_000, progress=False)
    npe = sf.NPE(
        prior, sf.MAF(transforms=1, hidden=(16,)), members=3, training=sf.Training(max_epochs=6)
    )
    return npe, sims, *npe.fit(FIT_KEY, sims, progress=False)


def test_each_row_is_given_to_one_member_that_held_it_out(fitted):
    _, sims, posterior, history = fitted
    rows = _rows_of_members(CHECK_KEY, posterior, sims, history, 10_000)
    assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows))
    assert set(np.concatenate(rows)) == set(history.held_out.ravel())
    for member, chosen in enumerate(rows):
        assert set(chosen) <= set(history.held_out[member])
    few = _rows_of_members(CHECK_KEY, posterior, sims, history, 60)
    assert sum(map(len, few)) == 60


def test_the_members_of_a_linear_gaussian_fit_are_right(fitted):
    _, sims, posterior, history = fitted
    report = sf.check(
        CHECK_KEY, posterior, simulations=sims, history=history, draws=200, progress=False
    )
    assert report.num_datasets == len(np.unique(history.held_out))
    assert report.findings == () and "about members" in report.verdict
    assert report.sbc.width == pytest.approx(1.0, abs=0.12)
    assert "simulations=simulations, history=history" in report.command


@pytest.mark.slow
def test_observations_in_a_dict(fitted):
    npe, sims, _, _ = fitted
    named = sf.Simulations(sims.theta, {"a": sims.x[:, 0], "b": sims.x[:, 1]})
    posterior, history = npe.fit(FIT_KEY, named, progress=False)
    report = sf.check(
        CHECK_KEY, posterior, simulations=named, history=history, draws=50, progress=False
    )
    assert report.num_datasets == len(np.unique(history.held_out))


def test_a_member_is_the_mixture_of_one(fitted):
    _, sims, posterior, _ = fitted
    densities = np.stack(
        [_member(posterior, m).log_prob(sims.theta[:5], sims.x[:5]) for m in range(3)]
    )
    mixture = np.log(np.mean(np.exp(densities), axis=0))
    np.testing.assert_allclose(posterior.log_prob(sims.theta[:5], sims.x[:5]), mixture, rtol=1e-4)


def test_a_history_of_another_fit_is_refused(fitted, gaussian):
    npe, sims, posterior, history = fitted
    other = sf.simulate(CHECK_KEY, npe.prior, noisy, 1_000, progress=False)
    for wrong, message in (
        (sims[np.arange(50)], "simulations: expected those of the fit, at least"),
        (other, "simulations: expected those of the fit, got 1,000 other rows of 1,000"),
        (sims[::-1], "simulations: expected the rows in the order of the fit"),
    ):
        with pytest.raises(ValueError, match=message):
            sf.check(CHECK_KEY, posterior, simulations=wrong, history=history, progress=False)
    with pytest.raises(ValueError, match="posterior: expected the posterior that `fit` returned"):
        sf.check(CHECK_KEY, gaussian(), simulations=sims, history=history, progress=False)
    other = sf.NPE(npe.prior, npe.density, members=2, training=npe.training)
    pair, _ = other.fit(STACK_KEY, sims, progress=False)
    with pytest.raises(ValueError, match="history: expected held-out rows of the posterior's"):
        sf.check(CHECK_KEY, pair, simulations=sims, history=history, progress=False)


def test_reused_rows_are_reported_by_check(fitted):
    _, sims, posterior, _ = fitted
    with pytest.warns(sf.errors.SbiFlowsWarning, match="simulations: 1,000 of 1,000 rows were us"):
        sf.check(CHECK_KEY, posterior, simulations=sims, draws=50, progress=False)
