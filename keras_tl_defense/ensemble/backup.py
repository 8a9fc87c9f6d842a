"""What is done of a fit, in a folder, so that it can go on when it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense.ensemble.fitting import Result, Task
from keras_tl_defense.ensemble.training import ClassImages

try:
    import fcntl
except ImportError:  # not on Windows, where nobody watches over the folder
    fcntl = None  # type: ignore[assignment]

_START, _DATA, _PART, _LOCK = "start.npz", "data.npz", ".part-", ".lock"


class Start(NamedTuple):
    """What a fit begins with.

    Attributes:
        drawn: The weights that `adapt` set, partly at random.
        seed: Seed of the fit.
    """

    drawn: list[np.ndarray]
    seed: int


class Backup:
    """A folder with the state before a fit, and a file for each task that is done.

    Files appear whole or not at all, and only their owner may read them: which classes the
    differentiators know may be a secret. One process uses the folder at a time, until `close`.

    Args:
        folder: Where; made when it is not there.
        identity: Arrays and texts by name that tell this fit from others.

    Attributes:
        start: What a fit that was stopped began with; `None` for a new one.

    Raises:
        ValueError: The folder holds other files, the backup of another fit, or a damaged one; or
            another process uses it.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise self._error("is a file", "Give the name of a folder.")
        digests = {name: fingerprint([part]) for name, part in identity.items()}
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for path in self._folder.iterdir()} - {_LOCK}
        self.start: Start | None = None
        if _START not in names and _DATA in names:
            raise self._error(f"is damaged: {_START} is missing")
        if _START not in names and any(not name.startswith(_PART) for name in names):
            raise self._error("holds files that are no backup of a fit")
        self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take(digests)
        except BaseException:
            self.close()
            raise

    def _take(self, digests: dict[str, str]) -> None:
        """Be the only one to use the folder, and read what a fit that was stopped began with."""
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._error(
                    "is in use by another process", "Wait for it, or give another folder."
                ) from None
        self._identity = json.dumps(digests)
        self._fit = ""
        if not (self._folder / _START).exists():
            return
        stored = self._read(_START, "identity", "seed")
        try:
            before = dict(json.loads(str(stored["identity"])))
        except ValueError:
            raise self._error(f"is damaged: {_START} is not what it should be") from None
        other = sorted(n for n in digests.keys() | before if digests.get(n) != before.get(n))
        if other:
            raise self._error(
                f"holds the backup of another fit, which differs in {', '.join(other)}"
            )
        drawn = [stored[name] for name in stored if name.startswith("drawn ")]
        if stored["seed"].shape or stored["seed"].dtype.kind != "i":
            raise self._error(f"is damaged: {_START} is not what it should be")
        self._begun(Start(drawn, int(stored["seed"])))

    def _begun(self, start: Start) -> None:
        self.start = start
        self._fit = fingerprint([start.seed, *start.drawn])  # in every file of this fit

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Backup:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def begin(self, start: Start) -> None:
        """Keep the state that the fit begins with."""
        drawn = {f"drawn {number}": array for number, array in enumerate(start.drawn)}
        self._write(_START, {"identity": self._identity, "seed": start.seed, **drawn})
        self._begun(start)

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
        remedy = "Remove this file to compute it again, or the folder to begin anew."
        result = self._read(name, "bodies", "fit", remedy=remedy)
        own = str(result.pop("fit")) == self._mark(task)
        if not own or not np.array_equal(result.pop("bodies"), task.bodies):
            raise self._error(f"is damaged: {name} is of another fit", remedy)
        if not gives(task, result):
            raise self._error(f"is damaged: {name} is not what it should be", remedy)
        return result

    def store(self, task: Task, result: Result) -> None:
        """Keep what a task gave."""
        given = {"bodies": task.bodies, "fit": self._mark(task)}
        self._write(_file_name(task), {**result, **given})

    def _mark(self, task: Task) -> str:
        return f"{self._fit} {task.level}"

    def _write(self, name: str, arrays: dict[str, Any]) -> None:
        # Others may not read it: what it holds is secret.
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=_PART, delete=False) as part:
            np.savez(part, **arrays)
        os.replace(part.name, self._folder / name)

    def _read(self, name: str, *needed: str, remedy: str = "") -> Result:
        with open(self._folder / name, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    found = {key: arrays[key] for key in arrays.files}
            except Exception as error:  # a damaged file can make zipfile and NumPy raise anything
                raise self._error(f"is damaged: {name} cannot be read", remedy) from error
        if not set(needed) <= set(found):
            raise self._error(f"is damaged: {name} is not what it should be", remedy)
        return found

    def _error(self, problem: str, remedy: str = "") -> ValueError:
        remedy = remedy or "Give another folder, or remove this one to begin anew."
        received = f"Received: backup_dir={str(self._folder)!r}"
        return ValueError(f"`backup_dir` {problem}. {remedy} {received}")


def fingerprint(parts: Iterable[Any]) -> str:
    """A digest of arrays and of what `repr` says of other things."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(part.tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()


def _file_name(task: Task) -> str:
    level = "references" if task.level is None else f"level-{task.level}"
    return f"task-{level}-{int(task.bodies[0])}.npz"
