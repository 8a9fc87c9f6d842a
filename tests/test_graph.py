"""Models unrolled into layer calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import build_student

from keras_tl_defense._keras import keras
from keras_tl_defense.graph import ModelGraph

layers = keras.layers


def sequential() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, activation="relu"),
            keras.Sequential([layers.BatchNormalization(), layers.ReLU()]),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    )


def branched() -> Any:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", name="stem")(inputs)
    left = layers.Conv2D(4, 3, padding="same", name="left")(x)
    right = layers.DepthwiseConv2D(3, padding="same", name="right")(x)
    x = layers.Add(name="add")([left, right])
    x = layers.Concatenate(name="join")([x, inputs])
    x = x * 2.0 - 1.0
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def shared_layers() -> Any:
    """A Sequential Student on the layers of a Sequential Teacher, as many scripts make it."""
    teacher = sequential()
    return keras.Sequential([keras.Input((8, 8, 3)), *teacher.layers[:-1], layers.Dense(2)])


def augmented() -> Any:
    inputs = keras.Input((12, 12, 3))
    augment = keras.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)])
    return keras.Model(inputs, build_student()(augment(inputs)))


@pytest.mark.parametrize("build", [sequential, branched, shared_layers, augmented, build_student])
def test_the_unrolled_model_computes_the_same(build: Any) -> None:
    model = build()
    graph = ModelGraph(model)
    x = np.random.default_rng(0).uniform(0, 255, (5, *graph.input_shape)).astype(np.float32)
    values = graph.run(tf.constant(x), [graph.output])
    np.testing.assert_allclose(values[graph.output], model(x, training=False), rtol=1e-5, atol=1e-5)


def test_the_cut_follows_the_last_frozen_layer() -> None:
    graph = ModelGraph(build_student())
    cut = graph.find_cut()
    assert graph.steps[graph.producer[cut]].name == "dropout"


def test_the_cut_stays_before_a_trainable_batch_normalisation() -> None:
    model = build_student()
    model.get_layer("base").trainable = True
    for layer in model.get_layer("base").layers:
        layer.trainable = layer.name == "norm2"
    graph = ModelGraph(model)
    assert graph.steps[graph.producer[graph.find_cut()]].name == "conv2"


def test_the_cut_is_where_everything_passes() -> None:
    model = branched()
    for name in ("stem", "left"):
        model.get_layer(name).trainable = False
    with pytest.raises(ValueError, match=r"No layer of the model is frozen .*'right'"):
        ModelGraph(model).find_cut()
    model.get_layer("right").trainable = False
    graph = ModelGraph(model)
    assert graph.shapes[graph.find_cut()] == (None, 7)


def test_no_cut_where_nothing_or_everything_is_frozen() -> None:
    model = sequential()
    with pytest.raises(ValueError, match="No layer of the model is frozen"):
        ModelGraph(model).find_cut()
    model.trainable = False
    with pytest.raises(ValueError, match="Every layer of the model is frozen"):
        ModelGraph(model).find_cut()


def test_layers_that_share_a_name_are_called_by_their_model() -> None:
    inputs = keras.Input((8, 8, 3))
    inner = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(3, 1, name="conv")], name="one")
    x = layers.Conv2D(2, 1, name="conv")(inner(inputs))
    graph = ModelGraph(keras.Model(inputs, x))
    assert [step.name for step in graph.steps] == ["one/conv", "conv"]


def test_a_missing_layer_is_named_with_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"no layer called 'conv_1'.*Did you mean 'conv1'"):
        ModelGraph(build_student(), "teacher").layer_output("conv_1")


def test_models_that_cannot_be_unrolled() -> None:
    class Subclassed(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.dense(x)

    class Overridden(keras.Model):  # type: ignore[misc]
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return super().call(x) + 1

    inputs = keras.Input((8, 8, 3))
    with pytest.raises(ValueError, match=r"must be a Functional or Sequential model.*Subclassed"):
        ModelGraph(Subclassed())
    with pytest.raises(ValueError, match=r"must be a Functional or Sequential.*Overridden"):
        ModelGraph(Overridden(inputs, layers.Flatten()(inputs)))
    with pytest.raises(ValueError, match="without an input shape"):
        ModelGraph(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(ValueError, match="must have one input and one output"):
        ModelGraph(keras.Model([inputs, keras.Input((3,))], layers.Flatten()(inputs)))
    with pytest.raises(ValueError, match="must be a Keras model"):
        ModelGraph("student.keras")
