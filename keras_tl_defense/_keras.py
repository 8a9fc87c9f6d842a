"""The Keras of this process: `tf.keras`, whichever generation that is."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

keras: Any = tf.keras


def _is_legacy() -> bool:
    try:
        return bool(keras.Model.__module__.startswith("tf_keras"))
    except ImportError as error:
        raise ImportError(
            "`tf.keras` cannot be imported. keras_tl_defense runs on Keras's TensorFlow backend: "
            "set the environment variable KERAS_BACKEND=tensorflow before Keras is imported. With "
            "TF_USE_LEGACY_KERAS=1, `pip install tf_keras`. "
            f"Received: KERAS_BACKEND={os.environ.get('KERAS_BACKEND')}"
        ) from error


LEGACY = _is_legacy()
"""Whether `tf.keras` is the legacy `tf_keras` (`TF_USE_LEGACY_KERAS=1`) and not Keras 3."""

if not LEGACY and keras.backend.backend() != "tensorflow":
    raise ImportError(
        "keras_tl_defense runs on Keras's TensorFlow backend only. Set the environment variable "
        "KERAS_BACKEND=tensorflow before Keras is imported. "
        f"Received: backend={keras.backend.backend()!r}"
    )

register = keras.utils.register_keras_serializable(package="keras_tl_defense")
"""Decorator that lets `keras.models.load_model` find one of this library's classes."""


def to_numpy(variable: Any) -> np.ndarray:
    """The value of a weight of either Keras generation, mirrored on several devices or not."""
    return np.array(tf.convert_to_tensor(variable))
