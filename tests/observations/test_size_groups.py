"""Small sets of a batch get shorter arrays: the same sizes, the same elements, the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sbi_flows as sf
from sbi_flows.densities.conditional import Blueprint, graph_of, initial_weights
from sbi_flows.densities.sizes import Sizes
from sbi_flows.observations.size_groups import MAX_GROUPS, size_groups, weights_of

PATTERN = sf.RandomSubset(3, 40)
TREE = jax.tree.structure(0)
SIZES = Sizes((False, False), TREE, ((50, 2),), has_mask=True)
SET = sf.DeepSet(width=8, features=4)
ROWS = 4096


def blueprint(embedding=SET, pattern=PATTERN, sizes=SIZES):
    count = len(embedding.summary_labels(sizes.like)) if embedding else 0
    sizes = Sizes(sizes.bounded, sizes.tree, sizes.shapes, (), True, count)
    return Blueprint(sf.MAF(transforms=1, hidden=(8,)), embedding, sizes, missing=pattern)


def features(rows):
    """Elements that are all different: (row, number of the element)."""
    row = jnp.broadcast_to(jnp.arange(rows, dtype=float)[:, None] / rows, (rows, 50))
    number = jnp.broadcast_to(jnp.arange(50.0)[None] / 50, (rows, 50))
    values = jnp.stack([row, number], axis=-1).reshape(rows, 100)
    return jnp.concatenate([values, jnp.ones_like(values)], axis=1)


def joined(plan, rows=ROWS):
    """Values and masks (rows, 50, 2) of all parts, padded to full length."""
    padded = []
    for part, inputs, _ in plan.hide_by_groups(jax.random.key(0), features(rows)):
        x, mask = part.sizes.observations(inputs)
        pad = ((0, 0), (0, 50 - x.shape[1]), (0, 0))
        padded.append((jnp.pad(x, pad), jnp.pad(mask, pad)))
    return tuple(jnp.concatenate(arrays) for arrays in zip(*padded, strict=True))


def test_groups_cover_all_sizes_once():
    groups = size_groups(PATTERN, ROWS)
    assert len(groups) == MAX_GROUPS
    sizes = [n for group in groups for n in range(group.smallest, group.largest + 1)]
    assert sizes == list(range(3, 41))


def test_every_range_of_sizes_is_covered_with_its_probability():
    for smallest in range(1, 8):
        for largest in range(smallest, 60):
            groups = size_groups(sf.RandomSubset(smallest, largest), 64)
            sizes = [n for g in groups for n in range(g.smallest, g.largest + 1)]
            assert sizes == (list(range(smallest, largest + 1)) if groups else [])
            weights = np.asarray(weights_of(groups)) / max(len(groups), 1)
            logs = [np.log((g.largest + 1) / g.smallest) for g in groups]
            np.testing.assert_allclose(weights * sum(logs), logs)


@pytest.mark.parametrize(
    "pattern", [sf.RandomSubset(0, 40), sf.RandomSubset(30, 40)], ids=["empty sets", "alike"]
)
def test_no_groups_where_they_would_be_wrong_or_useless(pattern):
    assert size_groups(pattern, ROWS) == ()
    plan = blueprint(pattern=pattern)
    assert [part for part, _, _ in plan.hide_by_groups(jax.random.key(0), features(8))] == [plan]


def test_one_part_unless_the_embedding_reads_any_length():
    key = jax.random.key(0)
    for embedding in (None, sf.SeriesNet(width=4, heads=2)):
        plan = blueprint(embedding)
        ((part, inputs, _),) = plan.hide_by_groups(key, features(8))
        assert part == plan
        np.testing.assert_array_equal(inputs, plan.hide(key, features(8)))


@pytest.mark.slow
def test_sizes_and_places_have_the_same_distribution_as_without_groups():
    plan = blueprint()
    assert len(plan.hide_by_groups(jax.random.key(0), features(ROWS))) == MAX_GROUPS
    _, mask = joined(plan)
    whole = plan.sizes.observations(plan.hide(jax.random.key(1), features(ROWS)))
    counts = [np.asarray(m[..., 0].sum(axis=1)) for m in (mask, whole[1])]
    assert counts[0].min() == 3 and counts[0].max() == 40
    quantiles = [np.quantile(np.log(n), np.linspace(0.05, 0.95, 10)) for n in counts]
    np.testing.assert_allclose(*quantiles, atol=0.15)


def test_elements_stay_together_in_their_order_and_every_one_can_come():
    x, mask = (np.asarray(a) for a in joined(blueprint()))
    numbers = np.round(x[..., 1] * 50).astype(int)
    rows = np.round(x[..., 0] * ROWS).astype(int)
    seen = np.zeros(50, int)
    for i in range(0, ROWS, 7):
        present = mask[i, :, 0]
        assert np.all(rows[i][present] == i)
        assert np.all(np.diff(numbers[i][present]) % 50 == 1)
        seen[numbers[i][present]] += 1
    assert seen.min() > 0.5 * seen.mean()


def test_series_that_end_early_keep_their_first_points():
    x, mask = joined(blueprint(pattern=sf.RandomSubset(3, 40, order="first")))
    numbers = np.round(np.asarray(x[..., 1]) * 50)
    expected = np.where(mask[..., 1], np.arange(50)[None], 0)
    np.testing.assert_array_equal(np.where(mask[..., 1], numbers, 0), expected)


@pytest.mark.slow
def test_the_loss_is_that_of_padded_sets():
    plan, rows = blueprint(), 8
    params, rest = initial_weights(plan, jax.random.key(3), None)
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(4), a.shape), params)
    hidden = plan.hide_by_groups(jax.random.key(0), features(rows))
    parts = [nnx.merge(graph_of(part), params, rest) for part, _, _ in hidden]
    y = jax.random.normal(jax.random.key(5), (rows, 2))
    inputs = [given for _, given, _ in hidden]
    noise = parts[0].whiten_parts(y, inputs, parts)
    got = parts[0].loss_of_parts(None, noise, inputs, parts)
    x, mask = joined(plan, rows)
    flat = jnp.concatenate([x.reshape(rows, -1), mask.reshape(rows, -1).astype(x.dtype)], axis=1)
    model = nnx.merge(graph_of(plan), params, rest)
    wanted, _ = model.whiten(y, plan.inputs(flat))
    np.testing.assert_allclose(noise, wanted, atol=1e-4)
    np.testing.assert_allclose(got, model.loss(None, wanted, plan.inputs(flat)), atol=1e-4)
    assert len(parts) == MAX_GROUPS
