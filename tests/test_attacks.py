"""The mimicry attack: what it does to a model, and what it never does."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, once
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import (
    AttackResult,
    MimicryAttack,
    best_layer,
    dssim,
    fingerprint_teacher,
    gini,
    plan_attacks,
)
from keras_tl_defense.datasets import synthetic
from keras_tl_defense.teachers import build_teacher, make_student


def reference_dssim(a: np.ndarray, b: np.ndarray) -> float:
    window = min(11, *a.shape[:2])
    similarity = structural_similarity(
        a.astype(float),
        b.astype(float),
        data_range=255,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        win_size=window,
        truncate=5 / 1.5,
    )
    return (1 - similarity) / 2


@given(st.integers(0, 1000), st.sampled_from([(32, 32), (20, 47), (11, 11)]))
@settings(max_examples=15, deadline=None)
def test_dssim_is_that_of_scikit_image(seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (*size, 3))
    b = np.clip(a + rng.normal(0, rng.uniform(0, 80), a.shape), 0, 255).astype(int)
    got = dssim(tf.constant(a[None], tf.float32), tf.constant(b[None], tf.float32))
    assert float(got[0]) == pytest.approx(reference_dssim(a, b), abs=1e-5)


def test_dssim_of_small_images_takes_the_window_that_fits() -> None:
    a = np.random.default_rng(0).integers(0, 256, (1, 7, 9, 3))
    assert float(dssim(tf.constant(a, tf.float32), tf.constant(a, tf.float32))[0]) == 0
    assert 0 < float(dssim(tf.constant(a, tf.float32), tf.constant(255.0 - a, tf.float32))[0]) <= 1


@given(st.integers(0, 1000), st.sampled_from([(176, 176), (201, 190)]))
@settings(max_examples=6, deadline=None)
def test_dssim_of_large_images_is_tensorflows_of_five_scales(
    seed: int, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 256, (2, *size, 3)).astype(np.float32)
    b = np.clip(a + rng.normal(0, rng.uniform(0, 80), a.shape), 0, 255).astype(np.float32)
    expected = (1 - tf.image.ssim_multiscale(a, b, 255)) / 2
    np.testing.assert_allclose(dssim(tf.constant(a), tf.constant(b)), expected, atol=1e-5)


def test_dssim_of_opposites_has_a_gradient() -> None:
    a = tf.constant(np.random.default_rng(0).integers(0, 256, (1, 176, 176, 3)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(a)
        value = dssim(a, 255 - a)
    assert 0.4 < float(value[0]) <= 1
    assert np.isfinite(tape.gradient(value, a)).all()


class Trained:
    """A Teacher of drawn shapes, a Student of drawn signs, and images to attack."""

    def __init__(self) -> None:
        keras.utils.set_random_seed(0)
        shapes = synthetic.load_shapes(train_per_class=40, test_per_class=1, size=24)
        self.teacher = build_teacher((24, 24, 3), shapes.classes, widths=(12, 24))
        self.teacher.compile(
            optimizer=keras.optimizers.Adam(1e-3),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        x = shapes.x_train.astype(np.float32)
        self.teacher.fit(x, shapes.y_train, epochs=6, batch_size=64, verbose=0)
        signs = synthetic.load_signs(train_per_class=40, test_per_class=15, size=24)
        self.student = make_student(
            self.teacher, "fc1", signs.x_train, signs.y_train, signs.classes, verbose=0
        )
        self.x, self.y = signs.x_test, signs.y_test
        answered = self.classes(self.x)
        assert (answered == self.y).mean() > 0.3
        self.plan = plan_attacks(self.y, answered, 24, seed=0)

    def classes(self, x: np.ndarray) -> np.ndarray:
        return self.student.predict(x.astype(np.float32), verbose=0).argmax(axis=1)

    def attack(self, **options: Any) -> Any:
        """Targeted attacks on the planned images."""
        plan = self.plan
        return MimicryAttack(self.teacher, "fc1", **{"steps": 200, **options})(
            self.x[plan.sources],
            self.x[plan.targets],
            self.y[plan.sources],
            self.y[plan.targets],
            verbose=0,
        )


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


@once
def test_success_rises_with_the_budget_until_hardly_anything_resists(trained: Trained) -> None:
    misled, reached, distance = [], [], []
    for budget in (1e-4, 0.01, 1.0):
        result = trained.attack(budget=budget, steps=500)
        answered = trained.classes(result.adversarial)
        assert result.within_budget.all()
        misled.append((answered != result.y_source).mean())
        reached.append(result.reached(answered).mean())
        distance.append(result.distance.mean())
    assert misled[0] < misled[2]
    assert misled[2] >= 0.8
    assert reached[0] < reached[1] < reached[2]
    assert distance[0] > distance[1] > distance[2]


def test_the_answer_is_whole_pixels_within_budget_and_honestly_measured(trained: Trained) -> None:
    result = trained.attack(budget=0.005)
    assert result.adversarial.dtype == np.uint8
    probe = keras.Model(trained.teacher.inputs[0], trained.teacher.get_layer("fc1").output)
    features = [
        probe.predict(images.astype(np.float32), verbose=0)
        for images in (result.adversarial, result.target)
    ]
    np.testing.assert_allclose(
        result.distance, np.linalg.norm(features[0] - features[1], axis=1), rtol=1e-3
    )
    for source, crafted, value in zip(result.source, result.adversarial, result.dssim, strict=True):
        assert value == pytest.approx(reference_dssim(source, crafted), abs=1e-5)
        assert value <= 0.005
    assert (result.adversarial != result.source).any(axis=(1, 2, 3)).all()


@once
def test_more_steps_and_any_batch_size_do_no_harm(trained: Trained) -> None:
    short, long = trained.attack(steps=20), trained.attack(steps=200)
    assert long.distance.mean() < short.distance.mean()
    small = trained.attack(steps=20, batch_size=7)
    np.testing.assert_allclose(small.distance.mean(), short.distance.mean(), rtol=0.02)


@once
@pytest.mark.parametrize(("norm", "budgets"), [("linf", (1, 8, 200)), ("l2", (20, 300, 1e4))])
def test_other_norms(trained: Trained, norm: str, budgets: tuple[float, ...]) -> None:
    misled, reached, distance = [], [], []
    for budget in budgets:
        result = trained.attack(norm=norm, budget=budget, steps=300)
        change = np.abs(result.adversarial.astype(float) - result.source).reshape(24, -1)
        size = change.max(axis=1) if norm == "linf" else np.linalg.norm(change, axis=1)
        np.testing.assert_array_equal(result.within_budget, size <= budget * (1 + 1e-6))
        assert result.within_budget.mean() > 0.9
        answered = trained.classes(result.adversarial)
        misled.append((answered != result.y_source).mean())
        reached.append(result.reached(answered).mean())
        distance.append(result.distance.mean())
    assert distance[0] > distance[1] > distance[2]
    assert misled[0] < misled[2]
    assert misled[2] >= 0.8
    assert reached[0] < reached[2]


@once
def test_restarts_keep_the_best_of_all_tries(trained: Trained) -> None:
    single, more = trained.attack(steps=100), trained.attack(steps=100, restarts=2)
    assert (more.distance <= single.distance * (1 + 1e-4)).all()
    assert (more.distance < single.distance * 0.999).any()
    again = trained.attack(steps=100, restarts=2, batch_size=7)
    np.testing.assert_allclose(again.distance.mean(), more.distance.mean(), rtol=0.02)
    assert (more.gradients, single.gradients) == (300, 100)
    assert more.seconds > single.seconds > 0


@once
def test_restarts_under_a_largest_change_begin_apart(trained: Trained) -> None:
    """Further from the source than a step alone moves them."""
    result = trained.attack(norm="linf", budget=8, steps=1, restarts=1, learning_rate=1e-3)
    change = np.abs(result.adversarial.astype(int) - result.source).reshape(24, -1)
    assert change.max() > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"within_budget": np.full(3, 8)}, "a boolean for each crafted input"),
        ({"within_budget": np.ones((3, 1), bool)}, "a boolean for each crafted input"),
        ({"y_source": np.zeros((3, 1), int)}, "`y_source` must be a class for each"),
        ({"y_target": np.zeros(2, int)}, "`y_target` must be a class for each"),
    ],
)
def test_results_of_ones_own_are_checked(options: dict[str, Any], message: str) -> None:
    given = {"within_budget": np.ones(3, bool), **options}
    with pytest.raises(ValueError, match=message):
        AttackResult(np.zeros((3, 8, 8, 3), np.uint8), **given)


def test_results_of_ones_own_may_be_lists() -> None:
    result = AttackResult(np.zeros((2, 8, 8, 3), np.uint8), [True, False], y_source=[1, 2])
    assert "1 within budget" in repr(result)
    assert result.reached(np.array([0, 0])).tolist() == [True, False]


def test_raw_images_are_what_was_rounded(trained: Trained) -> None:
    result = trained.attack(steps=40)
    np.testing.assert_array_equal(np.rint(np.clip(result.raw, 0, 255)), result.adversarial)
    assert (result.raw != result.adversarial).any()


@once
def test_best_layer_is_the_students_cut(trained: Trained) -> None:
    plan = trained.plan
    images = [trained.x[chosen] for chosen in (plan.sources, plan.targets)]
    classes = [trained.y[chosen] for chosen in (plan.sources, plan.targets)]
    predict = partial(trained.student.predict, verbose=0)
    options = {"steps": 150, "budget": 0.02, "verbose": 0}
    layers = ["conv1_1", "fc1", "logits"]
    choice = best_layer(trained.teacher, layers, predict, *images, *classes, **options)
    assert choice.layer == "fc1"
    assert choice.table["layer"].tolist() == layers
    assert (choice.table["n"] == 24).all()
    with pytest.raises(ValueError, match="Give a list of names of layers"):
        best_layer(trained.teacher, [], predict, *images, *classes)
    with pytest.warns(UserWarning, match="No attack reached its target"):
        best_layer(
            trained.teacher,
            ["conv1_1"],
            predict,
            *images,
            *classes,
            steps=1,
            budget=1e-4,
            verbose=0,
        )
    with pytest.raises(ValueError, match=r"a row for each image.*\(1,\)"):
        best_layer(
            trained.teacher, ["fc1"], lambda x: predict(x).argmax(1), *images, *classes, steps=1,
            verbose=0,
        )  # fmt: skip
    smaller = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(4)]
    )
    with pytest.raises(ValueError, match=r"does not take images of the Teacher\. Resize"):
        best_layer(trained.teacher, ["fc1"], smaller.predict, *images, *classes, steps=1)
    with pytest.raises(ValueError, match=r"Labels must be in 0\.\..*y_target from"):
        best_layer(trained.teacher, ["fc1"], predict, *images, classes[0], classes[1] + 99)


def test_the_teacher_is_found_by_its_silence(trained: Trained) -> None:
    keras.utils.set_random_seed(5)
    other = build_teacher((24, 24, 3), 10, widths=(12, 24))
    shapes = synthetic.load_shapes(train_per_class=20, test_per_class=1, size=24, seed=4)
    taught = build_teacher((24, 24, 3), shapes.classes, widths=(12, 24))
    taught.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    taught.fit(shapes.x_train.astype(np.float32), shapes.y_train, epochs=4, verbose=0)
    blackened = keras.Sequential(
        [
            keras.Input((24, 24, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="fc1"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )  # without biases, so black silences it
    teachers = {
        "blackened": blackened, "untrained": other, "another": taught,
        "the Teacher": trained.teacher,
    }  # fmt: skip

    def predict(x: np.ndarray) -> np.ndarray:
        return tf.nn.softmax(trained.student.predict(x.astype(np.float32), verbose=0)).numpy()

    table = fingerprint_teacher(
        predict, teachers, layers=dict.fromkeys(teachers, "fc1"), images=4, steps=300, verbose=0
    )
    assert table["teacher"][0] == "the Teacher"
    assert table["relative"][0] < 0.5 * table["relative"][1]
    spread = table.set_index("teacher")["spread"]
    assert spread["the Teacher"] < 0.5 * spread["another"]
    assert table["features"][0] < 0.1
    with pytest.raises(ValueError, match="must return probabilities"):
        fingerprint_teacher(
            lambda x: trained.student.predict(x.astype(np.float32), verbose=0),
            {"one": other}, steps=1, images=2, verbose=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="at least one candidate"):
        fingerprint_teacher(predict, {})
    with pytest.raises(TypeError, match="must be a dictionary"):
        fingerprint_teacher(predict, {"own": other}, preprocessing=keras.layers.Rescaling(1.0))
    with pytest.raises(ValueError, match="by the names of candidates"):
        fingerprint_teacher(predict, {"own": other}, layers={"ours": "fc1"})
    tall = keras.Sequential(
        [keras.Input((20, 9, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    )
    with pytest.raises(ValueError, match="does not take images of the candidate 'tall'"):
        fingerprint_teacher(predict, {"tall": tall}, images=2, steps=2)


@given(st.integers(2, 12), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_gini_is_the_mean_difference(count: int, seed: int) -> None:
    row = np.random.default_rng(seed).dirichlet(np.full(count, 0.3))
    expected = np.abs(row[:, None] - row).mean() / (2 * row.mean())
    assert gini(row[None])[0] == pytest.approx(expected, abs=1e-12)


@once
def test_untargeted_takes_the_candidate_that_is_imitated_best(trained: Trained) -> None:
    plan = trained.plan
    attack = MimicryAttack(trained.teacher, "fc1", steps=150)
    candidates = trained.x[plan.candidates]
    result = attack.untargeted(
        trained.x[plan.sources], candidates, trained.y[plan.sources], verbose=0
    )
    assert result.y_target is None
    assert not result.targeted
    resized = candidates[:1] * 0.999
    assert attack.untargeted(trained.x[:1], resized, verbose=0).target.dtype == np.uint8
    for target, choice in zip(result.target, candidates, strict=True):
        assert (choice == target).all(axis=(1, 2, 3)).any()
    targeted = trained.attack(steps=150)
    probe = keras.Model(trained.teacher.inputs[0], trained.teacher.get_layer("fc1").output)
    relative = [
        r.distance / np.linalg.norm(probe.predict(r.target.astype(np.float32), verbose=0), axis=1)
        for r in (result, targeted)
    ]
    assert relative[0].mean() < relative[1].mean()
    success = result.reached(trained.classes(result.adversarial)).mean()
    assert success >= targeted.reached(trained.classes(targeted.adversarial)).mean()


def test_likest_are_the_nearest_of_other_classes(student: Any, images: Images) -> None:
    attack = MimicryAttack(student, "base")
    x, y = images.x_test[::7], images.y_test[::7]
    chosen = attack.likest(x, y, images.x_train, images.y_train, count=3)
    own, pool = (
        student.get_layer("base").predict(a.astype(np.float32), verbose=0).reshape(len(a), -1)
        for a in (x, images.x_train)
    )
    for number, row in enumerate(chosen):
        relative = np.linalg.norm(own[number] - pool, axis=1) / np.linalg.norm(pool, axis=1)
        best = {
            label: relative[images.y_train == label].min()
            for label in range(CLASSES)
            if label != y[number]
        }
        np.testing.assert_allclose(relative[row], sorted(best.values())[:3], rtol=1e-3)
        assert len({*images.y_train[row], y[number]}) == 4
    assert attack.likest(x, y, images.x_train, images.y_train, count=50).shape[1] == CLASSES - 1
    with pytest.raises(ValueError, match="of another class than their sources"):
        attack.likest(x[:1], y[:1], x[:1], y[:1])


def test_any_layer_of_sequential_and_nested_teachers(student: Any, images: Images) -> None:
    """The Student itself serves as a Teacher, its layers nested in it."""
    base = student.get_layer("base")
    flat = keras.Sequential([keras.Input(base.inputs[0].shape[1:]), *base.layers[1:]])
    source, target = images.x_test[:4], images.x_test[30:34]
    for layer in ("conv1", "relu2", "fc1"):
        part = keras.Model(base.inputs, base.get_layer(layer).output)
        before, wanted = (part.predict(x.astype(np.float32), verbose=0) for x in (source, target))
        apart = np.linalg.norm((before - wanted).reshape(4, -1), axis=1)
        results = [
            MimicryAttack(teacher, layer, steps=20, budget=0.2)(source, target, verbose=0).distance
            for teacher in (student, base, flat)
        ]
        assert (results[0] < apart).all()
        np.testing.assert_allclose(results[0], results[1], rtol=1e-3)
        np.testing.assert_allclose(results[0], results[2], rtol=1e-3)


def test_preprocessing_is_the_teachers_own(student: Any, images: Images) -> None:
    inputs = keras.Input(images.x_test.shape[1:])
    scaled = keras.Model(inputs, student.get_layer("base")(keras.layers.Rescaling(255.0)(inputs)))
    source, target = images.x_test[:3], images.x_test[30:33]
    plain = MimicryAttack(student, "fc1", steps=20)(source, target, verbose=0)
    given = MimicryAttack(scaled, "fc1", steps=20, preprocessing=lambda x: x / 255)
    np.testing.assert_allclose(given(source, target, verbose=0).distance, plain.distance, rtol=1e-2)


@once
def test_a_source_equal_to_its_target_is_no_trouble(student: Any, images: Images) -> None:
    x = images.x_test[:2]
    result = MimicryAttack(student, "fc1", steps=20)(x, x, verbose=0)
    assert np.isfinite(result.distance).all()
    assert (result.distance < 1e-3).all()


@once
def test_overshooting_and_fractions_do_no_harm(student: Any, images: Images) -> None:
    """Resized images have both."""
    source = images.x_test[:4].astype(np.float32) + 0.3
    source[:, 0, 0, 0] = 255.4
    source[:, 0, 1, 0] = -0.4
    for norm, budget in (("linf", 8.4), ("dssim", 0.2)):
        attack = MimicryAttack(student, "fc1", norm=norm, budget=budget, steps=40)
        result = attack(source, images.x_test[30:34], verbose=0)
        assert result.within_budget.all()
        if norm == "linf":
            assert np.abs(result.adversarial.astype(float) - source).max() <= 8.4 + 0.5


@once
def test_black_and_white_can_be_changed(student: Any, images: Images) -> None:
    source = np.where(images.x_test[:6] > 127, 255, 0).astype(np.uint8)
    attack = MimicryAttack(student, "fc1", norm="linf", budget=8, steps=300, optimizer="adam")
    result = attack(source, images.x_test[30:36], verbose=0)
    change = np.abs(result.adversarial.astype(int) - source)
    assert change.max() <= 8
    assert (change > 0).mean() > 0.3


@once
def test_each_image_finds_its_own_penalty(trained: Trained) -> None:
    """With a thousandth of the usual weight all images would stay where they began."""
    usual, cheap = trained.attack(budget=0.01), trained.attack(budget=0.01, penalty=1e3)
    assert cheap.within_budget.all()
    assert cheap.distance.mean() < 1.3 * usual.distance.mean()


@once
def test_what_never_gets_within_budget_is_reported_and_not_replaced(trained: Trained) -> None:
    result = trained.attack(budget=1e-6, penalty=1.0, steps=30)
    assert not result.within_budget.any()
    assert (result.adversarial != result.source).any(axis=(1, 2, 3)).all()
    assert (result.dssim > 1e-6).all()
    assert np.isfinite(result.distance).all()
    assert not result.reached(result.y_target).any()


def test_a_teacher_of_any_size() -> None:
    inputs = keras.Input((None, None, 3))
    conv = keras.layers.Conv2D(4, 3, name="conv")(inputs)
    teacher = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(conv))
    attack = MimicryAttack(teacher, "pool", steps=12, budget=0.3)
    rng = np.random.default_rng(0)
    for size in (16, 9, 16):
        source, target = rng.integers(0, 256, (2, 2, size, size, 3))
        result = attack(source, target, verbose=0)
        assert result.adversarial.shape == (2, size, size, 3)
        assert result.within_budget.all()


def test_a_result_counts_what_missed_its_budget_as_a_failure(trained: Trained) -> None:
    result = trained.attack(steps=10)
    broken = type(result)(**{**vars(result), "within_budget": np.zeros(24, bool)})
    assert not broken.reached(broken.y_target).any()
    free = type(result)(**{**vars(result), "y_target": None})
    assert not free.reached(np.full(24, -1)).any()  # of a defence: rejected
    with pytest.raises(ValueError, match="one class for each crafted input"):
        result.reached(result.y_target[:, None])
    with pytest.raises(TypeError, match="must be integers"):
        result.reached(result.y_target.astype(float))
    assert result.reached(result.y_target).all()
    assert not result.reached(result.y_source).any()


def test_plan_attacks() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 8, 200)
    answered = np.where(rng.random(200) < 0.7, y, (y + 1) % 8)
    plan = plan_attacks(y, answered, 50, seed=3)
    assert len(set(plan.sources)) == 50
    assert (answered[plan.sources] == y[plan.sources]).all()
    assert (answered[plan.candidates] == y[plan.candidates]).all()
    for source, targets in zip(plan.sources, plan.candidates, strict=True):
        assert len({y[source], *y[targets]}) == 6
    np.testing.assert_array_equal(plan.targets, plan.candidates[:, 0])
    np.testing.assert_array_equal(plan.sources, plan_attacks(y, answered, 50, seed=3).sources)
    assert len(plan_attacks(y, answered, 999).sources) == (answered == y).sum()
    with pytest.raises(ValueError, match="`count` must be an integer of at least 1"):
        plan_attacks(y, answered, 0)
    with pytest.raises(ValueError, match="at least two classes"):
        plan_attacks(y, np.full(200, 3), 5)
    with pytest.raises(ValueError, match=r"y\.shape=\(200,\), student_class\.shape=\(199,\)"):
        plan_attacks(y, answered[1:], 5)


class TestBadInput:
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("budget", 0),
            ("budget", float("nan")),
            ("steps", 0),
            ("seed", -1),
            ("steps", 1.5),
            ("batch_size", 0),
            ("learning_rate", 0),
            ("penalty", float("inf")),
            ("restarts", -1),
            ("norm", "l1"),
        ],
    )
    def test_options(self, student: Any, option: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"`{option}`.*Received: {option}="):
            MimicryAttack(student, "fc1", **{option: value})

    def test_layers_and_images(self, student: Any, images: Images) -> None:
        with pytest.raises(ValueError, match=r"The teacher has no layer called 'block5_pool'"):
            MimicryAttack(student, "block5_pool")
        attack = MimicryAttack(student, "fc1", steps=1)
        x = images.x_test[:3]
        with pytest.raises(ValueError, match=r"shape \(n, 12, 12, 3\).*Received: x_target.shape"):
            attack(x, x[:, :8, :8])
        with pytest.raises(ValueError, match="as many in `x_target` as in `x_source`"):
            attack(x, x[:2])
        with pytest.raises(ValueError, match=r"in 0..255.*Received: x_source from"):
            attack(x / 255, x)
        with pytest.raises(ValueError, match=r"NaN or infinity.*Received: x_target\[0\]"):
            attack(x, np.full(x.shape, np.nan))
        with pytest.raises(ValueError, match=r"one label for each.*Received: y_source.shape"):
            attack(x, x, np.zeros(2, int), np.zeros(3, int))
        with pytest.raises(ValueError, match="`untargeted`"):
            attack(x, x, np.zeros(3, int))
        with pytest.raises(ValueError, match=r"of another class.*y_source\[1\]=y_target\[1\]=4"):
            attack(x, x, np.array([0, 4, 2]), np.array([1, 4, 3]))
        with pytest.raises(ValueError, match=r"whole grey levels.*budget=0.5"):
            MimicryAttack(student, "fc1", norm="linf", budget=0.5)
        with pytest.raises(ValueError, match=r"whole grey levels.*budget=0.9"):
            MimicryAttack(student, "fc1", norm="l2", budget=0.9)
        with pytest.raises(ValueError, match=r"in \(0, 1\].*norm=.*budget=1.1"):
            MimicryAttack(student, "fc1", budget=1.1)
        with pytest.raises(TypeError, match="`preprocessing` must be a callable"):
            MimicryAttack(student, "fc1", preprocessing=3)
        with pytest.raises(ValueError, match=r"shape \(n, m, H, W, C\)"):
            attack.untargeted(x, x)

    def test_a_loss_that_is_no_number_stops_the_attack(self, student: Any, images: Images) -> None:
        attack = MimicryAttack(student, "fc1", steps=30, preprocessing=lambda x: x * float("inf"))
        with pytest.raises(FloatingPointError, match=r"infinite at step 1\. .*'fc1'"):
            attack(images.x_test[:2], images.x_test[2:4], verbose=0)

    @pytest.mark.parametrize("norm", ["dssim", "l2", "linf"])
    def test_no_gradient_is_no_defence(self, norm: Any, student: Any, images: Images) -> None:
        attack = MimicryAttack(student, "fc1", norm=norm, steps=30, preprocessing=tf.round)
        with pytest.raises(ValueError, match="No gradient"):
            attack(images.x_test[:2], images.x_test[2:4], verbose=0)

    def test_whole_numbers_let_no_gradient_through(self, images: Images) -> None:
        inputs = keras.Input((12, 12, 3), dtype="uint8")
        whole = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
        teacher = keras.Model(inputs, keras.layers.Dense(3, name="fc1")(whole))
        with pytest.raises(ValueError, match="No gradient"):
            MimicryAttack(teacher, "fc1")(images.x_test[:2], images.x_test[2:4], verbose=0)
