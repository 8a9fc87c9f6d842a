"""What a user's own script may put around a defence, and into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, build_student, fitted, train

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

layers = keras.layers


def test_a_defence_inside_another_model(defence: Any, images: Images, tmp_path: Path) -> None:
    inputs = keras.Input((24, 24, 3))
    out = defence(layers.AveragePooling2D(2)(inputs))
    model = keras.Model(inputs, {name: out[name] for name in ("answer", "score")})
    large = images.x_test.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32)
    expected = defence.explain(images.x_test, verbose=0)
    model.save(tmp_path / "outer.keras")
    for outer in (model, keras.models.load_model(tmp_path / "outer.keras")):
        found = outer.predict(large, verbose=0)
        np.testing.assert_array_equal(found["answer"], expected["answer"])
        np.testing.assert_allclose(found["score"], expected["score"], atol=1e-4)


def test_mixed_precision(images: Images, tmp_path: Path) -> None:
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        keras.utils.set_random_seed(0)
        defence = fitted(train(build_student(), images), images, {"conv*": 0.5}, ensemble_size=3)
        rates = defence.evaluate(images.x_test, images.y_test, verbose=0)
        answers = defence.predict(images.x_test, verbose=0)
        defence.save(tmp_path / "mixed.keras")
        loaded = keras.models.load_model(tmp_path / "mixed.keras")
        np.testing.assert_array_equal(loaded.predict(images.x_test, verbose=0), answers)
        served = tf.saved_model.load(str(defence.export(tmp_path / "served")))
        found = served.signatures["serving_default"](tf.constant(images.x_test, tf.float32))
        assert np.mean(found["answer"] == answers) > 0.95  # bfloat16 rounds differently in a graph
        sources = (images.x_test[:8], images.y_test[:8])
        wanted = (images.y_test[:8] + 1) % CLASSES
        options = {"norm": "linf", "budget": 120, "steps": 40}
        for attack in (
            ktd.attacks.AdaptiveAttack(defence, **options),
            ktd.attacks.GeneralAttack(defence, "pgd", budget=120),
        ):
            result = attack(*sources, wanted, verbose=0)
            passed = result.reached(defence.predict(result.adversarial, verbose=0) - 1)
            assert passed.mean() >= 0.5, attack
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert rates["student_accuracy"].rate > 0.8
    assert rates["retention"].rate > 0.8


def test_a_student_without_frozen_layers(images: Images) -> None:
    student = build_student()
    student.get_layer("base").trainable = True
    student = train(student, images)
    with pytest.raises(ValueError, match="name the last of them with `cut=`"):
        ktd.DifferentiatorEnsemble(student, 0.5)
    defence = fitted(student, images, {"conv*": 0.5}, cut="flatten", ensemble_size=3)
    assert defence.evaluate(images.x_test, images.y_test, verbose=0)["retention"].rate > 0.8
    assert defence.left_alone() == {}


def test_channels_are_masked(student: Any, images: Images, tmp_path: Path) -> None:
    base = student.get_layer("base")
    activations = ktd.ClassActivations(student)
    activations.adapt(images.x_train.astype(np.float32), images.y_train, verbose=0)
    mask = ktd.ChannelMask.from_activations(activations, "conv1", (2, 3), 0.5)
    order = np.argsort(activations["conv1"][[2, 3]].max(axis=0), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(~mask.mask), np.sort(order[:4]))
    inputs = keras.Input(base.input_shape[1:])
    x = base.get_layer("conv1")(layers.Rescaling(1 / 127.5, offset=-1)(inputs))
    model = keras.Model(inputs, [x, mask(x)])
    model.save(tmp_path / "masked.keras")
    for one in (model, keras.models.load_model(tmp_path / "masked.keras")):
        whole, masked = one.predict(images.x_test.astype(np.float32), verbose=0)
        np.testing.assert_array_equal(masked, np.where(mask.mask, whole, 0))
        assert masked.any()


def test_masks_that_do_not_fit_are_refused(student: Any, images: Images) -> None:
    activations = ktd.ClassActivations(student)
    activations.adapt(images.x_train.astype(np.float32), images.y_train, verbose=0)
    with pytest.raises(ValueError, match="'fc1' is not a convolution of these activations"):
        ktd.ChannelMask.from_activations(activations, "fc1", (0, 1), 0.5)
    with pytest.raises(ValueError, match="must be booleans"):
        ktd.ChannelMask([0.5, 1.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"mask is one of 2 channels.*\(1, 3\)"):
        ktd.ChannelMask([True, False])(np.ones((1, 3), np.float32))


def test_layers_that_are_not_pruned_are_named(images: Images) -> None:
    """A gate by layers and one by operators, a depthwise convolution, a pattern that leaves out,
    and a layer that cannot be pruned.
    """
    inputs = keras.Input(images.x_train.shape[1:])
    x = layers.Conv2D(8, 3, activation="relu", name="conv1")(inputs)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(4, 1, activation="relu", name="squeeze")(gate)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="excite")(gate)
    x = layers.Multiply(name="scale")([x, gate])
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = x * (layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0))  # hard swish
    x = layers.Conv2D(6, 3, name="other")(x) + layers.Conv2D(6, 3, name="branch")(x)
    x = layers.EinsumDense("bhwc,cd->bhwd", (6, 6, 6), name="mixed")(x)
    x = layers.Flatten(name="flatten")(x)
    base = keras.Model(inputs, x, name="base")
    base.trainable = False
    student = keras.Sequential(
        [keras.Input(images.x_train.shape[1:]), base, layers.Dense(6, name="head")]
    )
    defence = ktd.DifferentiatorEnsemble(
        student, {"conv*": 0.5, "other": 0.5}, ensemble_size=2, seed=0
    )
    assert defence.left_alone() == {
        "squeeze": "a gate of 'scale'",
        "excite": "a gate of 'scale'",
        "depthwise": "depthwise: loses the channels that are pruned before it",
        "branch": "no ratio",
        "mixed": "not prunable: EinsumDense",
    }
    with pytest.raises(ValueError, match="'excite' matches no prunable layer"):
        ktd.DifferentiatorEnsemble(student, {"excite": 0.5})
    with pytest.raises(RuntimeError, match="No ratios are known yet"):
        ktd.DifferentiatorEnsemble(student).left_alone()
