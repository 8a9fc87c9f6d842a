"""The images that attacks are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_tl_defense.data import check_finite, check_images, check_pixels


def check_takes_images(shape: tuple[int | None, ...], model: str) -> None:
    """Check that a model takes images, of whose changes budgets tell.

    Args:
        shape: Of one input.
        model: What the model is called in the error.

    Raises:
        ValueError: It takes something else.
    """
    if len(shape) != 3:
        raise ValueError(
            f"Budgets are of images, so the {model} must take images of shape (H, W, C). Attack "
            "other inputs by `TargetAgnosticAttack`, `BackdoorAttack` or `as_art_estimator`. "
            f"Received: a {model} of inputs {shape}"
        )


def whole_pixels(x: Any, shape: tuple[int | None, ...], name: str) -> np.ndarray:
    """Images in whole grey levels, from which changes are counted.

    Resizing leaves fractions, and overshoots by up to a grey level: both are rounded off, as what
    is crafted will be.

    Args:
        x: Images of shape `(n, *shape)` in 0..255.
        shape: Of one image.
        name: What the images are called in errors.

    Returns:
        uint8 array of shape `(n, *shape)`.

    Raises:
        ValueError: The images are of another shape, or not in 0..255.
    """
    images = check_pixels(check_finite(check_images(x, shape, name), name=name), name)
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)
