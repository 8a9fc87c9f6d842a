"""How a pruning ratio rises while a model trains, as a schedule of TFMOT."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import LEGACY, keras, register
from keras_tl_defense._tfmot import import_tfmot
from keras_tl_defense._validation import check_integer
from keras_tl_defense.pruning.masks import pruned_count
from keras_tl_defense.pruning.ratios import check_ratio, rising_ratio

# Under Keras 3, where TFMOT does not work, the callback takes the schedule without its base class.
_Base: Any = import_tfmot().sparsity.keras.PruningSchedule if LEGACY else object


@register
class ActivationPruningSchedule(_Base):
    """Prune in rounds, each a step further, with training in between.

    Round `r` of `iterations` prunes `ratio * r / iterations`. It begins at training step
    `begin_step + (r - 1) * steps_per_iteration` and its ratio holds until the next round:

        round(step) = clip(1 + floor((step - begin_step) / steps_per_iteration), 0, iterations)
        ratio(step) = ratio * round(step) / iterations

    With the legacy Keras it is a `PruningSchedule` of TensorFlow Model Optimization and also serves
    `prune_low_magnitude`; load such a model in `activation_prune_scope()`, which knows it.

    The layers of their own that differentiators have with `tune="unfrozen"` are pruned alike: by
    the classes' activations, the same units in the same rounds.

    Args:
        ratio: Fraction that is pruned in the end, in `[0, 1)`.
        iterations: Rounds of pruning. Defaults to `5`.
        steps_per_iteration: Training steps from one round to the next. Defaults to `100`.
        begin_step: Training step of the first round; steps are counted from 1. Defaults to `1`.

    Raises:
        TypeError: An argument is not a number.
        ValueError: `ratio` is not in `[0, 1)`, or there are no rounds or steps.

    Example:
        >>> schedule = ActivationPruningSchedule(0.8, iterations=2, steps_per_iteration=10)
        >>> [round(float(schedule(step)[1]), 2) for step in (0, 1, 10, 11, 1000)]
        [0.0, 0.4, 0.4, 0.8, 0.8]

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022,
        Algorithm 2.
    """

    def __init__(
        self,
        ratio: float,
        iterations: int = 5,
        steps_per_iteration: int = 100,
        begin_step: int = 1,
    ) -> None:
        self.ratio = check_ratio("ratio", ratio)
        self.iterations = check_integer("iterations", iterations, 1)
        self.steps_per_iteration = check_integer("steps_per_iteration", steps_per_iteration, 1)
        self.begin_step = check_integer("begin_step", begin_step, 1)

    def round(self, step: Any) -> tf.Tensor:
        """The round that a training step belongs to, 0 before the first: int64 of the step's shape.

        Args:
            step: Integer or integer tensor.
        """
        since = tf.cast(step, tf.int64) - self.begin_step
        return tf.clip_by_value(1 + since // self.steps_per_iteration, 0, self.iterations)

    def __call__(self, step: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Whether a round begins with a training step, and the ratio that holds in it.

        Args:
            step: Integer or integer tensor.

        Returns:
            A boolean tensor and a float32 tensor.
        """
        current = self.round(step)
        begins = tf.not_equal(current, self.round(tf.cast(step, tf.int64) - 1))
        return begins, tf.gather(tf.constant([float(r) for r in self._ratios()]), current)

    def pruned_count(self, step: Any, units: int) -> tf.Tensor:
        """How many of so many units are pruned in a training step, exactly: int32 tensor.

        Args:
            step: Integer or integer tensor.
            units: Filters or connections of a layer.
        """
        counts = np.array([pruned_count(ratio, units) for ratio in self._ratios()], np.int32)
        return tf.gather(tf.constant(counts), self.round(step))

    def _ratios(self) -> list[Fraction]:
        """The ratio of each round, from round 0."""
        rounds = range(1, self.iterations + 1)
        return [Fraction(0), *(rising_ratio(self.ratio, r, self.iterations) for r in rounds)]

    def get_config(self) -> dict[str, Any]:
        """The arguments, in the nested form of TFMOT: `{"class_name": …, "config": {…}}`."""
        config = {
            "ratio": self.ratio,
            "iterations": self.iterations,
            "steps_per_iteration": self.steps_per_iteration,
            "begin_step": self.begin_step,
        }
        return {"class_name": keras.utils.get_registered_name(type(self)), "config": config}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ActivationPruningSchedule:
        """A schedule from its configuration, nested as `get_config` gives it, or the inner dict."""
        return cls(**config.get("config", config))
