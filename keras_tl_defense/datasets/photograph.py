"""Photographs of a drawing: at a slant, before a background, in some light, by some camera."""

from __future__ import annotations

import numpy as np
from skimage.filters import gaussian
from skimage.transform import ProjectiveTransform, downscale_local_mean, resize, warp

from keras_tl_defense.datasets.drawings import MARGIN


def photograph(
    drawing: np.ndarray,
    colours: np.ndarray,
    behind: float,
    size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Photograph a drawing once.

    Args:
        drawing: Layers of shape `(pixels, pixels, layers)`, 1 where there is paint.
        colours: Colours of the layers in 0..1, of shape `(layers, 3)`.
        behind: Brightness of the background in 0..1.
        size: Height and width of the photograph.
        rng: Decides pose, background, light and camera.

    Returns:
        Uint8 array of shape `(size, size, 3)`.
    """
    pose = _pose(drawing.shape[0], 2 * size, rng)
    layers = warp(drawing, pose, output_shape=(2 * size, 2 * size), order=1)
    scene = _background(2 * size, behind, rng)
    for layer, colour in zip(np.moveaxis(layers, -1, 0), colours, strict=True):
        scene += layer[..., np.newaxis] * (colour - scene)
    return _expose(downscale_local_mean(scene, (2, 2, 1)), rng)


def _pose(source: int, target: int, rng: np.random.Generator) -> ProjectiveTransform:
    """The map from pixels of the photograph to pixels of the drawing."""
    angle = rng.normal(0, 0.14)
    scale = rng.uniform(0.95, 1.8)
    stretch = np.exp(rng.normal(0, 0.06))
    shift = rng.uniform(-0.2, 0.2, 2)
    tilt = rng.normal(0, 0.12, 2)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    view = np.array([[cos * stretch, -sin, shift[0]], [sin, cos / stretch, shift[1]], [*tilt, 1.0]])
    into = np.array([[2 / target, 0, 1 / target - 1], [0, 2 / target, 1 / target - 1], [0, 0, 1]])
    half = (source - 1) / 2
    out = np.array([[half / MARGIN, 0, half], [0, half / MARGIN, half], [0, 0, 1]])
    return ProjectiveTransform(matrix=out @ view @ into)


def _background(pixels: int, brightness: float, rng: np.random.Generator) -> np.ndarray:
    """Paint a gradient, blobs and texture in two colours, `(pixels, pixels, 3)`."""
    field = np.zeros((pixels, pixels))
    for cells, strength in ((2, 1.0), (5, 0.8), (16, 0.4)):
        grid = rng.normal(0, strength * rng.uniform(0, 1), (cells, cells))
        field += resize(grid, field.shape, order=1)
    share = 1 / (1 + np.exp(-field * np.exp(rng.uniform(0, 2.5))))
    first, second = brightness + rng.normal(0, 0.08, (2, 3)) + rng.normal(0, 0.15, (2, 1))
    return first + share[..., np.newaxis] * (second - first)


def _expose(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light a scene of values near 0..1 and take it with an imperfect camera."""
    size = scene.shape[0]
    gamma, light = np.exp(rng.normal(0, 0.3)), np.exp2(rng.uniform(-2, 0.4))
    cast = np.exp(rng.normal(0, 0.1, 3))
    slope = rng.normal(0, 0.35, 2)
    axis = np.linspace(-1, 1, size)
    shadow = np.exp(slope[0] * axis[:, np.newaxis] + slope[1] * axis)[..., np.newaxis]
    lit = np.clip(scene, 0, 1) ** gamma * light * shadow * cast
    blur = size / 32 * rng.uniform(0.2, 1.3, 2)
    lit = gaussian(lit, (*blur, 0))
    noisy = lit + rng.normal(0, rng.uniform(0.005, 0.06), lit.shape)
    return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)
