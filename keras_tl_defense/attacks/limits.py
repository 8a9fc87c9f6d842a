"""How much a crafted input may differ from its source, in one of several measures."""

from __future__ import annotations

from typing import Literal

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_choice, check_positive
from keras_tl_defense.attacks.box import Box, check_change
from keras_tl_defense.attacks.dssim import dssim

Norm = Literal["dssim", "l2", "linf"]
_DEFAULTS: dict[str, float] = {"dssim": 0.01, "l2": 500.0, "linf": 8.0}


class Limit:
    """A budget in a norm.

    Under `"linf"` images are looked for in a box that leaves none of them over budget; under the
    other norms in all of 0..255, and leaving the budget costs a penalty.

    Args:
        norm: `"dssim"`, structural dissimilarity; `"l2"`, Euclidean, over all numbers of an image;
            `"linf"`, the largest change of any number; the last two in grey levels.
        budget: Largest value, in `(0, 1]`, above 0, or 1 and more; `None` takes 0.01, 500, or 8.
    """

    def __init__(self, norm: str, budget: float | None) -> None:
        self.norm = check_choice("norm", norm, tuple(_DEFAULTS))
        budget = _DEFAULTS[norm] if budget is None else budget
        self.budget = check_positive("budget", budget)
        if norm == "dssim" and self.budget > 1:
            raise ValueError(
                "A structural dissimilarity is in (0, 1]. For a budget in grey levels, give "
                f'`norm="linf"` or `norm="l2"`. Received: budget={budget!r}'
            )
        if norm != "dssim":
            check_change("budget", self.budget)
        self.penalised = norm != "linf"

    def measure(self, images: tf.Tensor, source: tf.Tensor) -> tf.Tensor:
        """How much images differ from their sources, shape `(batch,)`."""
        if self.norm == "dssim":
            return dssim(images, source)
        change = tf.reshape(images - source, (tf.shape(images)[0], -1))
        if self.norm == "linf":
            return tf.reduce_max(tf.abs(change), axis=1)
        return tf.sqrt(tf.maximum(tf.reduce_sum(tf.square(change), axis=1), 1e-12))

    def box(self, source: tf.Tensor) -> Box:
        """Where images are looked for."""
        return Box.around(source, 0, 255, np.floor(self.budget) if self.norm == "linf" else None)
