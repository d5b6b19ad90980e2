"""The posterior's draws, densities and modes: shapes, chunks, support, refusals, ArviZ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import sbi_flows as sf
from sbi_flows.posteriors import bound
from sbi_flows.posteriors.arviz import Groups, arviz_groups

pytestmark = pytest.mark.promotes

TINY = sf.MAF(transforms=1, hidden=(8,), context_width=0)
QUICK = sf.Training(max_epochs=2)
NOISE = 0.5


def noisy(key, theta):
    return theta + NOISE * jax.random.normal(key, (2,))


BOX = sf.as_prior({"level": dist.Normal(0.0, 1.0), "p": dist.Uniform(0.0, 1.0).expand([2])})


def boxed_simulator(key, theta):
    noise = jax.random.normal(key, (3,))
    return {"seen": theta["p"] + 0.2 * noise[:2], "level": theta["level"] + 0.5 * noise[2]}


@pytest.fixture(scope="module")
def gaussian():
    """Two members for theta ~ N(0, I) and x ~ N(theta, NOISE^2 I)."""
    sims = sf.simulate(jax.random.key(0), dist.Normal(0.0, 1.0).expand([2]), noisy, 2000)
    estimator = sf.NPE(dist.Normal(0.0, 1.0).expand([2]), TINY, training=QUICK, members=2)
    return estimator.fit(jax.random.key(1), sims, progress=False)[0]


@pytest.fixture(scope="module")
def boxed():
    """Three members for a dict prior, partly bounded, and a dict of observations."""
    with jax.numpy_rank_promotion("allow"):
        sims = sf.simulate(jax.random.key(0), BOX, boxed_simulator, 1000)
        estimator = sf.NPE(BOX, TINY, training=QUICK, members=3)
        return estimator.fit(jax.random.key(1), sims, progress=False)[0]


ONE = jnp.array([0.3, -0.8])
BATCH = jnp.array([[0.3, -0.8], [1.0, 1.0], [-2.0, 0.0], [0.0, 0.5], [3.0, -1.0]])
# the second presses on a corner of the box, the third lies beyond it
SEEN = {
    "seen": jnp.array([[0.5, 0.4], [0.01, 0.99], [1.6, -0.7]]),
    "level": jnp.array([0.0, 1.0, -3.0]),
}


def test_shapes_of_draws_and_densities(gaussian):
    key = jax.random.key(0)
    for x, batch in ((ONE, ()), (BATCH, (5,)), (BATCH[:1], (1,)), ([0.3, -0.8], ())):
        draws, log_prob = gaussian.sample_and_log_prob(key, x, 7)
        assert (draws.shape, log_prob.shape) == ((*batch, 7, 2), (*batch, 7))
        np.testing.assert_array_equal(gaussian.sample(key, x, 7), draws)
        assert gaussian.log_prob(draws, x).shape == (*batch, 7)
    assert gaussian.log_prob(ONE, ONE).shape == ()
    assert gaussian.log_prob(jnp.zeros((3, 4, 2)), ONE).shape == (3, 4)
    assert gaussian.log_prob(jnp.zeros((5, 2)), BATCH).shape == (5,)
    assert gaussian.log_prob(jnp.zeros((0, 2)), ONE).shape == (0,)


def test_draws_follow_the_key(gaussian):
    first, same, other = (gaussian.sample(jax.random.key(s), ONE, 50) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.any(first == other)
    # no draw repeats, within an observation or across the batch
    draws = np.asarray(gaussian.sample(jax.random.key(0), jnp.tile(ONE, (5, 1)), 50))
    assert len(np.unique(draws.reshape(-1, 2), axis=0)) == 250


def test_densities_agree_with_draws_and_with_the_exact_posterior(gaussian):
    draws, log_prob = gaussian.sample_and_log_prob(jax.random.key(0), BATCH[:4], 500)
    np.testing.assert_allclose(gaussian.log_prob(draws, BATCH[:4]), log_prob, atol=1e-3)
    variance = NOISE**2 / (1 + NOISE**2)
    exact = jax.scipy.stats.norm.logpdf(draws, BATCH[:4, None] / (1 + NOISE**2), variance**0.5)
    assert np.max(np.abs(np.mean(log_prob - np.sum(exact, axis=-1), axis=1))) < 0.06


def test_a_batch_is_its_observations_one_by_one(gaussian):
    theta = jax.random.normal(jax.random.key(0), (5, 9, 2))
    together = gaussian.log_prob(theta, BATCH)
    for row in range(5):
        np.testing.assert_allclose(
            together[row], gaussian.log_prob(theta[row], BATCH[row]), rtol=1e-4, atol=1e-4
        )
    np.testing.assert_allclose(gaussian.log_prob(theta[:, 0], BATCH), together[:, 0], atol=1e-4)


def test_the_result_does_not_depend_on_the_chunks(gaussian, monkeypatch):
    key, theta = jax.random.key(0), jax.random.normal(jax.random.key(1), (5, 9, 2))
    draws, log_prob = gaussian.sample_and_log_prob(key, BATCH, 9)
    many, single = gaussian.log_prob(theta, BATCH), gaussian.log_prob(theta[0], ONE)
    monkeypatch.setattr(bound, "MAX_CALL_ENTRIES", 36)  # two observations of nine draws at a time
    chunked, chunked_log_prob = gaussian.sample_and_log_prob(key, BATCH, 9)
    np.testing.assert_allclose(chunked, draws, atol=1e-5)
    np.testing.assert_allclose(chunked_log_prob, log_prob, atol=1e-4)
    np.testing.assert_allclose(gaussian.log_prob(theta, BATCH), many, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(bound, "MAX_CALL_ENTRIES", 8)  # four of nine theta at one observation
    np.testing.assert_allclose(gaussian.log_prob(theta, BATCH), many, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gaussian.log_prob(theta[0], ONE), single, rtol=1e-4, atol=1e-4)


def test_many_draws_for_one_observation_are_made_in_pieces(gaussian, monkeypatch):
    monkeypatch.setattr(bound, "MAX_CALL_ENTRIES", 800)
    draws, log_prob = gaussian.sample_and_log_prob(jax.random.key(0), ONE, 3001)
    assert (draws.shape, log_prob.shape) == ((3001, 2), (3001,))
    assert len(np.unique(np.asarray(draws), axis=0)) == 3001
    sd = NOISE / np.sqrt(1 + NOISE**2)
    np.testing.assert_allclose(np.std(draws, axis=0), sd, rtol=0.1)
    np.testing.assert_allclose(np.mean(draws, axis=0), ONE / (1 + NOISE**2), atol=0.15 * sd)


def member(posterior: sf.Posterior, i: int) -> sf.Posterior:
    weights = jax.tree.map(lambda leaf: leaf[i : i + 1], posterior.weights)
    return dataclasses.replace(posterior, weights=weights)


def test_the_ensemble_is_the_equal_mixture_of_its_members(gaussian):
    theta = jax.random.normal(jax.random.key(0), (9, 2))
    parts = [member(gaussian, i) for i in range(2)]
    assert [gaussian.members, *(p.members for p in parts)] == [2, 1, 1]
    one, two = (np.asarray(p.log_prob(theta, ONE), np.float64) for p in parts)
    assert np.max(np.abs(one - two)) > 1e-3
    mixed = np.logaddexp(one, two) - np.log(2)
    np.testing.assert_allclose(gaussian.log_prob(theta, ONE), mixed, rtol=1e-4, atol=1e-4)


def test_both_members_draw(gaussian):
    """A member moved far away takes half of the draws."""
    start = gaussian.weights[0].rest["start"]
    moved = start._replace(bias=start.bias.at[1].add(100.0))
    weights = (gaussian.weights[0]._replace(rest=gaussian.weights[0].rest | {"start": moved}),)
    far = np.asarray(
        dataclasses.replace(gaussian, weights=weights).sample(jax.random.key(0), ONE, 101)
    )
    assert np.sum(far[:, 0] > 50) in (50, 51)


def test_few_draws_come_from_any_member(gaussian):
    """One draw for each of many observations, as for a predictive check."""
    start = gaussian.weights[0].rest["start"]
    moved = start._replace(bias=start.bias.at[1].add(100.0))
    weights = (gaussian.weights[0]._replace(rest=gaussian.weights[0].rest | {"start": moved}),)
    posterior = dataclasses.replace(gaussian, weights=weights)
    far = posterior.sample(jax.random.key(0), jnp.zeros((400, 2)), 1)[:, 0, 0] > 50
    assert 0.4 < np.mean(far) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 10, 101])
def test_ensembles_draw_by_their_shares(gaussian, n):
    """Three copies, far apart; counts are as near to the shares as whole numbers can be."""
    parts = []
    for i in range(3):
        start = gaussian.weights[0].rest["start"]
        moved = start._replace(bias=start.bias + 100.0 * i)
        rest = gaussian.weights[0].rest | {"start": moved}
        parts.append(gaussian.weights[0]._replace(rest=rest))
    shares = (0.2, 0.35, 0.45)
    posterior = dataclasses.replace(
        gaussian, blueprints=gaussian.blueprints * 3, weights=tuple(parts), shares=shares
    )
    draws, log_prob = posterior.sample_and_log_prob(jax.random.key(0), jnp.zeros((300, 2)), n)
    which = np.round(np.asarray(draws[..., 0]) / 100).astype(int)
    counts = np.stack([np.sum(which == i, axis=1) for i in range(3)], axis=1)
    assert np.all(np.abs(counts - n * np.array(shares)) < 1)
    np.testing.assert_allclose(counts.mean(axis=0), n * np.array(shares), atol=0.1)
    # neither the order nor the place says where a draw comes from
    assert abs(np.mean(which[:, 0]) - np.mean(which)) < 0.15
    np.testing.assert_allclose(posterior.log_prob(draws, jnp.zeros((300, 2))), log_prob, atol=1e-3)
    assert "0.35 MAF" in repr(posterior)


@pytest.mark.promotes
def test_no_draw_is_outside_the_support(boxed):
    draws, log_prob = boxed.sample_and_log_prob(jax.random.key(0), SEEN, 3000)
    assert np.all(BOX.contains(draws))
    assert np.all(np.isfinite(log_prob))
    again = boxed.log_prob(draws, SEEN)
    assert np.all(np.isfinite(again))
    # at a face the place itself has few digits left
    assert np.quantile(np.abs(again - log_prob), 0.99) < 0.05


@pytest.mark.promotes
def test_outside_the_support_the_density_is_zero(boxed):
    x = jax.tree.map(lambda leaf: leaf[0], SEEN)
    theta = jnp.array([[0.0, 0.5, 0.5], [0.0, 1.1, 0.5], [0.0, 0.5, -0.1], [jnp.nan, 0.5, 0.5]])
    log_prob = boxed.log_prob(theta, x)
    assert np.isfinite(log_prob[0])
    np.testing.assert_array_equal(log_prob[1:], -np.inf)


@pytest.mark.promotes
def test_a_bounded_posterior_integrates_to_one(boxed):
    """Over the box and a wide interval, at an observation that presses on a corner."""
    x = jax.tree.map(lambda leaf: leaf[1], SEEN)
    rng = np.random.default_rng(0)
    theta = rng.uniform([-4.0, 0.0, 0.0], [5.0, 1.0, 1.0], size=(100_000, 3))
    density = np.exp(np.asarray(boxed.log_prob(theta, x)))
    assert 9 * density.mean() == pytest.approx(1.0, abs=0.06)


@pytest.mark.slow
@pytest.mark.promotes
def test_the_mode_is_the_exact_one_and_tops_all_draws(gaussian, boxed):
    modes = gaussian.map(BATCH[:4])
    assert modes.shape == (4, 2)
    sd = NOISE / np.sqrt(1 + NOISE**2)
    np.testing.assert_allclose(modes, BATCH[:4] / (1 + NOISE**2), atol=0.2 * sd)
    one = gaussian.map(ONE)
    assert one.shape == (2,)
    _, log_prob = gaussian.sample_and_log_prob(jax.random.key(5), ONE, 2000)
    assert gaussian.log_prob(one, ONE) >= np.max(log_prob) - 1e-4
    np.testing.assert_array_equal(gaussian.map(ONE), one)
    corner = boxed.map(SEEN)
    assert corner.shape == (3, 3)
    assert np.all(BOX.contains(corner))
    assert corner[1, 1] < 0.05
    assert corner[1, 2] > 0.95


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.zeros(3), r"x: expected shape \(2,\), or a batch of it, got \(3,\)"),
        (jnp.zeros((4, 3)), r"x: expected shape \(2,\), or a batch of it, got \(4, 3\)"),
        (jnp.zeros((4, 5, 2)), r"x: expected shape \(2,\), or a batch of it, got \(4, 5, 2\)"),
        (jnp.float32(1.0), r"x: expected shape \(2,\), or a batch of it, got \(\)"),
        (jnp.zeros((0, 2)), "x: expected at least one observation, got an empty batch"),
        (jnp.array([0.0, jnp.nan]), "x: expected finite values, got NaN; if NaN marks"),
        (np.array([[0.0, 1.0], [np.inf, 0.0]]), "x: expected finite values, got infinity"),
        (np.array([1e300, 1.0]), "x: expected finite values, got infinity"),
        (np.array(["a", "b"]), "x: expected real numbers, got dtype <U1"),
        (np.array([None, 1.0]), "x: expected real numbers, got dtype object"),
        (np.array([1j, 0.0]), "x: expected .*complex"),
        ([0.5, "a"], "x: expected real numbers"),
        (
            {"x": jnp.zeros(2)},
            r"x: expected an array of shape \(2,\), got a dict of arrays with the keys \['x'\]",
        ),
    ],
)
def test_observations_that_do_not_fit_are_refused(gaussian, x, message):
    for call in (
        lambda: gaussian.sample(jax.random.key(0), x, 5),
        lambda: gaussian.log_prob(jnp.zeros(2), x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_dicts_that_do_not_fit_are_refused(boxed):
    key = jax.random.key(0)
    whole = jax.tree.map(lambda leaf: leaf[0], SEEN)
    for x in ({"seen": whole["seen"]}, whole["seen"], whole | {"more": jnp.zeros(2)}):
        with pytest.raises(ValueError, match=r"x: expected .*level.*seen"):
            boxed.sample(key, x, 5)
    with pytest.raises(
        ValueError, match=r"x: expected shape level .*, seen .*, or a batch of it, got"
    ):
        boxed.sample(key, SEEN | {"level": jnp.zeros(2)}, 5)


@pytest.mark.parametrize("n", [0, -1])
def test_a_number_of_draws_below_one_is_refused(gaussian, n):
    with pytest.raises(ValueError, match=f"n: expected a whole number of at least 1, got {n}"):
        gaussian.sample(jax.random.key(0), ONE, n)


@pytest.mark.parametrize(
    ("theta", "x", "message"),
    [
        (jnp.zeros(3), ONE, r"theta: expected shape \(\*, 2\) for .*theta\[0\].*, got \(3,\)"),
        (jnp.float32(0.0), ONE, r"theta: expected shape \(\*, 2\)"),
        (jnp.zeros((4, 2)), BATCH, r"theta: expected \(5, 2\) or \(5, n, 2\) .* got \(4, 2\)"),
        (jnp.zeros(2), BATCH, r"theta: expected \(5, 2\) or \(5, n, 2\) .* got \(2,\)"),
        (np.array([1j, 0.0]), ONE, "theta: expected real numbers, got dtype complex128"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(gaussian, theta, x, message):
    with pytest.raises(ValueError, match=message):
        gaussian.log_prob(theta, x)


def test_integer_and_boolean_observations_are_numbers(gaussian):
    expected = gaussian.log_prob(ONE, jnp.array([1.0, 0.0]))
    for x in (np.array([1, 0]), np.array([True, False]), np.array([1.0, 0.0], np.float64)):
        np.testing.assert_allclose(gaussian.log_prob(ONE, x), expected, rtol=1e-5)


@pytest.mark.newest
@pytest.mark.promotes
def test_to_arviz_names_variables_and_keeps_the_draws(boxed):
    x = jax.tree.map(lambda leaf: leaf[0], SEEN)
    data = boxed.to_arviz(jax.random.key(0), x, n=200, prior_draws=150)
    for group, shapes in {
        "posterior": {"level": (4, 50), "p": (4, 50, 2)},
        "prior": {"level": (1, 150), "p": (1, 150, 2)},
        "sample_stats": {"lp": (4, 50)},
        "observed_data": {"level": (), "seen": (2,)},
    }.items():
        assert {name: data[group][name].shape for name in data[group].data_vars} == shapes
    drawn = data["posterior"]
    theta = np.concatenate([drawn["level"].values[..., None], drawn["p"].values], axis=-1)
    theta = theta.reshape(200, 3)
    assert np.all(BOX.contains(theta))
    log_prob = boxed.log_prob(theta, x)
    np.testing.assert_allclose(data["sample_stats"]["lp"].values.ravel(), log_prob, atol=0.02)
    np.testing.assert_array_equal(data["observed_data"]["seen"].values, x["seen"])
    # the posterior has learnt: it is narrower than the prior
    assert np.all(drawn["p"].values.std(axis=(0, 1)) < data["prior"]["p"].values.std(axis=(0, 1)))


def test_every_array_of_an_observation_has_a_name_in_arviz():
    x = {"a": {"b": np.arange(2.0)}, "c": (np.float32(1.0), np.zeros((2, 3)))}
    draws = jnp.zeros((4, 3))
    data = arviz_groups(BOX, Groups(draws, draws[:, 0], draws, x))["observed_data"]
    assert {n: data[n].shape for n in data.data_vars} == {"a.b": (2,), "c.0": (), "c.1": (2, 3)}
    np.testing.assert_array_equal(data["a.b"].values, [0.0, 1.0])


def test_dimensions_of_a_parameter_and_an_observed_array_of_one_name_must_agree():
    prior = sf.as_prior({"x": dist.Normal(0.0, 1.0).expand([2])})
    draws = jnp.zeros((4, 2))
    groups = Groups(draws, draws[:, 0], draws, jnp.zeros(4))
    with pytest.raises(
        ValueError, match=r"dims: expected one shape for 'x', .* got \(2,\) and \(4,\)"
    ):
        arviz_groups(prior, groups, dims={"x": ["a"]})


def test_to_arviz_takes_one_array_and_refuses_a_batch(gaussian):
    data = gaussian.to_arviz(jax.random.key(0), ONE, n=10, chains=2)
    assert data["posterior"]["theta"].shape == (2, 5, 2)
    np.testing.assert_array_equal(data["observed_data"]["x"].values, ONE)
    with pytest.raises(ValueError, match="x: expected one observation, got a batch"):
        gaussian.to_arviz(jax.random.key(0), BATCH)


def test_to_arviz_has_predictions_and_the_users_dimensions(boxed):
    x = jax.tree.map(lambda leaf: leaf[0], SEEN)
    data = boxed.to_arviz(
        jax.random.key(0),
        x,
        n=60,
        chains=3,
        prior_draws=20,
        simulator=boxed_simulator,
        predictive_draws=32,
        dims={"p": ["school"]},
        coords={"school": ["north", "south"]},
    )
    predicted = data["posterior_predictive"]
    assert {n: predicted[n].shape for n in predicted.data_vars} == {
        "level": (3, 10),
        "seen": (3, 10, 2),
    }
    assert data["posterior"]["p"].dims == ("chain", "draw", "school")
    assert list(data["prior"]["school"].values) == ["north", "south"]
    with pytest.raises(ValueError, match="dims: expected names among"):
        boxed.to_arviz(jax.random.key(0), x, n=4, dims={"q": ["school"]})
    with pytest.raises(ValueError, match="dims: expected 1 names for 'p'"):
        boxed.to_arviz(jax.random.key(0), x, n=4, dims={"p": ["a", "b"]})
    with pytest.raises(ValueError, match="coords: expected 2 values for 'school', got 3"):
        boxed.to_arviz(
            jax.random.key(0), x, n=4, dims={"p": ["school"]}, coords={"school": [1, 2, 3]}
        )


def test_the_representation_names_prior_density_and_members(gaussian, boxed):
    assert repr(gaussian).startswith("Posterior(Prior(theta: Normal[2]), MAF(transforms=1,")
    assert repr(gaussian).endswith("members=2)")
    assert "p: Uniform[2]" in repr(boxed)
