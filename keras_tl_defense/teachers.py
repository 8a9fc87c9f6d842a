"""A small Teacher, and Students made from a Teacher's layers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from keras_tl_defense._keras import LEGACY, keras
from keras_tl_defense.saving import check_loadable

_DROPOUT = 0.5


def build_teacher(
    input_shape: tuple[int, int, int], classes: int, widths: tuple[int, ...] = (24, 48, 96)
) -> Any:
    """A VGG-style network for small images in 0..255, untrained.

    Args:
        input_shape: `(H, W, C)`.
        classes: Number of logits.
        widths: Filters of each block of two 3×3 convolutions and a pooling.

    Returns:
        A Functional Keras model with layers `conv1_1`, `conv1_2`, `pool1` and so on, `flatten`,
        `fc1` and `logits`.

    Example:
        >>> build_teacher((32, 32, 3), classes=28).output_shape
        (None, 28)
    """
    layers = keras.layers
    x = inputs = keras.Input(input_shape)
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescaling")(x)
    for block, width in enumerate(widths, start=1):
        for part in (1, 2):
            x = layers.Conv2D(
                width,
                3,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                name=f"conv{block}_{part}",
            )(x)
        x = layers.MaxPooling2D(name=f"pool{block}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.3, name="dropout")(x)
    x = layers.Dense(128, activation="relu", kernel_initializer="he_normal", name="fc1")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="teacher")


def build_signal_teacher(
    input_shape: tuple[int, int], classes: int, widths: tuple[int, ...] = (16, 32, 64)
) -> Any:
    """A network of one-dimensional convolutions for signals in -1..1, untrained.

    Args:
        input_shape: `(length, channels)`.
        classes: Number of logits.
        widths: Filters of each block of two convolutions over 9 samples and a pooling of 4.

    Returns:
        A Functional Keras model with layers `conv1_1`, `conv1_2`, `pool1` and so on, `flatten`,
        `fc1` and `logits`.

    Example:
        >>> build_signal_teacher((256, 1), classes=6).output_shape
        (None, 6)
    """
    layers = keras.layers
    x = inputs = keras.Input(input_shape)
    for block, width in enumerate(widths, start=1):
        for part in (1, 2):
            x = layers.Conv1D(
                width,
                9,
                padding="same",
                activation="relu",
                kernel_initializer="he_normal",
                name=f"conv{block}_{part}",
            )(x)
        x = layers.MaxPooling1D(4, padding="same", name=f"pool{block}")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dropout(0.3, name="dropout")(x)
    x = layers.Dense(128, activation="relu", kernel_initializer="he_normal", name="fc1")(x)
    return keras.Model(inputs, layers.Dense(classes, name="logits")(x), name="teacher")


def load_teacher(path: str | Path) -> Any:
    """A Teacher from a file, without running code that the file brings.

    Args:
        path: A Keras file, `.keras` or `.h5`.

    Returns:
        The Keras model, not compiled.

    Raises:
        ValueError: The file holds a `Lambda` layer, which would run code of its own, or names code
            that is not Keras's.
    """
    if LEGACY:
        config = _stored_config(path)
        if '"Lambda"' in config:
            raise ValueError(
                "The Teacher has a `Lambda` layer, which would run code from the file. Load it "
                f"yourself if you trust it. Received: path={str(path)!r}"
            )
        check_loadable(json.loads(config))
    return keras.models.load_model(path, compile=False)


def _stored_config(path: str | Path) -> str:
    """The JSON of a model in a file, empty where there is none."""
    if h5py.is_hdf5(path):
        with h5py.File(path) as file:
            config = file.attrs.get("model_config", "{}")
            return config.decode() if isinstance(config, bytes) else str(config)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return archive.read("config.json").decode()
    return "{}"


def make_student(
    teacher: Any,
    cut: str,
    x: np.ndarray,
    y: np.ndarray,
    classes: int,
    *,
    epochs: int = 30,
    verbose: int | str = "auto",
) -> Any:
    """A deep-layer Student: the Teacher's layers up to `cut`, frozen, and one Dense of its own.

    The Dense layer is trained on features that are computed once, centred and scaled; both are
    folded into its weights.

    Args:
        teacher: A Keras model.
        cut: Name of the last layer that is taken over.
        x: Training images of shape `(n, H, W, C)`, as the Teacher takes them.
        y: Labels of shape `(n,)` in `0..classes-1`.
        classes: Number of classes.
        epochs: Passes over the features.
        verbose: 0 shows no progress bar.

    Returns:
        A Functional Keras model that returns logits, with the Teacher's layers nested in it as
        `base`.

    Raises:
        ValueError: The Teacher has no layer called `cut`, or the images do not fit it.

    Example:
        >>> student = make_student(teacher, "flatten", x_train, y_train, 16, epochs=1, verbose=0)
        >>> student.output_shape
        (None, 16)
    """
    base = keras.Model(teacher.inputs[0], teacher.get_layer(cut).output, name="base")
    base.trainable = False
    features = base.predict(x.astype(np.float32), verbose=verbose)
    shape = features.shape[1:]
    features = features.reshape(len(features), -1)
    mean, scale = features.mean(axis=0), features.std() + 1e-6
    dense = keras.layers.Dense(classes)
    trained = keras.Sequential(
        [keras.Input(features.shape[1:]), keras.layers.Dropout(_DROPOUT), dense]
    )
    trained.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    trained.fit((features - mean) / scale, y, batch_size=64, epochs=epochs, verbose=verbose)
    kernel, bias = dense.get_weights()
    dense.set_weights([kernel / scale, bias - mean @ kernel / scale])
    flatten = [keras.layers.Flatten()] if len(shape) > 1 else []
    head = keras.Sequential([keras.Input(shape), *flatten, dense], name="head")
    inputs = keras.Input(teacher.inputs[0].shape[1:])
    return keras.Model(inputs, head(base(inputs, training=False)), name="student")
