"""Keras files: written whole or not at all, and read without running code from them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_tl_defense._keras import keras

# Layers that run what a file names: a TensorFlow function, method or operation, or a SavedModel.
_CALLS_ANYTHING = (
    "TFOpLambda",
    "TFSMLayer",
    "TensorFlowOpLayer",
    "SlicingOpLambda",
    "ClassMethod",
    "InstanceMethod",
    "InstanceProperty",
)
_COMPUTATIONS = (
    "__operators__.",
    "math.",
    "nn.",
    "linalg.",
    "signal.",
    "cast",
    "clip_by_value",
    "concat",
    "expand_dims",
    "identity",
    "image.resize",
    "pad",
    "repeat",
    "reshape",
    "reverse",
    "split",
    "squeeze",
    "stack",
    "tile",
    "transpose",
)


def save_whole(write: Callable[[str], Any], filepath: str | Path, overwrite: bool) -> None:
    """Write a `.keras` file beside its place, then move it there.

    Args:
        write: Writes it under the name that it is given.
        filepath: Its place, ending in `.keras`.
        overwrite: Whether a file that is there may be replaced.

    Raises:
        ValueError: The name does not end in `.keras`, or the file exists and may not be replaced.
        OSError: The folder cannot be written.
    """
    path = Path(filepath)
    if path.suffix != ".keras":
        raise ValueError(
            "A defence is saved in Keras's own format. Give a name that ends in .keras. "
            f"Received: filepath={str(path)!r}"
        )
    if path.exists() and not overwrite:
        raise ValueError(f"The file exists. Pass overwrite=True. Received: filepath={str(path)!r}")
    try:
        with tempfile.TemporaryDirectory(prefix=".save-", dir=path.parent) as unfinished:
            whole = Path(unfinished) / path.name
            write(str(whole))
            whole.replace(path)
    except OSError as error:
        raise OSError(
            f"The file cannot be written ({error.strerror or error}). Choose a folder that "
            f"exists and that you may write to. Received: filepath={str(path)!r}"
        ) from error


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


def check_loadable(config: Any, custom_objects: Any = None) -> None:
    """Check that a configuration names only Keras's own classes and registered ones.

    The legacy Keras imports any module that a file names, and calls what it finds there.

    Raises:
        ValueError: It names something else.
    """
    if isinstance(config, list | tuple):
        for part in config:
            check_loadable(part, custom_objects)
    if not isinstance(config, dict):
        return
    for part in config.values():
        check_loadable(part, custom_objects)
    if "class_name" not in config:
        return
    _check_operator(config)
    function = config["class_name"] == "function"
    module = str(config.get("module") or "keras")
    name = config["config"] if function else config.get("registered_name")
    known = {**keras.utils.get_custom_objects(), **(custom_objects or {})}
    if isinstance(name, str) and name in known:  # what Keras looks up before it imports anything
        return
    if function or module.split(".")[0] not in ("keras", "tf_keras"):
        raise ValueError(
            "The file names code that is neither Keras's own nor registered. If you trust it, "
            "import the module that registers it, or pass `custom_objects`. "
            f"Received: {config['class_name']} {config.get('registered_name')!r} of {module!r}"
        )


def _check_operator(config: dict[str, Any]) -> None:
    """Refuse layers that run what a file names, but for plain computations.

    The legacy Keras calls any public function of TensorFlow, with any arguments, when it builds a
    model from a file.
    """
    kind, own = config["class_name"], config.get("config")
    if kind not in _CALLS_ANYTHING:
        return
    function = str(own.get("function")) if isinstance(own, dict) else ""
    if kind in ("TFOpLambda", "SlicingOpLambda") and function.startswith(_COMPUTATIONS):
        return
    raise ValueError(
        "The file has a layer that may do more than compute. Write the model with "
        "Keras's layers and arithmetic, and save it again. "
        f"Received: {kind} of {function or 'an object'!r}"
    )
