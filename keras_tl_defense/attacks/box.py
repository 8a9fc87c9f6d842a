"""Inputs written so that an optimiser may change them freely and they stay in a range."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense.data import check_finite

_SHRINK = 1.98  # so that inputs at the ends of the range move, too: the paper's 2 - 1e-6 holds them


class Box(NamedTuple):
    """`inputs = low + (tanh(w) / c + 1/2) * (high - low)`, with `c = 1.98`.

    Inputs may leave the range by half a hundredth of it, and are clipped in the end.

    Attributes:
        low: Lowest values, a number or a tensor of the shape of inputs.
        high: Highest values.
    """

    low: Any
    high: Any

    @classmethod
    def around(cls, source: tf.Tensor, low: float, high: float, budget: float | None) -> Box:
        """What is within a budget of the sources, and in the range."""
        if budget is None:
            return cls(low, high)
        return cls(tf.maximum(source - budget, low), tf.minimum(source + budget, high))

    def write(self, inputs: tf.Tensor) -> tf.Tensor:
        """The `w` of inputs."""
        return tf.atanh(((inputs - self.low) / (self.high - self.low) - 0.5) * _SHRINK)

    def read(self, w: tf.Tensor) -> tf.Tensor:
        """The inputs of a `w`."""
        return self.low + (tf.tanh(w) / _SHRINK + 0.5) * (self.high - self.low)

    def clip(self, inputs: np.ndarray) -> np.ndarray:
        """Inputs within the range."""
        clipped = np.clip(inputs, np.asarray(self.low), np.asarray(self.high))
        return np.asarray(clipped, inputs.dtype)


def check_range(
    value_range: tuple[float, float] | None, shape: tuple[int | None, ...]
) -> tuple[float, float]:
    """A lowest and a higher highest value; of images 0 and 255, unless others are given.

    Raises:
        ValueError: They are not, or inputs that are no images are given none.
    """
    if value_range is None:
        if len(shape) == 3:
            return 0.0, 255.0
        raise ValueError(
            "Inputs that are no images may have any range. Give it as `value_range`, such as "
            f"(-1, 1). Received: value_range=None for inputs of shape {tuple(shape)}"
        )
    if np.shape(value_range) != (2,) or not -np.inf < value_range[0] < value_range[1] < np.inf:
        raise ValueError(
            "`value_range` must be a lowest and a higher highest value. "
            f"Received: value_range={value_range!r}"
        )
    return float(value_range[0]), float(value_range[1])


def check_in_range(x: np.ndarray, value_range: tuple[float, float]) -> np.ndarray:
    """Inputs that are finite and in their range, as they came.

    Raises:
        ValueError: They are not.
    """
    low, high = value_range
    if not low <= check_finite(x).min() <= x.max() <= high:
        raise ValueError(
            f"Inputs must have values in {low:g}..{high:g}, the `value_range`. Scale them, or give "
            f"the range that they have. Received: values from {x.min():g} to {x.max():g}"
        )
    return x


def is_grey(shape: tuple[int, ...], value_range: tuple[float, float]) -> bool:
    """Whether inputs are images of whole grey levels."""
    return value_range == (0, 255) and len(shape) == 3


def check_change(name: str, change: float) -> None:
    """Check that images of whole grey levels can be changed by so much.

    Raises:
        ValueError: They cannot.
    """
    if change < 1:
        raise ValueError(
            f"Images have whole grey levels, of 0..255, so `{name}` must be at least 1. "
            f"Received: {name}={change!r}"
        )
