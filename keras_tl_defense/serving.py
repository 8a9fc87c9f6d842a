"""Write a defence as a SavedModel for TensorFlow Serving."""

from __future__ import annotations

import contextlib
import errno
import io
import tempfile
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
        ValueError: The version exists already.
        OSError: The folder cannot be written.
    """
    final = Path(path)
    parent = final.parent if final.name.isdigit() else final
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if parent != final and final.exists() and any(final.iterdir()):
            raise ValueError(
                "A SavedModel is never overwritten, because a server may be reading it. Give a new "
                f"version number, or the folder above it. Received: path={str(path)!r}"
            )
        with tempfile.TemporaryDirectory(prefix=".export-", dir=parent) as unfinished:
            _write(model, Path(unfinished) / "model", signature)
            return _publish(Path(unfinished) / "model", final)
    except OSError as error:
        raise OSError(
            f"The folder cannot be written ({error.strerror or error}). Choose one that you may "
            f"write to. Received: path={str(path)!r}"
        ) from error


def _write(model: Any, folder: Path, signature: tf.TensorSpec) -> None:
    archive = keras.export.ExportArchive()
    archive.add_endpoint("serving_default", model.serve, input_signature=[signature])
    with contextlib.redirect_stdout(io.StringIO()):
        archive.write_out(str(folder))


def _publish(finished: Path, path: Path) -> Path:
    """Move a finished SavedModel to its version, so that no server sees half of one."""
    if path.name.isdigit():
        return finished.rename(path)
    while True:
        taken = [int(entry.name) for entry in path.iterdir() if entry.name.isdigit()]
        version = path / str(max(taken, default=0) + 1)
        try:
            return finished.rename(version)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
