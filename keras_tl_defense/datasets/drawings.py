"""The drawings behind the synthetic images: traffic-like signs and everyday objects.

A drawing is a few flat layers, each of filled polygons and round strokes in a square of [-1, 1], y
downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from skimage.draw import polygon2mask

Points = Sequence[tuple[float, float]] | np.ndarray
Part = tuple[Points, float]  # a stroke of this half width through the points; 0 fills them
Layer = Sequence[Part]

MARGIN = 1.15  # half the width of the square that a drawing is cut out of


def _turn(radius: Any, turns: float = 1.0, count: int = 72, start: float = 0.0) -> np.ndarray:
    """Points on a curve around the centre, clockwise from the top; `radius` may vary with them."""
    angle = 2 * np.pi * (start + turns * np.arange(count) / count)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _move(points: Points, x: float = 0.0, y: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.asarray(points, float) * scale + (x, y)


def _loop(radius: float, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    return _move(_turn(radius, 73 / 72, 73), x, y)  # the last point is the first


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# Name: outline, size of the face in it, and height and size of the pictogram.
_OUTLINES: dict[str, tuple[np.ndarray, float, float, float]] = {
    "disc": (_turn(1.0), 0.78, 0.0, 0.56),
    "plate": (_turn(1.0), 0.92, 0.0, 0.62),
    "triangle": (_move(_turn(1.25, count=3), y=0.3), 0.70, 0.34, 0.40),
    "yield": (_move(_turn(1.25, count=3, start=0.5), y=-0.3), 0.62, 0.0, 0.40),
    "diamond": (_turn(1.1, count=4), 0.84, 0.0, 0.50),
    "square": (_turn(1.3, count=4, start=0.125), 0.90, 0.0, 0.72),
    "octagon": (_turn(1.05, count=8, start=0.0625), 0.90, 0.0, 0.82),
}
_PAINT = {
    "red": (0.74, 0.09, 0.12),
    "white": (0.93, 0.93, 0.91),
    "blue": (0.06, 0.27, 0.62),
    "yellow": (0.96, 0.76, 0.10),
    "black": (0.07, 0.07, 0.08),
}
_PICTOGRAMS: dict[str, Layer] = {
    "nothing": [],
    "bar": [(_box(-1.1, -0.3, 1.1, 0.3), 0)],
    "cross": [([(-0.7, -0.7), (0.7, 0.7)], 0.2), ([(-0.7, 0.7), (0.7, -0.7)], 0.2)],
    "exclamation": [([(0, -1), (0, 0.1)], 0.2), ([(0, 0.85)], 0.24)],
    "zigzag": [([(0.4, -0.9), (-0.45, -0.35), (0.45, 0.2), (-0.35, 0.8)], 0.18)],
    "dots": [([(-0.55, 0)], 0.4), ([(0.55, 0)], 0.4)],
    "left": [([(0.9, 0), (-0.3, 0)], 0.2), ([(-1, 0), (-0.2, -0.75), (-0.2, 0.75)], 0)],
    "right": [([(-0.9, 0), (0.3, 0)], 0.2), ([(1, 0), (0.2, -0.75), (0.2, 0.75)], 0)],
    "ahead": [([(0, 0.9), (0, -0.3)], 0.2), ([(0, -1), (-0.75, -0.2), (0.75, -0.2)], 0)],
    "person": [
        ([(0, -0.8)], 0.22),
        ([(0, -0.4), (0, 0.2)], 0.22),
        ([(-0.65, -0.1), (0, -0.4), (0.6, 0)], 0.11),
        ([(-0.5, 0.95), (0, 0.2), (0.5, 0.95)], 0.15),
    ],
    "two": [([(-0.5, -0.55), (-0.2, -0.85), (0.3, -0.85), (0.5, -0.5), (0.4, -0.1),
              (-0.5, 0.85), (0.55, 0.85)], 0.16)],
    "four": [([(0.35, 0.9), (0.35, -0.9), (-0.6, 0.35), (0.7, 0.35)], 0.16)],
    "letters": [
        ([(-0.7, -0.3), (-0.95, -0.3), (-0.95, 0), (-0.7, 0), (-0.7, 0.3), (-0.95, 0.3)], 0.08),
        ([(-0.5, -0.3), (-0.1, -0.3), (-0.3, -0.3), (-0.3, 0.3)], 0.08),
        (_box(0.1, -0.3, 0.35, 0.3) + _box(0.1, -0.3, 0.1, -0.3), 0.08),
        ([(0.6, 0.3), (0.6, -0.3), (0.9, -0.3), (0.9, 0.03), (0.6, 0.03)], 0.08),
    ],
    "seven": [([(-0.55, -0.85), (0.5, -0.85), (-0.15, 0.9)], 0.16)],
}  # fmt: skip

# Name: outline, paint of the rim, of the face and of the pictogram, pictogram.
SIGNS: dict[str, tuple[str, str, str, str, str]] = {
    "limit 2": ("disc", "red", "white", "black", "two"),
    "limit 4": ("disc", "red", "white", "black", "four"),
    "limit 7": ("disc", "red", "white", "black", "seven"),
    "no passing": ("disc", "red", "white", "black", "dots"),
    "turn left": ("plate", "white", "blue", "white", "left"),
    "turn right": ("plate", "white", "blue", "white", "right"),
    "ahead only": ("plate", "white", "blue", "white", "ahead"),
    "danger": ("triangle", "red", "white", "black", "exclamation"),
    "crossing": ("triangle", "red", "white", "black", "cross"),
    "people": ("triangle", "red", "white", "black", "person"),
    "winding road": ("triangle", "red", "white", "black", "zigzag"),
    "yield": ("yield", "red", "white", "black", "nothing"),
    "priority road": ("diamond", "white", "yellow", "black", "nothing"),
    "end of priority": ("diamond", "white", "yellow", "black", "bar"),
    "stop": ("octagon", "white", "red", "white", "letters"),
    "footpath": ("square", "white", "blue", "white", "person"),
}

_OUTWARDS = np.linspace(0, 0.9, 40)
# Name: the body, and details in a second colour.
SHAPES: dict[str, tuple[Layer, Layer]] = {
    "star of five": ([(_turn(np.tile([1, 0.42], 5), count=10), 0)], []),
    "star of six": ([(_turn(np.tile([1, 0.55], 6), count=12), 0)], []),
    "ring": ([(_loop(0.75), 0.2)], []),
    "heart": ([([(0, 0.9), (-0.87, 0.02), (0, -0.4), (0.87, 0.02)], 0),
               ([(-0.46, -0.3)], 0.5), ([(0.46, -0.3)], 0.5)], []),
    "spiral": ([(_turn(_OUTWARDS, 2.4, 40), 0.1)], []),
    "letter A": ([([(-0.65, 0.9), (0, -0.9), (0.65, 0.9)], 0.15),
                  ([(-0.4, 0.3), (0.4, 0.3)], 0.13)], []),
    "letter K": ([([(-0.5, -0.9), (-0.5, 0.9)], 0.16),
                  ([(0.6, -0.9), (-0.45, 0.05), (0.6, 0.9)], 0.16)], []),
    "letter M": ([([(-0.75, 0.9), (-0.75, -0.9), (0, 0.3), (0.75, -0.9), (0.75, 0.9)], 0.15)], []),
    "checkerboard": ([(_box(-0.95, -0.95, 0.95, 0.95), 0)],
                     [(_move(_box(0, 0, 0.475, 0.475), 0.475 * i - 0.95, 0.475 * j - 0.95), 0)
                      for i in range(4) for j in range(4) if (i + j) % 2]),
    "stripes": ([(_box(-0.95, y, 0.95, y + 0.24), 0) for y in (-0.95, -0.36, 0.23, 0.82)],
                [(_box(-0.95, y, 0.95, y + 0.24), 0) for y in (-0.65, -0.06, 0.53)]),
    "house": ([(_box(-0.7, -0.1, 0.7, 0.95), 0), ([(-1, -0.1), (0, -0.95), (1, -0.1)], 0)],
              [(_box(-0.15, 0.35, 0.2, 0.95), 0), (_box(-0.5, 0.1, -0.25, 0.35), 0)]),
    "tree": ([(_move(_turn(np.tile([0.5, 0.42], 9), count=18), x, y), 0)
              for x, y in ((0, -0.5), (-0.38, -0.1), (0.38, -0.1))],
             [(_box(-0.13, 0.2, 0.13, 1), 0)]),
    "fish": ([(_turn(1.0) * (0.7, 0.45) - (0.2, 0), 0),
              ([(0.35, 0), (0.95, -0.45), (0.95, 0.45)], 0)],
             [([(-0.55, -0.1)], 0.1), ([(-0.15, -0.25), (-0.05, 0), (-0.15, 0.25)], 0.05)]),
    "flower": ([(_move(_turn(0.36), *point), 0) for point in _turn(0.6, count=6)],
               [([(0, 0)], 0.3)]),
    "cloud": ([([(-0.55, 0.25)], 0.38), ([(-0.1, -0.1)], 0.5), ([(0.5, 0.15)], 0.45),
               ([(-0.55, 0.4), (0.5, 0.4)], 0.23)], []),
    "ladder": ([([(x, -1), (x, 1)], 0.1) for x in (-0.45, 0.45)]
               + [([(-0.4, y), (0.4, y)], 0.08) for y in (-0.75, -0.25, 0.25, 0.75)], []),
    "wheel": ([(_loop(0.85), 0.14), *(([(0, 0), tuple(end)], 0.06) for end in _turn(0.8, count=8))],
              [([(0, 0)], 0.22)]),
    "moon": ([(_move([*_turn(0.95, 0.7, 60, 0.5),
                      *_move(_turn(0.72, 0.62, 60, 0.52), 0.28, -0.2)[::-1]], x=0.2), 0)], []),
    "key": ([(_loop(0.32, y=-0.55), 0.13), ([(0, -0.2), (0, 0.95)], 0.1),
             ([(0, 0.9), (0.4, 0.9)], 0.1), ([(0, 0.55), (0.3, 0.55)], 0.1)], []),
    "cup": ([([(-0.75, -0.6), (0.45, -0.6), (0.3, 0.75), (-0.6, 0.75)], 0),
             (_move(_turn(0.32, 0.55), 0.5, 0), 0.09)], [([(-0.6, -0.5), (0.3, -0.5)], 0.07)]),
    "hourglass": ([([(-0.7, -0.9), (0.7, -0.9), (-0.7, 0.9), (0.7, 0.9)], 0)],
                  [([(-0.8, y), (0.8, y)], 0.1) for y in (-0.9, 0.9)]),
    "umbrella": ([(_turn(0.95, 0.5, 60, -0.25), 0)],
                 [([(0, -0.1), (0, 0.75), (0.12, 0.88), (0.28, 0.75)], 0.07)]),
    "mushroom": ([(_turn(1.0, 0.5, 60, -0.25) * (0.95, 0.8) + (0, 0.1), 0)],
                 [(_box(-0.22, 0.1, 0.22, 0.9), 0), ([(-0.4, -0.2)], 0.13), ([(0.3, -0.3)], 0.16)]),
    "boat": ([([(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)], 0)],
             [([(0.05, -0.9), (0.05, 0.3)], 0.05), ([(-0.1, -0.85), (-0.1, 0.2), (-0.8, 0.2)], 0)]),
    "crown": ([([(-0.9, 0.7), (-0.95, -0.5), (-0.45, 0.05), (0, -0.8), (0.45, 0.05), (0.95, -0.5),
                 (0.9, 0.7)], 0)], [([(x, 0.45)], 0.12) for x in (-0.5, 0, 0.5)]),
    "gear": ([(_turn(np.tile([0.95, 0.95, 0.68, 0.68], 8), count=32), 0)], [([(0, 0)], 0.32)]),
    "glasses": ([(_loop(0.36, x), 0.1) for x in (-0.52, 0.52)], [([(-0.13, 0), (0.13, 0)], 0.08)]),
    "snowman": ([([(0, 0.45)], 0.5), ([(0, -0.3)], 0.36)],
                [(_box(-0.3, -0.98, 0.3, -0.58), 0), ([(-0.5, -0.58), (0.5, -0.58)], 0.06)]),
}  # fmt: skip


def draw_sign(name: str, pixels: int) -> np.ndarray:
    """Draw the rim, the face and the pictogram of a sign.

    Args:
        name: One of `SIGNS`.
        pixels: Height and width.

    Returns:
        Array of shape `(pixels, pixels, 3)`, 1 where a layer has paint.
    """
    outline, *_, pictogram = SIGNS[name]
    points, face, y, scale = _OUTLINES[outline]
    centre = points.mean(axis=0)
    ink = [(_move(part, y=y, scale=scale), width * scale) for part, width in _PICTOGRAMS[pictogram]]
    return _paint_layers([[(points, 0)], [((points - centre) * face + centre, 0)], ink], pixels)


def draw_shape(name: str, pixels: int) -> np.ndarray:
    """Draw the body and the details of an object.

    Args:
        name: One of `SHAPES`.
        pixels: Height and width.

    Returns:
        Array of shape `(pixels, pixels, 2)`, 1 where a layer has paint.
    """
    return _paint_layers(SHAPES[name], pixels)


def _paint_layers(layers: Sequence[Layer], pixels: int) -> np.ndarray:
    return np.stack([_paint(layer, pixels) for layer in layers], axis=-1)


def _paint(layer: Layer, pixels: int) -> np.ndarray:
    axis = np.linspace(-MARGIN, MARGIN, pixels)
    x, y = np.meshgrid(axis, axis)
    paint = np.zeros((pixels, pixels), bool)
    for part, width in layer:
        points = np.asarray(part, float)
        if width == 0:
            corners = (points[:, ::-1] + MARGIN) * (pixels - 1) / (2 * MARGIN)
            paint |= polygon2mask(paint.shape, corners)
            continue
        for start, end in zip(points, points[1:] if len(points) > 1 else points, strict=False):
            along = end - start
            t = ((x - start[0]) * along[0] + (y - start[1]) * along[1]) / max(along @ along, 1e-9)
            t = np.clip(t, 0, 1)
            near = np.hypot(x - start[0] - t * along[0], y - start[1] - t * along[1])
            paint |= near <= width
    return paint.astype(np.float32)


def sign_colours(name: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The worn paints of a sign's layers, and any brightness of the background."""
    paints = np.array([_PAINT[paint] for paint in SIGNS[name][1:4]])
    worn = rng.uniform(0, 0.35)
    faded = paints * (1 - worn) + paints.mean(axis=1, keepdims=True) * worn
    return np.clip(faded + rng.normal(0, 0.03, 3), 0, 1), rng.uniform(0.05, 0.9)


def shape_colours(_: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Random colours of a body and its details, and a background that the body stands out of."""
    body = rng.uniform(0, 1)
    detail, behind = (body + rng.uniform((0.3, 0.4), (0.7, 0.6))) % 1
    colours = np.array([[body], [detail]]) + rng.normal(0, 0.22, (2, 3))
    return np.clip(colours, 0, 1), behind
