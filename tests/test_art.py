"""A defence under the attacks of adversarial-robustness-toolbox, and under gradients."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, build_student, fitted, once

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import GeneralAttack, as_art_estimator
from keras_tl_defense.attacks.defended import as_logits


@pytest.mark.parametrize("decision", ["score", "count"])
def test_the_estimator_answers_as_the_defence(
    decision: str, calibrated: Any, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "decision", decision)
    estimator = as_art_estimator(calibrated)
    rng = np.random.default_rng(0)
    x = images.x_test.astype(np.float32)
    x = np.concatenate([x, rng.uniform(0, 255, x[:40].shape).astype(np.float32)])
    expected = calibrated.predict(x, verbose=0)
    assert 0 < (expected == 0).sum() < len(expected)
    np.testing.assert_array_equal(estimator.predict(x).argmax(axis=1), expected)
    assert estimator.nb_classes == calibrated.classes + 1


def test_gradients_point_where_the_score_rises(calibrated: Any, images: Images) -> None:
    """The draw is fixed, as a step may draw other members."""
    members = tf.constant(calibrated.explain(images.x_test[:8], verbose=0)["members"])
    classes = tf.constant(images.y_test[:8])
    x = tf.constant(images.x_test[:8], tf.float32)

    def score(images: tf.Tensor) -> tf.Tensor:
        return calibrated.white_box(images, members, classes)["score"]

    with tf.GradientTape() as tape:
        tape.watch(x)
        before = score(x)
    gradient = tape.gradient(before, x)
    direction = gradient / tf.norm(tf.reshape(gradient, (8, -1)), axis=1)[:, None, None, None]
    risen = (score(x + 0.05 * direction) - score(x - 0.05 * direction)) / 0.1
    np.testing.assert_allclose(
        risen, tf.norm(tf.reshape(gradient, (8, -1)), axis=1), rtol=0.1, atol=1e-4
    )


@pytest.mark.parametrize("label", [None, 2, np.array([5, 0, 2, 5])])
def test_gradients_of_classes_are_those_of_each_output(
    label: Any, calibrated: Any, images: Images
) -> None:
    x = tf.constant(images.x_test[:4], tf.float32)
    for classifier in (calibrated, calibrated.student):
        estimator = as_art_estimator(classifier)
        every = []
        for one in range(estimator.nb_classes):
            with tf.GradientTape() as tape:
                tape.watch(x)
                output = estimator.model(x)[:, one]
            every.append(tape.gradient(output, x))
        expected = np.stack(every, axis=1)
        if label is not None:
            expected = expected[np.arange(4), np.broadcast_to(label, 4)][:, None]
        found = estimator.class_gradient(x.numpy(), label=label)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert np.abs(found).max() > 1e-3


def test_the_white_box_sees_what_explain_says(calibrated: Any, images: Images) -> None:
    details = calibrated.explain(images.x_test, verbose=0)
    found = calibrated.white_box(
        tf.constant(images.x_test), details["members"], details["student_class"]
    )
    for name in ("score", "margins"):
        np.testing.assert_allclose(found[name], details[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(np.argmax(found["logits"], axis=1), details["student_class"])


@once
def test_projected_gradient_descent_beats_one_step_and_rises_with_the_budget(
    student: Any, calibrated: Any, images: Images
) -> None:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent

    x, y = images.x_test[:30].astype(np.float32), (images.y_test[:30] + 2) % CLASSES
    for classifier, shift in ((student, 0), (calibrated, 1)):
        estimator = as_art_estimator(classifier)
        labels = np.eye(estimator.nb_classes)[y + shift]
        reached = {}
        for name, budget in (("once", 16), ("little", 2), ("much", 16), ("all", 128)):
            attack = (
                FastGradientMethod(estimator, eps=budget, targeted=True)
                if name == "once"
                else ProjectedGradientDescent(
                    estimator,
                    eps=budget,
                    eps_step=budget / 8,
                    max_iter=30,
                    targeted=True,
                    verbose=False,
                )
            )
            crafted = np.rint(attack.generate(x, labels))
            answered = estimator.predict(crafted).argmax(axis=1)
            reached[name] = np.mean(answered == y + shift)
        assert reached["once"] <= reached["much"], reached
        assert reached["little"] < reached["much"] <= reached["all"], reached
        assert reached["all"] > 0.9, reached


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_probabilities_of_half_precision_are_probabilities(dtype: Any) -> None:
    logits = tf.random.stateless_normal((200, 65), seed=(0, 0), stddev=4)
    halved = tf.cast(tf.nn.softmax(logits), dtype)
    assert np.abs(tf.cast(halved, tf.float32).numpy().sum(axis=1) - 1).max() > 1e-4
    found = as_logits(halved)
    assert (found.numpy().argmax(axis=1) == logits.numpy().argmax(axis=1)).mean() > 0.95
    np.testing.assert_allclose(tf.reduce_logsumexp(found, axis=1), 0, atol=0.02)
    np.testing.assert_array_equal(as_logits(logits), logits)


@once
def test_a_later_calibration_changes_nothing(calibrated: Any, images: Images) -> None:
    """Neither outputs nor what is rejected."""
    asked, x = calibrated.calibration.asked, images.x_test[:60]
    estimator = as_art_estimator(calibrated)
    outputs, answers = estimator.predict(x.astype(np.float32)), calibrated.predict(x, verbose=0)
    calibrated.calibrate(images.x_test, images.y_test, retention=0.5, verbose=0)
    try:
        assert (calibrated.predict(x, verbose=0) != answers).any()
        again = estimator.predict(x.astype(np.float32))
    finally:
        calibrated.calibrate(images.x_test, images.y_test, retention=asked, verbose=0)
    np.testing.assert_allclose(again, outputs, atol=1e-5)
    np.testing.assert_array_equal(again.argmax(axis=1), answers)


@once
def test_a_softmax_hides_nothing(student: Any, calibrated: Any, images: Images) -> None:
    """Of a Student that is very sure, and of its defence, beside the same ones with logits."""
    sure = build_student(softmax=True)
    weights = student.get_weights()
    sure.set_weights([*weights[:-2], *(8 * w for w in weights[-2:])])
    x, wanted = images.x_test[:20], (images.y_test[:20] + 2) % CLASSES
    defence = fitted(sure, images, {"conv*": 0.5})
    defence.calibrate(images.x_test, images.y_test, verbose=0)
    for hard, easy in ((sure, student), (defence, calibrated)):
        shift = int(hard is defence)
        reached = []
        for classifier in (hard, easy):
            result = GeneralAttack(classifier, "pgd", budget=32)(x, None, wanted, verbose=0)
            estimator = as_art_estimator(classifier)
            taken = estimator.predict(result.adversarial.astype(np.float32)).argmax(axis=1)
            reached.append(np.mean(taken == wanted + shift))
        assert reached[0] >= reached[1] - 0.15, reached


def test_without_art_the_command_is_told(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "art.estimators.classification", None)
    with pytest.raises(ImportError, match="pip install adversarial-robustness-toolbox"):
        as_art_estimator(student)


def test_what_is_no_classifier(student: Any) -> None:
    one = keras.Sequential([keras.Input((12, 12, 3)), keras.layers.Flatten()])
    one.add(keras.layers.Dense(1, activation="sigmoid"))
    with pytest.raises(ValueError, match=r"at least two classes.*shape \(None, 1\)"):
        as_art_estimator(one)
    two = keras.Model(student.inputs, [student.output, student.output])
    with pytest.raises(ValueError, match=r"one output.*shape \(None, \d+\) and"):
        as_art_estimator(two)
    with pytest.raises(ValueError, match="must be a Keras model"):
        as_art_estimator(student.predict)


def test_votes_have_no_gradient(student: Any) -> None:
    votes = ktd.DifferentiatorEnsemble(student, 0.5, head="pair", mode="vote")
    with pytest.raises(ValueError, match="have no gradient"):
        as_art_estimator(votes)
