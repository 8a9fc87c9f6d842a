"""Mimicry by who knows the masks of a defence, and none of its heads."""

from __future__ import annotations

import time
from typing import Any

import tensorflow as tf

from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.bounded import BoundedDescent
from keras_tl_defense.attacks.features import LayerFeatures, distance
from keras_tl_defense.attacks.inputs import check_takes_images, whole_pixels
from keras_tl_defense.attacks.limits import Limit, Norm
from keras_tl_defense.attacks.members import MemberChoice, Members
from keras_tl_defense.attacks.targets import check_apart
from keras_tl_defense.data import check_labels


class MaskedMimicryAttack:
    """Craft images that the Teacher and its pruned copies take for another one.

    The attacker has the Teacher and knows which filters each differentiator keeps: the very masks,
    or those of a defence that they have built themselves, with guessed ratios and images of their
    own. What the heads make of the features is unknown to them, so they imitate: the features of
    the target at the Teacher's layer, those that the heads of the members read, averaged, and those
    that the references' heads read, averaged, each in relation to the length of the target's. The
    sum, times the length of the Teacher's, becomes small as in `MimicryAttack`, and images and
    budgets are as there.

    Args:
        teacher: A built Functional or Sequential Keras model.
        layer: Name of the layer whose output is imitated, the Student's cut.
        defence: A `DifferentiatorEnsemble` with `mode="validate"`, fitted, with the masks.
        members: Which differentiators that know the target class are imitated; as for
            `AdaptiveAttack`. Defaults to `"sampled"`.
        samples: How many are sampled or fixed. Defaults to `5`.
        budget, norm, steps, restarts, learning_rate, batch_size, seed: As for `AdaptiveAttack`.
        preprocessing: Callable from images in 0..255 to what the Teacher takes. Defaults to the
            defence's.

    Raises:
        TypeError: It is no `DifferentiatorEnsemble`.
        RuntimeError: The defence was not fitted.
        ValueError: An argument is out of range, the Teacher has no such layer or takes no images,
            or the defence votes with all pairs.

    Example:
        >>> attack = MaskedMimicryAttack(teacher, "flatten", defence, budget=0.05, steps=20)
        >>> result = attack(x_source, x_target, y_source, y_target)
        >>> result.adversarial.shape
        (4, 32, 32, 3)

    Reference:
        Wang et al., "With Great Training Comes Great Vulnerability", USENIX Security 2018, for the
        attack that this one extends.
    """

    def __init__(
        self,
        teacher: Any,
        layer: str,
        defence: Any,
        *,
        members: Members = "sampled",
        samples: int = 5,
        budget: float | None = None,
        norm: Norm = "dssim",
        steps: int = 600,
        restarts: int = 0,
        learning_rate: float | None = None,
        batch_size: int = 16,
        seed: int = 0,
        preprocessing: Any = None,
    ) -> None:
        self._choose = MemberChoice(defence, members, samples, seed)
        self._features = LayerFeatures(teacher, layer, preprocessing or defence.preprocessing)
        check_takes_images(self._features.input_shape, "Teacher")
        wanted = tuple(defence.student.inputs[0].shape[1:])
        if self._features.input_shape != wanted:
            raise ValueError(
                "The Teacher must take the images that the Student takes. Received: a Teacher of "
                f"inputs {self._features.input_shape}, a Student of inputs {wanted}"
            )
        self.layer, self.defence = layer, defence
        self._limit = Limit(norm, budget)
        self.budget, self.norm = self._limit.budget, norm
        self._wanted = tf.function(self._look, reduce_retracing=True)
        self._search = BoundedDescent(
            self._aim,
            self._limit,
            steps=steps,
            restarts=restarts,
            optimizer="adam",
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            hint=f"Or lower `learning_rate`. Received: layer={layer!r}",
        )

    def __call__(
        self,
        x_source: Any,
        x_target: Any,
        y_source: Any,
        y_target: Any,
        *,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft images that look like `x_source` and are taken for `x_target`, masked and whole.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            x_target: Images of the same shape.
            y_source: Integer classes of the sources in `0..K-1`, shape `(n,)`.
            y_target: Integer classes of the targets.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted images; their `distance` is what was to become small.

        Raises:
            ValueError: The images do not fit the Teacher or each other, are not in 0..255, or a
                target is of its source's class.
            FloatingPointError: A gradient became NaN or infinite.
        """
        started = time.perf_counter()
        shape, classes = self._features.input_shape, self.defence.classes
        source, target = (
            whole_pixels(x, shape, name)
            for name, x in (("x_source", x_source), ("x_target", x_target))
        )
        count = len(source)
        if len(target) != count:
            raise ValueError(
                "There must be as many targets as sources. "
                f"Received: {len(target)} targets, {count} sources"
            )
        own = check_labels(y_source, classes, count, "y_source")
        wanted = check_labels(y_target, classes, count, "y_target")
        check_apart(own, wanted)
        chosen = self._choose(wanted)

        def context(part: slice, done: int) -> tuple[tf.Tensor, ...]:
            rows = tf.constant(chosen(part, done), tf.int32)
            labels = tf.constant(wanted[part], tf.int32)
            return rows, labels, *self._wanted(tf.constant(target[part], tf.float32), rows, labels)

        found = self._search(source, context, self._search.progress(count, verbose))
        return self._search.result(
            found,
            started,
            source=source,
            target=target,
            y_source=own,
            y_target=wanted,
            layer=self.layer,
            members=self._choose.kept(chosen, count),
        )

    def _look(
        self, images: tf.Tensor, members: tf.Tensor, classes: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Features of the Teacher, of the members and of the references."""
        found = self.defence.white_box(images, members, classes)
        return self._features(images), found["features"], found["reference_features"]

    def _aim(
        self, images: tf.Tensor, members: tf.Tensor, classes: tf.Tensor, *wanted: tf.Tensor
    ) -> tf.Tensor:
        whole, *masked = zip(self._look(images, members, classes), wanted, strict=True)
        missing = distance(*whole)
        length = tf.norm(whole[1], axis=1)
        for features, like in masked:
            size = like.shape[-1]
            apart = distance(tf.reshape(features, (-1, size)), tf.reshape(like, (-1, size)))
            relative = tf.reshape(apart, tf.shape(like)[:2]) / (tf.norm(like, axis=2) + 1e-12)
            missing += length * tf.reduce_mean(relative, axis=1)
        return missing
