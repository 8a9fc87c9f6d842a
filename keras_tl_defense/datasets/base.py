"""The one form in which every loader hands over its images, and what the loaders share."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from skimage.transform import resize

from keras_tl_defense._validation import check_integer, check_positive

_CHUNK = 256  # images resized at once: bounds the memory of the float copy


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images, split into a training and a test part.

    The images of a loader are ordered by class, so shuffle them before a part is split off. Two
    data sets are equal only when they are the same object: compare their arrays.

    Args:
        x_train: Array `(n, height, width, 3)`, `uint8`, RGB in 0..255. The training images.
        y_train: Array `(n,)`, `int64`, in `0..classes - 1`. Their classes.
        x_test: Array `(m, height, width, 3)`, `uint8`, RGB in 0..255. The test images.
        y_test: Array `(m,)`, `int64`, in `0..classes - 1`. Their classes.
        class_names: Tuple of strings. The name of each class, in the order of the labels.
        track_train: Array `(n,)`, `int64`, or `None`. Training images that share a number show
            one physical thing: keep them on one side of a split. Defaults to `None`.

    Raises:
        ValueError: An array has another type or shape, or a label has no name.

    Example:

    >>> import numpy as np
    >>> images, labels = np.zeros((2, 8, 8, 3), "uint8"), np.array([0, 1])
    >>> ImageDataset(images, labels, images, labels, ("stop", "yield"))
    ImageDataset(classes=2, image_shape=(8, 8, 3), train=2, test=2)
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    track_train: np.ndarray | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            _check_images(f"x_{part}", images)
            check_numbers(f"y_{part}", labels, len(images))
            check_classes(f"y_{part}", labels, self.classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                "The training and test images differ in size. Expected one size; resize them "
                f"first. Received: x_train.shape={self.x_train.shape}, "
                f"x_test.shape={self.x_test.shape}"
            )
        if self.track_train is not None:
            check_numbers("track_train", self.track_train, len(self.x_train))

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape `(height, width, 3)` of one image, as a model's input wants it."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels

    def hold_out(self, share: float = 0.2, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
        """Split the training images for a calibration.

        Args:
            share: Number in `(0, 1)`. The part of each class that is held out, at least one image;
                where there are tracks, of its tracks. Defaults to `0.2`.
            seed: Integer. Decides which. Defaults to `0`.

        Returns:
            Two data sets with the same test images: one with the training images that are left, one
            with those held out.

        Raises:
            ValueError: A class has only one image, or one track.

        Example:

        >>> from keras_tl_defense.datasets import synthetic
        >>> signs = synthetic.load_signs(train_per_class=10, test_per_class=1)
        >>> train, validation = signs.hold_out()
        >>> len(train.x_train), len(validation.x_train)
        (128, 32)
        """
        share = check_positive("share", share, 1)
        rng = np.random.default_rng(seed)
        things = np.arange(len(self.y_train)) if self.track_train is None else self.track_train
        held_out = np.zeros(len(self.y_train), bool)
        for label in np.unique(self.y_train):
            own = self.y_train == label
            names = rng.permutation(np.unique(things[own]))
            if len(names) < 2:
                raise ValueError(
                    "To hold images out, every class needs at least two training images, of "
                    "different tracks where there are tracks. Add images. "
                    f"Received: {len(names)} of class {label}"
                )
            count = min(len(names) - 1, max(1, round(share * len(names))))
            held_out |= own & np.isin(things, names[:count])
        left, taken = (
            replace(
                self,
                x_train=self.x_train[rows],
                y_train=self.y_train[rows],
                track_train=None if self.track_train is None else self.track_train[rows],
            )
            for rows in (~held_out, held_out)
        )
        return left, taken

    def __repr__(self) -> str:
        return (
            f"ImageDataset(classes={self.classes}, image_shape={self.image_shape}, "
            f"train={len(self.x_train)}, test={len(self.x_test)})"
        )


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"`{name}` is not a batch of RGB images. Expected uint8 values of shape "
            f"(n, height, width, 3); convert it first. Received: {name}.dtype={images.dtype}, "
            f"{name}.shape={images.shape}"
        )


def check_numbers(name: str, numbers: np.ndarray, count: int) -> None:
    """Raise a `ValueError` unless there is an int64 for each of `count` inputs."""
    if numbers.dtype != np.int64 or numbers.shape != (count,):
        raise ValueError(
            f"`{name}` does not fit its inputs. Expected one int64 for each of {count} inputs; "
            f"convert it with `.astype('int64')`, or mend its length. Received: "
            f"{name}.dtype={numbers.dtype}, {name}.shape={numbers.shape}"
        )


def check_classes(name: str, labels: np.ndarray, classes: int) -> None:
    """Raise a `ValueError` where a label has no class name."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"`{name}` holds a label without a class name. Expected labels in 0..{classes - 1}; "
            f"give a name for every class. Received: labels in {labels.min()}..{labels.max()}"
        )


def choose_names(names: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The class names that a caller wants, all by default.

    Raises:
        ValueError: One is not known or comes twice, or there is none.
    """
    if names is None:
        return tuple(known)
    wanted = () if isinstance(names, str) else tuple(names)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(known):
        raise ValueError(
            f"`classes` must be different names from {tuple(known)}. Received: classes={names!r}"
        )
    return wanted


def draw_parts(
    family: int,
    kinds: Sequence[int],
    draw: Callable[[int, np.random.Generator], np.ndarray],
    train_per_class: int,
    test_per_class: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Draw examples of some classes, for training and for testing.

    Each depends on the seed, its family and class, its part and its place in the class, and not on
    how many are drawn.

    Args:
        family: Number of the loader's, which keeps its random draws apart from others'.
        kinds: Numbers of the classes among all of the family, in the order of the labels.
        draw: Maps a label and a generator to an example.
        train_per_class: Training examples of each class, 1 or more.
        test_per_class: Test examples of each class, 1 or more.
        seed: 0 or more.

    Returns:
        `x_train`, `y_train`, `x_test` and `y_test`, ordered by class.

    Raises:
        ValueError: A number is no integer or too small.
    """
    counts = {
        "train": check_integer("train_per_class", train_per_class, 1),
        "test": check_integer("test_per_class", test_per_class, 1),
    }
    seed = check_integer("seed", seed, 0)
    found: dict[str, np.ndarray] = {}
    for part, (name, count) in enumerate(counts.items()):
        keys = [(family, part, kind, index) for kind in kinds for index in range(count)]
        streams = [np.random.SeedSequence(seed, spawn_key=key) for key in keys]
        labels = np.repeat(np.arange(len(kinds), dtype=np.int64), count)
        examples = [
            draw(label, np.random.default_rng(stream))
            for label, stream in zip(labels.tolist(), streams, strict=True)
        ]
        found |= {f"x_{name}": np.stack(examples), f"y_{name}": labels}
    return found


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """Resize a batch of images to squares, smoothing first where they shrink.

    Args:
        images: Array `(n, height, width, 3)`, `uint8`, in 0..255.
        size: Integer. The height and width wanted, in pixels.

    Returns:
        Array `(n, size, size, 3)`, `uint8`; `images` itself when the size is right already.

    Raises:
        ValueError: `images` has another type or shape.

    Example:

    >>> import numpy as np
    >>> resize_images(np.full((2, 30, 40, 3), 7, "uint8"), 16).shape
    (2, 16, 16, 3)
    """
    _check_images("images", images)
    if images.shape[1:3] == (size, size):
        return images
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        shape = (len(chunk), size, size, 3)
        smooth = resize(chunk, shape, order=1, anti_aliasing=True, preserve_range=True)
        resized[start : start + _CHUNK] = np.rint(smooth)
    return resized


def read_pack(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read named arrays from an `.npz` file, never unpickling anything.

    Args:
        path: Path of the file.
        names: Strings. The arrays that it must hold.

    Returns:
        Dictionary from each name to its array.

    Raises:
        ValueError: The file is damaged, holds pickled objects, or lacks one of the arrays.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/pack.npz", x=np.arange(3))
    ...     read_pack(Path(folder) / "pack.npz", ["x"])
    {'x': array([0, 1, 2])}
    """
    try:
        with np.load(path, allow_pickle=False) as pack:
            missing = [name for name in names if name not in pack]
            found = sorted(pack)
            arrays = {name: pack[name] for name in names if name in pack}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The file {path} cannot be read ({error}). Expected arrays written by `numpy.savez`, "
            f"without pickled objects; write it again. Received: path={str(path)!r}"
        ) from error
    if missing:
        raise ValueError(
            f"The file {path} lacks {missing}. Expected the arrays {list(names)}; write it again "
            f"with all of them. Received: arrays={found}"
        )
    return arrays


def check_folder(root: str | Path) -> Path:
    """Return `root` as a `Path`, or raise a `FileNotFoundError` when there is no such folder."""
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            "There is no such folder. Expected the folder that holds the data; check its "
            f"spelling, or download the data first. Received: root={str(root)!r}"
        )
    return folder
