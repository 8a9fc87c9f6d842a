"""Write a defence as a SavedModel for TensorFlow Serving."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import tensorflow as tf

from keras_tl_defense._keras import keras


def export_saved_model(model: Any, path: str | Path, signature: tf.TensorSpec) -> Path:
    """Export `model.serve` as the signature `serving_default`.

    Args:
        model: A Keras model with a method `serve` that returns a dict of tensors.
        path: Folder of the SavedModel. TF Serving wants its last part to be a version number; when
            it is not, the next free number below it is taken.
        signature: What the model takes.

    Returns:
        The folder that was written.

    Raises:
        FileExistsError: The folder exists and is not empty.
        OSError: The folder cannot be written.
    """
    folder = _version_folder(Path(path))
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", model.serve, input_signature=[signature])
    with contextlib.redirect_stdout(io.StringIO()):
        archive.write_out(str(folder))
    return folder


def _version_folder(path: Path) -> Path:
    """Make the folder to write to, so that nobody else takes the same version."""
    try:
        if path.name.isdigit():
            if path.is_dir() and any(path.iterdir()):
                raise FileExistsError(
                    "A SavedModel is never overwritten, because a server may be reading it. Give "
                    f"a new version number, or the folder above it. Received: path={str(path)!r}"
                )
            path.mkdir(parents=True, exist_ok=True)
            return path
        path.mkdir(parents=True, exist_ok=True)
        taken = [int(entry.name) for entry in path.iterdir() if entry.name.isdigit()]
        folder = path / str(max(taken, default=0) + 1)
        folder.mkdir()
        return folder
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            f"The folder cannot be written ({error.strerror}). Choose one that you may write to. "
            f"Received: path={str(path)!r}"
        ) from error
