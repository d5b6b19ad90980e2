"""Networks: autoregressive masks, zero initial outputs, dropout, symmetries of point clouds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.networks import Conditioner, ResidualMLP, graph
from sbi_flows.networks.mlp import dropout, fast_key, split_key
from sbi_flows.networks.shapes import align
from tests.cases import perturbed

PARAMS, CONTEXT = 3, 2


def conditioner(in_dim: int, out_dim: int, *, masked: bool, hidden=(16, 16), rate=0.0):
    """Return a conditioner with perturbed weights, since initial outputs are zero."""
    module = Conditioner(
        in_dim,
        out_dim,
        PARAMS,
        context_dim=CONTEXT,
        hidden=hidden,
        dropout=rate,
        masked=masked,
        rngs=nnx.Rngs(0),
    )
    graph, state = nnx.split(module)
    return nnx.merge(graph, perturbed(jax.random.key(0), state, 1.0))


@pytest.mark.parametrize("masked", [False, True])
def test_a_new_conditioner_gives_zeros(masked):
    module = Conditioner(
        3, 3, PARAMS, context_dim=CONTEXT, hidden=(8,), masked=masked, rngs=nnx.Rngs(0)
    )
    x, context = jnp.ones((3, 4, 5)), jnp.ones((5, CONTEXT))
    out = module(x, module.encode_context(context))
    assert out.shape == (PARAMS, 3, 4, 5)
    np.testing.assert_array_equal(out, 0.0)


# hidden widths at and off a multiple of the number of entries
@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(16, 16), (4,), (7, 5, 7)])
@pytest.mark.parametrize("dim", [1, 4])
def test_masked_parameters_depend_on_inputs_up_to_their_own(dim, hidden):
    module = conditioner(dim, dim, masked=True, hidden=hidden)
    x = jnp.full((dim, dim), 0.3)
    # row i has input i changed; the second half of the batch is unchanged
    out = module(
        jnp.stack([x + jnp.eye(dim), x], axis=1), module.encode_context(jnp.zeros(CONTEXT))
    )
    assert out.shape == (PARAMS, dim, 2, dim)
    strength = np.max(np.abs(out[:, :, 0] - out[:, :, 1]), axis=0)
    for entry, source in itertools.product(range(dim), repeat=2):
        if source > entry:
            assert strength[entry, source] == 0.0
        else:
            assert strength[entry, source] > 0.0


def test_all_inputs_matter_in_a_narrow_network():
    """Each input has an influence, also where there are fewer hidden units than inputs."""
    module = conditioner(6, 6, masked=True, hidden=(3,))
    x = jnp.full((6, 6), 0.3)
    out = module(jnp.stack([x + jnp.eye(6), x], axis=1), module.encode_context(jnp.zeros(CONTEXT)))
    strength = np.max(np.abs(out[:, :, 0] - out[:, :, 1]), axis=0)
    assert np.all(strength[-1] > 0.0)
    assert np.all(np.triu(strength, 1) == 0.0)


def test_unmasked_parameters_depend_on_every_input_and_the_context():
    module = conditioner(2, 3, masked=False)
    x, context = jnp.full(2, 0.3), jnp.full(CONTEXT, -0.2)
    for jacobian in jax.jacobian(lambda x, c: module(x, module.encode_context(c)), argnums=(0, 1))(
        x, context
    ):
        assert jacobian.shape == (PARAMS, 3, 2)
        assert np.all(np.max(np.abs(jacobian), axis=0) > 0)


def test_one_context_serves_many_draws():
    module = conditioner(2, 2, masked=True)
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    contexts = jax.random.normal(jax.random.key(2), (4, CONTEXT))
    together = module(x, module.encode_context(contexts))
    for row in range(4):
        alone = module(x[..., row], module.encode_context(contexts[row]))
        np.testing.assert_allclose(together[..., row], alone, atol=1e-5)


# widths at and off a multiple of the number of entries, and fewer units than these
@pytest.mark.slow
@pytest.mark.parametrize("hidden", [(16, 16), (7, 5, 7), (10, 10, 10), (3,)])
def test_advancing_input_by_input_gives_the_parameters_of_one_pass(hidden):
    module = conditioner(4, 4, masked=True, hidden=hidden)
    x, context = jax.random.normal(jax.random.key(1), (4, 5, 2)), jnp.ones((2, CONTEXT))
    given = module.encode_context(context)
    together = module(x, given)
    units = module.begin((5, 2), x.dtype)
    for i in range(4):
        known = jnp.where((jnp.arange(4) <= i)[:, None, None], x, 0.0)
        units, alone = module.advance(jnp.asarray(i), known, units, given)
        assert alone.shape == (PARAMS, 1, 5, 2)
        np.testing.assert_allclose(alone[:, 0], together[:, i], rtol=1e-5, atol=1e-5)


def dropping(x, key):
    module = conditioner(3, 3, masked=True, rate=0.5)
    return module(x.T, module.encode_context(jnp.ones(CONTEXT)), key=key)


NETWORKS = {
    "conditioner": lambda: dropping,
    "residual MLP": lambda: (
        lambda x, key: ResidualMLP(3, 4, width=16, dropout=0.5, rngs=nnx.Rngs(0))(x, key=key)
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_needs_a_key_and_follows_it(name):
    network, x = NETWORKS[name](), jnp.ones((6, 3))
    first, second = jax.random.key(0), jax.random.key(1)
    np.testing.assert_array_equal(network(x, None), network(x, None))
    np.testing.assert_array_equal(network(x, first), network(x, first))
    assert np.max(np.abs(network(x, first) - network(x, None))) > 1e-3
    assert np.max(np.abs(network(x, first) - network(x, second))) > 1e-3


def test_dropout_keeps_the_mean():
    x = jnp.full((101, 999), 2.0)
    dropped = np.asarray(dropout(jax.random.key(0), x, 0.25))
    np.testing.assert_allclose(np.unique(dropped), [0.0, 2.0 / 0.75], rtol=1e-6)
    assert abs(np.mean(dropped) - 2.0) < 0.02
    np.testing.assert_array_equal(dropout(jax.random.key(0), x, 0.0), x)
    np.testing.assert_array_equal(dropout(None, x, 0.25), x)


def test_the_residual_mlp_maps_the_last_axis():
    network = ResidualMLP(3, 8, width=16, blocks=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    out = network(x)
    assert out.shape == (2, 5, 8)
    np.testing.assert_allclose(out[1, 2], network(x[1, 2]), atol=1e-5)


def test_keys_split_only_where_there_is_one():
    assert list(split_key(None, 3)) == [None, None, None]
    keys = split_key(jax.random.key(0), 3)
    assert len({tuple(np.asarray(jax.random.key_data(k))) for k in keys}) == 3


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_a_fast_key_follows_its_source(impl):
    first, same, other = (fast_key(jax.random.key(seed, impl=impl)) for seed in (0, 0, 1))
    draw = jax.random.normal(first, (4,))
    np.testing.assert_array_equal(draw, jax.random.normal(same, (4,)))
    assert not np.any(draw == jax.random.normal(other, (4,)))


def test_align_adds_axes_in_front():
    assert align(jnp.ones((2,)), jnp.ones((5, 4, 2))).shape == (1, 1, 2)
    assert align(jnp.ones((4, 2)), jnp.ones((4, 2))).shape == (4, 2)


@pytest.fixture(scope="module")
def cloud():
    graph, state = nnx.split(sf.PointCloud(3, 2, features=4, vectors=2, width=8, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, perturbed(jax.random.key(0), state, 0.1))


def clouds():
    keys = jax.random.split(jax.random.key(1))
    return {
        "points": jax.random.normal(keys[0], (2, 6, 3)),
        "marks": jax.random.normal(keys[1], (2, 6, 2)),
    }


@pytest.mark.slow
def test_the_embedding_of_a_cloud_does_not_depend_on_the_order_of_its_points(cloud):
    x, order = clouds(), np.array([3, 1, 5, 0, 2, 4])
    shuffled = jax.tree.map(lambda a: a[:, order], x)
    np.testing.assert_allclose(cloud(shuffled), cloud(x), atol=1e-5)


@pytest.mark.slow
def test_missing_points_of_a_cloud_are_left_out(cloud):
    x = clouds()
    padded = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 2), (0, 0)), constant_values=7.0), x)
    mask = jax.tree.map(lambda a: jnp.broadcast_to(jnp.arange(8)[:, None] < 6, a.shape), padded)
    np.testing.assert_allclose(cloud(padded, mask), cloud(x), atol=1e-5)
    # one missing coordinate leaves out the whole point
    mask = {**mask, "points": mask["points"].at[:, 5, 1].set(False)}
    fewer = jax.tree.map(lambda a: a[:, :5], x)
    np.testing.assert_allclose(cloud(padded, mask), cloud(fewer), atol=1e-5)
    none = jax.tree.map(jnp.zeros_like, mask)
    assert np.all(np.isfinite(cloud(padded, none)))


def test_clouds_embedded_in_small_batches_give_the_same(cloud, monkeypatch):
    x, whole = clouds(), cloud(clouds())
    points = x["points"].shape[1]
    monkeypatch.setattr(graph, "_MAX_PAIRS", points**2)
    assert len(whole) == 2
    np.testing.assert_allclose(cloud(x), whole, atol=1e-5)


def test_the_embedding_of_a_cloud_moves_as_the_cloud_does(cloud):
    x = clouds()
    turn, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (3, 3)))
    shift = jnp.array([[[1.0, -2.0, 0.5]]])
    before, after = cloud(x), cloud(x | {"points": x["points"] @ turn + shift})
    np.testing.assert_allclose(after[:, :4], before[:, :4], atol=1e-5)
    vectors, moved = (a[:, 4:].reshape(2, 2, 3) for a in (before, after))
    np.testing.assert_allclose(moved, vectors @ turn + shift, atol=1e-5)
    # marks and distances between points change the invariant features
    other = cloud(x | {"marks": -x["marks"]}), cloud(x | {"points": 2.0 * x["points"]})
    assert all(np.max(np.abs(o[:, :4] - before[:, :4])) > 1e-3 for o in other)


def test_a_cloud_of_another_shape_is_refused(cloud):
    with pytest.raises(ValueError, match=r"points: expected shape \(B, P, 3\), got \(2, 6, 2\)"):
        cloud(jnp.ones((2, 6, 2)))
    with pytest.raises(ValueError, match=r"marks: expected shape \(2, 6, 2\), got None"):
        cloud(jnp.ones((2, 6, 3)))
