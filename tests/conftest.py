"""Small models and images that the tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pandas as pd
import pytest

import keras_tl_defense as ktd
from keras_tl_defense._keras import LEGACY, keras

hypothesis.settings.register_profile("unhurried", deadline=None)  # machines may be busy
hypothesis.settings.load_profile("unhurried")

once = pytest.mark.skipif(
    LEGACY, reason="once is enough: what the generations of Keras differ in is tested elsewhere"
)

KEY = bytes(range(16))
SIZE, CLASSES = 12, 6


class Images(NamedTuple):
    """Training and test images with labels."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def draw_images(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images, each class a pattern of its own."""
    patterns = np.random.default_rng(7).uniform(0, 255, (CLASSES, SIZE, SIZE, 3))
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(CLASSES), per_class)
    noisy = patterns[y] * 0.8 + rng.normal(25, 40, (len(y), SIZE, SIZE, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), y


def build_student(classes: int = CLASSES, softmax: bool = False) -> Any:
    """A Student as Keras's transfer-learning guide writes it, untrained: a frozen nested base."""
    layers = keras.layers
    inner = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inner)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(name="pool1")(x)
    x = layers.Conv2D(10, 3, use_bias=False, name="conv2")(x)
    x = layers.BatchNormalization(name="norm2")(x)
    x = layers.ReLU(name="relu2")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(20, activation="relu", name="fc1")(x)
    base = keras.Model(inner, x, name="base")
    base.trainable = False
    inputs = keras.Input((SIZE, SIZE, 3))
    x = base(inputs, training=False)
    x = layers.Dropout(0.2, name="dropout")(x)
    x = layers.Dense(classes, activation="softmax" if softmax else None, name="head")(x)
    return keras.Model(inputs, x, name="student")


def train(student: Any, images: Images, epochs: int = 40) -> Any:
    """Train the Student's own layers; its frozen batch normalisation gets statistics, too."""
    rng = np.random.default_rng(3)
    norm = student.get_layer("base").get_layer("norm2")
    shape = norm.gamma.shape
    norm.set_weights(
        [
            rng.uniform(0.5, 1.5, shape),
            rng.uniform(0.1, 0.5, shape),
            rng.normal(0, 0.1, shape),
            rng.uniform(0.05, 0.3, shape),
        ]
    )
    softmax = student.layers[-1].activation is keras.activations.softmax
    student.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax),
    )
    student.fit(
        images.x_train.astype(np.float32), images.y_train, epochs=epochs, batch_size=32, verbose=0
    )
    return student


def fitted(student: Any, images: Images, ratios: Any, **options: Any) -> Any:
    """A defence of `student`, ready to answer."""
    defence = ktd.DifferentiatorEnsemble(student, ratios, seed=0, key=KEY, **options)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.compile(optimizer="adam")
    defence.fit(images.x_train, images.y_train, verbose=0)
    return defence


def weights_of(defence: Any) -> dict[str, np.ndarray]:
    """The weights of all differentiators, by their names, unpacked: masks and heads."""
    bank = defence.get_layer("differentiators")
    names = (w.name.split(":")[0].split("/")[-1] for w in bank.weights)
    found = {name: np.array(w) for name, w in zip(names, bank.weights, strict=True)}
    units = sum(block.units for block in bank.masks.blocks if block.kind == "filters")
    bits = np.unpackbits(found.pop("filter_bits"), axis=1, count=units, bitorder="little")
    for prefix, heads in (("", bank.heads), ("reference_", bank.reference_heads)):
        kernel, scale, bias = map(np.array, heads.weights)
        assert kernel.dtype == np.float16
        found[f"{prefix}kernel"] = kernel.astype(np.float32) * scale[..., None]
        found[f"{prefix}bias"] = bias
    return {**found, "filter_masks": bits.astype(bool)}


def draw_history() -> pd.DataFrame:
    """What a search of ratios could have measured: four candidates, the third chosen."""
    at = [[0.5, 0.6, 0.7], [0.4, 0.3, 0.5], [0.1, 0.2, 0.3], [0.05, 0.25, 0.6]]
    history = pd.DataFrame(
        at, columns=["acceptance_at_0.9", "acceptance_at_0.95", "acceptance_at_0.99"]
    )
    history["ratios"] = [{}, {"conv1": 0.85}, {"conv1": 0.85, "conv2": 0.5}, {"conv2": 0.5}]
    history["head_layer"] = "flatten"
    history["chosen"] = np.arange(4) == 2
    return history


@pytest.fixture(scope="session")
def images() -> Images:
    return Images(*draw_images(20, seed=0), *draw_images(10, seed=1))


@pytest.fixture(scope="session")
def student(images: Images) -> Any:
    keras.utils.set_random_seed(0)
    return train(build_student(), images)


@pytest.fixture(scope="session")
def defence(student: Any, images: Images) -> Any:
    """A defence whose convolutions are pruned, three members to an input."""
    return fitted(student, images, {"conv*": 0.5}, ensemble_size=3)


@pytest.fixture(scope="session")
def calibrated(student: Any, images: Images) -> Any:
    """A defence whose score decides."""
    defence = fitted(student, images, {"conv*": 0.5})
    defence.calibrate(images.x_test, images.y_test, verbose=0)
    return defence


@pytest.fixture(scope="session")
def dense_defence(student: Any, images: Images) -> Any:
    """A defence whose convolutions and Dense connections are pruned."""
    return fitted(student, images, 0.6, ensemble_size=3, reject_threshold=2)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real data sets and Teachers, if there is one."""
    folder = os.environ.get("KERAS_TL_DEFENSE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: KERAS_TL_DEFENSE_DATA does not name a folder")
    return Path(folder)
