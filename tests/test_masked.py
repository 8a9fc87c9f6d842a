"""Masked and compact execution against networks from which channels were really taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from oracles import connection_mask

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import find_blocks
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.grouped import GroupedBody
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.masks import connection_thresholds

layers = keras.layers
Keep = dict[str, np.ndarray]


def no_connections(name: str, member: tf.Tensor) -> tf.Tensor:
    raise AssertionError("no connections are pruned")


def masked(
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any = no_connections,
) -> np.ndarray:
    """Features at the graph's output, all rows in one masked pass."""
    body = MaskedBody(graph, graph.output, pruned_blocks(graph, bank))
    return run_rows(body, graph, x, rows, members, bank, connection_mask)


def run_rows(
    body: Any,
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any,
) -> np.ndarray:
    """What a body gives of all rows, flattened."""

    @tf.function
    def run(x: tf.Tensor) -> tf.Tensor:
        values = graph.run(x, [graph.output])
        masks = tf.constant(bank[members])
        return body(values, tf.constant(rows), tf.constant(members), masks, connection_mask)

    return run(tf.constant(x)).numpy().reshape(np.size(rows), -1)


def grouped(
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any = no_connections,
) -> np.ndarray:
    """The same, every row's differentiator compact."""
    body = GroupedBody(graph, graph.output, pruned_blocks(graph, bank))
    return run_rows(body, graph, x, rows, members, bank, connection_mask)


def late(
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any = no_connections,
) -> np.ndarray:
    """Compact, with outputs dropped from what layers compute, and every second block masked."""
    blocks = pruned_blocks(graph, bank)
    names = [block.name for block in blocks if block.kind == "filters"]
    every = [step.name for step in graph.steps]
    body = GroupedBody(graph, graph.output, blocks, late=every, masked=names[1::2])
    return run_rows(body, graph, x, rows, members, bank, connection_mask)


def split(
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any = no_connections,
) -> np.ndarray:
    """Compact up to the middle of the network, and masked from there."""
    blocks = pruned_blocks(graph, bank)
    between = graph.bottlenecks(graph.output)
    half = between[len(between) // 2]
    first = GroupedBody(graph, half, blocks)
    rest = MaskedBody(graph, graph.output, blocks, half)

    def body(*given: Any) -> tf.Tensor:
        return rest(*given, first(*given))

    return run_rows(body, graph, x, rows, members, bank, connection_mask)


def compact(
    graph: ModelGraph,
    x: np.ndarray,
    rows: np.ndarray,
    members: np.ndarray,
    bank: np.ndarray,
    connection_mask: Any = no_connections,
) -> np.ndarray:
    """The same, one differentiator after the other, without what is removed."""
    body = CompactBody(
        graph, graph.output, pruned_blocks(graph, bank), connection_mask=connection_mask
    )
    loaded = body.load(x)
    parts = [
        body(loaded[own], bank[member], member) for own, member in zip(rows, members, strict=True)
    ]
    return np.concatenate(parts)


def pruned_blocks(graph: ModelGraph, bank: np.ndarray) -> list[Any]:
    """All prunable layers, or only the convolutions where there are filters to prune."""
    blocks = find_blocks(graph)
    filters = [block for block in blocks if block.kind == "filters"]
    return filters if bank.shape[1] else blocks


each_form = pytest.mark.parametrize("run", [masked, compact, grouped, late, split])


class Widths:
    """Builds a network whose pruned layers have only the filters that are kept."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep

    def __call__(self, name: str, filters: int) -> int:
        return int(self.keep[name].sum()) if name in self.keep else filters


def chain(width: Widths) -> Any:
    """Convolution, batch normalisation, activation and dropout; offsets that could revive."""
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(width("a", 6), 3, name="a")(inputs)
    x = layers.BatchNormalization(name="a_norm")(x)
    x = layers.Activation("sigmoid", name="a_act")(x)
    x = layers.Dropout(0.5, name="a_drop")(x)
    x = layers.ZeroPadding2D(name="pad")(x)
    x = layers.Conv2D(width("b", 8), 3, strides=2, activation="tanh", name="b")(x)
    x = layers.AveragePooling2D(2, name="pool")(x)
    x = layers.BatchNormalization(name="late_norm")(x)
    x = layers.SeparableConv2D(width("c", 5), 3, padding="same", name="c")(x)
    return keras.Model(inputs, layers.Flatten(name="flatten")(x))


def depthwise(width: Widths) -> Any:
    """MobileNet's block: the mask follows the channels through a depthwise convolution."""
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(width("a", 6), 3, use_bias=False, name="a")(inputs)
    x = layers.BatchNormalization(name="a_norm")(x)
    x = layers.ReLU(6.0, name="a_relu")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="deep")(x)
    x = layers.BatchNormalization(name="deep_norm")(x)
    x = layers.ReLU(6.0, name="deep_relu")(x)
    x = layers.Conv2D(width("b", 7), 1, name="b")(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D(name="pool")(x))


def joined(width: Widths) -> Any:
    """DenseNet's join: the mask follows the channels through a concatenation and what follows."""
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(width("a", 6), 3, padding="same", name="a")(inputs)
    y = layers.Conv2D(width("b", 4), 3, padding="same", activation="relu", name="b")(x)
    x = layers.Concatenate(name="join")([x, inputs, y])
    x = layers.BatchNormalization(name="join_norm")(x)
    x = layers.ReLU(name="join_relu")(x)
    x = layers.Conv2D(width("c", 5), 3, name="c")(x)
    return keras.Model(inputs, layers.GlobalMaxPooling2D(name="pool")(x))


def signal(width: Widths) -> Any:
    """A one-dimensional network, and a Dense layer on the pruned channels."""
    inputs = keras.Input((30, 2))
    x = layers.Conv1D(width("a", 6), 5, activation="relu", name="a")(inputs)
    x = layers.MaxPooling1D(2, name="pool")(x)
    x = layers.Conv1D(width("b", 8), 3, activation="elu", name="b")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(inputs, layers.Dense(9, activation="relu", name="fc")(x))


# What stays of each weight of each layer, given what is kept of the pruned ones.
Slices = Callable[[Keep], dict[str, list[Any]]]


def norm(mask: np.ndarray) -> list[Any]:
    return [np.ix_(mask)] * 4


SLICES: dict[str, tuple[Callable[[Widths], Any], dict[str, int], Slices]] = {
    "chain": (
        chain,
        {"a": 6, "b": 8, "c": 5},
        lambda k: {
            "a": [np.ix_([True] * 3, [True] * 3, [True] * 3, k["a"]), np.ix_(k["a"])],
            "a_norm": norm(k["a"]),
            "b": [np.ix_([True] * 3, [True] * 3, k["a"], k["b"]), np.ix_(k["b"])],
            "late_norm": norm(k["b"]),
            "c": [
                np.ix_([True] * 3, [True] * 3, k["b"], [True]),
                np.ix_([True], [True], k["b"], k["c"]),
                np.ix_(k["c"]),
            ],
        },
    ),
    "depthwise": (
        depthwise,
        {"a": 6, "b": 7},
        lambda k: {
            "a": [np.ix_([True] * 3, [True] * 3, [True] * 3, k["a"])],
            "a_norm": norm(k["a"]),
            "deep": [
                np.ix_([True] * 3, [True] * 3, k["a"], [True] * 2),
                np.ix_(np.repeat(k["a"], 2)),
            ],
            "deep_norm": norm(np.repeat(k["a"], 2)),
            "b": [np.ix_([True], [True], np.repeat(k["a"], 2), k["b"]), np.ix_(k["b"])],
        },
    ),
    "joined": (
        joined,
        {"a": 6, "b": 4, "c": 5},
        lambda k: {
            "a": [np.ix_([True] * 3, [True] * 3, [True] * 3, k["a"]), np.ix_(k["a"])],
            "b": [np.ix_([True] * 3, [True] * 3, k["a"], k["b"]), np.ix_(k["b"])],
            "join_norm": norm(np.concatenate([k["a"], [True] * 3, k["b"]])),
            "c": [
                np.ix_(
                    [True] * 3, [True] * 3, np.concatenate([k["a"], [True] * 3, k["b"]]), k["c"]
                ),
                np.ix_(k["c"]),
            ],
        },
    ),
    "signal": (
        signal,
        {"a": 6, "b": 8},
        lambda k: {
            "a": [np.ix_([True] * 5, [True] * 2, k["a"]), np.ix_(k["a"])],
            "b": [np.ix_([True] * 3, k["a"], k["b"]), np.ix_(k["b"])],
            "fc": [np.ix_(np.tile(k["b"], 11), [True] * 9), np.ix_([True] * 9)],
        },
    ),
}


def randomise(model: Any, rng: np.random.Generator) -> None:
    """Random weights everywhere, biases and moving statistics included."""
    for layer in model.layers:
        weights = [rng.normal(0, 0.4, w.shape) for w in layer.get_weights()]
        if isinstance(layer, layers.BatchNormalization):
            weights[3] = np.abs(weights[3]) + 0.2
        layer.set_weights(weights)


def kept_channels(features: np.ndarray, small: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The columns of masked features that the small network has, the others being 0."""
    columns = np.tile(mask, features.shape[1] // len(mask))
    assert not features[:, ~columns].any()
    assert columns.sum() == small.shape[1]
    return features[:, columns]


@each_form
@pytest.mark.parametrize("case", SLICES)
def test_it_equals_physically_removed(case: str, run: Any) -> None:
    build, filters, slices = SLICES[case]
    rng = np.random.default_rng(0)
    full = build(Widths({}))
    randomise(full, rng)
    graph = ModelGraph(full)
    blocks = [b for b in find_blocks(graph) if b.kind == "filters"]
    assert [b.name for b in blocks] == list(filters)
    keeps = []
    for _ in range(3):
        keep = {name: rng.random(count) < 0.6 for name, count in filters.items()}
        for mask in keep.values():
            mask[0] = True
        keeps.append(keep)
    bank = np.stack([np.concatenate([keep[name] for name in filters]) for keep in keeps])
    x = rng.normal(0, 1, (4, *graph.input_shape)).astype(np.float32)
    rows = np.array([[0, 1], [2, 3], [1, 1]])
    members = np.array([2, 0, 1])
    features = run(graph, x, rows, members, bank)
    for group, member in enumerate(members):
        keep = keeps[member]
        small = build(Widths(keep))
        for layer in small.layers:
            if layer.name in slices(keep):
                weights = full.get_layer(layer.name).get_weights()
                kept = slices(keep)[layer.name]
                layer.set_weights([w[i] for w, i in zip(weights, kept, strict=True)])
        expected = small(x[rows[group]], training=False).numpy()
        got = features[2 * group : 2 * group + 2]
        if expected.shape != got.shape:
            got = kept_channels(got, expected, keep[list(filters)[-1]])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@each_form
def test_dense_connections_equal_a_pruned_kernel(run: Any) -> None:
    rng = np.random.default_rng(0)
    inputs = keras.Input((7,))
    x = layers.Dense(5, activation="relu", name="fc1")(inputs)
    model = keras.Model(inputs, layers.Dense(4, name="fc2")(x))
    randomise(model, rng)
    graph = ModelGraph(model)
    kernels = {name: model.get_layer(name).get_weights()[0] for name in ("fc1", "fc2")}
    masks = {}
    for name, kernel in kernels.items():
        scores = rng.uniform(0, 1, (3, len(kernel))).astype(np.float32)
        thresholds, ties = connection_thresholds(kernel, scores, 0.7)
        masks[name] = np.stack(
            [connection_mask(kernel, *row) for row in zip(scores, thresholds, ties, strict=True)]
        )
    x = rng.normal(0, 1, (4, 7)).astype(np.float32)
    features = run(
        graph,
        x,
        np.array([[0, 1, 2], [3, 2, 1]]),
        np.array([1, 2]),
        np.zeros((3, 0), bool),
        lambda name, member: tf.gather(tf.constant(masks[name]), member),
    )
    (_, b1), (_, b2) = (model.get_layer(name).get_weights() for name in ("fc1", "fc2"))
    for group, (images, member) in enumerate([((0, 1, 2), 1), ((3, 2, 1), 2)]):
        hidden = np.maximum(x[list(images)] @ (kernels["fc1"] * masks["fc1"][member]) + b1, 0)
        expected = hidden @ (kernels["fc2"] * masks["fc2"][member]) + b2
        np.testing.assert_allclose(
            features[3 * group : 3 * group + 3], expected, rtol=1e-5, atol=1e-6
        )


def root_mean_square(x: Any) -> Any:
    """An activation that mixes channels, though none that are 0."""
    return x / tf.sqrt(tf.reduce_mean(x**2, axis=-1, keepdims=True) + 1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(name="x"),
        layers.UnitNormalization(name="x"),
        layers.Activation("softmax", name="x"),
        layers.Activation(root_mean_square, name="x"),
        layers.AveragePooling2D(3, 1, "same", data_format="channels_first", name="x"),
        layers.Permute((3, 1, 2), name="x"),
        layers.Reshape((8 * 8 * 4,), name="x"),
        layers.Lambda(lambda t: t + 1, name="x"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_not_known_to_keep_channels_apart_is_refused(layer: Any) -> None:
    inputs = keras.Input((8, 8, 3))
    x = layer(layers.MaxPooling2D(1)(layers.Conv2D(4, 3, padding="same", name="conv")(inputs)))
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    blocks = [block for block in find_blocks(graph) if block.kind == "filters"]
    with pytest.raises(ValueError, match=r"The layer 'x' .* comes after a pruned convolution"):
        MaskedBody(graph, graph.output, blocks)
    MaskedBody(graph, graph.output, [])


@pytest.mark.parametrize(
    "operation",
    [lambda x: 1 / x, keras.activations.relu, layers.Activation("softmax")],
    ids=["division", "relu", "softmax"],
)
def test_a_bare_operation_on_a_pruned_channel_is_refused(operation: Any) -> None:
    inputs = keras.Input((8, 8, 3))
    x = operation(layers.Conv2D(4, 3, name="conv")(inputs))
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    with pytest.raises(ValueError, match="comes after a pruned convolution"):
        MaskedBody(graph, graph.output, find_blocks(graph))


@pytest.mark.parametrize(
    "layer",
    [
        layers.Rescaling(2.0, offset=-1.0),
        lambda x: 1 - x * 2,
        layers.Reshape((4, 16, 4)),
        layers.Activation("sigmoid"),
        layers.BatchNormalization(beta_initializer="ones"),
        layers.DepthwiseConv2D(1, bias_initializer="ones"),
    ],
    ids=lambda layer: type(layer).__name__,
)
@each_form
def test_no_offset_revives_a_channel(layer: Any, run: Any) -> None:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(beta_initializer="ones")(layer(layers.MaxPooling2D(1)(x)))
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    keep = np.array([True, False, True, False])
    images = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    features = run(graph, images, np.array([[0, 1]]), np.array([0]), keep[None])
    plain = graph.run(tf.constant(images), [graph.output])[graph.output].numpy()
    columns = np.tile(keep, plain.shape[1] // 4)
    assert not features[:, ~columns].any()
    assert plain[:, ~columns].any()
    np.testing.assert_allclose(features[:, columns], plain[:, columns], rtol=1e-5)


@each_form
def test_at_an_addition_a_pruned_branch_contributes_nothing(run: Any) -> None:
    inputs = keras.Input((8, 8, 3))
    branches = [layers.Conv2D(4, 3, padding="same", name=name)(inputs) for name in "ab"]
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(layers.Add()(branches))))
    keep = np.array([[1, 0, 1, 0, 0, 0, 1, 1]], bool)
    images = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    features = run(graph, images, np.array([[0, 1]]), np.array([0]), keep)
    values = graph.run(tf.constant(images), [graph.layer_output(name) for name in "ab"])
    a, b = (values[graph.layer_output(name)].numpy() for name in "ab")
    expected = (a * keep[0, :4] + b * keep[0, 4:]).reshape(2, -1)
    np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-6)


@each_form
def test_a_factor_for_all_channels_of_a_position(run: Any) -> None:
    """A gate of one channel, as in spatial attention, serves whatever channels stay."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="a")(inputs)
    gate = layers.Conv2D(1, 3, padding="same", activation="sigmoid", name="gate")(x)
    x = layers.Conv2D(4, 3, name="b")(layers.Multiply()([x, gate]))
    graph = ModelGraph(keras.Model(inputs, layers.Flatten()(x)))
    keep = np.array([[1, 0, 1, 0, 0, 1, 0, 1, 1, 0]], bool)
    images = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    features = run(graph, images, np.array([[0, 1]]), np.array([0]), keep)
    a, gate, b = (graph.step(name).layer for name in ("a", "gate", "b"))
    x = a(images) * keep[0, :6]
    expected = np.reshape(b(x * gate(x)) * keep[0, 6:], (2, -1))
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "last",
    [
        [layers.Flatten(data_format="channels_first")],
        [layers.Flatten(), layers.LayerNormalization()],
        [layers.Flatten(), layers.Dense(5)],
    ],
    ids=["channels first", "normalised", "dense"],
)
@each_form
def test_what_no_removed_channel_reaches_runs_as_it_is(last: Any, run: Any) -> None:
    inputs = keras.Input((8, 8, 3))
    branches = [layers.Conv2D(4, 3, padding="same", name=name)(inputs) for name in "ab"]
    x = layers.Add(name="sum")(branches)
    for layer in last:
        x = type(layer).from_config(layer.get_config())(x)
    graph = ModelGraph(keras.Model(inputs, x))
    keep = np.array([[1, 0, 1, 0, 0, 0, 1, 1]], bool)
    images = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    a, b = (graph.step(name).layer(images) for name in "ab")
    expected = a * keep[0, :4] + b * keep[0, 4:]
    for step in graph.steps[3:]:
        expected = step.layer(expected)
    features = run(graph, images, np.array([[0, 1]]), np.array([0]), keep)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_used_twice_is_refused_when_it_is_to_be_pruned() -> None:
    inputs = keras.Input((8, 8, 3))
    shared = layers.Conv2D(3, 1, name="shared")
    graph = ModelGraph(keras.Model(inputs, shared(shared(inputs))))
    blocks = find_blocks(graph)
    assert [block.name for block in blocks] == ["shared@1", "shared@2"]
    with pytest.raises(ValueError, match="'shared' is used 2 times"):
        blocks[0].checked()


def test_what_comes_before_the_first_pruned_layer_is_computed_once() -> None:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="a")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(5, 3, name="b")(layers.MaxPooling2D(2)(x)))
    graph = ModelGraph(keras.Model(inputs, x))
    images = np.random.default_rng(0).normal(0, 1, (3, 8, 8, 3)).astype(np.float32)
    blocks = {block.name: block for block in find_blocks(graph)}
    for names, shape in ((["a", "b"], (3, 8, 8, 3)), (["b"], (3, 3, 3, 4)), ([], (3, 5))):
        body = CompactBody(graph, graph.output, [blocks[name] for name in names])
        loaded = body.load(images)
        assert loaded.shape == shape
        units = sum(blocks[name].units for name in names)
        plain = graph.run(tf.constant(images), [graph.output])[graph.output]
        kept = np.ones(units, bool)
        np.testing.assert_allclose(body(loaded, kept), plain, rtol=1e-5, atol=1e-5)
        assert body.load(images[:0]).shape == (0, *shape[1:])
        assert body(loaded[:0], kept).shape == (0, *plain.shape[1:])
