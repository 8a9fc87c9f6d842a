"""What attacks need to know of classifiers and defences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

_SMALLEST = float(np.finfo(np.float32).tiny)
_ROUNDED = 0.02  # what sums of probabilities of half precision may be off


def sum_to_one(rows: Any) -> tf.Tensor:
    """Whether they are probabilities, boolean scalar."""
    rows = tf.cast(rows, tf.float32)
    off = tf.reduce_max(tf.abs(tf.reduce_sum(rows, axis=1) - 1))
    return (tf.reduce_min(rows) >= 0) & (off < _ROUNDED)


def as_logits(outputs: tf.Tensor) -> tf.Tensor:
    """A classifier's logits, float32; the logarithms of its outputs where it ends in a softmax."""
    outputs = tf.cast(outputs, tf.float32)
    return tf.where(sum_to_one(outputs), tf.math.log(tf.maximum(outputs, _SMALLEST)), outputs)


def ask_student(student_predict: Callable[[np.ndarray], Any], x: np.ndarray, of: str) -> np.ndarray:
    """A Student's outputs for images, a row for each.

    Args:
        student_predict: Maps images to them.
        x: Images.
        of: Whose shape the images have, for the error.

    Raises:
        ValueError: It takes no images of this shape, or returns something else.
    """
    try:
        outputs = np.asarray(student_predict(x), np.float64)
    except (ValueError, tf.errors.InvalidArgumentError) as error:
        raise ValueError(
            f"The Student does not take images of {of}. Resize them in `student_predict`. "
            f"Received: images of shape {x.shape[1:]}"
        ) from error
    if outputs.ndim != 2 or len(outputs) != len(x):
        raise ValueError(
            "`student_predict` must return the Student's logits or probabilities, a row for "
            f"each image. Received: shape {outputs.shape} for {len(x)} images"
        )
    return outputs


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
