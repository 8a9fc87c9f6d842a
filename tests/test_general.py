"""General attacks, by adversarial-robustness-toolbox, with our inputs and results."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, once

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import GeneralAttack


def right(student: Any, images: Images, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Images that the Student answers rightly."""
    answered = student.predict(images.x_test.astype(np.float32), verbose=0).argmax(axis=1)
    chosen = np.flatnonzero(answered == images.y_test)[:: 60 // count][:count]
    return images.x_test[chosen], images.y_test[chosen]


def misled(student: Any, result: Any) -> float:
    """Share within budget that the Student takes for another class, or for the target."""
    answered = student.predict(result.adversarial.astype(np.float32), verbose=0).argmax(axis=1)
    return float(result.reached(answered).mean())


def test_iterative_beats_one_step_and_budgets_matter(student: Any, images: Images) -> None:
    x, y = right(student, images)
    rates = {
        (method, budget): misled(student, GeneralAttack(student, method, budget=budget)(x, y))
        for method, budget in (
            ("fgsm", 16), ("pgd", 2), ("pgd", 16), ("pgd", 100), ("eot-pgd", 100),
        )
    }  # fmt: skip
    assert rates["fgsm", 16] <= rates["pgd", 16], rates
    assert rates["pgd", 2] < rates["pgd", 100], rates
    assert min(rates["pgd", 100], rates["eot-pgd", 100]) >= 0.95, rates


@once
@pytest.mark.parametrize("method", ["fgsm", "pgd", "eot-pgd", "deepfool", "carlini-wagner"])
def test_results_are_measured_on_whole_pixels(method: Any, student: Any, images: Images) -> None:
    x, y = right(student, images)
    steps = None if method == "fgsm" else 10
    attack = GeneralAttack(student, method, steps=steps, batch_size=8)
    result = attack(x, y, verbose=0)
    assert result.adversarial.dtype == np.uint8
    change = (result.adversarial.astype(float) - x).reshape(len(x), -1)
    norm = np.inf if attack.norm == "linf" else 2
    np.testing.assert_array_equal(
        result.within_budget, np.linalg.norm(change, ord=norm, axis=1) <= attack.budget * (1 + 1e-6)
    )
    assert (result.dssim > 0).any()
    assert result.seconds > 0
    np.testing.assert_array_equal(
        attack(x, y, verbose=0).adversarial, result.adversarial
    )  # the seed decides


@once
@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_large_logits_hide_no_gradient(method: Any, student: Any, images: Images) -> None:
    """The same answers, a thousand times as sure."""
    x, y = right(student, images)
    sure = keras.models.clone_model(student)
    weights = student.get_weights()
    sure.set_weights([*weights[:-2], *(1000 * weight for weight in weights[-2:])])
    rates = [misled(s, GeneralAttack(s, method, budget=32)(x, y)) for s in (student, sure)]
    assert rates[1] >= rates[0] - 0.05 > 0.3


@once
@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_fractions_of_grey_levels_cost_no_success(
    method: Any, student: Any, images: Images
) -> None:
    """In budgets and in images, such as those that were resized."""
    x, y = right(student, images)
    x = np.clip(0.97 * x + 0.3, 0, 255.4)
    result = GeneralAttack(student, method, budget=64.7)(x, y, verbose=0)
    assert result.within_budget.all()
    assert np.abs(result.adversarial.astype(float) - x).max() <= 64.7
    assert misled(student, result) >= 0.5


@once
def test_the_seed_alone_decides_the_noise(student: Any, images: Images) -> None:
    x, y = right(student, images, 4)
    found = []
    for everywhere, seed in ((1, 0), (2, 0), (3, 5)):
        keras.utils.set_random_seed(everywhere)
        attack = GeneralAttack(student, "eot-pgd", steps=5, seed=seed)
        found += [attack(x, y, verbose=0).adversarial for _ in range(2)]
    for again in found[1:4]:
        np.testing.assert_array_equal(found[0], again)
    assert (found[0] != found[4]).any()


def test_a_gradient_that_breaks_on_the_way_is_told(student: Any, images: Images) -> None:
    x, y = right(student, images, 4)

    @tf.custom_gradient
    def breaking(inputs: tf.Tensor) -> Any:
        moved = tf.reduce_max(tf.abs(inputs - x.astype(np.float32)))
        return tf.identity(inputs), lambda above: above / tf.cast(moved < 3, tf.float32)

    attack = GeneralAttack(student, "pgd", preprocessing=breaking, steps=20)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite at step \d+, .* Check"):
        attack(x, y, verbose=0)


def test_a_broken_classifier_is_no_robust_one(student: Any, images: Images) -> None:
    broken = keras.models.clone_model(student)
    weights = student.get_weights()
    broken.set_weights([*weights[:-1], weights[-1] * np.nan])
    x, y = right(student, images, 4)
    for method in ("fgsm", "carlini-wagner", "hop-skip-jump"):
        with pytest.raises(FloatingPointError, match=r"NaN .* Check what"):
            GeneralAttack(broken, method)(x, y, verbose=0)


@once
def test_the_smallest_changes_are_found_by_gradients_and_by_questions(
    student: Any, images: Images
) -> None:
    x, y = right(student, images, 6)
    sizes = {}
    for method, steps in (("deepfool", 10), ("carlini-wagner", 30), ("hop-skip-jump", 15)):
        attack = GeneralAttack(student, method, budget=5000, steps=steps)
        result = attack(x, y, verbose=0)
        assert misled(student, result) >= 0.8, method
        sizes[method] = np.linalg.norm(
            (result.adversarial.astype(float) - x).reshape(len(x), -1), axis=1
        ).mean()
    assert sizes["carlini-wagner"] < 2.5 * sizes["deepfool"], sizes
    assert sizes["carlini-wagner"] < 2.5 * sizes["hop-skip-jump"], sizes
    assert max(sizes.values()) < 0.1 * 255 * np.sqrt(x[0].size), sizes


@once
def test_deepfool_looks_at_all_classes(images: Images) -> None:
    """More than the ten likeliest, as ART does by default: here the last is the nearest."""
    logits = keras.layers.Dense(12, name="many")
    inputs = keras.Input(images.x_test.shape[1:])
    scaled = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    student = keras.Model(inputs, logits(scaled))
    x = images.x_test[:5]
    kernel = np.random.default_rng(0).normal(size=logits.kernel.shape)
    kernel *= [0, *[1e-4] * 10, 1]  # hardly any change of an image brings the ten to the top
    last = (x.reshape(len(x), -1) / 255) @ kernel[:, 11]
    logits.set_weights([kernel, np.array([0, *[-1] * 10, -3 - last.max()])])
    before, after = (
        student.predict(part.astype(np.float32), verbose=0).argmax(axis=1)
        for part in (x, GeneralAttack(student, "deepfool", budget=5000)(x, verbose=0).adversarial)
    )
    assert not before.any()
    np.testing.assert_array_equal(after, 11)


@once
def test_who_may_ask_the_defence_finds_a_way(calibrated: Any, images: Images) -> None:
    """By gradients through it and by questions alone, towards a class."""
    student = calibrated.student
    x, y = right(student, images, 6)
    wanted = (y + 2) % CLASSES
    answered = calibrated.predict(images.x_test, verbose=0) - 1
    start = np.stack([images.x_test[answered == label][0] for label in wanted])
    for method, options in (
        ("pgd", {"budget": 200}),
        ("hop-skip-jump", {"budget": 5000, "steps": 5}),
    ):
        attack = GeneralAttack(calibrated, method, **options)
        given = {"x_start": start} if method == "hop-skip-jump" else {}
        result = attack(x, y, wanted, verbose=0, **given)
        answers = calibrated.predict(result.adversarial, verbose=0) - 1
        assert result.reached(answers).mean() >= 0.8, method
    apart = [
        np.linalg.norm((there.astype(float) - x).reshape(len(x), -1), axis=1)
        for there in (start, result.adversarial)
    ]
    assert np.median(apart[1]) < 0.8 * np.median(apart[0]), apart


@once
def test_questions_end_where_an_answer_is_taken_back(student: Any, images: Images) -> None:
    """Single images are answered as if they were black, after a start that was adversarial."""
    x, y = right(student, images, 2)

    def moody(inputs: tf.Tensor) -> tf.Tensor:
        return tf.cond(tf.shape(inputs)[0] == 1, lambda: 0 * inputs, lambda: inputs)

    black = student.predict(np.zeros_like(x[:1], np.float32), verbose=0).argmax()
    wanted = np.array([next(c for c in range(CLASSES) if c not in (black, own)) for own in y])
    start = np.stack([images.x_test[images.y_test == label][0] for label in wanted])
    attack = GeneralAttack(student, "hop-skip-jump", steps=2, preprocessing=moody)
    result = attack(x, y, wanted, x_start=start, verbose=0)
    assert result.adversarial.shape == x.shape


@once
def test_an_answer_that_is_taken_back_spoils_no_image(student: Any, images: Images) -> None:
    """The first image's answers are: it keeps what it had. The second ends as it does alone."""

    def classes(x: np.ndarray) -> np.ndarray:
        return np.asarray(student.predict(x.astype(np.float32), verbose=0).argmax(axis=1))

    black = classes(np.zeros_like(images.x_test[:1]))[0]
    x, _ = right(student, images, 2)
    start = np.empty_like(x)
    for number, mark in enumerate((255, 0)):
        x[number, 0] = mark
        others = images.x_test.copy()
        others[:, 0] = mark
        found = classes(others)
        start[number] = others[(found != black) & (found != classes(x)[number])][0]

    def moody(inputs: tf.Tensor) -> tf.Tensor:
        single = tf.shape(inputs)[0] == 1
        taken_back = single & (tf.reduce_mean(inputs[:, 0], axis=(1, 2)) > 127)
        return tf.where(taken_back[:, None, None, None], 0 * inputs, inputs)

    answered = classes(start)
    results = []
    for rows in ([0, 1], [1]):
        attack = GeneralAttack(student, "hop-skip-jump", steps=4, preprocessing=moody)
        result = attack(x[rows], None, answered[rows], x_start=start[rows], verbose=0)
        results.append(np.linalg.norm(result.adversarial[-1].astype(float) - x[1]))
        np.testing.assert_array_equal(classes(result.adversarial), answered[rows])
    assert 0 < results[0] < 1.5 * results[1] < 1.5 * np.linalg.norm(start[1].astype(float) - x[1])


def test_what_rounding_undoes_is_enlarged(student: Any, images: Images) -> None:
    """However small it is, by no more than it takes."""
    x, y = right(student, images, 6)
    attack = GeneralAttack(student, "deepfool")
    found = attack(x, y, verbose=0)
    assert found.reached(student.predict(found.adversarial, verbose=0).argmax(axis=1)).all()
    change = found.raw - x
    for times in (1 / 4, 1 / 30):
        raw, rounded = attack._rounded((x + times * change).astype(np.float32), x, None)
        assert (student.predict(rounded, verbose=0).argmax(axis=1) != y).all()
        assert np.abs(raw - x).max() < 6 * np.abs(change).max()


@once
def test_questions_without_a_target_begin_where_the_seed_says(student: Any, images: Images) -> None:
    x, y = right(student, images, 3)
    attack = GeneralAttack(student, "hop-skip-jump", budget=10_000, steps=2)
    first, again = (attack(x, y, verbose=0).adversarial for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (student.predict(first.astype(np.float32), verbose=0).argmax(axis=1) != y).any()
    other = GeneralAttack(student, "hop-skip-jump", budget=10_000, steps=2, seed=1)
    assert (other(x, y, verbose=0).adversarial != first).any()


@pytest.mark.parametrize("method", ["pgd", "carlini-wagner", "deepfool"])
def test_no_gradient_is_no_robustness(method: Any, student: Any, images: Images) -> None:
    x, y = right(student, images, 2)
    attack = GeneralAttack(student, method, preprocessing=tf.round, steps=2)
    with pytest.raises(ValueError, match="No gradient"):
        attack(x, y, verbose=0)


@once
def test_confidence_is_how_surely_another_class_is_answered(student: Any, images: Images) -> None:
    x, y = right(student, images, 8)
    leads = []
    for confidence in (0.0, 4.0):
        attack = GeneralAttack(student, "carlini-wagner", confidence=confidence, budget=5000)
        found = student.predict(attack(x, y, verbose=0).adversarial.astype(np.float32), verbose=0)
        left = found[np.arange(len(y)), y]
        found[np.arange(len(y)), y] = -np.inf
        leads.append(np.median(found.max(axis=1) - left))
    assert 0 < leads[0] < 2, leads
    assert leads[1] > 3.5, leads


@once
def test_on_a_teacher_its_own_classes_are_left(student: Any, images: Images) -> None:
    base = student.get_layer("base")
    x, y = right(student, images)
    y += base.output_shape[1]  # a Student may have more classes than its Teacher
    result = GeneralAttack(base, "pgd", budget=64)(x, y, verbose=0)
    given, taken = (
        base.predict(x.astype(np.float32), verbose=0).argmax(axis=1)
        for x in (result.source, result.adversarial)
    )
    assert (given != taken).mean() > 0.8
    np.testing.assert_array_equal(result.y_source, y)


def test_bad_arguments(
    student: Any, calibrated: Any, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = right(student, images, 2)
    with pytest.raises(ValueError, match="`method` must be one of"):
        GeneralAttack(student, "bim")
    with pytest.raises(ValueError, match="`budget` must be"):
        GeneralAttack(student, "pgd", budget=-1)
    with pytest.raises(ValueError, match='Only "carlini-wagner" takes a `confidence`'):
        GeneralAttack(student, "pgd", confidence=5)
    with pytest.raises(ValueError, match="`steps` must be"):
        GeneralAttack(student, "fgsm", steps=5)
    with pytest.raises(ValueError, match=r"Take .* with a defence"):
        GeneralAttack(calibrated, "deepfool")
    with pytest.raises(ValueError, match=r"scales its images itself\. Leave `preprocessing` out"):
        GeneralAttack(calibrated, "pgd", preprocessing=keras.layers.Rescaling(1 / 255))
    with pytest.raises(ValueError, match="`confidence` must be"):
        GeneralAttack(student, "carlini-wagner", confidence=-1)
    with pytest.raises(ValueError, match="Leave `x_start` out"):
        GeneralAttack(student, "pgd")(x, y, x_start=x)
    with pytest.raises(ValueError, match="Pass `y_target`"):
        GeneralAttack(calibrated, "pgd")(x, y)
    with pytest.raises(ValueError, match="takes no target"):
        GeneralAttack(student, "deepfool")(x, y, (y + 1) % CLASSES)
    with pytest.raises(ValueError, match="`x_start`"):
        GeneralAttack(student, "hop-skip-jump")(x, y, (y + 1) % CLASSES)
    with pytest.raises(ValueError, match="start from for each source"):
        GeneralAttack(student, "hop-skip-jump")(x, y, (y + 1) % CLASSES, x_start=x[:1])
    with pytest.raises(ValueError, match=r"in 0\.\.255"):
        GeneralAttack(student, "hop-skip-jump")(x, y, (y + 1) % CLASSES, x_start=x / 255)
    with pytest.raises(RuntimeError, match="Call `adapt` and `fit`"):
        GeneralAttack(ktd.DifferentiatorEnsemble(student, 0.5), "pgd")
    pool = keras.layers.GlobalAveragePooling1D()
    signals = keras.Sequential([keras.Input((64, 1)), pool, keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="must take images"):
        GeneralAttack(signals, "pgd")
    with pytest.raises(ValueError, match="another class than its source"):
        GeneralAttack(student, "pgd")(x, y, y)
    votes = ktd.DifferentiatorEnsemble(student, 0.5, head="pair", mode="vote")
    with pytest.raises(ValueError, match="have no gradient"):
        GeneralAttack(votes, "pgd")
    monkeypatch.setitem(sys.modules, "art.estimators.classification", None)
    with pytest.raises(ImportError, match="pip install adversarial-robustness-toolbox"):
        GeneralAttack(student, "eot-pgd")
