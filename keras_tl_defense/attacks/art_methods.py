"""What methods of adversarial-robustness-toolbox lack: levelled logits, mean outputs, an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

_NOISE, SAMPLES = 8.0, 8  # of EOT-PGD, in grey levels
_LEAD = 10.0  # of a logit, beyond which the gradient of the cross-entropy soon becomes 0
_HALVINGS = 60  # of a step of HopSkipJump, after which it is nothing


def patient(attack: Any) -> Any:
    """HopSkipJump that ends where a classifier takes back an answer, and starts where it is told.

    It would start from random images without a seed. And it halves a step until the image is
    adversarial, for ever where the image that it stands on no longer is: at a threshold, a
    batch and a single image may be answered differently.
    """

    class Patient(attack):
        failures = 0

        def _init_sample(
            self, x: Any, y: int, y_p: int, init_pred: int, adv_init: Any, *others: Any
        ) -> Any:
            if self.targeted:
                return (adv_init, init_pred) if init_pred == y != y_p else None
            return (adv_init, y_p) if init_pred != y_p else None

        def _adversarial_satisfactory(
            self, samples: np.ndarray, *given: Any, **options: Any
        ) -> Any:
            found = super()._adversarial_satisfactory(samples, *given, **options)
            self.failures = self.failures + 1 if len(samples) == 1 and not found.any() else 0
            if self.failures > _HALVINGS:
                self.failures = 0
                return np.ones_like(found)
            return found

    return Patient


def levelled(images: tf.Tensor, outputs: Callable[[tf.Tensor], tf.Tensor]) -> tf.Tensor:
    """Outputs that are made smaller where the largest leads by so much that gradients vanish."""
    found = outputs(images)
    top = tf.math.top_k(found, 2).values
    return found / tf.stop_gradient(tf.maximum((top[:, :1] - top[:, 1:]) / _LEAD, 1.0))


def expected(
    images: tf.Tensor, outputs: Callable[[tf.Tensor], tf.Tensor], random: tf.random.Generator
) -> tf.Tensor:
    """The mean of outputs under noise."""
    shape = (SAMPLES, tf.shape(images)[0], 1, 1, 1)
    size = random.uniform(shape, 0, _NOISE)
    noise = size * random.normal(tf.concat([[SAMPLES], tf.shape(images)], axis=0))
    noisy = tf.reshape(tf.clip_by_value(images + noise, 0, 255), (-1, *images.shape[1:]))
    found = levelled(noisy, outputs)
    return tf.reduce_mean(tf.reshape(found, (SAMPLES, -1, found.shape[1])), axis=0)
