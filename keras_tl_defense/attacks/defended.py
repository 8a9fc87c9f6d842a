"""What attacks need to know of classifiers and defences."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

_SMALLEST = float(np.finfo(np.float32).tiny)


def as_logits(outputs: tf.Tensor) -> tf.Tensor:
    """A classifier's logits, float32; the logarithms of its outputs where it ends in a softmax."""
    outputs = tf.cast(outputs, tf.float32)
    sums, least = tf.reduce_sum(outputs, axis=1), tf.reduce_min(outputs)
    probable = (least >= 0) & (tf.reduce_max(tf.abs(sums - 1)) < 1e-3)
    return tf.where(probable, tf.math.log(tf.maximum(outputs, _SMALLEST)), outputs)


def is_defence(classifier: Any) -> bool:
    """Whether it is a `DifferentiatorEnsemble` and no other Keras model."""
    return hasattr(type(classifier), "member_classes")


def check_defence(defence: Any) -> None:
    """Check that a defence can be attacked by gradients.

    Raises:
        TypeError: It is something else.
        RuntimeError: It was not fitted.
        ValueError: All pairs vote.
    """
    if not is_defence(defence):
        raise TypeError(
            "What is attacked must be a `DifferentiatorEnsemble`. For other Keras models, see "
            f"`MimicryAttack` and `GeneralAttack`. Received: {type(defence).__name__}"
        )
    if defence.mode == "vote":
        raise ValueError(
            "The votes of all pairs have no gradient. Make the defence with "
            "`mode=\"validate\"`. Received: a defence with mode='vote'"
        )
    if not defence.fitted:
        raise RuntimeError(
            "The defence has no differentiators to attack yet. Call `adapt` and `fit`, and "
            f"`calibrate`, before. Received: {defence!r}"
        )


def least_score(defence: Any) -> float | None:
    """The score that a defence asks for; `None` where votes decide."""
    return float(defence.calibration.threshold) if defence.decision == "score" else None


def certainty(found: dict[str, tf.Tensor], least: float | None, reject_threshold: int) -> tf.Tensor:
    """How far a defence is from rejecting images, above 0 where it accepts; with a gradient.

    Args:
        found: What it says of them, `score` and `margins` among it.
        least: The score that it asks for; `None` where votes decide.
        reject_threshold: Votes that reject.

    Returns:
        Float tensor of shape `(batch,)`: the score less what is asked for or, where votes decide,
        the margin that must be above 0, the smallest if one vote rejects.
    """
    if least is not None:
        return found["score"] - least
    return tf.sort(found["margins"], axis=1)[:, reject_threshold - 1]
