"""TensorFlow Model Optimization, which is loaded only where it is used.

Importing it turns the whole process over to the legacy Keras, so nothing here runs under Keras 3.
"""

from __future__ import annotations

from typing import Any

from keras_tl_defense._keras import LEGACY


def import_tfmot() -> Any:
    """The module `tensorflow_model_optimization`.

    Raises:
        ImportError: It cannot be imported; the message says what to install.
        RuntimeError: Keras 3 is in use.
    """
    if not LEGACY:
        raise RuntimeError(
            "TensorFlow Model Optimization works with the legacy Keras only. Use the callback "
            "`keras_tl_defense.ActivationPruning`, which works with any Keras model, or set the "
            "environment variable TF_USE_LEGACY_KERAS=1 before TensorFlow is imported. "
            "Received: Keras 3"
        )
    try:
        import tensorflow_model_optimization
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("distutils"):
            raise ImportError(
                "TensorFlow Model Optimization needs `distutils`, which Python 3.12 no longer has. "
                "Run `pip install setuptools`, which brings it."
            ) from error
        raise ImportError(
            "TensorFlow Model Optimization cannot be imported. Run "
            "`pip install tensorflow-model-optimization tf_keras`."
        ) from error
    return tensorflow_model_optimization
