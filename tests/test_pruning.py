"""Pruning by activation while a model trains: the schedule and the callback."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, SIZE, Images, build_student
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

layers = keras.layers


def build_model() -> Any:
    """Batch normalisation with and without a scale, a depthwise convolution, a concatenation."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 255, name="scaled")(inputs)
    x = layers.Conv2D(8, 3, activation="relu", name="conv1")(x)
    x = layers.Conv2D(10, 3, name="conv2")(x)
    x = layers.BatchNormalization(scale=False, name="norm2")(x)
    x = first = layers.ReLU(name="relu2")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = second = layers.BatchNormalization(name="norm3")(x)
    x = layers.SeparableConv2D(6, 1, name="conv4")(x)
    x = layers.Concatenate(name="both")([x, layers.Cropping2D(1)(first), second])
    x = layers.BatchNormalization(name="norm4")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(20, activation="relu", name="fc1")(x)
    return keras.Model(inputs, layers.Dense(CLASSES, name="head")(x), name="model")


SHORT = ktd.ActivationPruningSchedule(0.5, iterations=1)
# Whatever is pruned, these layers return 0 in the channels of its filters.
FOLLOWERS = {"conv1": ["conv1"], "conv2": ["relu2", "depthwise", "norm3"], "conv4": ["conv4"]}


def compiled(model: Any) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss)
    return model


def class_means(model: Any, images: Images, names: Any = None) -> ktd.ClassActivations:
    activations = ktd.ClassActivations(model, names)
    activations.adapt(images.x_train.astype(np.float32), images.y_train, verbose=0)
    return activations


def train(model: Any, images: Images, callbacks: list[Any], epochs: int = 2) -> Any:
    x = images.x_train.astype(np.float32)
    return model.fit(x, images.y_train, epochs=epochs, callbacks=callbacks, verbose=0)


def check_removed(model: Any, activations: Any, classes: Any, ratio: float, x: np.ndarray) -> None:
    """The least active filters are gone, wherever their channels go, and no others are."""
    copy = keras.models.clone_model(model)  # its layers are its own, in any case
    copy.set_weights(model.get_weights())
    names = [name for followers in FOLLOWERS.values() for name in followers]
    part = keras.Model(copy.inputs, [copy.get_layer(name).output for name in names])
    values = dict(zip(names, part(x[:20].astype(np.float32)), strict=True))
    for name, followers in FOLLOWERS.items():
        scores = activations[name][list(classes)].max(axis=0)
        gone = np.argsort(scores, kind="stable")[: math.floor(ratio * len(scores))]
        kept = np.setdiff1d(np.arange(len(scores)), gone)
        for follower in followers:
            alive = values[follower].numpy().any(axis=(0, 1, 2))
            assert not alive[gone].any()
            assert alive[kept].mean() >= 0.5  # some filters never fire


def oracle(step: int, ratio: float, iterations: int, every: int, begin: int) -> float:
    """The ratio that holds in a step, round by round."""
    found = 0.0
    for number in range(iterations):
        if step >= begin + number * every:
            found = ratio * (number + 1) / iterations
    return found


@settings(max_examples=30)
@given(
    ratio=st.floats(0, 0.99),
    iterations=st.integers(1, 7),
    every=st.integers(1, 9),
    begin=st.integers(1, 20),
)
def test_the_schedule_rises_in_equal_steps(
    ratio: float, iterations: int, every: int, begin: int
) -> None:
    made = ktd.ActivationPruningSchedule(ratio, iterations, every, begin)
    config = made.get_config()
    for schedule in (
        made,
        ktd.ActivationPruningSchedule.from_config(config),
        ktd.ActivationPruningSchedule.from_config(config["config"]),
        keras.utils.deserialize_keras_object(keras.utils.serialize_keras_object(made)),
    ):
        steps = np.arange(begin + iterations * every + 5)
        begins, ratios = schedule(tf.constant(steps))
        expected = [oracle(step, ratio, iterations, every, begin) for step in steps]
        np.testing.assert_allclose(ratios.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert np.flatnonzero(begins).tolist() == [begin + n * every for n in range(iterations)]


@settings(max_examples=30)
@given(
    percent=st.integers(0, 99),
    iterations=st.integers(1, 7),
    units=st.sampled_from([6, 24, 40, 97, 512, 25088 * 4096]),
)
def test_counts_are_exact(percent: int, iterations: int, units: int) -> None:
    schedule = ktd.ActivationPruningSchedule(percent / 100, iterations, steps_per_iteration=1)
    counts = schedule.pruned_count(tf.range(iterations + 1), units).numpy()
    expected = [units * percent * n // (100 * iterations) for n in range(iterations + 1)]
    assert counts.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": 1.0}, r"must be in \[0, 1\).*Received: ratio=1.0"),
        ({"ratio": -0.1}, "Received: ratio=-0.1"),
        ({"ratio": 0.5, "steps_per_iteration": 0}, "Received: steps_per_iteration=0"),
        ({"ratio": 0.5, "iterations": 0}, "Received: iterations=0"),
        ({"ratio": 0.5, "begin_step": 0}, "Received: begin_step=0"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ktd.ActivationPruningSchedule(**arguments)


def test_filters_are_gone_and_stay_gone(images: Images) -> None:
    model = compiled(build_model())
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=2, steps_per_iteration=3)
    pruning = ktd.ActivationPruning(activations, (1, 4), schedule)
    before = np.array(model.get_layer("conv1").kernel)
    train(model, images, [pruning])
    check_removed(model, activations, (1, 4), 0.5, images.x_test)
    for name in ("fc1", "head"):
        kernel = np.array(model.get_layer(name).kernel)
        assert np.sum(kernel == 0) == kernel.size // 2
        assert np.sum(~pruning.masks[name]["kernel"]) == kernel.size // 2
    kernel = np.array(model.get_layer("conv1").kernel)
    moved = kernel[..., kernel.any(axis=(0, 1, 2))] != before[..., kernel.any(axis=(0, 1, 2))]
    assert moved.all()  # what is left is trained


def test_it_prunes_by_activation_and_not_by_magnitude(images: Images) -> None:
    model = build_model()
    conv = model.get_layer("conv1")
    kernel, bias = (np.array(weight) for weight in conv.get_weights())
    bias[:4] = 50  # these fire most and have the smallest kernels
    kernel[..., :4] *= 0.01
    conv.set_weights([kernel, bias])
    activations = class_means(model, images, ["conv1"])
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=1)
    train(compiled(model), images, [ktd.ActivationPruning(activations, (0, 1), schedule)], epochs=1)
    assert np.array(conv.bias)[:4].all()
    assert not np.array(conv.bias)[4:].any()


def test_connections_are_pruned_by_activation_too(images: Images) -> None:
    """Of a Dense layer with equal weights, those of the least active inputs."""
    model = build_model()
    kernel, bias = model.get_layer("fc1").get_weights()
    model.get_layer("fc1").set_weights([np.full_like(kernel, 0.01), bias])
    activations = class_means(model, images, ["fc1"])
    scores = activations["fc1"][[0, 1]].max(axis=0)
    pruning = ktd.ActivationPruning(activations, (0, 1), SHORT)
    train(compiled(model), images, [pruning], epochs=1)
    gone = np.argsort(scores, kind="stable")[: len(scores) // 2]
    expected = np.ones(kernel.shape, bool)
    expected[gone] = False
    np.testing.assert_array_equal(pruning.masks["fc1"]["kernel"], expected)


def test_channels_that_nobody_prunes_stay(images: Images) -> None:
    """Of a concatenation, one branch is pruned, and the input is the other."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(4, 3, padding="same", name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(layers.Concatenate()([x, inputs]))
    model = keras.Model(inputs, layers.Dense(CLASSES)(layers.Flatten()(x)))
    pruning = ktd.ActivationPruning(class_means(model, images, ["conv"]), (0, 1), SHORT)
    train(compiled(model), images, [pruning], epochs=1)
    beta = pruning.masks["norm"]["beta"]
    np.testing.assert_array_equal(beta, [*pruning.masks["conv"]["bias"], True, True, True])
    assert beta.sum() == 5


@pytest.mark.parametrize("softmax", ["softmax", tf.nn.softmax, layers.Softmax(name="inner")])
def test_what_mixes_channels_is_refused(images: Images, softmax: Any) -> None:
    model, activations = between(images, layers.Activation(softmax, name="mixed"))
    with pytest.raises(ValueError, match=r"'mixed' \(Activation\) comes after a pruned"):
        train(model, images, [ktd.ActivationPruning(activations, (0, 1), SHORT)])
    with pytest.raises(ValueError, match="'ends' ends in a softmax"):
        between(images, layers.Conv2D(4, 1, activation=softmax, name="ends"))


def test_every_round_prunes_more(images: Images) -> None:
    class Watch(keras.callbacks.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.gone: list[int] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            kernel = np.array(self.model.get_layer("conv1").kernel)
            self.gone.append(int(np.sum(~kernel.any(axis=(0, 1, 2)))))

    model = compiled(build_model())
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.75, 3, steps_per_iteration=2, begin_step=2)
    pruning, watch = ktd.ActivationPruning(activations, (0, 1), schedule), Watch()
    train(model, images, [pruning, watch])
    assert watch.gone == [0, 2, 2, 4, 4, 6, 6, 6]


def test_it_can_be_used_twice_and_on_copies(images: Images) -> None:
    model = build_model()
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=2, steps_per_iteration=2)
    pruning = ktd.ActivationPruning(activations, (2, 3), schedule)
    for _ in range(2):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        train(compiled(copy), images, [pruning], epochs=1)
        check_removed(copy, activations, (2, 3), 0.5, images.x_test)
    assert np.array(model.get_layer("conv1").kernel).any(axis=(0, 1, 2)).all()


@pytest.mark.parametrize("together", [2, 3])
def test_several_steps_in_one_execution(images: Images, together: int) -> None:
    model = build_model()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, steps_per_execution=together)
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=2, steps_per_iteration=2)
    train(model, images, [ktd.ActivationPruning(activations, (2, 3), schedule)], epochs=1)
    check_removed(model, activations, (2, 3), 0.5, images.x_test)


def test_what_does_not_fit_is_refused(images: Images) -> None:
    model = compiled(build_model())
    activations = class_means(model, images)
    schedule = ktd.ActivationPruningSchedule(0.5)
    with pytest.raises(TypeError, match="must be an `ActivationPruningSchedule`"):
        ktd.ActivationPruning(activations, (0, 1), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in 0..5, the classes of the activations.*=6"):
        ktd.ActivationPruning(activations, (0, 6), schedule)
    with pytest.raises(ValueError, match="at least one class, as"):
        ktd.ActivationPruning(activations, (), schedule)
    with pytest.raises(TypeError, match=r"must be a `ClassActivations`.*Received: .*Functional"):
        ktd.ActivationPruning(model, (0, 1), schedule)
    with pytest.raises(TypeError, match=r"sequence of names.*Received: layers='conv1'"):
        ktd.ClassActivations(model, "conv1")
    with pytest.raises(RuntimeError, match=r"Call `adapt\(x_train, y_train\)` first"):
        ktd.ActivationPruning(ktd.ClassActivations(model), (0, 1), schedule)
    other = compiled(build_student())
    with pytest.raises(ValueError, match=r"another model: .*'conv4' has 6 units.*there is none"):
        train(other, images, [ktd.ActivationPruning(activations, (0, 1), schedule)])


def between(images: Images, *middle: Any) -> tuple[Any, Any]:
    """A model with some layers between a convolution and a softmax head; and its activations."""
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    for layer in middle:
        x = layer(x)
    x = layers.Dense(CLASSES, activation="softmax", name="head")(layers.Flatten()(x))
    model = keras.Model(inputs, x)
    model.compile("adam", "sparse_categorical_crossentropy")
    return model, class_means(model, images)


@pytest.mark.parametrize(
    ("middle", "makes"),
    [
        ([layers.Activation("sigmoid", name="after")], "0.5"),
        ([layers.Rescaling(1, offset=2, name="after")], "2"),
        ([layers.DepthwiseConv2D(1, activation="softplus", name="after")], "0.693"),
        ([layers.ReLU(), layers.Activation("sigmoid", name="after"), layers.ReLU()], "0.5"),
    ],
)
def test_what_makes_something_of_nothing_is_refused(
    images: Images, middle: list[Any], makes: str
) -> None:
    model, activations = between(images, *middle)
    pruning = ktd.ActivationPruning(activations, (0, 1), ktd.ActivationPruningSchedule(0.5))
    with pytest.raises(ValueError, match=f"'after' makes {makes}.*a channel that is 0"):
        train(model, images, [pruning])


def test_the_best_weights_are_pruned_too(images: Images) -> None:
    """`EarlyStopping` may bring back weights of an earlier round."""
    model, activations = between(images)
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=2, steps_per_iteration=4)
    stop = keras.callbacks.EarlyStopping(
        monitor="loss", mode="max", patience=1, restore_best_weights=True
    )
    pruning = ktd.ActivationPruning(activations, (0, 1), schedule)
    train(model, images, [stop, pruning], epochs=3)
    kernel = np.array(model.get_layer("conv").kernel)
    np.testing.assert_array_equal(kernel != 0, pruning.masks["conv"]["kernel"])


def test_an_added_number_is_refused_unless_a_product_takes_it_away(images: Images) -> None:
    pruned = {"activations": None, "classes": (0, 1), "schedule": SHORT}
    model, pruned["activations"] = between(images, lambda x: x + 1.0)
    with pytest.raises(ValueError, match="makes 1 of a channel that is 0"):
        train(model, images, [ktd.ActivationPruning(**pruned)])
    swish = lambda x: x * (layers.Activation("sigmoid", name="gate")(x) + 1.0)  # noqa: E731
    mask = ktd.ChannelMask([True, False, True, True])
    model, pruned["activations"] = between(images, swish, mask)
    train(model, images, [ktd.ActivationPruning(**pruned)], epochs=1)
    assert np.sum(np.array(model.get_layer("conv").kernel).any(axis=(0, 1, 2))) == 2


def test_layers_that_are_used_twice_are_refused(images: Images) -> None:
    norm, conv = layers.BatchNormalization(name="norm"), layers.Conv2D(4, 1, name="again")
    model, activations = between(images, norm, layers.Conv2D(4, 1, name="other"), norm)
    with pytest.raises(ValueError, match="'norm' is used more than once"):
        train(model, images, [ktd.ActivationPruning(activations, (0, 1), SHORT)])
    with pytest.raises(ValueError, match="'again' is used 2 times"):
        between(images, conv, conv)


def test_a_schedule_that_does_not_end_is_told(images: Images) -> None:
    model, activations = between(images)
    schedule = ktd.ActivationPruningSchedule(0.5, iterations=3, steps_per_iteration=100)
    with pytest.warns(UserWarning, match=r"after 4 steps, in round 1 of 3; the last .* step 201"):
        train(model, images, [ktd.ActivationPruning(activations, (0, 1), schedule)], epochs=1)
