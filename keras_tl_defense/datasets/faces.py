"""Photographs of faces: one class for each person, few images of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_tl_defense._validation import check_integer
from keras_tl_defense.datasets.base import (
    ImageDataset,
    check_folder,
    read_pack,
    resize_images,
)

PACK = "lfw64.npz"
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load(root: str | Path, size: int = 64) -> ImageDataset:
    """Read face photographs from `lfw64.npz` in a folder.

    The file holds the four arrays `x_train`, `y_train`, `x_test` and `y_test` of an
    `ImageDataset`: crops of Labeled Faces in the Wild, or any other faces stored in the same way.
    No name of a person is read or shown: the classes are called "person 0", "person 1", and so on.

    Args:
        root: String or path. The folder that holds `lfw64.npz`.
        size: Integer. The height and width that the images are resized to. Defaults to `64`.

    Returns:
        `ImageDataset`, its images of shape `(size, size, 3)`.

    Raises:
        FileNotFoundError: There is no such folder, or no `lfw64.npz` in it.
        ValueError: `size` is out of range, or the file lacks an array or is damaged.

    Reference:
        Huang et al., "Labeled Faces in the Wild", University of Massachusetts Amherst, 2007.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> faces = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype="uint8")
    >>> people = np.array([0, 0, 1, 1, 2, 2])
    >>> arrays = {"x_train": faces, "y_train": people, "x_test": faces, "y_test": people}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/lfw64.npz", **arrays)
    ...     load(folder, size=32)
    ImageDataset(classes=3, image_shape=(32, 32, 3), train=6, test=6)
    """
    size = check_integer("size", size, 8)
    path = check_folder(root) / PACK
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {PACK} in the folder. Expected a file with the arrays {list(_ARRAYS)}; "
            f"write it with `numpy.savez`. Received: root={str(root)!r}"
        )
    arrays = read_pack(path, _ARRAYS)
    y_train, y_test = arrays["y_train"].astype(np.int64), arrays["y_test"].astype(np.int64)
    people = 1 + max(int(y_train.max(initial=-1)), int(y_test.max(initial=-1)))
    return ImageDataset(
        x_train=resize_images(arrays["x_train"], size),
        y_train=y_train,
        x_test=resize_images(arrays["x_test"], size),
        y_test=y_test,
        class_names=tuple(f"person {person}" for person in range(people)),
    )
