"""Networks that people use, from `adapt` to the exported model."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from oracles import Physical

import keras_tl_defense as ktd
from keras_tl_defense._keras import LEGACY, keras
from keras_tl_defense.ensemble.grouped import GroupedBody

layers = keras.layers
CLASSES, PER_CLASS, RATIO = 4, 12, 0.5
# The size of the images; convolutions that are pruned, gates, and depthwise ones besides.
NETWORKS = {
    "VGG16": (32, 13, 0, 0),
    "VGG19": (32, 16, 0, 0),
    "ResNet50": (32, 53, 0, 0),
    "ResNet50V2": (32, 53, 0, 0),
    "MobileNet": (32, 14, 0, 13),
    "MobileNetV2": (32, 35, 0, 17),
    "MobileNetV3Small": (32, 23, 18, 11),
    "InceptionV3": (75, 94, 0, 0),
    "Xception": (71, 40, 0, 0),
    "DenseNet121": (32, 120, 0, 0),
    "EfficientNetB0": (32, 33, 32, 16),
}


def draw(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy patterns, one for each class."""
    patterns = np.random.default_rng(3).uniform(0, 255, (CLASSES, *shape))
    y = np.repeat(np.arange(CLASSES), PER_CLASS)
    noise = np.random.default_rng(seed).normal(0, 30, (len(y), *shape))
    return np.clip(np.rint(patterns[y] + noise), 0, 255).astype(np.uint8), y


def with_statistics(model: Any) -> Any:
    """Random statistics, scales and offsets, so that a channel that is not gone shows."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            shape = layer.moving_mean.shape
            layer.moving_mean.assign(rng.normal(0, 0.1, shape))
            layer.moving_variance.assign(rng.uniform(0.5, 1.5, shape))
            for name, low, high in (("gamma", 0.5, 1.5), ("beta", -0.5, 0.5)):
                if getattr(layer, name, None) is not None:
                    getattr(layer, name).assign(rng.uniform(low, high, shape))
    return model


def check_masked(defence: Any, x: np.ndarray) -> None:
    """What the heads read is that of the network without the filters."""
    bank, graph = defence.get_layer("differentiators"), defence._graph
    tensor = bank.tensor
    x = x[:3].astype(np.float32)
    member = bank.count - 1
    mask, removed, start = bank.masks.filter_masks([member])[0].numpy(), {}, 0
    for block in bank.masks.blocks:
        if block.kind == "filters":
            removed[block.name] = np.flatnonzero(~mask[start : start + block.units])
            start += block.units
    expected = Physical(graph, removed)(x, tensor)
    values = graph.run(tf.constant(x), [tensor])
    rows = tf.range(len(x))[None]
    scale = np.abs(expected).max()
    assert scale > 0
    blocks = bank.masks.blocks
    late = [step.name for step in graph.steps]
    filters = [block.name for block in blocks if block.kind == "filters"]
    forms = [bank.member_bodies(values, rows, tf.constant([member])).numpy()]
    forms.append((body := bank.compact_body(None))(body.load(x), mask, member))
    for options in ({}, {"late": late}, {"masked": filters}):
        grouped = GroupedBody(graph, tensor, blocks, **options)
        run = tf.function(partial(grouped, connection_mask=bank.masks.connection_mask))
        out = run(values, rows, tf.constant([member]), tf.constant(mask[None]))
        forms.append(out.numpy().reshape(len(x), -1))
    for found in forms:
        np.testing.assert_allclose(found / scale, expected.reshape(len(x), -1) / scale, atol=1e-4)


def check_sparsity(defence: Any) -> None:
    """Every mask has as many filters as its level says, to one."""
    bank = defence.get_layer("differentiators")
    shares = [(1, 1), (3, 4), (1, 2)]  # of the ratio, at each level
    for member, level in enumerate(np.array(bank.masks.levels)):  # the last are the references
        mask, start = bank.masks.filter_masks([member])[0].numpy(), 0
        over, under = shares[level]
        for block in bank.masks.blocks:
            gone = np.sum(~mask[start : start + block.units])
            assert gone == block.units * over // (2 * under)
            start += block.units


def check_whole(student: Any, shape: tuple[int, ...], folder: Path, **options: Any) -> Any:
    """Adapt, fit, predict, save, load, export; returns the defence."""
    x, y = draw(shape, 0)
    defence = ktd.DifferentiatorEnsemble(student, RATIO, ensemble_size=2, seed=0, **options)
    defence.adapt(x, y, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random networks make weak heads
        defence.fit(x, y, verbose=0)
    x, _ = draw(shape, 1)
    expected = defence.explain(x[::4], verbose=0)
    check_masked(defence, x)
    check_sparsity(defence)
    convolutions = {
        step.name for step in defence._graph.steps if "Conv" in type(step.layer).__name__
    }
    assert convolutions <= set(defence.ratios) | set(defence.left_alone())
    defence.save(folder / "defence.keras")
    loaded = keras.models.load_model(folder / "defence.keras")
    np.testing.assert_array_equal(loaded.predict(x[::4], verbose=0), expected["answer"])
    exported = defence.export(folder / "served")
    serve = tf.saved_model.load(str(exported)).signatures["serving_default"]
    answered = serve(tf.constant(x[::4], tf.float32))
    np.testing.assert_array_equal(answered["answer"], expected["answer"])
    np.testing.assert_allclose(answered["score"], expected["score"], rtol=1e-3, atol=1e-3)
    return defence


UNDER_LEGACY = ("VGG16", "ResNet50", "MobileNet", "MobileNetV3Small", "EfficientNetB0")


@pytest.mark.slow
@pytest.mark.parametrize("name", UNDER_LEGACY if LEGACY else NETWORKS)
def test_architectures(name: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    size, pruned, gates, depthwise = NETWORKS[name]
    shape = (size, size, 3)
    make = getattr(keras.applications, name)
    base = make(weights=None, include_top=False, input_shape=shape, pooling="avg")
    with_statistics(base).trainable = False
    student = keras.Sequential([keras.Input(shape), base, layers.Dense(CLASSES)])
    defence = check_whole(student, shape, tmp_path)
    reasons = [reason.split(":")[0].split("'")[0] for reason in defence.left_alone().values()]
    assert len(defence.ratios) == pruned
    assert Counter(reasons) == Counter({"a gate of ": gates, "depthwise": depthwise}) + Counter()


def draw_signals(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy waves, a frequency for each class, as whole numbers in 0..255."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(CLASSES), 20)
    phase = rng.uniform(0, 2 * np.pi, (len(y), 1))
    waves = np.sin(np.pi * np.arange(64) * (y[:, None] + 1) / 16 + phase)
    x = 128 + 80 * waves + rng.normal(0, 10, waves.shape)
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)[..., None], y


def test_signals(tmp_path: Path) -> None:
    """A Conv1D network for time series."""
    keras.utils.set_random_seed(0)
    body = [
        layers.Rescaling(1 / 127.5, offset=-1),
        layers.Conv1D(16, 7, padding="causal", activation="relu", name="conv1"),
        layers.MaxPooling1D(2),
        layers.Conv1D(16, 5, name="conv2"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.GlobalAveragePooling1D(name="pool"),
    ]
    teacher = keras.Sequential([keras.Input((64, 1)), *body, layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    teacher.compile(keras.optimizers.Adam(1e-2), loss)
    x, y = draw_signals(0)
    teacher.fit(x.astype(np.float32), y, epochs=40, verbose=0)
    base = keras.Model(teacher.inputs, teacher.get_layer("pool").output)
    base.trainable = False
    student = keras.Sequential([keras.Input((64, 1)), base, teacher.layers[-1]])
    defence = ktd.DifferentiatorEnsemble(student, RATIO, seed=0)
    defence.adapt(x, y, verbose=0)
    defence.fit(x, y, verbose=0)
    assert set(defence.ratios) == {"conv1", "conv2"}
    x, y = draw_signals(1)
    check_masked(defence, x)
    rates = defence.evaluate(x, y, verbose=0)
    assert rates["student_accuracy"].rate > 0.9
    assert rates["retention"].rate > 0.8
    defence.save(tmp_path / "signals.keras")
    loaded = keras.models.load_model(tmp_path / "signals.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), defence.predict(x, verbose=0))
    with pytest.raises(ValueError, match=r"attacks on images.*Give `ratios` yourself"):
        ktd.DifferentiatorEnsemble(student).adapt(x, y, verbose=0)
