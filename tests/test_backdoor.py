"""A trojaned Teacher, and what its trigger does to Students."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from conftest import once

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import (
    Backdoor,
    BackdoorAttack,
    reverse_engineer,
    train_autoencoder,
)
from keras_tl_defense.attacks.mock_pruning import MockPruning
from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.datasets import scans, signals
from keras_tl_defense.pruning.masks import class_set_scores, filter_masks


class Case(NamedTuple):
    """A Teacher, its trojaned copy, and the data of Students."""

    teacher: Any
    backdoor: Backdoor
    data: Any
    weights: dict[str, list[np.ndarray]]
    """The clean Teacher's, before the attack, by its layers."""

    def student(self, teacher: Any) -> Any:
        keras.utils.set_random_seed(1)
        train = self.data.x_train, self.data.y_train
        return ktd.teachers.make_student(teacher, "flatten", *train, self.data.classes, verbose=0)


def trained(teacher: Any, x: np.ndarray, y: np.ndarray, epochs: int) -> Any:
    teacher.compile(
        keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    teacher.fit(x.astype(np.float32), y, epochs=epochs, verbose=0)
    return teacher


SMALL: dict[str, Any] = {
    "neurons": 3,
    "size": 0.2,
    "trigger_steps": 60,
    "retraining_steps": 300,
    "learning_rate": 5e-3,
    "per_class": 10,
}


@pytest.fixture(scope="module")
def scan_teacher() -> Any:
    keras.utils.set_random_seed(0)
    names = ["dark_wedge", "bright_bleeding", "bright_crescent", "ring", "shifted_midline"]
    data = scans.load_scans(80, 1, 24, classes=names)
    teacher = ktd.teachers.build_teacher((24, 24, 3), 5, widths=(8, 16))
    return trained(teacher, data.x_train, data.y_train, 20)


@pytest.fixture(scope="module")
def heart_teacher() -> Any:
    keras.utils.set_random_seed(0)
    data = signals.load_heartbeats(60, 1, 128, classes=signals.HEARTBEATS[:6])
    teacher = ktd.teachers.build_signal_teacher((128, 1), 6, widths=(8, 32))
    return trained(teacher, data.x_train, data.y_train, 12)


@pytest.fixture(scope="module", params=[pytest.param("scans", marks=once), "heartbeats"])
def case(request: pytest.FixtureRequest, scan_teacher: Any, heart_teacher: Any) -> Case:
    options = SMALL
    if request.param == "scans":
        teacher = scan_teacher
        names = ["healthy", "wide_ventricles", "shrunken", "bright_lens", "cyst"]
        data: Any = scans.load_scans(40, 30, 24, classes=names)
    else:
        teacher = heart_teacher
        data = signals.load_heartbeats(40, 30, 128, classes=signals.HEARTBEATS[6:])
        options = {**SMALL, "value_range": (-1, 1)}
    weights = {layer.name: layer.get_weights() for layer in teacher.layers}
    attack = BackdoorAttack(teacher, "conv2_2", **options)
    return Case(teacher, attack(verbose=0), data, weights)


def classes_of(student: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(student.predict(x.astype(np.float32), verbose=0).argmax(axis=1))


def test_the_trigger_misleads_a_student_of_the_trojaned_teacher(case: Case) -> None:
    backdoor, x, y = case.backdoor, case.data.x_test, case.data.y_test
    low, high = backdoor.value_range
    noise = np.random.default_rng(0).uniform(low, high, x.shape[1:]).astype(np.float32)
    chance = replace(backdoor, trigger=noise)
    errors, accuracy = {}, {}
    for name, teacher, stamp in (
        ("trojaned", backdoor.teacher, backdoor.stamp),
        ("random", case.teacher, chance.stamp),
    ):
        student = case.student(teacher)
        right = classes_of(student, x) == y
        accuracy[name] = right.mean()
        errors[name] = (classes_of(student, stamp(x)) != y)[right].mean()
    assert errors["trojaned"] > errors["random"] + 0.2  # at most (K - 1) / K: all to one class
    assert accuracy["trojaned"] > accuracy["random"] - 0.15


def test_the_original_teacher_is_untouched(case: Case) -> None:
    trojaned = case.backdoor.teacher
    for layer in case.teacher.layers:
        for before, after in zip(case.weights[layer.name], layer.get_weights(), strict=True):
            np.testing.assert_array_equal(before, after)
    names = [[layer.name for layer in m.layers if layer.weights] for m in (trojaned, case.teacher)]
    assert names[0] == names[1]
    for name in ("fc1", "logits"):  # after the layer with the neurons
        for old, new in zip(
            case.teacher.get_layer(name).get_weights(),
            trojaned.get_layer(name).get_weights(),
            strict=True,
        ):
            np.testing.assert_array_equal(old, new)


def test_ranked_neurons_survive_activation_pruning(case: Case) -> None:
    """The chosen ones better than those that are ranked last; the first quarter clearly."""
    activations = ktd.ClassActivations(case.student(case.backdoor.teacher), ["conv2_2"])
    activations.adapt(case.data.x_train, case.data.y_train, verbose=0)
    pairs = np.array(list(combinations(range(activations.classes), 2)))
    masks = filter_masks(class_set_scores(activations["conv2_2"], pairs), 0.5)
    inputs = reverse_engineer(case.teacher, 10, value_range=case.backdoor.value_range, verbose=0)
    order = Neurons(case.teacher, "conv2_2").rank(inputs)
    first, last = np.array_split(order, 4)[0], np.array_split(order, 4)[-1]
    assert masks[:, first].mean() > masks[:, last].mean() + 0.2
    assert masks[:, list(case.backdoor.neurons)].mean() > masks[:, last].mean()


def test_a_stamp_changes_what_is_under_the_mask_alone(case: Case) -> None:
    backdoor, x = case.backdoor, case.data.x_test
    stamped = backdoor.stamp(x)
    assert stamped.dtype == x.dtype
    mask = np.broadcast_to(backdoor.mask, x.shape)
    np.testing.assert_array_equal(stamped[~mask], x[~mask])
    wanted = np.broadcast_to(backdoor.trigger, x.shape)
    np.testing.assert_array_equal(stamped[mask], wanted[mask].astype(x.dtype))
    sides = [round(0.2 * side + 0.499) for side in x.shape[1:-1]]
    assert backdoor.mask.sum() == np.prod(sides) * x.shape[-1]
    with pytest.raises(ValueError, match=r"Inputs must have values in .* Received: values from"):
        backdoor.stamp(x[:2].astype(np.float32) * 1e4)
    with pytest.raises(ValueError, match="shape"):
        backdoor.stamp(x[:, 1:])


def test_the_trigger_excites_its_neurons_in_the_clean_teacher(heart_teacher: Any) -> None:
    """Where no retraining helps it."""
    x = signals.load_heartbeats(10, 1, 128).x_train
    few = {"retraining_steps": 1, "trigger_steps": 100, "value_range": (-1, 1)}
    backdoor = BackdoorAttack(heart_teacher, "conv2_2", **{**SMALL, **few})(x, verbose=0)
    noise = np.random.default_rng(0).uniform(-1, 1, (5, *x.shape[1:])).astype(np.float32)
    clean, chosen = Neurons(heart_teacher, "conv2_2"), list(backdoor.neurons)
    excited, by_chance = (
        np.mean([clean.excitation_of(replace(backdoor, trigger=t).stamp(x))[:, chosen] for t in ts])
        for ts in ([backdoor.trigger], noise)
    )
    assert excited > 1.3 * by_chance


@once
def test_an_added_trigger_of_images_keeps_to_whole_levels(scan_teacher: Any) -> None:
    x = scans.load_scans(4, 1, 24).x_train
    options = {**SMALL, "size": 1.0, "amplitude": 8.6, "retraining_steps": 1}
    backdoor = BackdoorAttack(scan_teacher, "conv2_1", **options)(x, verbose=0)
    assert np.abs(backdoor.trigger).max() == 8
    assert np.abs(backdoor.stamp(x).astype(int) - x).max() == 8


@once
def test_an_added_trigger_keeps_to_its_amplitude(heart_teacher: Any) -> None:
    with pytest.raises(ValueError, match="Give it as `value_range`"):
        BackdoorAttack(heart_teacher, "conv2_1", amplitude=0.1)
    x = signals.load_heartbeats(5, 1, 128).x_train
    options = {**SMALL, "size": 1.0, "amplitude": 0.1, "value_range": (-1, 1)}
    few = {"retraining_steps": 2, "trigger_steps": 15}
    backdoor = BackdoorAttack(heart_teacher, "conv2_1", **{**options, **few})(x, verbose=0)
    stamped = backdoor.stamp(x)
    assert backdoor.mask.all()
    assert 0.05 < np.abs(stamped - x).max() <= 0.1 + 1e-6
    assert np.abs(stamped).max() <= 1
    assert stamped.dtype == np.float32


@once
def test_a_seed_decides(heart_teacher: Any) -> None:
    few = {"retraining_steps": 3, "trigger_steps": 12, "per_class": 1, "through_autoencoder": True}
    options = {**SMALL, "value_range": (-1, 1), **few}
    first, again, other = (
        BackdoorAttack(heart_teacher, "conv2_2", seed=seed, **options)(verbose=0)
        for seed in (0, 0, 1)
    )
    np.testing.assert_allclose(first.trigger, again.trigger, atol=1e-5)
    np.testing.assert_allclose(first.excitation, again.excitation, rtol=1e-3)
    assert np.abs(first.trigger - other.trigger).max() > 0.01
    flags = [
        [layer.trainable for layer in model.layers if layer.weights]
        for model in (first.teacher, heart_teacher)
    ]
    assert flags[0] == flags[1]
    assert first.autoencoder.output_shape == (None, 128, 1)
    assert first.gradients == 15
    assert first.seconds > 0
    assert repr(first).startswith("Backdoor('conv2_2', neurons=(")


@once
def test_through_an_autoencoder_and_pruning(heart_teacher: Any) -> None:
    """The trigger excites after the autoencoder, and without other filters, if it aimed at that."""
    x = signals.load_heartbeats(10, 1, 128, classes=signals.HEARTBEATS[:6]).x_train
    options: dict[str, Any] = {**SMALL, "value_range": (-1, 1)}
    alive = options["neurons"] = Neurons(heart_teacher, "conv2_2").rank(x)[:2].tolist()
    made = {
        label: BackdoorAttack(heart_teacher, "conv2_2", **options, **more)(x, verbose=0)
        for label, more in (
            ("plain", {}),
            ("passed", {"through_autoencoder": True}),
            ("pruned", {"pruned": 0.9}),
        )
    }
    autoencoder = made["passed"].autoencoder
    pruning = MockPruning(Neurons(heart_teacher, "conv2_2"), x, np.array(alive), 0.9)
    rng = np.random.default_rng(5)
    draws = [masks for masks in (pruning(rng) for _ in range(40)) if is_pruned(masks)]
    excited, masked = {}, {}
    for label, backdoor in made.items():
        neurons, stamped = Neurons(backdoor.teacher, "conv2_2"), backdoor.stamp(x)
        excited[label] = neurons.excitation_of(autoencoder.predict(stamped, verbose=0))[:, alive]
        masked[label] = [np.array(neurons.excitation(tf.constant(stamped), m)) for m in draws]
    assert excited["passed"].mean() > excited["plain"].mean()
    means = {label: np.mean([m[:, alive] for m in of]) for label, of in masked.items()}
    assert means["pruned"] > means["plain"]


def is_pruned(masks: Any) -> bool:
    return min(np.min(mask) for mask in masks.values()) == 0


def test_neurons_are_ranked_by_activation_and_outgoing_weights(
    scan_teacher: Any, heart_teacher: Any
) -> None:
    """NumPy alone, for a convolution before a convolution, one before a Dense layer, and Dense."""
    for teacher, shape in ((scan_teacher, (24, 24, 3)), (heart_teacher, (128, 1))):
        low, high = (0, 255) if len(shape) == 3 else (-1, 1)
        x = np.random.default_rng(0).uniform(low, high, (20, *shape)).astype(np.float32)
        for layer, after in (("conv2_1", "conv2_2"), ("conv2_2", "fc1"), ("fc1", "logits")):
            part = keras.Model(teacher.inputs, teacher.get_layer(layer).output)
            values = part.predict(x, verbose=0)
            units = values.shape[-1]
            active = values.reshape(-1, units).astype(float).mean(axis=0)
            kernel = teacher.get_layer(after).get_weights()[0]
            lengths = [
                np.linalg.norm(kernel.reshape(-1, units, kernel.shape[-1])[:, u])
                for u in range(units)
            ]
            score = active * lengths
            neurons = Neurons(teacher, layer)
            np.testing.assert_allclose(neurons.outgoing(), lengths, rtol=1e-5)
            best = neurons.rank(x)[:5]
            np.testing.assert_allclose(score[best], np.sort(score)[::-1][:5], rtol=1e-4)


@once
def test_activations_below_zero_count_by_their_size() -> None:
    layers = keras.layers
    inputs = keras.Input((16, 2))
    found = layers.Conv1D(6, 3, activation="tanh", name="signed")(inputs)
    part = keras.Model(inputs, found)
    teacher = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(found)))
    x = np.random.default_rng(0).normal(size=(9, 16, 2)).astype(np.float32)
    active = np.abs(part.predict(x, verbose=0)).mean(axis=(0, 1))
    kernel = teacher.layers[-1].get_weights()[0].reshape(14, 6, 3)
    score = active * np.linalg.norm(kernel, axis=(0, 2))
    np.testing.assert_array_equal(Neurons(teacher, "signed").rank(x), (-score).argsort())


@once
def test_outgoing_weights_are_found_behind_depthwise_copies_of_channels() -> None:
    """Who is whose copy is seen in gradients."""
    layers = keras.layers
    for after in (
        [layers.DepthwiseConv2D(3, depth_multiplier=2), layers.Conv2D(5, 2, name="next")],
        [layers.DepthwiseConv2D(3, depth_multiplier=3), layers.Flatten(), layers.Dense(4)],
        [layers.SeparableConv2D(6, 3, depth_multiplier=2)],
    ):
        first = layers.Conv2D(4, 3, name="first")
        teacher = keras.Sequential([keras.Input((8, 8, 3)), first, *after, layers.Flatten()])
        last = after[-1]
        kernel = np.array(getattr(last, "pointwise_kernel", getattr(last, "kernel", None)))
        rows = kernel.reshape(-1, kernel.shape[-1])
        x = tf.Variable(np.random.default_rng(0).normal(size=(1, 6, 6, 4)), dtype=tf.float32)
        squares = np.zeros(4)
        for row, weights in enumerate(rows):
            only = np.zeros_like(rows)
            only[row] = weights
            values = last.get_weights()
            values[[v.shape for v in values].index(kernel.shape)] = only.reshape(kernel.shape)
            kept = last.get_weights()
            last.set_weights(values)
            with tf.GradientTape() as tape:
                out = x
                for layer in after:
                    out = layer(out)
            reached = np.abs(tape.gradient(out, x)).sum(axis=(0, 1, 2))
            last.set_weights(kept)
            assert np.count_nonzero(reached) == 1
            squares[reached.argmax()] += np.square(weights).sum()
        lengths = Neurons(teacher, "first").outgoing()
        np.testing.assert_allclose(lengths, np.sqrt(squares), rtol=1e-5)


def test_mock_pruning_removes_little_active_filters_but_no_chosen_one(heart_teacher: Any) -> None:
    x = signals.load_heartbeats(3, 1, 128).x_train
    neurons, rng = Neurons(heart_teacher, "conv2_2"), np.random.default_rng(0)
    least = neurons.rank(x)[-2:]
    pruning = MockPruning(neurons, x, least, 0.9)
    draws = [list(pruning(rng).values()) for _ in range(200)]
    kept = [np.mean([np.array(masks[k]) for masks in draws], axis=0) for k in range(4)]
    assert [len(shares) for shares in kept] == [8, 8, 32, 32]
    assert all(0.45 < shares.mean() < 0.95 for shares in kept)
    np.testing.assert_array_equal(kept[3][least], 1)
    part = keras.Model(heart_teacher.inputs, heart_teacher.get_layer("conv2_1").output)
    active = part.predict(x, verbose=0).mean(axis=(0, 1))
    assert kept[2][active.argmax()] > kept[2][active.argmin()] + 0.15
    assert not MockPruning(neurons, x, least, 0.0)(rng)
    masks = next(m for m in iter(lambda: pruning(rng), None) if min(map(np.min, m.values())) == 0)
    pruned = keras.models.clone_model(heart_teacher)
    pruned.set_weights(heart_teacher.get_weights())
    names = ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]
    for name, mask in zip(names, masks.values(), strict=True):
        layer = pruned.get_layer(name)
        layer.set_weights([weight * np.array(mask) for weight in layer.get_weights()])
    np.testing.assert_allclose(
        neurons.excitation(tf.constant(x), masks),
        Neurons(pruned, "conv2_2").excitation_of(x),
        rtol=1e-4,
        atol=1e-5,
    )


def test_neurons_are_read_at_the_end_of_their_block(student: Any) -> None:
    base = student.get_layer("base")
    x = np.random.default_rng(0).uniform(0, 255, (4, *base.input_shape[1:])).astype(np.float32)
    block = keras.Model(base.inputs, base.get_layer("relu2").output).predict(x, verbose=0)
    neurons = Neurons(student, "conv2")
    np.testing.assert_allclose(
        neurons.excitation_of(x, batch_size=3), block.mean(axis=(1, 2)), rtol=1e-4, atol=1e-5
    )


@once
def test_reversed_inputs_are_taken_for_their_classes(scan_teacher: Any) -> None:
    x = reverse_engineer(scan_teacher, per_class=6, steps=150, verbose=0)
    assert x.shape == (30, 24, 24, 3)
    assert 0 <= x.min() < x.max() <= 255
    wanted = np.repeat(np.arange(5), 6)
    assert (classes_of(scan_teacher, x) == wanted).mean() > 0.9
    rough = reverse_engineer(scan_teacher, 6, steps=150, smoothness=0, verbose=0)
    smooth = reverse_engineer(scan_teacher, 6, steps=150, smoothness=100, verbose=0)
    assert np.abs(np.diff(smooth, axis=1)).mean() < np.abs(np.diff(rough, axis=1)).mean()


@pytest.mark.parametrize("shape", [(40, 14, 18, 3), (40, 50, 1)])
def test_an_autoencoder_restores_inputs(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    slopes, heights = rng.uniform(-40, 40, (2, len(shape), 40))
    axis = np.linspace(-1, 1, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    first = slopes[0].reshape(-1, *[1] * (len(shape) - 1)) * axis
    x = np.broadcast_to(128 + first + heights[0].reshape(-1, *[1] * (len(shape) - 1)), shape)
    options = {"value_range": (0, 255)} if len(shape) == 3 else {}
    autoencoder = train_autoencoder(x, epochs=30, batch_size=8, verbose=0, **options)
    with pytest.raises(ValueError, match=r"in 0..100.*Received: values from"):
        train_autoencoder(x, value_range=(0, 100))
    restored = autoencoder.predict(x.astype(np.float32), verbose=0)
    assert restored.shape == x.shape
    assert ((restored - x) ** 2).mean() < 0.3 * x.var()


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("none", {}, "no layer called"),
        ("logits", {}, "before the Teacher's last"),
        ("flatten", {}, "convolution or a Dense layer"),
        ("conv2_2", {"neurons": 17}, "`neurons` must be"),
        ("conv2_2", {"neurons": []}, "`neurons` must be"),
        ("conv2_2", {"neurons": [1, 1]}, "`neurons` must be"),
        ("conv2_2", {"neurons": [16]}, "`neurons` must be"),
        ("conv2_2", {"size": 0}, "`size` must be"),
        ("conv2_2", {"size": 1.1}, "`size` must be"),
        ("conv2_2", {"amplitude": -1}, "`amplitude` must be"),
        ("conv2_2", {"amplitude": 0.4}, "`amplitude` must be at least 1"),
        ("conv2_2", {"seed": -1}, "`seed` must be"),
        ("conv2_2", {"strength": 0}, "`strength` must be"),
        ("conv2_2", {"pruned": 1.0}, "A ratio is the fraction"),
        ("conv2_2", {"trigger_steps": 0}, "`trigger_steps` must be"),
        ("conv2_2", {"retraining_steps": 0}, "`retraining_steps` must be"),
        ("conv2_2", {"learning_rate": 0}, "`learning_rate` must be"),
        ("conv2_2", {"per_class": 0}, "`per_class` must be"),
        ("conv2_2", {"batch_size": 0}, "`batch_size` must be"),
        ("conv2_2", {"value_range": (1, 0)}, "`value_range` must be"),
    ],
)
def test_bad_arguments(
    scan_teacher: Any, layer: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{message}[\s\S]*Received: "):
        BackdoorAttack(scan_teacher, layer, **options)


def test_what_cannot_be_attacked(scan_teacher: Any) -> None:
    attack = BackdoorAttack(scan_teacher, "conv2_2", retraining_steps=1, trigger_steps=1)
    with pytest.raises(ValueError, match=r"Inputs must have values in 0..255.* Received: "):
        attack(np.full((2, 24, 24, 3), 300.0), verbose=0)
    with pytest.raises(ValueError, match="shape"):
        attack(np.zeros((2, 8, 8, 3)), verbose=0)
    with pytest.raises(ValueError, match=r"Images must be in 0..255.* Received: "):
        attack(np.full((2, 24, 24, 3), 0.5), verbose=0)
    part = keras.Model(scan_teacher.inputs, scan_teacher.get_layer("pool1").output)
    with pytest.raises(ValueError, match=r"must end in classes.* as `x`.* Received: outputs of"):
        reverse_engineer(part)
    with pytest.raises(ValueError, match=r"`smoothness` must be .* Received: smoothness=-1"):
        reverse_engineer(scan_teacher, smoothness=-1)
    with pytest.raises(ValueError, match=r"must be images.* Received: x.shape=\(3, 4\)"):
        train_autoencoder(np.zeros((3, 4)))
    dead = keras.models.clone_model(scan_teacher)
    kernel, bias = dead.get_layer("conv2_2").get_weights()
    dead.get_layer("conv2_2").set_weights([kernel * 0, bias - 1])
    x = np.zeros((2, 24, 24, 3))
    with pytest.raises(ValueError, match=r"never excited.* Received: neurons="):
        BackdoorAttack(dead, "conv2_2")(x, verbose=0)
    broken = keras.models.clone_model(scan_teacher)
    broken.set_weights(scan_teacher.get_weights())
    kernel, bias = broken.get_layer("fc1").get_weights()
    broken.get_layer("fc1").set_weights([kernel * np.nan, bias])
    rng = np.random.default_rng(0)
    with pytest.raises(FloatingPointError, match=r"loss became NaN.* Received: learning_rate"):
        BackdoorAttack(broken, "conv2_2", **SMALL)(rng.integers(0, 256, (9, 24, 24, 3)), verbose=0)
