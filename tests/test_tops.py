"""Tops of differentiators against thinner networks, and their training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import find_blocks
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.ensemble.top_training import TopTrainer, _ridge
from keras_tl_defense.ensemble.tops import Arrays, OwnTop, own_blocks
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.ratios import rising_ratio

layers = keras.layers
RATIOS = {"a": 0.5, "b": 0.4, "fc": 0.6}


def frozen(filters: int = 5) -> Any:
    return layers.Conv2D(filters, 3, activation="relu", trainable=False, name="body")


def top_of(x: Any, a: int, b: int) -> Any:
    """Two blocks, a batch normalisation whose offset could revive channels, and a Dense layer."""
    x = layers.Conv2D(a, 3, padding="same", use_bias=False, name="a")(x)
    x = layers.BatchNormalization(name="a_norm")(x)
    x = layers.Activation("sigmoid", name="a_act")(x)
    x = layers.MaxPooling2D(2, name="a_pool")(x)
    x = layers.Conv2D(b, 2, strides=2, activation="relu", name="b")(x)
    x = layers.ZeroPadding2D(1, name="pad")(x)
    x = layers.BatchNormalization(name="late_norm")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.5, name="dropout")(x)
    return layers.Dense(7, activation="relu", name="fc")(x)


def student() -> Any:
    inputs = keras.Input((10, 10, 3))
    outputs = layers.Dense(4, name="head")(top_of(frozen()(inputs), a=8, b=6))
    return drawn(keras.Model(inputs, outputs))


def drawn(model: Any) -> Any:
    """The model with weights that leave no layer trivial."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        norm = isinstance(layer, layers.BatchNormalization)
        layer.set_weights(
            [
                rng.uniform(0.3, 1, w.shape) if norm else rng.normal(0, 0.3, w.shape)
                for w in layer.get_weights()
            ]
        )
    return model


def make_top(model: Any, ratios: dict[str, float], kind: type[OwnTop] = OwnTop) -> OwnTop:
    """The top from the cut to what the head takes."""
    graph = ModelGraph(model, role="student")
    return kind(graph, graph.find_cut(), graph.step("head").inputs[0], ratios)


def narrowed(top: OwnTop, seed: int = 0) -> tuple[Arrays, Arrays]:
    """The Student's weights gathered to filters that are drawn at random."""
    rng = np.random.default_rng(seed)
    weights, everything = top.start()
    kept = {
        name: np.sort(rng.permutation(everything[name])[:count])
        for name, count in top.kept_counts().items()
    }
    return top.narrow(weights, everything, kept), kept


def cut_values(top: OwnTop, rows: int = 3, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (rows, *top.cut_shape)).astype(np.float32)


def drawn_scores(top: OwnTop, seed: int = 2) -> Arrays:
    """Scores with ties, and units that never fire."""
    rng = np.random.default_rng(seed)
    return {b.name: rng.integers(0, 3, b.units).astype(np.float32) for b in top.blocks}


def optimizer(rate: float) -> Any:
    return keras.optimizers.serialize(keras.optimizers.Adam(rate))


def test_a_compact_top_equals_the_thinner_network() -> None:
    model = student()
    top = make_top(model, {"a": 0.5, "b": 0.4})
    weights, kept = narrowed(top)
    a, b = kept["a"], kept["b"]
    inputs = keras.Input(top.cut_shape)
    thin = keras.Model(inputs, top_of(inputs, a=4, b=4))
    full = {layer.name: layer.get_weights() for layer in model.layers}
    thin.get_layer("a").set_weights([full["a"][0][..., a]])
    thin.get_layer("a_norm").set_weights([w[a] for w in full["a_norm"]])
    thin.get_layer("b").set_weights([full["b"][0][:, :, a][..., b], full["b"][1][b]])
    thin.get_layer("late_norm").set_weights([w[b] for w in full["late_norm"]])
    kernel = full["fc"][0].reshape(4, 4, 6, 7)[:, :, b].reshape(-1, 7)
    thin.get_layer("fc").set_weights([kernel, full["fc"][1]])
    x = cut_values(top)
    expected = thin(x, training=False).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(top.run(x, weights, kept), expected, rtol=1e-4, atol=1e-5)


def branches(x: Any) -> Any:
    """Channels through a frozen layer, a depthwise convolution, a join and a sum, to the end."""
    x = layers.Conv2D(6, 3, padding="same", name="a")(x)
    x = layers.BatchNormalization(trainable=False, name="frozen_norm")(x)
    x = layers.ReLU(6.0, name="relu")(x)
    y = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same", name="deep")(x)
    y = layers.BatchNormalization(scale=False, name="deep_norm")(y)
    z = layers.Conv2D(6, 1, activation="tanh", name="b")(y)
    x = layers.Add(name="add")([x, z])
    x = layers.Conv2D(4, 3, padding="same", trainable=False, name="frozen_conv")(x)
    return layers.Concatenate(name="join")([y, x, z])


def signal(x: Any) -> Any:
    """One-dimensional convolutions and a Dense layer on their channels."""
    x = layers.Reshape((-1, 5), name="reshape")(x)
    x = layers.Conv1D(6, 3, dilation_rate=2, padding="causal", name="a")(x)
    x = layers.ELU(name="elu")(x)
    x = layers.Conv1D(5, 4, strides=2, padding="same", activation="tanh", name="b")(x)
    x = layers.Dense(4, name="dense")(x)
    return layers.GlobalAveragePooling1D(name="pool")(x)


@pytest.mark.parametrize("build", [branches, signal])
def test_a_compact_top_equals_the_masked_network(build: Callable[[Any], Any]) -> None:
    inputs = keras.Input((10, 10, 3))
    x = layers.Flatten(name="last")(build(frozen()(inputs)))
    model = drawn(keras.Model(inputs, layers.Dense(4, name="head")(x)))
    top = make_top(model, {"a": 0.5, "b": 0.4})
    weights, kept = narrowed(top)
    graph = ModelGraph(model)
    end = graph.step("head").inputs[0]
    blocks = [block for block in find_blocks(graph, before=end) if block.name in "ab"]
    mask = np.concatenate([np.isin(np.arange(b.units), kept[b.name]) for b in blocks])
    images = np.random.default_rng(2).normal(0, 1, (3, 10, 10, 3)).astype(np.float32)
    values = graph.run(images, [end])
    body = MaskedBody(graph, end, blocks)
    expected = body(values, np.arange(3)[None], np.array([0]), mask[None], lambda *_: 1.0)
    got = top.run(values[graph.find_cut()], weights, kept)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert got.shape[1] == top.features


def test_training_starts_at_the_student() -> None:
    model = student()
    top = make_top(model, dict.fromkeys(RATIOS, 0.0))
    x = np.random.default_rng(2).normal(0, 1, (6, 10, 10, 3)).astype(np.float32)
    at_cut = keras.Model(model.input, model.get_layer("body").output)(x).numpy()
    expected = keras.Model(model.input, model.get_layer("fc").output)(x).numpy()
    trainer = TopTrainer(top, optimizer(0.0), outputs=1, iterations=2, epochs=1, batch_size=4)
    targets = np.float32([[0], [1]] * 3)
    scores = drawn_scores(top)
    trained = trainer.fit(at_cut, targets, np.ones_like(targets), scores, np.random.default_rng(0))
    features = top.run(at_cut, trained.weights, trained.kept)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_every_round_leaves_exact_counts_and_the_most_active() -> None:
    top = make_top(student(), RATIOS)
    weights, kept = top.start()
    scores = drawn_scores(top)
    for number, (a, b, connections) in enumerate([(7, 6, 538), (6, 5, 404), (4, 4, 269)], 1):
        ratios = {name: rising_ratio(ratio, number, 3) for name, ratio in RATIOS.items()}
        before, (weights, kept) = kept, top.prune(ratios, scores, weights, kept)
        assert (len(kept["a"]), len(kept["b"])) == (a, b)
        score = np.abs(student().get_layer("fc").get_weights()[0]) * scores["fc"][:, None]
        stays = np.argsort(np.argsort(score, axis=None, kind="stable")) >= score.size - connections
        inputs = np.isin(np.arange(96) % 6, kept["b"])
        np.testing.assert_array_equal(weights["fc/kernel"] != 0, stays.reshape(score.shape)[inputs])
        assert {name: w.shape for name, w in weights.items()} == top.weight_shapes(ratios)
        for name, filters in kept.items():
            gone = np.setdiff1d(before[name], filters)
            assert set(filters) <= set(before[name])
            ranks = [(scores[name][f], f) for f in [*gone, *filters]]
            assert not len(gone) or max(ranks[: len(gone)]) < min(ranks[len(gone) :])


def test_connections_go_by_weight_and_activation() -> None:
    top = make_top(student(), {"fc": 0.3})
    weights, kept = top.start()
    activity = np.random.default_rng(0).uniform(0, 1, 96).astype(np.float32)
    activity[::3] = 0
    score = np.abs(weights["fc/kernel"]) * activity[:, None]
    order = np.argsort(score, axis=None, kind="stable")
    expected = weights["fc/kernel"].copy()
    expected.ravel()[order[: int(0.3 * score.size)]] = 0
    pruned, _ = top.prune({"fc": 0.3}, {"fc": activity}, weights, kept)
    np.testing.assert_array_equal(pruned["fc/kernel"], expected)
    np.testing.assert_array_equal(pruned["a/kernel"], weights["a/kernel"])


class CountingTop(OwnTop):
    """Counts how often Python runs it: in a graph, once for each trace."""

    runs = 0

    def run(self, *args: Any) -> Any:
        self.runs += 1
        return super().run(*args)


def problem(top: OwnTop, rows: int = 24, seed: int = 0) -> tuple[Any, ...]:
    """Values at the cut of two classes that differ, and what `fit` takes with them."""
    x = cut_values(top, rows, seed)
    half = np.arange(rows // 2)
    x[half, :4] += 0.5
    targets = np.zeros((rows, 2), np.float32)
    targets[half, 0] = targets[rows // 2 :, 1] = 1
    weights = np.where(targets == 1, 1.5, 0.5).astype(np.float32)
    return x, targets, weights, drawn_scores(top)


def fit(trainer: TopTrainer, *data: Any) -> Any:
    return trainer.fit(*data, np.random.default_rng(0))


def trainer_of(top: OwnTop) -> TopTrainer:
    return TopTrainer(top, optimizer(1e-2), outputs=2, iterations=2, epochs=4, batch_size=10)


def test_training_lowers_the_loss_and_prunes() -> None:
    model = student()
    before = [w.copy() for w in model.get_weights()]
    top = make_top(model, RATIOS)
    data = problem(top)
    trained = fit(trainer_of(top), *data)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert trained.loss.shape == trained.accuracy.shape == (8,)
    assert trained.loss[7] < 0.9 * trained.loss[4]
    assert 0.8 < trained.accuracy[7] <= 1
    assert 0 < np.count_nonzero(trained.weights["fc/kernel"]) <= 269  # of 672, 0.6 pruned
    untrained = top.narrow(top.start()[0], top.start()[1], trained.kept)
    for name, weight in trained.weights.items():
        assert weight.dtype == np.float32
        assert not np.array_equal(weight, untrained[name]), name
    sizes = [array.nbytes for array in [*trained.weights.values(), *trained.kept.values()]]
    assert top.bytes_per_differentiator == sum(sizes)


def test_a_trainer_serves_every_pair_without_a_new_trace() -> None:
    model = student()
    top = make_top(model, RATIOS, CountingTop)
    assert isinstance(top, CountingTop)
    trainer = trainer_of(top)
    fit(trainer, *problem(top, rows=17, seed=5))
    traces = top.runs
    again = fit(trainer, *problem(top))
    assert top.runs == traces == 4  # features and training, in two rounds
    fresh = fit(trainer_of(top), *problem(top))
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), again, fresh
    )


def test_members_run_in_an_exported_graph(tmp_path: Path) -> None:
    top = make_top(student(), {"a": 0.5, "b": 0.4})
    members = [narrowed(top, seed) for seed in range(3)]
    weights, kept = tf.nest.map_structure(lambda *arrays: np.stack(arrays), *members)
    module = tf.Module()
    module.stacks = [tf.Variable(stack) for stack in (*weights.values(), *kept.values())]
    stacks = iter(module.stacks)
    weights, kept = ({name: next(stacks) for name in part} for part in (weights, kept))
    shape = (None, *top.cut_shape)

    @tf.function(input_signature=[tf.TensorSpec(shape), tf.TensorSpec((None,), tf.int32)])
    def run(x: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
        return top.run_members(x, chosen, 2, weights, kept)

    module.run = run
    module.layers = [step.layer for step in top._layers.steps]
    tf.saved_model.save(module, str(tmp_path / "top"))
    loaded = tf.saved_model.load(str(tmp_path / "top"))
    x, chosen = cut_values(top, rows=8), np.int32([2, 0, 2, 1])
    expected = [top.run(x[2 * i : 2 * i + 2], *members[m]) for i, m in enumerate(chosen)]
    got = loaded.run(tf.constant(x), tf.constant(chosen))
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-4, atol=1e-5)
    assert loaded.run(tf.constant(x[:0]), tf.constant(chosen[:0])).shape == (0, top.features)


@pytest.mark.parametrize("rows", [8, 40])
def test_the_head_starts_at_the_weighted_ridge_regression(rows: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (rows, 20)).astype(np.float32)
    targets = rng.integers(0, 2, (rows, 2)).astype(np.float32)
    weights = rng.uniform(0.1, 2, (rows, 2)).astype(np.float32)
    kernel, bias = _ridge(x, targets, weights)
    for output in range(2):
        share = weights[:, output] / weights[:, output].sum()
        spread = np.cov(x.T, aweights=share, bias=True)
        ridge = spread + 0.1 * np.trace(spread) / rows * np.eye(20)
        mean = share @ x
        expected = np.linalg.solve(ridge, (x - mean).T @ (share * (2 * targets[:, output] - 1)))
        np.testing.assert_allclose(kernel[:, output], expected, rtol=1e-3, atol=1e-5)
        middle = share @ (x @ kernel[:, output] + bias[output])
        np.testing.assert_allclose(middle, share @ (2 * targets[:, output] - 1), atol=1e-4)


def ends(x: Any, *, layer: Any) -> Any:
    return layers.Dense(4, name="head")(layers.Flatten()(layer(x)))


def refused(layer: Any, message: str) -> None:
    inputs = keras.Input((10, 10, 3))
    model = keras.Model(inputs, ends(frozen(4)(inputs), layer=layer))
    with pytest.raises(ValueError, match=message) as error:
        make_top(model, {})
    assert 'tune="head"' in str(error.value)


def test_layers_that_cannot_be_owned_are_refused_by_name() -> None:
    refused(layers.SeparableConv2D(4, 3, name="odd"), "'odd' is a SeparableConv2D")
    refused(layers.LayerNormalization(name="odd"), "'odd' is a LayerNormalization")
    refused(layers.Conv2D(4, 3, groups=2, name="odd"), "'odd' convolves in 2 groups")
    refused(layers.BatchNormalization(axis=1, name="odd"), "'odd' does not normalise the last")
    twice = layers.Conv2D(4, 1, name="odd")
    refused(lambda x: twice(twice(x)), "'odd@1' is used 2 times")


def test_what_does_not_fit_is_refused() -> None:
    model = student()
    with pytest.raises(ValueError, match="Those are: a, b, fc"):
        make_top(model, {"body": 0.5})
    graph = ModelGraph(model)
    assert [block.name for block in own_blocks(graph, graph.find_cut(), graph.output)] == [
        *RATIOS,
        "head",
    ]
    inputs = keras.Input((10, 10, 5))
    x = layers.Add(name="around")([layers.Conv2D(5, 1, name="cut")(inputs), inputs])
    graph = ModelGraph(keras.Model(inputs, x))
    with pytest.raises(ValueError, match="'around' after the cut"):
        OwnTop(graph, graph.layer_output("cut"), graph.output, {})
    with pytest.raises(ValueError, match="Received: round=3, iterations=2"):
        rising_ratio(0.5, 3, 2)


def test_a_ratio_rises_in_decimal_steps() -> None:
    assert [float(rising_ratio(0.9, n, 3)) for n in (1, 2, 3)] == [0.3, 0.6, 0.9]
    assert float(rising_ratio(0.29, 7, 7)) == 0.29
