"""Continuous flows: paths, solves, samplers and fits, compared with exact results."""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from flax import nnx
from jax.scipy.stats import multivariate_normal, norm

import sbi_flows as sf
from sbi_flows.densities.ode import OdeFlow, Velocity, field_derivatives
from sbi_flows.densities.samplers import Ancestral, Heun
from sbi_flows.networks.velocity import VelocityNetwork
from tests import cases

pytestmark = pytest.mark.promotes

PATHS = {"straight": sf.Straight(), "EDM": sf.EDM(), "VP": sf.VP(), "VE": sf.VE()}
MEAN, SD = jnp.array([1.0, -2.0]), jnp.array([0.3, 2.0])


class Exact(VelocityNetwork):
    """Exact velocity of the path to the normal distribution of `MEAN` and `SD`."""

    def encode_context(self, context, *, key=None):
        return None

    def __call__(self, z, angle, encoded, *, key=None):
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        shift = z - jnp.broadcast_to(sin * MEAN, z.shape)
        variance = (sin * SD) ** 2 + cos**2
        point = MEAN + sin * SD**2 / variance * shift
        return cos * point - sin * cos / variance * shift


def exact_flow(path=None, solver=None, sampler=None):
    path = sf.Straight() if path is None else path
    solver = sf.Solver(rtol=1e-5, atol=1e-5) if solver is None else solver
    draw = None if sampler is None else functools.partial(sampler, path)
    graph, state = nnx.split(Exact())
    velocity = Velocity(graph, (state, None))
    return OdeFlow(velocity, (2,), jnp.float32, path.ends, solver, draw)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_turns_from_noise_to_data(name):
    path = PATHS[name]
    first, last = path.ends
    assert 0.0 <= first < 0.02
    assert math.pi / 2 - 0.12 < last <= math.pi / 2
    steps = np.asarray(path.steps(20))
    assert steps.shape == (21,)
    np.testing.assert_allclose(steps[[0, -1]], [first, last], atol=1e-5)
    assert np.all(np.diff(steps) > 0)
    angles = np.asarray(path.angles(jnp.linspace(0.001, 0.999, 999)))
    assert np.all((angles >= first - 1e-6) & (angles <= last + 1e-6))
    weights = np.asarray(path.weight(jnp.asarray(angles)))
    assert np.all(np.isfinite(weights) & (weights >= 0))


def test_a_straight_path_weighs_errors_of_its_own_field():
    """The field on z = t data + (1 - t) noise is the velocity divided by the path's sd."""
    time = np.linspace(0.05, 0.95, 10)
    angle = np.arctan2(time, 1 - time)
    expected = 1 / (time**2 + (1 - time) ** 2)
    np.testing.assert_allclose(sf.Straight().weight(jnp.asarray(angle)), expected, rtol=1e-5)


def test_training_goes_late_if_asked():
    places = jnp.linspace(0.0005, 0.9995, 1000)

    def mean_time(late):
        angle = sf.Straight(late=late).angles(places)
        return float(jnp.mean(jnp.tan(angle) / (1 + jnp.tan(angle))))

    for late in (0.0, 1.0, 4.0):
        assert mean_time(late) == pytest.approx((1 + late) / (2 + late), abs=2e-3)


def test_levels_of_noise_are_those_of_the_papers():
    sigma = 1 / np.tan(np.asarray(sf.EDM().angles(jnp.linspace(0.0005, 0.9995, 1000)), float))
    assert np.log(sigma).mean() == pytest.approx(-1.2, abs=0.01)
    assert np.log(sigma).std() == pytest.approx(1.2, abs=0.02)
    # Karras et al. 2022, equation 5
    i, rho = np.arange(11) / 10, 7.0
    levels = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(np.tan(sf.EDM().steps(10)), 1 / levels, rtol=2e-3)
    # Song et al. 2021, equation 33: the variance that is left at time 1
    left = math.exp(-0.5 * (20.0 - 0.1) - 0.1)
    assert math.sin(sf.VP().ends[0]) ** 2 == pytest.approx(left, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_a_solve_carries_noise_to_the_distribution_and_knows_its_density(name):
    flow = exact_flow(PATHS[name])
    draws, log_prob = jax.jit(lambda key: flow.sample_and_log_prob(seed=key, sample_shape=(4000,)))(
        jax.random.key(0)
    )
    assert draws.shape == (4000, 2)
    np.testing.assert_allclose(np.mean(draws, 0), MEAN, atol=4 * 2.0 / math.sqrt(4000))
    # paths that start after the noise or end before the data have a small bias
    np.testing.assert_allclose(np.std(draws, 0) / SD, 1.0, atol=0.04)
    exact = jnp.sum(norm.logpdf(draws, MEAN[None], SD[None]), axis=-1)
    slack = 0.02 if name == "straight" else 0.15
    np.testing.assert_allclose(log_prob, exact, atol=slack, rtol=5e-3)
    np.testing.assert_allclose(jax.jit(flow.log_prob)(draws), log_prob, atol=5e-3)


@pytest.mark.parametrize(("sampler", "off"), [(Heun(steps=24), 0.03), (Ancestral(steps=300), 0.05)])
def test_samplers_of_few_steps(sampler, off):
    flow = exact_flow(sf.EDM(), sampler=sampler)
    draws = jax.jit(lambda key: flow.sample(seed=key, sample_shape=(8000,)))(jax.random.key(0))
    np.testing.assert_allclose(np.mean(draws, 0), MEAN, atol=4 * 2.0 / math.sqrt(8000) + off)
    np.testing.assert_allclose(np.std(draws, 0) / SD, 1.0, atol=off)


def test_a_sampler_that_draws_no_fresh_noise_follows_the_ode():
    path = sf.EDM(smallest=1e-3)
    noise = jax.random.normal(jax.random.key(1), (200, 2))
    velocity = lambda z, angle: Exact()(z, angle, None)  # noqa: E731
    samplers = Heun(steps=200), Heun(), Ancestral(steps=400, fresh=0.0)
    exact, few, many = (s(path, velocity, noise, jax.random.key(2)) for s in samplers)
    assert np.max(np.abs(few - exact) / SD[None]) < 0.15
    assert np.max(np.abs(many - exact) / SD[None]) < 0.1
    # second order: twice the steps have a quarter of the error
    closer = Heun(steps=48)(path, velocity, noise, jax.random.key(2))
    assert np.mean(np.abs(closer - exact)) < 0.4 * np.mean(np.abs(few - exact))


def test_the_divergence_is_exact_or_a_projection():
    matrix = jnp.array([[1.0, 2.0, 0.0], [0.5, -3.0, 1.0], [0.0, 0.3, 0.25]])
    z = jax.random.normal(jax.random.key(0), (5, 3))
    found = field_derivatives(
        lambda z: z @ matrix, z, sf.Solver().probes_of(jax.random.key(0), 3, z.dtype)
    )
    np.testing.assert_allclose(found.value, z @ matrix, rtol=1e-6)
    np.testing.assert_allclose(found.divergence, np.full(5, -1.75), rtol=1e-5)
    np.testing.assert_allclose(found.squared_norm, np.full(5, np.sum(matrix**2)), rtol=1e-5)
    for noise in ("rademacher", "gaussian"):
        solver = sf.Solver(exact_up_to=2, probes=4000, noise=noise)
        probes = solver.probes_of(jax.random.key(1), 3, z.dtype)
        assert probes.shape == (4000, 3)
        found = field_derivatives(lambda z: z @ matrix, z, probes)
        assert float(found.divergence[0]) == pytest.approx(-1.75, abs=0.25)


def test_many_directions_in_turn_add_up_to_the_same():
    matrix = jax.random.normal(jax.random.key(0), (12, 12))
    z = jax.random.normal(jax.random.key(1), (5, 12))
    found = field_derivatives(lambda z: jnp.tanh(z @ matrix), z, jnp.eye(12))
    each = jax.vmap(jax.jacfwd(lambda z: jnp.tanh(z @ matrix)))(z)
    np.testing.assert_allclose(found.value, jnp.tanh(z @ matrix), rtol=1e-5)
    np.testing.assert_allclose(found.divergence, jnp.trace(each, axis1=1, axis2=2), rtol=1e-4)
    np.testing.assert_allclose(found.squared_norm, jnp.sum(each**2, axis=(1, 2)), rtol=1e-4)


def test_projections_are_the_same_in_every_solve_and_exact_for_a_diagonal():
    flow = exact_flow(solver=sf.Solver(exact_up_to=1, rtol=1e-5, atol=1e-5))
    points = jnp.array([[1.0, -2.0], [0.5, 1.0]])
    np.testing.assert_allclose(flow.log_prob(points[:1]), flow.log_prob(points)[:1], atol=5e-3)
    # a diagonal Jacobian is exact under signs
    exact = multivariate_normal.logpdf(points, MEAN, jnp.diag(SD**2))
    np.testing.assert_allclose(flow.log_prob(points), exact, atol=0.02)


def test_fixed_steps_agree_with_adapted_ones():
    points = jnp.array([[1.0, -2.0], [0.5, 1.0]])
    fixed = exact_flow(solver=sf.Solver(steps=40)).log_prob(points)
    np.testing.assert_allclose(fixed, exact_flow().log_prob(points), atol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sf.Solver(rtol=0.0), "rtol: expected a positive number, got 0.0"),
        (lambda: sf.Solver(steps=0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: sf.EDM(smallest=3.0, largest=2.0), "expected smallest < largest, got 3.0 and 2.0"),
        (lambda: sf.VP(first=30.0), "expected first < last"),
        (lambda: sf.VP(last=float("inf")), "last: expected a finite number, got inf"),
        (lambda: sf.EDM(mean=float("nan")), "mean: expected a finite number, got nan"),
        (lambda: sf.EDM(power=float("inf")), "power: expected a finite number, got inf"),
        (lambda: sf.Solver(method=diffrax.Tsit5), "method: expected .*, got the class Tsit5"),
        (lambda: sf.Straight(late=-1.0), "late: expected a number above -1, got -1.0"),
        (lambda: sf.Heun(steps=0), "steps: expected a whole number of at least 1, got 0"),
        (lambda: sf.Ancestral(fresh=1.5), "fresh: expected a number from 0 to 1, got 1.5"),
        (lambda: sf.Film(width=0), "width: expected a whole number of at least 1, got 0"),
        (
            lambda: cases.unchecked(sf.Diffusion, path=sf.EDM),
            "path: expected one such as .*, got the class EDM",
        ),
        (
            lambda: cases.unchecked(sf.FlowMatching, path=sf.EDM()),
            "path: expected one such as sf.Straight.*got EDM",
        ),
        (
            lambda: cases.unchecked(sf.CNF, solver=None),
            "solver: expected one such as .*, got NoneType",
        ),
        (lambda: sf.CNF(kinetic=-1.0), "kinetic: expected zero or a positive number, got -1.0"),
    ],
)
def test_settings_that_make_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


SMALL = sf.Film(width=32, blocks=2)
PRIOR = sf.as_prior({"place": dist.Uniform(-1.0, 1.0).expand([2])})
QUICK = sf.Training(max_epochs=30, learning_rate=3e-3, ema_decay=0.98)
FLOWS = {
    "flow matching": sf.FlowMatching(network=SMALL),
    "diffusion": sf.Diffusion(network=SMALL),
    "CNF": sf.CNF(network=sf.Film(width=24, blocks=1)),
}
TRAINED = {"CNF": sf.Training(max_epochs=4, learning_rate=1e-3)}


def folded(key, theta):
    """Observe |first parameter| and the second with noise: the posterior has two modes."""
    x = jnp.stack([jnp.abs(theta["place"][0]), theta["place"][1]])
    return x + 0.1 * jax.random.normal(key, (2,))


@pytest.fixture(scope="module")
def simulations():
    sims = sf.simulate(jax.random.key(0), PRIOR, folded, 3000, progress=False)
    # add a constant feature and a failed simulation
    x = jnp.concatenate([sims.x, jnp.ones((3000, 1))], axis=1)
    return sf.Simulations(sims.theta, x.at[7].set(jnp.nan))


KINDS = [pytest.param(name, marks=pytest.mark.slow) for name in FLOWS]


@pytest.fixture(scope="module", params=KINDS)
def fitted(request, simulations):
    training = TRAINED.get(request.param, QUICK)
    npe = sf.NPE(PRIOR, FLOWS[request.param], training=training, members=1)
    return npe.fit(jax.random.key(1), simulations, progress=False)


SEEN = np.array([0.5, 0.2, 1.0], np.float32)


def test_a_fit_finds_both_modes(fitted):
    posterior, history = fitted
    assert np.all(history.best_loss < history.start_loss - 0.05)
    draws = np.asarray(posterior.sample(jax.random.key(2), SEEN, 4000))
    assert np.all(np.abs(draws) <= 1.0)
    assert 0.4 < np.mean(draws[:, 0] > 0) < 0.6
    assert np.median(np.abs(draws[:, 0])) == pytest.approx(0.5, abs=0.05)
    assert np.mean(np.abs(draws[:, 0]) < 0.2) < 0.1
    assert draws[:, 1].mean() == pytest.approx(0.2, abs=0.05)
    assert draws[:, 1].std() == pytest.approx(0.1, abs=0.05)


def test_a_fit_integrates_to_one_where_its_draws_are(fitted):
    posterior, _ = fitted
    edges = np.linspace(-1.0, 1.0, 101)
    middle = (edges[1:] + edges[:-1]) / 2
    grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.exp(np.asarray(posterior.log_prob(grid, SEEN))) * 0.02**2
    assert mass.sum() == pytest.approx(1.0, abs=0.01)
    draws, log_prob = posterior.sample_and_log_prob(jax.random.key(3), SEEN, 4000)
    np.testing.assert_allclose(posterior.log_prob(draws, SEEN), log_prob, atol=2e-2)
    # the entropy from draws and from the grid
    entropy = -np.sum(mass * np.log(np.maximum(mass / 0.02**2, 1e-30)))
    assert -np.mean(log_prob) == pytest.approx(entropy, abs=0.05)


def test_the_history_says_how_much_work_a_density_is(fitted):
    _, history = fitted
    assert history.solver_steps.shape == history.held_out_loss.shape
    assert 5 < history.solver_steps.mean() < 200
    # three evaluations a step, and one before the first
    np.testing.assert_array_equal(history.solver_evaluations, 3 * history.solver_steps + 1)


def test_held_out_losses_are_log_densities_in_the_units_of_theta(fitted, simulations):
    posterior, history = fitted
    valid = simulations.only_valid()
    rows = history.held_out[0]
    said = -np.asarray(posterior.log_prob(valid.theta[rows], valid.x[rows]))
    assert history.held_out_loss.shape == (1, len(rows))
    # the weights are those of the best epoch; with a likelihood loss, of the best of either half
    assert np.mean(history.held_out_loss) == pytest.approx(np.mean(said), abs=0.05)


def test_what_is_drawn_does_not_depend_on_other_observations(fitted):
    posterior, _ = fitted
    batch = np.stack([SEEN, SEEN + np.array([0.2, -0.3, 0.0], np.float32)])
    keys = jax.random.key(4)
    both = posterior.log_prob(np.zeros((2, 2), np.float32), batch)
    alone = [posterior.log_prob(np.zeros(2, np.float32), x) for x in batch]
    np.testing.assert_allclose(both, alone, atol=0.02)
    draws = posterior.sample(keys, batch, 50)
    assert draws.shape == (2, 50, 2)
    others = posterior.sample(keys, np.stack([SEEN, SEEN]), 50)
    np.testing.assert_allclose(draws[0], others[0], atol=0.02)
    assert np.max(np.abs(draws[1] - others[1])) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_one_parameter_and_one_number(name):
    sims = sf.simulate(
        jax.random.key(0),
        dist.Normal(0.0, 1.0),
        lambda key, theta: theta.sum() + jax.random.normal(key),
        300,
        progress=False,
    )
    training = sf.Training(max_epochs=2)
    npe = sf.NPE(dist.Normal(0.0, 1.0), FLOWS[name], training=training, members=1)
    posterior, _ = npe.fit(jax.random.key(1), sims, progress=False)
    draws = np.asarray(posterior.sample(jax.random.key(2), jnp.float32(1.0), 2000))
    assert draws.shape == (2000, 1)
    assert draws.mean() == pytest.approx(0.5, abs=0.15)
    assert draws.std() == pytest.approx(math.sqrt(0.5), abs=0.12)


@pytest.mark.slow
def test_a_solve_that_fails_says_at_which_observations(simulations):
    hurried = sf.FlowMatching(network=SMALL, solver=sf.Solver(max_steps=1), sampler=None)
    npe = sf.NPE(PRIOR, hurried, training=sf.Training(max_epochs=1), members=1)
    with pytest.warns(sf.SbiFlowsWarning, match="not solved for 300 of 300 rows"):
        posterior, _ = npe.fit(jax.random.key(1), simulations, progress=False)
    batch = np.stack([SEEN] * 3)
    with pytest.raises(sf.SolveFailed, match=r"not solved at 3 of 3 .* \(numbers 0, 1, 2\)"):
        posterior.sample(jax.random.key(2), batch, 10)
    with pytest.raises(sf.SolveFailed, match="not solved at 1 of 1") as error:
        posterior.log_prob(np.zeros((3, 2), np.float32), SEEN)
    assert error.value.values.shape == (3,)
    assert np.all(np.isnan(error.value.values))


def test_regression_is_trained_for_longer_by_default():
    default = sf.NPE(PRIOR, sf.Diffusion()).training
    assert default.max_epochs > sf.NPE(PRIOR).training.max_epochs
    assert sf.NPE(PRIOR, sf.Diffusion(), training=QUICK).training is QUICK


@pytest.fixture(scope="module")
def tokens():
    """A perturbed network with one token of its own kind and three exchangeable ones."""
    settings = sf.Tokens(width=16, heads=2, size=2, kinds=(7, 3, 3, 3))
    graph, state = nnx.split(settings.build(nnx.Rngs(0), dim=8, context_dim=3))
    return nnx.merge(graph, cases.perturbed(jax.random.key(1), state, 0.3))


def test_exchanged_parameters_have_exchanged_velocities(tokens):
    z = jax.random.normal(jax.random.key(0), (5, 2, 4, 2))
    encoded = tokens.encode_context(jax.random.normal(jax.random.key(1), (2, 3)))

    def velocity(z):
        return tokens(z.reshape(5, 2, 8), jnp.asarray(0.7), encoded).reshape(z.shape)

    order = np.array([0, 3, 1, 2])
    np.testing.assert_allclose(velocity(z[:, :, order]), velocity(z)[:, :, order], atol=1e-5)
    # but the token of another kind is not exchangeable
    other = np.array([1, 0, 2, 3])
    assert np.max(np.abs(velocity(z[:, :, other]) - velocity(z)[:, :, other])) > 1e-2


@pytest.mark.slow
def test_a_mask_keeps_tokens_apart():
    chain = ((True, False, False), (True, True, False), (False, True, True))
    settings = sf.Tokens(width=8, heads=2, blocks=1, mask=chain)
    graph, state = nnx.split(settings.build(nnx.Rngs(0), dim=3, context_dim=2))
    network = nnx.merge(graph, cases.perturbed(jax.random.key(1), state, 0.3))
    encoded = network.encode_context(jnp.ones(2))
    jacobian = jax.jacobian(lambda z: network(z, jnp.asarray(0.3), encoded))(jnp.ones(3))
    seen = np.abs(np.asarray(jacobian)) > 1e-6
    np.testing.assert_array_equal(seen, np.array(chain))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "heads: expected a divisor of width=64, got 5"),
        ({"size": 4}, "size: expected a divisor of 6 parameters, got 4"),
        ({"kinds": (0, 1)}, r"kinds: expected one for each of 6 tokens, got \(0, 1\)"),
        ({"mask": ((True, True),)}, "mask: expected as many columns as rows"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        sf.Tokens(**settings).build(nnx.Rngs(0), dim=6, context_dim=2)
