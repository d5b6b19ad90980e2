"""Embeddings: symmetries, missing entries, padding, smallest sizes, settings."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sbi_flows.networks.embeddings import (
    ConvNet,
    DeepSet,
    EmbeddingSettings,
    Fusion,
    SeriesNet,
    SetTransformer,
)
from sbi_flows.networks.embeddings.base import start_at_zero
from sbi_flows.networks.embeddings.layers import _neighbours, _shifts, space_to_depth
from tests.cases import perturbed, unchecked
from tests.embedding_cases import (
    BATCH,
    CASES,
    CONV,
    DEEP_SET,
    FEATURES,
    FUSION,
    LISTS,
    SERIES,
    SET_TRANSFORMER,
    SETS,
    filled,
    like_of,
    masks,
    network,
    observations,
    padded,
    summaries,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_mask_of_true_gives_the_same_as_no_mask(name):
    apply, state = network(name)
    settings, shapes = CASES[name]
    x = observations(shapes)
    full = jax.tree.map(lambda a: jnp.ones(a.shape, bool), x)
    out = apply(state, x, None)
    assert out.shape == (BATCH, FEATURES)
    assert settings.features == FEATURES
    np.testing.assert_allclose(apply(state, x, full), out, atol=1e-5)
    assert np.all(np.std(out, axis=0) > 1e-4)
    values = summaries(name)(x, None)
    np.testing.assert_allclose(summaries(name)(x, full), values, atol=1e-5)
    labels = settings.summary_labels(like_of(shapes))
    assert values.shape == (BATCH, len(labels))
    assert len(set(labels)) == len(labels) <= (64 if name != "fusion" else 200)
    assert np.max(np.abs(values)) < 5.0


@pytest.mark.parametrize("name", CASES)
def test_missing_entries_do_not_matter_but_their_mask_does(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    mask = masks(x)
    for compute in (functools.partial(apply, state), summaries(name)):
        out = compute(filled(x, mask), mask)
        np.testing.assert_array_equal(compute(filled(x, mask, 100.0), mask), out)
        np.testing.assert_array_equal(compute(filled(x, mask, np.nan), mask), out)
        full = jax.tree.map(jnp.ones_like, mask)
        assert np.max(np.abs(compute(filled(x, mask), full) - out)) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_an_observation_without_entries_has_a_constant_embedding(name):
    apply, state = network(name)
    x, other = (observations(CASES[name][1], seed) for seed in (0, 1))
    # the first row has entries
    mask = jax.tree.map(lambda m: m.at[1:].set(False), masks(x))
    out = apply(state, x, mask)
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out[1], out[2], atol=1e-6)
    np.testing.assert_array_equal(out[1:], apply(state, other, mask)[1:])
    assert np.max(np.abs(out[1] - out[0])) > 1e-3
    values = summaries(name)(x, mask)
    assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(values[1], values[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_weight_has_a_finite_gradient(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    mask = jax.tree.map(lambda m: m.at[1].set(False), masks(x))
    cotangent = jax.random.normal(jax.random.key(3), (BATCH, FEATURES))
    gradients = jax.jit(jax.grad(lambda s: jnp.sum(apply(s, x, mask) * cotangent)))(state)
    flat, _ = jax.tree.flatten_with_path(gradients)
    assert all(np.all(np.isfinite(leaf)) for _, leaf in flat)
    unused = [jax.tree_util.keystr(path) for path, leaf in flat if not np.any(leaf != 0.0)]
    assert unused == []


@pytest.mark.parametrize("name", SETS)
def test_the_order_of_a_set_does_not_matter(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    order = np.random.default_rng(0).permutation(x.shape[1])
    assert np.any(order != np.arange(x.shape[1]))
    for mask in (None, masks(x)):
        shuffled = None if mask is None else mask[:, order]
        for compute in (functools.partial(apply, state), summaries(name)):
            np.testing.assert_allclose(compute(x[:, order], shuffled), compute(x, mask), atol=1e-5)


@pytest.mark.parametrize("name", ["series", "long series", "image", "cube"])
def test_the_order_of_points_on_a_grid_matters(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    assert np.max(np.abs(apply(state, x[:, ::-1], None) - apply(state, x, None))) > 1e-3


@pytest.mark.parametrize(("name", "count"), [(name, 9) for name in LISTS] + [("long series", 70)])
def test_padding_changes_nothing(name, count):
    apply, state = network(name)
    x = observations(CASES[name][1])
    longer, end = padded(x, count, 7.0), padded(jnp.ones(x.shape, bool), count, False)
    np.testing.assert_allclose(apply(state, longer, end), apply(state, x, None), atol=1e-5)
    assert np.max(np.abs(apply(state, longer, None) - apply(state, x, None))) > 1e-3
    mask = masks(x).at[1].set(False)  # one row without entries
    np.testing.assert_allclose(
        apply(state, longer, padded(mask, count, False)), apply(state, x, mask), atol=1e-5
    )
    if name in SETS:
        values = summaries(name)(longer, padded(mask, count, False))
        np.testing.assert_allclose(values, summaries(name)(x, mask), atol=1e-5)


def test_the_number_of_elements_matters():
    """Copies of a set have the same means; only the number of elements differs."""
    for name in ("vectors", "transformer"):
        apply, state = network(name)
        x = observations(CASES[name][1])
        twice = apply(state, jnp.concatenate([x, x], axis=1), None)
        assert np.max(np.abs(twice - apply(state, x, None))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (DEEP_SET, (1,)),
        (DEEP_SET, (1, 1)),
        (DeepSet(each=SERIES, width=4), (1, 1)),
        (SET_TRANSFORMER, (1,)),
        (dataclasses.replace(SET_TRANSFORMER, each=SERIES), (1, 3)),
        (SERIES, (1,)),
        (SeriesNet(), (2, 1)),
        (CONV, (1, 1)),
        (CONV, (1, 20, 2)),
        (dataclasses.replace(CONV, axes=1), (1,)),
        (dataclasses.replace(CONV, axes=3), (1, 2, 1)),
        (Fusion({"x": None}), {"x": ()}),
        (Fusion({"x": None}), {"x": (100,)}),
    ],
    ids=str,
)
def test_the_smallest_sizes(settings, shape):
    like, labels = like_of(shape), settings.summary_labels(like_of(shape))

    def apply(x):
        return settings.build(nnx.Rngs(0), like)(x, None), settings.summarise(x, None)

    out, values = jax.jit(apply)(observations(shape, batch=1))
    assert out.shape == (1, settings.features) and values.shape == (1, len(labels))
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(values))
    out, values = jax.eval_shape(apply, observations(shape, batch=0))
    assert out.shape == (0, settings.features) and values.shape == (0, len(labels))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        (CONV, (3,), r"ConvNet expects an image \(H, W\) or \(H, W, C\), got shape \(3,\)"),
        (CONV, {"a": (3, 3)}, "ConvNet expects an image .* got several arrays with names a"),
        (dataclasses.replace(CONV, axes=1), (2, 3, 4), r"expects an array \(L,\) or \(L, C\)"),
        (dataclasses.replace(CONV, axes=3), (2, 3), r"expects a cube .* got shape \(2, 3\)"),
        (SERIES, (), r"SeriesNet expects a series \(T,\) or \(T, C\), got shape \(\)"),
        (SERIES, (0, 2), r"SeriesNet expects a series .*, got shape \(0, 2\)"),
        (DEEP_SET, (2, 3, 4), r"DeepSet expects a set \(n,\) or \(n, C\), got shape \(2, 3, 4\)"),
        (SET_TRANSFORMER, (), r"SetTransformer expects a set .*, got shape \(\)"),
        (DeepSet(each=SERIES), (4,), r"SeriesNet expects a series .*, got shape \(\)"),
        (FUSION, (3,), r"Fusion expects a dict of arrays \['image', .* got shape \(3,\)"),
        (FUSION, {"image": (3, 3)}, r"Fusion expects .*'series'\], got \['image'\]"),
        (
            FUSION,
            {"image": (3,), "series": (3,), "redshift": ()},
            r"ConvNet expects .* got shape \(3,\) \(part 'image'\)",
        ),
    ],
)
def test_an_observation_of_another_shape_is_refused(settings, shape, message):
    like = like_of(shape)
    with pytest.raises(ValueError, match=f"embedding: .*{message}"):
        settings.check(like)
    with pytest.raises(ValueError, match=message):
        settings.build(nnx.Rngs(0), like)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (DeepSet, {"width": 0}, "width: expected a whole number"),
        (DeepSet, {"each": SeriesNet}, "each: expected an embedding"),
        (DeepSet, {"heads": 3}, "heads: expected a divisor of width=32, got 3"),
        (SetTransformer, {"inducing": 0}, "inducing: expected"),
        (SetTransformer, {"dropout": 1.0}, "dropout: expected"),
        (SeriesNet, {"stride": 3}, "stride: expected a power of two, got 3"),
        (SeriesNet, {"heads": 5}, "heads: expected a divisor of width=32, got 5"),
        (ConvNet, {"axes": 4}, "axes: expected 1, 2 or 3, got 4"),
        (Fusion, {"parts": {}}, "parts: expected one or more"),
        (Fusion, {"parts": (("a", None), ("a", None))}, "parts: expected one or more different"),
        (Fusion, {"parts": {1: None}}, "parts: expected names as keys, got 1"),
        (Fusion, {"parts": {"a": ConvNet}}, r"parts\['a'\]: expected an embedding or None"),
    ],
)
def test_an_invalid_setting_is_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        unchecked(kind, **fields)


@pytest.mark.parametrize("name", ["vectors", "transformer", "series", "image", "fusion"])
def test_dropout_needs_a_key_and_follows_it(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    first, second = jax.random.key(0), jax.random.key(1)
    dropped = apply(state, x, None, first)
    np.testing.assert_array_equal(apply(state, x, None, first), dropped)
    assert np.max(np.abs(dropped - apply(state, x, None))) > 1e-3
    assert np.max(np.abs(dropped - apply(state, x, None, second))) > 1e-3


@pytest.mark.parametrize("name", ["set of series", "transformer", "fusion"])
def test_networks_of_an_ensemble_run_in_one_vmap(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    mask = masks(x)
    members = [state, perturbed(jax.random.key(1), state, 0.1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    out = jax.jit(jax.vmap(apply, in_axes=(0, None, None)))(stacked, x, mask)
    alone = jnp.stack([apply(member, x, mask) for member in members])
    np.testing.assert_allclose(out, alone, atol=1e-5)
    assert np.max(np.abs(alone[0] - alone[1])) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_state_consists_of_float32_weights(name):
    settings, shapes = CASES[name]
    with jax.enable_x64(True):
        module = nnx.eval_shape(lambda: settings.build(nnx.Rngs(0), like_of(shapes)))
    variables = jax.tree.leaves(nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable))
    assert variables and all(type(v) is nnx.Param for v in variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vectors", "transformer", "cube", "fusion"])
def test_precision_follows_the_observation(name):
    apply, state = network(name)
    x = observations(CASES[name][1])
    mask = masks(x)
    out, values = apply(state, x, mask), summaries(name)(x, mask)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: a.astype(jnp.float64), x)
        wide_out, wide_values = apply(state, wide, mask), summaries(name)(wide, mask)
        assert wide_out.dtype == wide_values.dtype == jnp.float64
        assert apply(state, x, mask).dtype == summaries(name)(x, mask).dtype == jnp.float32
    np.testing.assert_allclose(wide_out, out, atol=1e-4)
    np.testing.assert_allclose(wide_values, values, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_settings_are_frozen_hashable_and_plain(name):
    settings, shapes = CASES[name]
    copy = dataclasses.replace(settings)
    assert copy == settings and hash(copy) == hash(settings) and copy is not settings
    assert dataclasses.replace(settings, features=7) != settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.features = 3
    hints = typing.get_type_hints(type(settings))
    fields = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    plain = {int, float, bool, int | None, EmbeddingSettings | None}
    pairs = tuple[tuple[str, EmbeddingSettings | None], ...]
    assert set(fields.values()) <= plain | {pairs}
    shared = settings.shared(like_of(shapes))
    assert len(shared) == len(jax.tree.leaves(like_of(shapes)))


def test_axes_that_share_a_standardisation():
    def shared(name):
        return CASES[name][0].shared(like_of(CASES[name][1]))

    assert shared("vectors") == shared("transformer") == shared("series") == ((0,),)
    assert shared("set of series") == ((0, 1),)
    assert shared("image") == ((0, 1),)
    assert shared("cube") == ((0, 1, 2),)
    assert shared("fusion") == ((0, 1), (), (0,))  # image, redshift, series


def test_the_parts_of_a_fusion_are_sorted_pairs():
    mapping = Fusion({"b": SERIES, "a": None})
    assert mapping.parts == (("a", None), ("b", SERIES))
    assert mapping == Fusion((("b", SERIES), ("a", None)))


@pytest.mark.parametrize("part", ["image", "series", "redshift"])
def test_a_part_of_a_fusion_may_be_absent(part):
    apply, state = network("fusion")
    x, other = (observations(CASES["fusion"][1], seed) for seed in (0, 5))
    mask = jax.tree.map(lambda a: jnp.ones(a.shape, bool), x)
    absent = mask | {part: jnp.zeros_like(mask[part]).at[0].set(True)}
    out = apply(state, x, absent)
    # the values of an absent part do not matter; those of the first row are present
    np.testing.assert_array_equal(apply(state, x | {part: other[part]}, absent)[1:], out[1:])
    np.testing.assert_allclose(apply(state, x, mask)[0], out[0], atol=1e-5)
    assert np.max(np.abs(apply(state, x, mask)[1:] - out[1:])) > 1e-3


def test_an_image_network_without_coordinates_ignores_where_a_source_is():
    x = jnp.zeros((2, 16, 16)).at[0, 5:8, 5:8].set(1.0).at[1, 7:10, 9:12].set(1.0)
    like = like_of((16, 16))
    out = {}
    for is_located in (True, False):
        module = dataclasses.replace(CONV, is_located=is_located).build(nnx.Rngs(0), like)
        out[is_located] = nnx.jit(lambda m, x: m(x, None))(module, x)
    np.testing.assert_allclose(out[False][0], out[False][1], atol=1e-5)
    assert np.max(np.abs(out[True][0] - out[True][1])) > 1e-3


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_and_a_matrix_product_are_a_convolution(axes):
    letters = "DHW"[-axes:]
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    x = jax.random.normal(jax.random.key(0), (2, *(5, 4, 3)[:axes], 3))
    shifts = _shifts(axes)
    matrix = jax.random.normal(jax.random.key(1), (len(shifts), 3, 4))
    kernel = jnp.zeros((3,) * axes + (3, 4))
    for shift, block in zip(shifts, matrix, strict=True):
        kernel = kernel.at[shift].set(block)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1,) * axes, "SAME", dimension_numbers=layout
    )
    np.testing.assert_allclose(_neighbours(x) @ matrix.reshape(-1, 4), expected, atol=1e-4)


def test_patches_keep_neighbours_together_and_mark_padding():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    patches, mask = space_to_depth(x, None, (2, 2), mark_padding=True)
    np.testing.assert_array_equal(patches[0, 0, 1], [2.0, 3.0, 6.0, 7.0])
    np.testing.assert_array_equal(patches[0, 1, 0], [8.0, 9.0, 0.0, 0.0])
    assert mask is not None
    np.testing.assert_array_equal(mask[0, 1, 0], [True, True, False, False])
    assert np.all(mask[0, 0])


@pytest.mark.parametrize("name", CASES)
def test_huge_numbers_give_finite_results(name):
    apply, state = network(name)
    x = jax.tree.map(lambda a: 1e30 * a, observations(CASES[name][1]))
    assert np.all(np.isfinite(apply(state, x, None)))
    values = summaries(name)(x, None)
    assert np.all(np.isfinite(values)) and np.max(np.abs(values)) < 1e3


@pytest.mark.parametrize("length", [1, 128, 129, 1000, 100_000])
def test_a_long_series_has_at_most_128_tokens(length):
    graph, state = nnx.split(
        nnx.eval_shape(lambda: SeriesNet(width=4).build(nnx.Rngs(0), like_of((length,))))
    )
    module = nnx.merge(graph, state)
    tokens = -(-length // int(np.prod(module.factors)))
    assert tokens <= 128 and (tokens > 60 or length == 1)


@pytest.mark.parametrize("name", CASES)
def test_a_fit_starts_from_an_output_of_zero(name):
    settings, shapes = CASES[name]
    x = observations(shapes)
    built = settings.build(nnx.Rngs(0), like_of(shapes))
    assert np.any(np.asarray(built(x, None)) != 0.0)
    np.testing.assert_array_equal(start_at_zero(built)(x, None), np.zeros((BATCH, FEATURES)))
