"""Inputs that excite one unit each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import Images

from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import TargetAgnosticAttack, effectiveness


def probabilities(student: Any, x: np.ndarray) -> np.ndarray:
    return tf.nn.softmax(student.predict(x.astype(np.float32), verbose=0)).numpy()


def features(student: Any, x: np.ndarray) -> np.ndarray:
    flat = student.get_layer("base").predict(x.astype(np.float32), verbose=0)
    return flat.reshape(len(x), -1)


def test_a_unit_is_high_and_the_others_are_not(student: Any) -> None:
    base = student.get_layer("base")
    layer = base.layers[-1].name
    blank = np.full((1, *base.input_shape[1:]), 127.5)
    before = features(student, blank)[0]
    strength = 3 * before.max()  # so little that the others count as much as the unit
    attack = TargetAgnosticAttack(base, layer, strength=strength, steps=150)
    units = np.arange(0, 20, 3)
    result = attack(units, verbose=0)
    after = features(student, result.adversarial)
    wanted = strength * np.eye(after.shape[1])[units]
    assert (np.linalg.norm(after - wanted, axis=1) <= np.linalg.norm(before - wanted, axis=1)).all()
    live = after[np.arange(len(units)), units] > before[units]
    assert live.mean() >= 0.5
    np.testing.assert_allclose(result.distance, np.linalg.norm(after - wanted, axis=1), rtol=1e-3)
    assert result.adversarial.dtype == np.uint8
    assert result.gradients == 150


def test_by_default_units_rise_as_far_as_they_can(student: Any) -> None:
    base = student.get_layer("base")
    layer = base.layers[-1].name
    usual = TargetAgnosticAttack(base, layer)._usual_strength()
    units = np.arange(0, 20, 2)
    heights = []
    for strength in (usual / 30, None, 30 * usual):
        attack = TargetAgnosticAttack(base, layer, strength=strength, steps=150)
        found = features(student, attack(units, verbose=0).adversarial)
        heights.append(found[np.arange(len(units)), units].mean())
    little, default, most = heights
    assert little < 0.9 * default, heights
    assert default > 0.9 * most, heights


def test_the_student_is_surer_of_crafted_inputs_than_of_what_they_began_as(student: Any) -> None:
    base = student.get_layer("base")
    layer = base.layers[-1].name
    found = {}
    for steps in (1, 200):
        result = TargetAgnosticAttack(base, layer, start="random", steps=steps)(verbose=0)
        table = effectiveness(probabilities(student, result.adversarial), confidences=[0.95])
        found[steps] = table.iloc[0]
    assert found[200]["count"] > found[1]["count"]
    assert found[200]["classes"] > found[1]["classes"]


def test_the_budget_bounds_the_change_of_what_is_given(student: Any, images: Images) -> None:
    base = student.get_layer("base")
    layer = base.layers[-1].name
    x = images.x_test[:6]
    moved = []
    for budget in (2, 16):
        result = TargetAgnosticAttack(base, layer, budget=budget, steps=100)(range(6), x, verbose=0)
        change = np.abs(result.adversarial.astype(int) - x)
        assert 0 < change.max() <= budget
        moved.append(result.distance.mean())
    assert moved[1] < moved[0]
    assert result.layer == layer
    rough = TargetAgnosticAttack(base, layer, budget=2.7, steps=50)
    own = images.y_test[:6]
    result = rough(range(6), np.clip(x + 0.4, 0, 255), own, verbose=0)
    assert np.abs(result.adversarial - result.source).max() == 2
    assert result.within_budget.all()
    assert result.reached(np.where(np.arange(6) < 2, own + 1, own)).sum() == 2
    again = TargetAgnosticAttack(base, layer, budget=2, steps=100, batch_size=4)
    np.testing.assert_array_equal(again(range(2), x[0], verbose=0).source, np.stack([x[0], x[0]]))


def test_sounds() -> None:
    keras.utils.set_random_seed(0)
    teacher = keras.Sequential(
        [
            keras.Input((64, 1)),
            keras.layers.Conv1D(8, 5, activation="relu"),
            keras.layers.GlobalAveragePooling1D(name="pool"),
            keras.layers.Dense(4),
        ]
    )
    start = TargetAgnosticAttack(teacher, value_range=(-1, 1), steps=1)(verbose=0)
    attack = TargetAgnosticAttack(teacher, value_range=(-1, 1), steps=100)
    assert attack.layer == "pool"
    result = attack(verbose=0)
    assert result.distance.mean() < start.distance.mean()
    assert result.adversarial.shape == (8, 64, 1)
    assert result.adversarial.dtype == np.float32
    assert np.abs(result.adversarial).max() <= 1
    assert (result.adversarial != np.rint(result.adversarial)).any()


def test_inputs_begin_blank_or_random(student: Any) -> None:
    base = student.get_layer("base")
    spread = {}
    for start in ("blank", "random"):
        attack = TargetAgnosticAttack(base, start=start, steps=1, learning_rate=1e-6)
        spread[start] = attack([0, 1], verbose=0).adversarial.astype(float) - 127.5
    assert np.abs(spread["blank"]).max() < 3
    assert np.abs(spread["random"]).max() > 100


def test_budgets_of_wide_ranges_allow_for_rounding() -> None:
    """Sixteen-bit sounds, whose float32 values are rounded to some thousandths, and no more."""
    teacher = keras.Sequential(
        [keras.Input((64, 1)), keras.layers.Conv1D(4, 5), keras.layers.Flatten(name="flat")]
    )
    wide = (-32768, 32767)
    x = np.random.default_rng(0).uniform(*wide, (5, 64, 1))
    attack = TargetAgnosticAttack(teacher, "flat", value_range=wide, budget=20.3, steps=300)
    result = attack(range(5), x, verbose=0)
    assert result.within_budget.all()
    moved = result.adversarial.copy()
    moved[1, 3] += 41
    within = attack._within(moved, np.asarray(result.source, np.float32))
    assert within.tolist() == [True, False, True, True, True]


def test_a_teacher_of_one_layer_has_none_before() -> None:
    flat = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match=r"no layer before its last.*as `layer`"):
        TargetAgnosticAttack(flat)


def test_effectiveness_counts_attempts() -> None:
    rows = np.array([[0.96, 0.04], [0.3, 0.7], [0.005, 0.995], [0.995, 0.005]])
    table = effectiveness(rows).set_index("confidence")
    assert table.loc[0.95, ["count", "n", "classes", "attempts"]].tolist() == [3, 4, 2, 3]
    assert table.loc[0.99, ["count", "n", "classes", "attempts"]].tolist() == [2, 4, 2, 4]
    defended = effectiveness(rows, accepted=[True, True, False, True], confidences=[0.95])
    assert defended["count"].tolist() == [2]
    assert defended["attempts"].isna().all()
    with pytest.raises(ValueError, match="rows that sum to 1"):
        effectiveness(np.array([[3.0, -1.0]]))
    with pytest.raises(ValueError, match=r"in \(0, 1\)"):
        effectiveness(rows, confidences=[95])
    with pytest.raises(ValueError, match=r"for each of the 4 inputs.*\(3,\)"):
        effectiveness(rows, accepted=[True, True, False])


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"start": "black"}, {}, "`start` must be one of"),
        ({"value_range": 255}, {}, "`value_range` must be"),
        ({"steps": 0}, {}, "`steps` must be"),
        ({"budget": 0.4}, {}, "`budget` must be at least 1"),
        ({}, {"units": [0], "x": np.full((1, 12, 12, 3), 0.5)}, "Images must be in 0..255"),
        ({}, {"units": [10**6]}, "has the units 0"),
        ({}, {"units": []}, "`units` must be some integers"),
        ({}, {"units": [0.5]}, "`units` must be some integers"),
        ({"budget": 3}, {"units": [0]}, "Pass them as `x`"),
        ({}, {"units": [0, 1], "x": np.full((3, 12, 12, 3), 9)}, "an input for each of the 2"),
        ({}, {"units": [0], "x": np.full((1, 12, 12, 3), 300)}, "values in 0..255"),
        ({}, {"units": [0], "x": np.zeros((1, 8, 8, 3))}, "shape"),
    ],
)
def test_bad_input(student: Any, options: Any, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TargetAgnosticAttack(student, "fc1", **options)(**call)
