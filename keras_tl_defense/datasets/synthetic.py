"""Images drawn by code: traffic-like signs, and everyday objects to train a Teacher on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from keras_tl_defense._validation import check_integer
from keras_tl_defense.datasets.base import ImageDataset, draw_parts
from keras_tl_defense.datasets.drawings import (
    SHAPES,
    SIGNS,
    draw_shape,
    draw_sign,
    shape_colours,
    sign_colours,
)
from keras_tl_defense.datasets.photograph import photograph


class _Family(NamedTuple):
    """A set of drawings, and the number that keeps its random draws apart from the other's."""

    number: int
    names: Iterable[str]
    draw: Callable[[str, int], np.ndarray]
    colours: Callable[[str, np.random.Generator], tuple[np.ndarray, float]]


_SIGNS = _Family(0, SIGNS, draw_sign, sign_colours)
_SHAPES = _Family(1, SHAPES, draw_shape, shape_colours)


def load_signs(
    train_per_class: int = 100, test_per_class: int = 30, size: int = 32, seed: int = 0
) -> ImageDataset:
    """Draw photographs of traffic-like signs, 16 classes of them.

    Several classes share outline and paints and differ in the pictogram alone. Nothing is read or
    downloaded. An image depends on the seed, its class, its part and its place in the class, and
    not on how many are drawn: asking for more adds images and changes none.

    Args:
        train_per_class: Integer. Training images of each class. Defaults to `100`.
        test_per_class: Integer. Test images of each class. Defaults to `30`.
        size: Integer, at least 8. Height and width of an image. Defaults to `32`.
        seed: Integer, at least 0. Other seeds draw other photographs of the same signs. Defaults
            to `0`.

    Returns:
        `ImageDataset`, ordered by class, its images of shape `(size, size, 3)`.

    Raises:
        ValueError: An argument is no integer or too small.

    Example:

    >>> load_signs(train_per_class=3, test_per_class=1)
    ImageDataset(classes=16, image_shape=(32, 32, 3), train=48, test=16)
    """
    return _load(_SIGNS, train_per_class, test_per_class, size, seed)


def load_shapes(
    train_per_class: int = 100, test_per_class: int = 20, size: int = 32, seed: int = 0
) -> ImageDataset:
    """Draw photographs of everyday objects, 28 classes of them, to train a Teacher on.

    No class is a sign of `load_signs`. The colours are any colours: only the form tells the class.

    Args:
        train_per_class: Integer. Training images of each class. Defaults to `100`.
        test_per_class: Integer. Test images of each class. Defaults to `20`.
        size: Integer, at least 8. Height and width of an image. Defaults to `32`.
        seed: Integer, at least 0. Other seeds draw other photographs of the same objects.
            Defaults to `0`.

    Returns:
        `ImageDataset`, ordered by class, its images of shape `(size, size, 3)`.

    Raises:
        ValueError: An argument is no integer or too small.

    Example:

    >>> load_shapes(train_per_class=3, test_per_class=1, size=48)
    ImageDataset(classes=28, image_shape=(48, 48, 3), train=84, test=28)
    """
    return _load(_SHAPES, train_per_class, test_per_class, size, seed)


def _load(family: _Family, train: int, test: int, size: int, seed: int) -> ImageDataset:
    size = check_integer("size", size, 8)
    names = tuple(family.names)
    drawings = [family.draw(name, 3 * size) for name in names]

    def draw(label: int, rng: np.random.Generator) -> np.ndarray:
        return photograph(drawings[label], *family.colours(names[label], rng), size, rng)

    parts = draw_parts(family.number, range(len(names)), draw, train, test, seed)
    return ImageDataset(**parts, class_names=names)
