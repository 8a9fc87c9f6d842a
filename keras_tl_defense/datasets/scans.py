"""Grey images that resemble slices of brain scans, drawn by code."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.filters import gaussian
from skimage.transform import downscale_local_mean, resize

from keras_tl_defense._validation import check_integer
from keras_tl_defense.datasets.base import ImageDataset, choose_names, draw_parts

_FAMILY = 2  # after signs and shapes
SCANS = (
    "healthy",
    "wide_ventricles",
    "shrunken",
    "dark_wedge",
    "bright_bleeding",
    "bright_crescent",
    "bright_lens",
    "cyst",
    "scattered_spots",
    "ring",
    "glioma",
    "meningioma",
    "metastases",
    "central_mass",
    "shifted_midline",
)
"""Names of all classes of `load_scans`."""


def load_scans(
    train_per_class: int = 100,
    test_per_class: int = 50,
    size: int = 32,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> ImageDataset:
    """Draw grey slices of heads: a skull, tissue, ventricles, and one of 15 findings.

    Pose, shape, texture, contrast and noise are random. The drawings are no patients' and fit for
    no diagnosis. A Teacher may have some of the classes and its Student the others. An image
    depends on the seed, its class, its part and its place in the class, and not on how many are
    drawn.

    Args:
        train_per_class: Integer. Training images of each class. Defaults to `100`.
        test_per_class: Integer. Test images of each class. Defaults to `50`.
        size: Integer, at least 16. Height and width of an image. Defaults to `32`.
        seed: Integer, at least 0. Other seeds draw other images. Defaults to `0`.
        classes: Names from `SCANS`, in the order of the labels. Defaults to all.

    Returns:
        `ImageDataset`, ordered by class, its images of shape `(size, size, 3)` with three equal
        channels.

    Raises:
        ValueError: An argument is no integer or too small, or there is no such class.

    Example:

    >>> load_scans(train_per_class=3, test_per_class=1, classes=SCANS[:10])
    ImageDataset(classes=10, image_shape=(32, 32, 3), train=30, test=10)
    """
    names = choose_names(classes, SCANS)
    size = check_integer("size", size, 16)

    def draw(label: int, rng: np.random.Generator) -> np.ndarray:
        return np.repeat(_draw(names[label], size, rng)[..., np.newaxis], 3, axis=2)

    kinds = [SCANS.index(name) for name in names]
    parts = draw_parts(_FAMILY, kinds, draw, train_per_class, test_per_class, seed)
    return ImageDataset(**parts, class_names=names)


class _Head:
    """A slice in coordinates in which the inside of the skull is the unit disc."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        pixels = 2 * size
        axis = np.linspace(-1, 1, pixels)
        x, y = np.meshgrid(axis, axis)
        angle, shift = rng.normal(0, 0.15), rng.normal(0, 0.04, 2)
        x, y = x - shift[0], y - shift[1]
        x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        self.x, self.y = x / rng.uniform(0.6, 0.7), y / rng.uniform(0.74, 0.84)
        self.r = np.hypot(self.x, self.y)
        self.rng = rng
        self.texture = self.clouds(12)
        self.edge = self.clouds(6)
        brain = 0.5 + 0.06 * self.texture - 0.12 * (self.r > 0.82 + 0.05 * self.edge)
        self.image = np.where(self.r < 1, brain, 0.03)
        self.image[(self.r >= 1) & (self.r < 1 + rng.uniform(0.1, 0.16))] = rng.uniform(0.8, 1)

    def clouds(self, cells: int) -> np.ndarray:
        """Smooth noise."""
        return resize(self.rng.normal(size=(cells, cells)), self.x.shape, order=3)

    def paint(self, where: np.ndarray, grey: float, strength: float = 1.0) -> None:
        """Give a grey to what is inside the skull."""
        soft = gaussian((where & (self.r < 1)).astype(float), 1.0) * strength
        self.image += soft * (grey - self.image)

    def ellipse(
        self, x: float, y: float, width: float, height: float, turn: float = 0.0, rough: float = 0.0
    ) -> np.ndarray:
        """Where an ellipse is; `rough` frays its edge."""
        u, v = self.x - x, self.y - y
        u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
        return np.hypot(u / width, v / height) < 1 + rough * self.edge

    def ventricles(self, scale: float, shift: float = 0.0) -> None:
        """Two dark wings beside the midline."""
        for side in (-1, 1):
            for y, turn in ((-0.18, 0.35), (0.22, -0.35)):
                wing = self.ellipse(
                    side * 0.13 * scale + shift, y, 0.09 * scale, 0.25 * scale**0.5, -side * turn
                )
                self.paint(wing, 0.12)


def _draw(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A slice as uint8 of shape `(size, size)`."""
    head = _Head(size, rng)
    wide = rng.uniform(1.9, 2.4) if name == "wide_ventricles" else rng.uniform(0.8, 1.2)
    head.ventricles(wide, rng.choice([-1, 1]) * rng.uniform(0.2, 0.3) * (name == "shifted_midline"))
    _find(name, head, rng)
    image = downscale_local_mean(gaussian(head.image, rng.uniform(0.3, 1.0)), (2, 2))
    image = np.clip(image, 0, 1) ** rng.lognormal(0, 0.15) * rng.uniform(0.75, 1.0)
    image += rng.normal(0, rng.uniform(0.01, 0.05), image.shape)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _find(name: str, head: _Head, rng: np.random.Generator) -> None:
    """Draw the finding of a class."""
    side = rng.choice([-1, 1])
    angle = rng.uniform(-0.9, 0.9) + (np.pi if side < 0 else 0)
    x, y = 0.55 * np.cos(angle), 0.55 * np.sin(angle)
    size = rng.uniform(0.2, 0.32)
    turn, rough = rng.uniform(0, np.pi), 0.25
    outer = np.cos(np.arctan2(head.y, head.x) - angle)
    if name == "shrunken":
        head.paint(head.r > rng.uniform(0.76, 0.84) + 0.04 * head.edge, 0.1)
    elif name == "dark_wedge":
        wedge = (outer > np.cos(rng.uniform(0.35, 0.55))) & (head.r > 0.35)
        head.paint(wedge, 0.28, 0.85)
    elif name == "bright_bleeding":
        head.paint(head.ellipse(x, y, size, 0.7 * size, turn, 0.2), 0.92)
    elif name == "bright_crescent":
        inner = rng.uniform(0.8, 0.87)
        head.paint((outer > np.cos(rng.uniform(0.9, 1.3))) & (head.r > inner), 0.85)
    elif name == "bright_lens":
        head.paint(head.ellipse(1.6 * x, 1.6 * y, 0.28, 0.5, angle), 0.85)
    elif name == "cyst":
        head.paint(head.ellipse(x, y, size, size), 0.1)
    elif name == "scattered_spots":
        for _ in range(rng.integers(6, 11)):
            at = complex(*rng.uniform((-0.45, -0.6), (0.45, 0.6)))
            head.paint(head.ellipse(at.real, at.imag, 0.07, 0.07), 0.85)
    elif name == "ring":
        head.paint(head.ellipse(x, y, size, size, 0, 0.1), 0.85)
        head.paint(head.ellipse(x, y, 0.6 * size, 0.6 * size, 0, 0.1), 0.2)
    elif name == "glioma":
        head.paint(head.ellipse(x, y, 1.7 * size, 1.4 * size, turn, rough), 0.33, 0.8)
        head.paint(head.ellipse(x, y, 0.9 * size, 0.7 * size, turn, rough), 0.75)
    elif name == "meningioma":
        head.paint(head.ellipse(1.5 * x, 1.5 * y, 0.9 * size, 0.9 * size, 0, 0.05), 0.75)
    elif name == "metastases":
        for _ in range(rng.integers(3, 5)):
            at = rng.uniform(0.5, 0.85) * np.exp(1j * rng.uniform(0, 2 * np.pi))
            head.paint(head.ellipse(at.real, at.imag, 0.2, 0.2, 0, 0.1), 0.33, 0.8)
            head.paint(head.ellipse(at.real, at.imag, 0.12, 0.12), 0.8)
    elif name == "central_mass":
        head.paint(head.ellipse(0, rng.uniform(0.3, 0.5), 0.8 * size, 0.8 * size, 0, 0.05), 0.8)
