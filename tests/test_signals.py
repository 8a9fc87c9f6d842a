"""Drawn heartbeats, sounds and scans, and a Teacher of signals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.datasets import SignalDataset, scans, signals

LOADERS: list[tuple[Any, tuple[str, ...], dict[str, int], tuple[int, ...]]] = [
    (signals.load_heartbeats, signals.HEARTBEATS, {"length": 128}, (128, 1)),
    (signals.load_sounds, signals.SOUNDS, {"length": 256}, (256, 1)),
    (scans.load_scans, scans.SCANS, {"size": 16}, (16, 16, 3)),
]


@pytest.mark.parametrize(("load", "names", "small", "shape"), LOADERS)
def test_a_drawing_depends_on_seed_class_part_and_place_alone(
    load: Any, names: tuple[str, ...], small: dict[str, int], shape: tuple[int, ...]
) -> None:
    data = load(3, 2, **small)
    assert data.class_names == names
    assert data.x_train.shape == (3 * len(names), *shape)
    assert data.x_test.shape == (2 * len(names), *shape)
    np.testing.assert_array_equal(data.y_train, np.repeat(np.arange(len(names)), 3))
    more = load(5, 1, classes=[names[4], names[1]], **small)
    np.testing.assert_array_equal(more.x_train[:3], data.x_train[data.y_train == 4])
    np.testing.assert_array_equal(more.x_train[5:8], data.x_train[data.y_train == 1])
    np.testing.assert_array_equal(more.x_test[0], data.x_test[data.y_test == 4][0])
    assert more.class_names == (names[4], names[1])
    every = np.concatenate([data.x_train, data.x_test, load(3, 1, seed=1, **small).x_train])
    assert len(np.unique(every.reshape(len(every), -1), axis=0)) == len(every)
    assert np.isfinite(every.astype(float)).all()
    assert every.astype(float).std(axis=tuple(range(1, every.ndim))).min() > 0


def test_ranges() -> None:
    for load in (signals.load_heartbeats, signals.load_sounds):
        x = load(10, 1).x_train
        assert x.dtype == np.float32
        assert np.abs(x).max() <= 1
        assert (np.abs(x) == 1).mean() < 0.01  # hardly anything is clipped
    x = scans.load_scans(5, 1).x_train
    assert x.dtype == np.uint8
    assert (x == x[..., :1]).all()
    assert x.min() < 40
    assert x.max() > 200


@pytest.mark.parametrize(("load", "names", "small", "shape"), LOADERS)
def test_bad_arguments(
    load: Any, names: tuple[str, ...], small: dict[str, int], shape: tuple[int, ...]
) -> None:
    bad = [{"train_per_class": 0}, {"test_per_class": 1.5}, {"seed": -1}, dict.fromkeys(small, 8)]
    for options in bad:
        with pytest.raises(ValueError, match=r"must be an integer of at least .* Received: "):
            load(**options)
    for classes in ([], ["none such"], [names[0]] * 2, names[0]):
        with pytest.raises(ValueError, match=r"different names from .* Received: classes="):
            load(1, 1, classes=classes)


def test_what_is_no_data_set() -> None:
    data = signals.load_heartbeats(2, 1, 64, classes=signals.HEARTBEATS[:2])
    assert repr(data) == "SignalDataset(classes=2, signal_shape=(64, 1), train=4, test=2)"
    for change, message in [
        ({"x_train": data.x_train.astype(float)}, "not a batch of signals"),
        ({"x_test": data.x_test[..., 0]}, "not a batch of signals"),
        ({"y_train": data.y_train[1:]}, "does not fit"),
        ({"y_train": data.y_train + 1}, "label without a class name"),
        ({"x_test": data.x_test[:, 1:]}, "differ in shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(data, **change)
    assert isinstance(data, SignalDataset)


def test_a_teacher_of_heartbeats_serves_students_of_others() -> None:
    """Students are better on its layers than on untrained ones, and can be defended."""
    keras.utils.set_random_seed(0)
    names = signals.HEARTBEATS
    public = signals.load_heartbeats(100, 20, 128, classes=names[:6])
    private = signals.load_heartbeats(20, 20, 128, classes=names[6:])
    untrained = ktd.teachers.build_signal_teacher((128, 1), 6)
    teacher = keras.models.clone_model(untrained)
    teacher.compile(
        keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    teacher.fit(public.x_train, public.y_train, epochs=12, verbose=0)
    right = teacher.predict(public.x_test, verbose=0).argmax(axis=1) == public.y_test
    assert right.mean() > 0.85
    rates = []
    for base in (untrained, teacher):
        train = private.x_train, private.y_train
        student = ktd.teachers.make_student(base, "flatten", *train, private.classes, verbose=0)
        answers = student.predict(private.x_test, verbose=0).argmax(axis=1)
        rates.append((answers == private.y_test).mean())
    assert rates[1] > rates[0]
    defence = ktd.DifferentiatorEnsemble(
        student, 0.5, seed=0, preprocessing=keras.layers.Rescaling(1 / 127.5, offset=-1)
    )
    defence.adapt((private.x_train + 1) * 127.5, private.y_train, verbose=0)
    defence.fit((private.x_train + 1) * 127.5, private.y_train, verbose=0)
    measured = defence.evaluate((private.x_test + 1) * 127.5, private.y_test, verbose=0)
    assert measured["student_accuracy"].rate == pytest.approx(rates[1], abs=0.02)
    assert measured["retention"].rate > 0.5
