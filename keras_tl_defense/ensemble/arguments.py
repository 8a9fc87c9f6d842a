"""What users pass to `DifferentiatorEnsemble`, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense.graph import ModelGraph


def class_count(graph: ModelGraph) -> int:
    """Number of classes K of a Student, which must return K >= 2 numbers for each image."""
    shape = graph.shapes[graph.output]
    if len(shape) != 2 or shape[1] is None or shape[1] < 2:
        raise ValueError(
            "The student must return one row of K >= 2 logits or probabilities for each image. A "
            "single sigmoid output can be retrained as `Dense(2)`. "
            f"Received: output shape {shape}"
        )
    return shape[1]


def check_ensemble_size(ensemble_size: int | None, classes: int) -> int:
    """The ensemble size, by default 5 or what there are; `ValueError` outside 1..K-1."""
    if ensemble_size is None:
        return min(5, classes - 1)
    if isinstance(ensemble_size, bool) or not isinstance(ensemble_size, int):
        raise TypeError(
            f"`ensemble_size` must be an integer. Received: ensemble_size={ensemble_size!r}"
        )
    if not 1 <= ensemble_size < classes:
        raise ValueError(
            f"`ensemble_size` must be in 1..{classes - 1}, because only K-1 = {classes - 1} "
            f"differentiators know a class. Received: ensemble_size={ensemble_size}"
        )
    return ensemble_size


def check_threshold(reject_threshold: int, ensemble_size: int) -> int:
    """The number of disagreements that rejects; `ValueError` outside 1..ensemble_size."""
    if isinstance(reject_threshold, bool) or not isinstance(reject_threshold, int):
        raise TypeError(
            "`reject_threshold` must be an integer. "
            f"Received: reject_threshold={reject_threshold!r}"
        )
    if not 1 <= reject_threshold <= ensemble_size:
        raise ValueError(
            f"`reject_threshold` must be in 1..{ensemble_size}, the number of differentiators that "
            f"check an input. Received: reject_threshold={reject_threshold}"
        )
    return reject_threshold


def check_preprocessing(preprocessing: Any) -> Any:
    """A callable or `None`, as it came; `TypeError` for anything else."""
    if preprocessing is not None and not callable(preprocessing):
        raise TypeError(
            "`preprocessing` must be a callable such as `keras.layers.Rescaling(1 / 255)`. "
            f"Received: preprocessing={preprocessing!r}"
        )
    return preprocessing


def serialize_preprocessing(preprocessing: Any) -> Any:
    """Configuration of a layer or registered function; `ValueError` for any other function."""
    if preprocessing is None:
        return None
    if isinstance(preprocessing, keras.layers.Layer) or _is_registered(preprocessing):
        return keras.utils.serialize_keras_object(preprocessing)
    raise ValueError(
        "A plain function cannot be saved with the model, because loading a file must not run code "
        "from it. Pass a Keras layer such as `keras.layers.Rescaling(1 / 255)`, or decorate the "
        "function with `@keras.utils.register_keras_serializable()`. "
        f"Received: preprocessing={preprocessing!r}"
    )


def _is_registered(function: Any) -> bool:
    name = keras.utils.get_registered_name(function) if hasattr(function, "__name__") else None
    return name is not None and keras.utils.get_registered_object(name) is not None


def key_words(key: bytes) -> np.ndarray:
    """Sixteen bytes as two int64, `ValueError` for anything else."""
    if not isinstance(key, bytes) or len(key) != 16:
        raise ValueError(
            f"`key` must be 16 bytes. Received: {type(key).__name__} of length "
            f"{len(key) if hasattr(key, '__len__') else 'unknown'}"
        )
    return np.frombuffer(key, np.int64).copy()
