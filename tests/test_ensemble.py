"""`DifferentiatorEnsemble` against the published algorithm, written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import (
    CLASSES,
    KEY,
    SIZE,
    Images,
    build_student,
    draw_images,
    fitted,
    train,
    weights_of,
)
from plain_defence import PlainDefence, mixed

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.pruning.masks import pruned_count


@pytest.mark.parametrize(
    ("head", "ratios", "threshold"),
    [
        ("pair", {"conv1": 0.5, "conv2": 0.5}, 1),
        ("one_vs_rest", {"conv1": 0.5, "conv2": 0.5}, 2),
        ("one_vs_rest", dict.fromkeys(("conv1", "conv2", "fc1"), 0.6), 1),
    ],
)
def test_algorithm_1(
    head: str, ratios: dict[str, float], threshold: int, student: Any, images: Images
) -> None:
    options = {"head": head, "ensemble_size": 3, "reject_threshold": threshold}
    defence = fitted(student, images, ratios, jitter=0, **options)
    heads = 1 if head == "pair" else 2
    assert weights_of(defence)["kernel"].shape == (15, heads, 20)
    x = mixed(images)
    details = defence.explain(x, verbose=0)
    plain = PlainDefence(defence, images, ratios)
    logits = defence.student(x.astype(np.float32), training=False).numpy()
    np.testing.assert_array_equal(details["student_class"], logits.argmax(axis=1))
    assert all(len(set(row)) == 3 for row in details["members"])
    expected = plain.answer(
        x, details["student_class"], details["members"], defence.reject_threshold
    )
    np.testing.assert_allclose(details["score"], expected["score"], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(details["disagreements"], expected["disagreements"])
    np.testing.assert_array_equal(details["answer"], expected["answer"])
    np.testing.assert_array_equal(details["accepted"], expected["answer"] > 0)
    np.testing.assert_array_equal(defence.predict(x, verbose=0), expected["answer"])
    assert 0.1 < details["accepted"].mean() < 0.9


def test_it_answers_honest_images_and_rejects_noise(defence: Any, images: Images) -> None:
    rates = defence.evaluate(images.x_test, images.y_test, verbose=0)
    assert rates["student_accuracy"].rate > 0.9
    assert rates["retention"].rate > 0.8
    answer = defence.predict(images.x_test, verbose=0)
    assert rates["clean_acceptance"].count == (answer > 0).sum()
    assert rates["clean_accuracy"].count == (answer == images.y_test + 1).sum()
    noise = np.random.default_rng(5).integers(0, 256, (60, SIZE, SIZE, 3))
    assert (defence.predict(noise, verbose=0) > 0).mean() < rates["clean_acceptance"].rate


def test_answers_do_not_depend_on_batch_order_or_container(defence: Any, images: Images) -> None:
    x = mixed(images)
    answer = defence.predict(x, verbose=0)
    for batch_size in (1, 7, 500):
        np.testing.assert_array_equal(defence.predict(x, batch_size, verbose=0), answer)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_array_equal(defence.predict(x[order], verbose=0), answer[order])
    dataset = tf.data.Dataset.from_tensor_slices((x, np.zeros(len(x), np.int64))).batch(9)
    alone = dataset.map(lambda a, b: a)
    for data in (
        x.astype(np.float64),
        tf.constant(x),
        dataset,
        alone,
        alone.map(lambda a: (a,)),
    ):
        np.testing.assert_array_equal(defence.predict(data, verbose=0), answer)


def test_a_dataset_trains_like_arrays(student: Any, images: Images, defence: Any) -> None:
    dataset = tf.data.Dataset.from_tensor_slices((images.x_train, images.y_train)).batch(16)
    other = ktd.DifferentiatorEnsemble(student, {"conv*": 0.5}, ensemble_size=3, seed=0, key=KEY)
    other.adapt(dataset, verbose=0)
    other.compile()
    history = other.fit(dataset, verbose=0)
    levels = 1 + int(weights_of(other)["levels"].max())
    assert len(history.history["loss"]) == len(history.history["accuracy"]) == levels
    assert history.epoch == list(range(levels))
    np.testing.assert_allclose(
        other.explain(images.x_test, verbose=0)["score"],
        defence.explain(images.x_test, verbose=0)["score"],
        rtol=1e-3,
        atol=1e-4,
    )
    rates = other.evaluate(dataset.shuffle(20), verbose=0)
    assert rates["student_accuracy"].rate > 0.9


def test_logits_and_softmax_sequential_and_two_classes(images: Images) -> None:
    keras.utils.set_random_seed(1)
    chosen = images.y_train < 2
    two = Images(images.x_train[chosen], images.y_train[chosen], *images[2:])
    student = train(build_student(classes=2, softmax=True), two)
    defence = fitted(student, two, {"conv1": 0.5})
    assert defence.ensemble_size == 1
    assert len(defence.member_classes) == 1
    assert set(defence.predict(images.x_test, verbose=0)) <= {0, 1, 2}
    base = student.get_layer("base")
    flat = keras.Sequential([keras.Input((SIZE, SIZE, 3)), *base.layers[1:], keras.layers.Dense(2)])
    assert fitted(flat, two, {"conv1": 0.5}).cut == "fc1"


def body_features(defence: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features at the cut, unmasked and under the masks of the first differentiator."""
    bank = defence.get_layer("differentiators")
    cut = bank.tensor
    values = defence._graph.run(tf.constant(x, tf.float32), [cut])
    rows = tf.range(len(x))[None, :]
    masked = bank.body_features(values, rows, tf.constant([0])).numpy()
    return values[cut].numpy().reshape(masked.shape), masked


@pytest.mark.parametrize("frozen", [("conv",), ("conv", "norm")])
def test_a_cut_within_a_block_prunes_what_is_before_it(
    images: Images, frozen: tuple[str, ...]
) -> None:
    """A frozen convolution under a batch normalisation that was retrained, as scripts have it."""
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(8, 3, name="conv")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Flatten(name="flatten")(layers.ReLU(name="relu")(x))
    student = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))
    for name in frozen:
        student.get_layer(name).trainable = False
    defence = fitted(student, images, {"conv": 0.75})
    assert defence.cut == {1: "conv", 2: "flatten"}[len(frozen)]
    plain, masked = body_features(defence, images.x_test[:3])
    gone = ~weights_of(defence)["filter_masks"][0]
    assert gone.sum() == 6
    columns = np.tile(gone, masked.shape[1] // 8)
    assert not masked[:, columns].any()
    assert plain[:, columns].any()
    np.testing.assert_allclose(masked[:, ~columns], plain[:, ~columns], rtol=1e-5)


def test_noise_below_a_grey_level_changes_nothing(defence: Any, images: Images) -> None:
    x = mixed(images).astype(np.float32)
    noise = np.random.default_rng(0).uniform(-0.49, 0.49, x.shape)
    before, after = (defence.explain(a, verbose=0) for a in (x, x + noise))
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


def test_a_student_of_half_precision(images: Images) -> None:
    layers = keras.layers
    inputs = keras.Input((SIZE, SIZE, 3))
    half = {"dtype": keras.mixed_precision.Policy("mixed_bfloat16")}
    x = layers.Conv2D(6, 3, activation="relu", name="conv", **half)(inputs)
    x = layers.Dense(9, activation="relu", name="fc", **half)(layers.Flatten()(x))
    student = keras.Model(inputs, layers.Dense(CLASSES, name="head")(x))
    for name in ("conv", "fc"):
        student.get_layer(name).trainable = False
    answers = fitted(student, images, 0.5).predict(images.x_test, verbose=0)
    assert set(answers) <= set(range(CLASSES + 1))


def test_layers_after_the_cut_are_none_of_our_business(images: Images) -> None:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((SIZE, SIZE, 3))
    x = build_student(CLASSES)(inputs)
    twice = keras.layers.Dense(CLASSES, name="twice")
    student = keras.Model(inputs, twice(twice(x)))
    defence = fitted(student, images, {"conv1": 0.5}, cut="base")
    assert defence.cut == "fc1"


def test_sparsity_is_exact_for_every_differentiator(dense_defence: Any, student: Any) -> None:
    base = student.get_layer("base")
    sizes = {"conv1": 8, "conv2": 10, "fc1": int(np.prod(base.get_layer("fc1").kernel.shape))}
    table = dense_defence.sparsity()
    assert list(table.columns) == ["level", "differentiators", "layer", "units", "kept"]
    weights = weights_of(dense_defence)
    masks, levels = weights["filter_masks"], weights["levels"][:15]
    assert masks.shape == (15 + 4, 18)
    assert len(table) == 3 * len(np.unique(levels))
    for row in table.itertuples():
        ratio = 0.6 * [1, 0.75, 0.5][row.level]
        assert row.units == sizes[row.layer]
        assert row.kept == row.units - pruned_count(ratio, row.units)
        assert row.differentiators == (levels == row.level).sum()
        if row.layer != "fc1":
            own = masks[:, :8] if row.layer == "conv1" else masks[:, 8:]
            assert (own[:15][levels == row.level].sum(axis=1) == row.kept).all()
    assert (masks[15:, :8].sum(axis=1) == 8 - 4).all()  # the references
    assert (masks != masks[0]).any()


def test_pruning_by_activation_decides_and_not_by_size(images: Images, student: Any) -> None:
    """A filter with large weights that never fires goes; a small one that fires stays."""
    copy = keras.models.clone_model(student)
    copy.set_weights(student.get_weights())
    for layer in copy.get_layer("base").layers:
        layer.trainable = False
    conv1 = copy.get_layer("base").get_layer("conv1")
    kernel, bias = conv1.get_weights()
    kernel[..., 0], bias[0] = 10 * np.abs(kernel[..., 0]), -1e4
    conv1.set_weights([kernel, bias])
    defence = ktd.DifferentiatorEnsemble(copy, {"conv1": 0.125}, jitter=0)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    masks = weights_of(defence)["filter_masks"]
    assert not masks[:, 0].any()
    assert masks[:, 1:].all()


def test_preprocessing_is_part_of_the_defence(images: Images, defence: Any) -> None:
    """A Student that takes 0..1 answers like one that takes 0..255, given the scaling."""
    inner = keras.Input((SIZE, SIZE, 3))
    outer = keras.Model(inner, defence.student(keras.layers.Rescaling(255.0)(inner)))
    scaled = fitted(
        outer,
        images,
        {"conv*": 0.5},
        ensemble_size=3,
        preprocessing=keras.layers.Rescaling(1 / 255),
    )
    x = mixed(images)
    np.testing.assert_allclose(
        scaled.explain(x, verbose=0)["score"],
        defence.explain(x, verbose=0)["score"],
        rtol=1e-2,
        atol=1e-3,
    )


def test_the_same_seed_gives_the_same_heads_and_another_key(student: Any, images: Images) -> None:
    scores, members = [], []
    for _ in range(2):
        defence = ktd.DifferentiatorEnsemble(student, {"conv*": 0.5}, seed=4)
        defence.adapt(images.x_train, images.y_train, verbose=0)
        defence.compile()
        defence.fit(images.x_train, images.y_train, images_per_class=7, epochs=2, verbose=0)
        scores.append(weights_of(defence)["kernel"])
        members.append(defence.explain(images.x_test, verbose=0)["members"])
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-5, atol=1e-7)
    assert (members[0] != members[1]).any()


def test_what_is_fixed_cannot_be_set(defence: Any) -> None:
    for name in ("reject_threshold", "ensemble_size"):
        with pytest.raises(AttributeError):
            setattr(defence, name, 2)


def test_the_student_is_left_as_it_was(images: Images) -> None:
    keras.utils.set_random_seed(2)
    student = train(build_student(), images, epochs=1)
    weights = [w.copy() for w in student.get_weights()]
    flags = [layer.trainable for layer in student.layers]
    fitted(student, images, 0.5)
    assert [layer.trainable for layer in student.layers] == flags
    for before, after in zip(weights, student.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


class TestBadInput:
    def test_steps_in_the_wrong_order(self, student: Any, images: Images) -> None:
        defence = ktd.DifferentiatorEnsemble(student, 0.5)
        x, y = images.x_train, images.y_train
        with pytest.raises(RuntimeError, match=r"not pruned yet. Call `adapt"):
            defence.predict(x)
        with pytest.raises(RuntimeError, match=r"not pruned yet. Call `adapt"):
            defence.fit(x, y)
        with pytest.raises(RuntimeError, match=r"not pruned yet. Call `adapt"):
            defence.sparsity()
        defence.adapt(x, y, verbose=0)
        assert defence.calibration is None
        with pytest.raises(RuntimeError, match="not trained since the last `adapt`"):
            defence.calibrate(x, y)
        with pytest.raises(RuntimeError, match="not trained since the last `adapt`"):
            defence.predict(x)
        with pytest.raises(RuntimeError, match="not trained since the last `adapt`"):
            defence.export("nowhere")
        with pytest.raises(RuntimeError, match="not trained since the last `adapt`"):
            defence.evaluate(x, y)

    @pytest.mark.parametrize("size", [CLASSES, 0, -1, 2.0, True, "3"])
    def test_ensemble_size(self, student: Any, size: Any) -> None:
        with pytest.raises(ValueError, match=rf"in 1..5.*Received: ensemble_size={size!r}"):
            ktd.DifferentiatorEnsemble(student, 0.5, ensemble_size=size)

    @pytest.mark.parametrize("threshold", [0, 4, "1"])
    def test_reject_threshold(self, student: Any, threshold: Any) -> None:
        with pytest.raises(ValueError, match=rf"in 1..3.*Received: reject_threshold={threshold!r}"):
            ktd.DifferentiatorEnsemble(student, 0.5, ensemble_size=3, reject_threshold=threshold)

    def test_preprocessing(self, student: Any) -> None:
        with pytest.raises(TypeError, match="`preprocessing` must be a callable"):
            ktd.DifferentiatorEnsemble(student, 0.5, preprocessing=3)

    def test_ratios_and_layers(self, student: Any) -> None:
        for name, value in {"head": "both", "tune": "all", "retention": 1.0}.items():
            with pytest.raises(ValueError, match=f"Received: {name}={value!r}"):
                ktd.DifferentiatorEnsemble(student, 0.5, **{name: value})
        for value in (0, -1, 2.5):
            with pytest.raises(ValueError, match=f"Received: iterations={value}"):
                ktd.DifferentiatorEnsemble(student, 0.5, iterations=value)
        with pytest.raises(ValueError, match="Received: jitter=-1"):
            ktd.DifferentiatorEnsemble(student, 0.5, jitter=-1)
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            ktd.DifferentiatorEnsemble(student, 1.0)
        with pytest.raises(ValueError, match="matches no prunable layer before the cut"):
            ktd.DifferentiatorEnsemble(student, {"head": 0.5})
        with pytest.raises(ValueError, match="no layer called 'fc2'"):
            ktd.DifferentiatorEnsemble(student, 0.5, cut="fc2")
        with pytest.raises(ValueError, match="must come before the student's output"):
            ktd.DifferentiatorEnsemble(student, 0.5, cut="head")

    def test_students_that_will_not_do(self) -> None:
        class Subclassed(keras.Model):  # type: ignore[misc]
            def call(self, x: tf.Tensor) -> tf.Tensor:
                return x

        with pytest.raises(ValueError, match=r"Functional or Sequential.*student=Subclassed"):
            ktd.DifferentiatorEnsemble(Subclassed(), 0.5)
        inputs = keras.Input((SIZE, SIZE, 3))
        single = keras.Model(inputs, build_student(classes=1)(inputs))
        with pytest.raises(ValueError, match=r"K >= 2 .*`Dense\(2\)`"):
            ktd.DifferentiatorEnsemble(single, 0.5)
        free = keras.Input((None, None, 3))
        conv = keras.layers.Conv2D(4, 3, name="conv")
        conv.trainable = False
        pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(conv(free)))
        with pytest.raises(ValueError, match="size of the cut must be known"):
            ktd.DifferentiatorEnsemble(keras.Model(free, keras.layers.Dense(3)(pooled)), 0.5)

    def test_images_and_labels(self, defence: Any, images: Images) -> None:
        x, y = images.x_train.astype(np.float32), images.y_train
        broken = x.copy()
        broken[33, 0, 0, 0] = np.nan
        with pytest.raises(ValueError, match=r"NaN or infinity.*Received: x\[33\]"):
            defence.predict(broken, verbose=0)
        broken[33, 0, 0, 0] = np.inf
        with pytest.raises(ValueError, match=r"NaN or infinity.*Received: x\[33\]"):
            defence.adapt(broken, y, verbose=0)
        with pytest.raises(ValueError, match=r"shape \(n, 12, 12, 3\).*Received: x.shape=\(2, 9"):
            defence.predict(x[:2, :9, :9], verbose=0)
        with pytest.raises(ValueError, match=r"Add the batch dimension: x\[None\]"):
            defence.predict(x[0], verbose=0)
        with pytest.raises(TypeError, match=r"must be numbers.*Received: x.dtype=<U"):
            defence.predict(x.astype(str), verbose=0)
        with pytest.raises(ValueError, match=r"At least one image"):
            defence.predict(x[:0], verbose=0)
        with pytest.raises(ValueError, match=r"in 0..5.*Received: y from 0 to 6"):
            defence.adapt(x, np.where(y == 5, 6, y), verbose=0)
        with pytest.raises(ValueError, match="Received: y from -1"):
            defence.adapt(x, y - 1, verbose=0)
        with pytest.raises(ValueError, match="one-hot"):
            defence.adapt(x, np.eye(CLASSES)[y], verbose=0)
        with pytest.raises(TypeError, match="must be integers"):
            defence.adapt(x, y.astype(float), verbose=0)
        with pytest.raises(ValueError, match="one label for each of the 120 images"):
            defence.adapt(x, y[:-1], verbose=0)
        with pytest.raises(ValueError, match="labels are missing"):
            defence.adapt(x, verbose=0)
        with pytest.raises(ValueError, match="Add images of class 3"):
            defence.fit(x[y != 3], y[y != 3], verbose=0)
        with pytest.raises(ValueError, match="`preprocessing`"):
            defence.adapt(x / 255, y, verbose=0)
        for outside in (x / 255, x - 300, x * 1e30):
            with pytest.raises(ValueError, match=r"must be in 0..255.*Received: x from"):
                defence.predict(outside, verbose=0)

    def test_datasets(self, defence: Any, images: Images) -> None:
        dataset = tf.data.Dataset.from_tensor_slices((images.x_train, images.y_train))
        with pytest.raises(ValueError, match=r"must be batched. Call `.batch"):
            defence.adapt(dataset, verbose=0)
        with pytest.raises(ValueError, match="never ends"):
            defence.predict(dataset.batch(8).repeat(), verbose=0)
        with pytest.raises(ValueError, match="has no labels"):
            defence.adapt(dataset.batch(8).map(lambda x, y: x), verbose=0)
        with pytest.raises(ValueError, match="Received: an empty dataset"):
            defence.predict(dataset.batch(8).take(0), verbose=0)
        with pytest.raises(ValueError, match="Leave `y` out"):
            defence.adapt(dataset.batch(8), images.y_train, verbose=0)

    def test_a_failed_adapt_loses_nothing(self, student: Any) -> None:
        images = Images(*draw_images(5, seed=0), *draw_images(2, seed=1))
        defence = fitted(student, images, 0.5)
        before = defence.predict(images.x_test, verbose=0)
        with pytest.raises(ValueError, match="Add images of class 0"):
            defence.adapt(images.x_train[5:], images.y_train[5:], verbose=0)
        np.testing.assert_array_equal(defence.predict(images.x_test, verbose=0), before)
