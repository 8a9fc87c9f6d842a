"""What is done of a fit, in a folder, so that it can go on when it was stopped."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense.ensemble.fitting import Result, Task
from keras_tl_defense.ensemble.training import ClassImages

_START, _DATA, _PART = "start.npz", "data.npz", ".part-"


class Start(NamedTuple):
    """What a fit begins with.

    Attributes:
        drawn: The weights that were drawn at random.
        seed: Seed of the fit.
    """

    drawn: list[np.ndarray]
    seed: int


class Backup:
    """A folder with the state before a fit, and a file for each task that is done.

    Files appear whole or not at all, and only their owner may read them: one holds the secret key.

    Args:
        folder: Where; made when it is not there.
        identity: Arrays and texts that tell this fit from others.

    Attributes:
        start: What a fit that was stopped began with; `None` for a new one.

    Raises:
        ValueError: The folder holds other files, the backup of another fit, or a damaged one.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, identity: Iterable[Any]) -> None:
        self._folder = Path(folder)
        self._identity = fingerprint(identity)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.start: Start | None = None
        names = {path.name for path in self._folder.iterdir()}
        if _START in names:
            stored = self._read(_START, "identity", "seed")
            if str(stored["identity"]) != self._identity:
                raise self._error(
                    "holds the backup of another fit: of another Student, other ratios or other "
                    "arguments. With ratios='auto', give a `seed`, so that the search finds the "
                    "same again"
                )
            drawn = [stored[name] for name in stored if name.startswith("drawn ")]
            if stored["seed"].shape or stored["seed"].dtype.kind != "i":
                raise self._error(f"is damaged: {_START} is not what it should be")
            self.start = Start(drawn, int(stored["seed"]))
        elif any(not name.startswith(_PART) for name in names):
            raise self._error("holds files that are no backup of a fit")

    def begin(self, start: Start) -> None:
        """Keep the state that the fit begins with."""
        drawn = {f"drawn {number}": array for number, array in enumerate(start.drawn)}
        self._write(_START, {"identity": self._identity, "seed": start.seed, **drawn})
        self.start = start

    def check_data(self, sample: ClassImages, logits: np.ndarray) -> None:
        """Keep what tells the training images and the Student from others, or compare it.

        Args:
            sample: Training images.
            logits: The Student's outputs for some of them.

        Raises:
            ValueError: They are others than those of the fit that was stopped.
        """
        digest = fingerprint(sample)
        if not (self._folder / _DATA).exists():
            self._write(_DATA, {"digest": digest, "logits": logits})
            return
        kept = self._read(_DATA, "digest", "logits")
        if str(kept["digest"]) != digest:
            raise self._error(
                "holds the backup of a fit with other training images, or in another order"
            )
        scale = float(np.abs(logits).max())
        if not np.allclose(kept["logits"], logits, rtol=1e-3, atol=1e-3 * scale):
            raise self._error("holds the backup of a fit of another Student, or preprocessing")

    def restore(self, weights: Sequence[Any]) -> None:
        """Give weights what the fit that was stopped began with."""
        assert self.start is not None
        drawn = self.start.drawn
        fits = len(drawn) == len(weights) and all(
            array.shape == tuple(weight.shape) and array.dtype == tf.as_dtype(weight.dtype)
            for array, weight in zip(drawn, weights, strict=True)
        )
        if not fits:
            raise self._error(f"is damaged: {_START} is not what it should be")
        for array, weight in zip(drawn, weights, strict=True):
            weight.assign(array)

    def load(self, task: Task, gives: Callable[[Task, Result], bool]) -> Result | None:
        """What a task gave; `None` when it is not done.

        Args:
            task: The task.
            gives: Whether it can have given a result.
        """
        name = _file_name(task)
        if not (self._folder / name).exists():
            return None
        result = self._read(name, "bodies")
        if not np.array_equal(result.pop("bodies"), task.bodies) or not gives(task, result):
            raise self._error(f"is damaged: {name} is not what it should be")
        return result

    def store(self, task: Task, result: Result) -> None:
        """Keep what a task gave."""
        self._write(_file_name(task), {**result, "bodies": task.bodies})

    def finish(self) -> None:
        """Remove the files; the folder stays."""
        for pattern in (f"{_PART}*", "task-*.npz", _DATA, _START):
            for path in self._folder.glob(pattern):
                path.unlink()

    def _write(self, name: str, arrays: dict[str, Any]) -> None:
        # Others may not read it: what it holds is secret.
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_PART, delete=False) as part:
            np.savez(part, **arrays)
        os.replace(part.name, self._folder / name)

    def _read(self, name: str, *needed: str) -> Result:
        with open(self._folder / name, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    found = {key: arrays[key] for key in arrays.files}
            except Exception as error:  # a damaged file can make zipfile and NumPy raise anything
                raise self._error(f"is damaged: {name} cannot be read") from error
        if not set(needed) <= set(found):
            raise self._error(f"is damaged: {name} is not what it should be")
        return found

    def _error(self, problem: str) -> ValueError:
        return ValueError(
            f"`backup_dir` {problem}. Give another folder, or remove this one to begin anew. "
            f"Received: backup_dir={str(self._folder)!r}"
        )


def fingerprint(parts: Iterable[Any]) -> str:
    """A digest of arrays and of what `repr` says of other things."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _file_name(task: Task) -> str:
    level = "references" if task.level is None else f"level-{task.level}"
    return f"task-{level}-{int(task.bodies[0])}.npz"
