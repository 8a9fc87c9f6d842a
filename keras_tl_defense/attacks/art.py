"""Any attack of the adversarial-robustness-toolbox, on a Student, a Teacher or a defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_callable
from keras_tl_defense.attacks.defended import (
    as_logits,
    certainty,
    check_defence,
    is_defence,
    least_score,
)
from keras_tl_defense.attacks.descent import NO_GRADIENT

_TIE = 1e-5


def as_art_estimator(classifier: Any, *, preprocessing: Any = None) -> Any:
    """A classifier for the attacks of adversarial-robustness-toolbox.

    A `DifferentiatorEnsemble` has K+1 outputs: the Student's logits and, before them, one that is
    the largest where the defence rejects: the Student's largest logit, less how far the score is
    above its threshold (before `calibrate`, how far the members that decide agree). What members
    check an image is drawn as for any image, and gradients go through them. A later `calibrate`
    does not change the estimator. The Student's class `c` is output `c + 1`; attacks without target
    count a rejection as success, so give them targets. What they make goes into `evaluate_defence`
    as an `AttackResult`, rounded to uint8.

    Any other Keras model has its logits; of a softmax, logarithms are taken. Inputs of another
    range, signals in -1..1 for one, are attacked in 0..255, with
    `preprocessing=keras.layers.Rescaling(2 / 255, offset=-1)`. Some attacks of that library,
    DeepFool for one, are written for images in 0..1; `GeneralAttack` scales them, and ends
    HopSkipJump where that library would halve a step for ever, at an answer that is taken back.

    Args:
        classifier: A fitted `DifferentiatorEnsemble`, or a Keras model of images that returns
            logits or probabilities.
        preprocessing: Callable from images in 0..255 to what a Keras model takes; a defence has its
            own, and refuses another.

    Returns:
        An `art.estimators.classification.TensorFlowV2Classifier` of images in 0..255. Where a
        gradient becomes NaN or infinite, or an output NaN, it raises a `FloatingPointError`.

    Raises:
        ImportError: adversarial-robustness-toolbox is not installed.
        RuntimeError: A defence was not fitted.
        ValueError: All pairs of a defence vote, which has no gradient, it is given a
            preprocessing, or the classifier is no Keras model with an output for each of at least
            two classes.

    Example:
        >>> estimator = as_art_estimator(defence)
        >>> estimator.predict(x_test[:2].astype("float32")).shape  # 16 classes, and rejection
        (2, 17)

    Reference:
        Nicolae et al., "Adversarial Robustness Toolbox v1.0.0", arXiv:1807.01069.
    """
    return make_estimator(classifier, preprocessing)


def make_estimator(
    classifier: Any,
    preprocessing: Any,
    around: Callable[[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]], tf.Tensor] | None = None,
    highest: float = 255.0,
) -> Any:
    """What `as_art_estimator` returns, of images in 0..`highest`, and its outputs changed.

    Args:
        classifier: A defence or a Keras model.
        preprocessing: Of a Keras model.
        around: Maps images and the function that maps images to outputs to other outputs.
        highest: What stands for 255.
    """
    try:
        from art.estimators.classification import TensorFlowV2Classifier
    except ImportError as error:
        raise ImportError(
            "General attacks need adversarial-robustness-toolbox: "
            "pip install adversarial-robustness-toolbox"
        ) from error
    defended = is_defence(classifier)
    if defended:
        check_defence(classifier)
        if preprocessing is not None:
            raise ValueError(
                "A defence scales its images itself. Leave `preprocessing` out. "
                f"Received: preprocessing={preprocessing!r}"
            )
    least = least_score(classifier) if defended else None
    model = classifier.student if defended else classifier
    shapes = [tuple(output.shape) for output in getattr(model, "outputs", ())]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 2:
        found = f"outputs of shape {' and '.join(map(str, shapes))}" if shapes else repr(classifier)
        raise ValueError(
            "The classifier must be a Keras model with one output, logits or probabilities of at "
            f"least two classes, one for each. Received: {found}"
        )
    shape = tuple(model.inputs[0].shape[1:])
    scaling = (
        classifier.preprocessing if defended else check_callable("preprocessing", preprocessing)
    )

    def logits(images: tf.Tensor) -> tf.Tensor:
        images = tf.cast(images, tf.float32)
        return as_logits(model(scaling(images) if scaling else images, training=False))

    def outputs(images: tf.Tensor) -> tf.Tensor:
        own = logits(images)
        if not defended:
            return own
        found, largest = classifier.call(images), tf.reduce_max(own, axis=1)
        sure = certainty(found, least, classifier.reject_threshold)
        below = largest - _TIE * (1 + tf.abs(largest))  # at the threshold, a tie is no rejection
        accepted = sure > 0 if least is None else sure >= 0
        rejected = tf.where(
            accepted, tf.minimum(largest - sure, below), tf.maximum(largest - sure, largest)
        )
        return tf.concat([rejected[:, None], own], axis=1)

    some_images = tf.TensorSpec((None, *shape), tf.float32)

    @tf.function(input_signature=[some_images])
    def answered(images: tf.Tensor) -> tf.Tensor:
        images *= 255 / highest
        return around(images, outputs) if around else outputs(images)

    @tf.function(input_signature=[some_images])
    def of_all(images: tf.Tensor) -> tf.Tensor | None:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(images)
            found = answered(images)
        if tape.gradient(found, images) is None:  # of which a Jacobian says 0
            return None
        return tape.batch_jacobian(
            found, images, parallel_iterations=1, experimental_use_pfor=False
        )

    @tf.function(input_signature=[some_images, tf.TensorSpec((None,), tf.int32)])
    def of_each(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(images)
            found = tf.gather(answered(images), labels, batch_dims=1)
        return tape.gradient(found, images)

    class Classifier(TensorFlowV2Classifier):
        """With compiled gradients of classes, and errors where attacks would take NaN for 0."""

        gradients = 0

        def _finite(self, gradient: Any) -> Any:
            self.gradients += 1
            if gradient is None or np.asarray(gradient).dtype == object:
                raise ValueError(NO_GRADIENT)
            if not np.isfinite(gradient).all():
                raise FloatingPointError(
                    f"The attack's gradient became NaN or infinite at step {self.gradients}, "
                    "counted over all batches. Check what the classifier says of these images."
                )
            return gradient

        def predict(self, x: Any, *others: Any, **options: Any) -> np.ndarray:
            found = np.asarray(super().predict(x, *others, **options))
            if np.isnan(found).any():
                raise FloatingPointError(
                    f"The classifier's outputs became NaN after {self.gradients} steps. Check what "
                    "it says of these images."
                )
            return found

        def loss_gradient(self, x: Any, y: Any, *others: Any, **options: Any) -> Any:
            return self._finite(super().loss_gradient(x, y, *others, **options))

        def class_gradient(
            self, x: np.ndarray, label: Any = None, training_mode: bool = False, **options: Any
        ) -> np.ndarray:
            if self.preprocessing_defences:
                found = self._finite(super().class_gradient(x, label, training_mode, **options))
            elif label is None:
                found = self._finite(of_all(tf.cast(x, tf.float32)))
            else:
                labels = tf.broadcast_to(tf.cast(label, tf.int32), [len(x)])
                found = self._finite(of_each(tf.cast(x, tf.float32), labels))[:, None]
            return np.array(found)  # a copy, into which attacks may write

    return Classifier(
        model=lambda images, training=False: answered(tf.cast(images, tf.float32)),
        nb_classes=shapes[0][1] + defended,
        input_shape=shape,
        loss_object=tf.keras.losses.CategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, highest),
    )
