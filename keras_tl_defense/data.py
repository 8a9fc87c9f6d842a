"""What users pass as images and labels, checked and cut into batches.

Arrays, tensors and batched `tf.data.Dataset`s come out as the same NumPy batches, one at a time,
so that no pass over the data holds more than a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_integer

LOWEST_PIXEL, HIGHEST_PIXEL = -1.0, 256.0  # resizing may overshoot 0..255 a little


class Batches:
    """Checked batches of images and labels, to be iterated any number of times.

    Args:
        x: Array or tensor of shape `(n, *shape)`, or a `tf.data.Dataset` of batches: `images`, or
            `(images, labels)`.
        y: Integer array of shape `(n,)` or `(n, 1)`, labels in `0..classes-1`; `None` for a
            dataset, or where no labels are needed.
        shape: Shape of one image; `None` where any size will do.
        classes: Number of classes; `None` when labels are not needed.
        batch_size: Images per batch for arrays. A dataset keeps its own batches.
        pixels: Whether the images must be in 0..255.

    Raises:
        TypeError: Images are not numbers, or labels are not integers.
        ValueError: A shape does not fit, the images contain NaN or infinity, labels are missing
            or out of range, or a dataset is not batched.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        *,
        shape: tuple[int | None, ...],
        classes: int | None = None,
        batch_size: int = 32,
        pixels: bool = False,
    ) -> None:
        self._batch_size = check_integer("batch_size", batch_size, 1)
        self.shape = shape
        self.classes = classes
        self._pixels = pixels
        self._dataset = x if isinstance(x, tf.data.Dataset) else None
        if self._dataset is not None:
            _check_dataset(self._dataset, y, classes, shape)
            size = int(self._dataset.cardinality())
            if size == tf.data.INFINITE_CARDINALITY:
                raise ValueError(
                    "The dataset never ends. Leave `.repeat()` out, or add `.take(batches)`. "
                    "Received: a dataset of infinite cardinality"
                )
            self.count: int | None = size if size >= 0 else None
            return
        self._x = check_images(x, shape)
        self._y = np.zeros(0, np.int64)
        if classes is not None:
            if y is None:
                raise ValueError(
                    "The labels are missing. Pass `y`, integers of shape (n,), or a "
                    "`tf.data.Dataset` of (images, labels). Received: y=None"
                )
            self._y = check_labels(y, classes, len(self._x))
        self.count = -(-len(self._x) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `(images, labels)`: images as they came; labels int64, empty when not needed."""
        if self._dataset is None:
            for start in range(0, len(self._x), self._batch_size):
                part = slice(start, start + self._batch_size)
                images = self._checked(self._x[part], start)
                yield images, self._y[part]
            return
        seen = 0
        for element in self._dataset.as_numpy_iterator():
            parts = element if isinstance(element, tuple) else (element,)
            images, labels = (*parts, None)[:2]
            images = self._checked(check_images(images, self.shape), seen)
            seen += len(images)
            if self.classes is None:
                yield images, np.zeros(0, np.int64)
            else:
                yield images, check_labels(labels, self.classes, len(images))

    def _checked(self, images: np.ndarray, offset: int) -> np.ndarray:
        images = check_finite(images, offset)
        return check_pixels(images) if self._pixels else images


def check_images(x: Any, shape: tuple[int | None, ...], name: str = "x") -> np.ndarray:
    """Images as an array of numbers of shape `(n, *shape)`.

    Args:
        x: Array or tensor.
        shape: Shape of one image, `None` for a size that is free.
        name: What the images are called in error messages.

    Returns:
        The array, its dtype unchanged.
    """
    x = np.asarray(x)
    if x.dtype.kind not in "iuf" and x.dtype.name != "bfloat16":
        raise TypeError(
            "Images must be numbers (integers or floats). Decode or convert them first. "
            f"Received: {name}.dtype={x.dtype}"
        )
    expected = tuple("any" if size is None else size for size in shape)
    fits = x.ndim == len(shape) + 1 and all(
        want is None or have == want for have, want in zip(x.shape[1:], shape, strict=True)
    )
    if not fits:
        hint = "Resize or convert them to what the model takes."
        if x.ndim == len(shape):
            hint = "Add the batch dimension: x[None]."
        raise ValueError(
            f"Images must have shape (n, {', '.join(map(str, expected))}). {hint} "
            f"Received: {name}.shape={x.shape}"
        )
    if len(x) == 0:
        raise ValueError(f"At least one image is needed. Received: {name}.shape={x.shape}")
    return x


def check_finite(x: np.ndarray, offset: int = 0, name: str = "x") -> np.ndarray:
    """Return `x` if it has no NaN and no infinity.

    Args:
        x: Images of shape `(n, …)`.
        offset: Number of the first image, for the error message.
        name: What the images are called in error messages.

    Raises:
        ValueError: A value is NaN or infinite; the message says in which image.
    """
    if x.dtype.kind in "iu":
        return x
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    if not finite.all():
        raise ValueError(
            "Images must be finite, but NaN or infinity was found. Remove or repair the image. "
            f"Received: {name}[{offset + int(np.argmin(finite))}] with non-finite values"
        )
    return x


def check_pixels(x: np.ndarray, name: str = "x") -> np.ndarray:
    """Return `x` if it looks like images in 0..255.

    A grey level more on either side is let pass, as resizing may overshoot. Fractions of which none
    is above 1 are taken for images that were scaled.

    Raises:
        ValueError: Values are outside 0..255, or scaled.
    """
    low, high = float(x.min()), float(x.max())
    scaled = 0 < high <= 1 and bool((x != np.rint(x)).any())
    if low < LOWEST_PIXEL or high > HIGHEST_PIXEL or scaled:
        raise ValueError(
            "Images must be in 0..255. Pass them unscaled, and give the scaling to what the model "
            "takes as `preprocessing`, such as `keras.layers.Rescaling(1 / 255)`. "
            f"Received: {name} from {low:g} to {high:g}"
        )
    return x


def check_every_class(counts: np.ndarray) -> None:
    """Check that there are images of every class.

    Args:
        counts: Int array of shape `(classes,)`: images of each class.

    Raises:
        ValueError: A class has none; the message names it.
    """
    missing = np.flatnonzero(counts == 0)
    if len(missing):
        raise ValueError(
            "Every class needs at least one image, because layers are pruned by the activations of "
            f"the classes. Add images of class {', '.join(map(str, missing))}. "
            f"Received: no image of {len(missing)} of {len(counts)} classes"
        )


def check_labels(y: Any, classes: int | None, count: int, name: str = "y") -> np.ndarray:
    """Labels as an int64 array of shape `(count,)` in `0..classes-1`.

    Args:
        y: Integer array or tensor of shape `(count,)` or `(count, 1)`.
        classes: Number of classes; `None` where any number from 0 will do.
        count: Number of images that the labels belong to.
        name: What the labels are called in error messages.
    """
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] > 1:
        raise ValueError(
            "Labels must be class numbers, not one-hot rows. Convert them with "
            f"`y.argmax(axis=1)`. Received: {name}.shape={y.shape}"
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,):
        raise ValueError(
            f"There must be one label for each of the {count} images. Received: "
            f"{name}.shape={y.shape}"
        )
    if y.dtype.kind not in "iu":
        raise TypeError(
            "Labels must be integers, class numbers from 0. Convert them with "
            f"`y.astype(int)`. Received: {name}.dtype={y.dtype}"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or (classes is not None and high >= classes):
        last = "" if classes is None else classes - 1
        raise ValueError(
            f"Labels must be in 0..{last}, as the Student's outputs are numbered (the defence's "
            f"answers are one higher: subtract 1). Received: {name} from {low} to {high}"
        )
    return y.astype(np.int64)


def _check_dataset(
    dataset: tf.data.Dataset, y: Any, classes: int | None, shape: tuple[int | None, ...]
) -> None:
    if y is not None:
        raise ValueError(
            "A `tf.data.Dataset` brings its labels itself. Leave `y` out. "
            f"Received: y={type(y).__name__}"
        )
    spec = dataset.element_spec
    images = spec[0] if isinstance(spec, tuple) else spec
    if classes is not None and not (isinstance(spec, tuple) and len(spec) >= 2):
        raise ValueError(
            "The dataset has no labels. Make it one of (images, labels) batches. "
            f"Received: element_spec={spec}"
        )
    if getattr(images, "shape", None) is None:
        raise ValueError(
            "The dataset must yield image tensors or (images, labels). "
            f"Received: element_spec={spec}"
        )
    if images.shape.rank is not None and images.shape.rank != len(shape) + 1:
        raise ValueError(
            "The dataset must be batched. Call `.batch(32)` on it. "
            f"Received: images of shape {images.shape}"
        )
