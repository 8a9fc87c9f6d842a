"""The mimicry attack: an image that a Teacher's layer takes for another one."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_callable, check_integer, check_positive
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.dssim import dssim
from keras_tl_defense.data import check_finite, check_images, check_labels, check_pixels
from keras_tl_defense.graph import ModelGraph

_SHRINK = 2 - 1e-6
_DECAY, _EPSILON = 0.95, 1e-7
_CHECK_EVERY = 10
_PROBE_STEPS = 50


class MimicryAttack:
    """Craft images whose features at a layer of the Teacher are those of a target image.

    Whoever has the Teacher can make a Student take an image of one class for another without
    knowing the Student: where the two share their first layers, equal features in gives equal
    answers out. Each image minimises `penalty * max(DSSIM - budget, 0)² + ‖features(target) -
    features(image)‖₂` by Adadelta over `w + δ`, with `w = arctanh((source / 255 - 1/2) * c)` and
    `image = (tanh(w + δ) / c + 1/2) * 255`. The answer is the closest image within budget after
    rounding to whole grey levels, looked for every 10 steps; where no image was within budget, the
    one that came closest to it, marked as a failure.

    Args:
        teacher: A built Functional or Sequential Keras model.
        layer: Name of the layer whose output is imitated; the Student's cut is the strongest place.
        budget: Largest structural dissimilarity from the source, in `(0, 1]`; 1 lifts the limit.
            Defaults to `0.01`.
        steps: Steps of Adadelta. Defaults to `2000`.
        learning_rate: Its rate. Defaults to `1.0`.
        penalty: Weight of leaving the budget. Defaults to `1000 / budget²`, which is 1e7 at 0.01.
        batch_size: Images that are crafted at once. Defaults to `64`.
        preprocessing: Callable from images in 0..255 to what the Teacher takes, when it does not
            take images in 0..255.

    Raises:
        ValueError: An argument is out of range, or the Teacher has no such layer or takes no
            images.

    Example:
        >>> attack = MimicryAttack(teacher, layer="flatten", budget=0.01, steps=600)
        >>> result = attack(x_source, x_target, y_source, y_target)
        >>> result.adversarial.shape, bool(result.within_budget.all())
        ((4, 32, 32, 3), True)

    Reference:
        Wang et al., "With Great Training Comes Great Vulnerability: Practical Attacks against
        Transfer Learning", USENIX Security 2018.
    """

    def __init__(
        self,
        teacher: Any,
        layer: str,
        *,
        budget: float = 0.01,
        steps: int = 2000,
        learning_rate: float = 1.0,
        penalty: float | None = None,
        batch_size: int = 64,
        preprocessing: Any = None,
    ) -> None:
        self._graph = ModelGraph(teacher, "teacher")
        if len(self._graph.input_shape) != 3:
            raise ValueError(
                "How much an image may differ is measured by DSSIM, so the Teacher must take "
                "images of shape (H, W, C). "
                f"Received: a Teacher of inputs {self._graph.input_shape}"
            )
        self._tensor = self._graph.layer_output(layer)
        self.layer = layer
        self.budget = check_positive("budget", budget, 1)
        self.steps = check_integer("steps", steps, 1)
        self.learning_rate = check_positive("learning_rate", learning_rate)
        penalty = 1000 / self.budget**2 if penalty is None else penalty
        self.penalty = check_positive("penalty", penalty)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.preprocessing = check_callable("preprocessing", preprocessing)
        self._features = tf.function(self._compute_features, reduce_retracing=True)
        self._compiled: dict[tuple[int, ...], Any] = {}

    def _advance(self, shape: tuple[int, ...]) -> Any:
        """The compiled steps for images of this shape, whatever the batch."""
        if shape not in self._compiled:
            images = tf.TensorSpec((None, *shape), tf.float32)
            features, count = tf.TensorSpec((None, None), tf.float32), tf.TensorSpec((), tf.int32)
            self._compiled[shape] = tf.function(
                self._run_steps, input_signature=[images, images, features, *[images] * 3, count]
            )
        return self._compiled[shape]

    def __call__(
        self,
        x_source: Any,
        x_target: Any,
        y_source: Any = None,
        y_target: Any = None,
        *,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft images that look like `x_source` and are taken for `x_target`.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            x_target: Images of the same shape.
            y_source: Integer classes of the sources in `0..K-1`, shape `(n,)`.
            y_target: Integer classes of the targets, shape `(n,)`.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted images with their distances.

        Raises:
            ValueError: The images do not fit the Teacher or each other, or are not in 0..255.
            FloatingPointError: The loss became NaN or infinite.
        """
        source = self._check(x_source, "x_source")
        target = self._check(x_target, "x_target")
        _check_count("x_target", target, "x_source", source)
        source_classes = _check_classes(y_source, len(source), "y_source")
        target_classes = _check_classes(y_target, len(source), "y_target")
        if (source_classes is None) != (target_classes is None):
            raise ValueError(
                "Whether a targeted attack succeeds depends on both classes. Pass `y_source` and "
                "`y_target`, or neither; where any other class will do, use `untargeted`. "
                f"Received: y_source={y_source is not None}, y_target={y_target is not None}"
            )
        if source_classes is not None and target_classes is not None:
            same = np.flatnonzero(source_classes == target_classes)
            if len(same):
                raise ValueError(
                    "A target must be of another class than its source, or nothing is attacked. "
                    f"Received: y_source[{same[0]}]=y_target[{same[0]}]={source_classes[same[0]]}"
                )
        return self._attack(source, target, source_classes, target_classes, verbose)

    def likest(
        self, x_source: Any, y_source: Any, x_pool: Any, y_pool: Any, count: int = 5
    ) -> np.ndarray:
        """Choose for each source the targets that the Teacher takes for most like it.

        An attacker to whom any wrong answer will do need not take targets at random. Likeness is
        the distance of the layer's features, in relation to the length of the target's.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            y_source: Their integer classes, shape `(n,)`.
            x_pool: Images of shape `(p, H, W, C)` that may be targets.
            y_pool: Their integer classes, shape `(p,)`.
            count: Targets for each source, all of different classes. Defaults to `5`.

        Returns:
            Int array of shape `(n, count)`: numbers of images of the pool, the likest first, of
            classes other than the source's; fewer columns where the pool has fewer classes.

        Raises:
            ValueError: The images do not fit the Teacher, are not in 0..255, or all are of a
                source's class.

        Example:
            >>> attack = MimicryAttack(teacher, layer="flatten", steps=60)
            >>> candidates = attack.likest(x_source, y_source, x_target, y_target, count=2)
            >>> result = attack.untargeted(x_source, x_target[candidates], y_source)
        """
        source, pool = self._check(x_source, "x_source"), self._check(x_pool, "x_pool")
        own = _check_classes(y_source, len(source), "y_source")
        others = _check_classes(y_pool, len(pool), "y_pool")
        count = check_integer("count", count, 1)
        if own is None or others is None or any((others == label).all() for label in own):
            raise ValueError(
                "Targets must be of another class than their sources. Pass the classes of both, "
                f"and a pool with more than one. Received: {0 if others is None else len(pool)} "
                "images in the pool with classes"
            )
        wanted, given = self._features_of(pool), self._features_of(source)
        square = np.sum(wanted**2, axis=1)
        apart = np.sum(given**2, axis=1)[:, None] + square - 2 * given @ wanted.T
        relative = apart / np.maximum(square, 1e-12)
        relative[own[:, None] == others] = np.inf
        classes = np.unique(others)
        members = [np.flatnonzero(others == label) for label in classes]
        nearest = np.stack([m[relative[:, m].argmin(axis=1)] for m in members], axis=1)
        order = np.take_along_axis(relative, nearest, axis=1).argsort(axis=1, kind="stable")
        least = min(count, int(min(np.sum(classes != label) for label in own)))
        return np.take_along_axis(nearest, order[:, :least], axis=1)

    def untargeted(
        self,
        x_source: Any,
        x_candidates: Any,
        y_source: Any = None,
        *,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft images that look like `x_source` and are taken for anything else.

        50 steps towards each candidate choose the one whose features are imitated best: nearest,
        in relation to their own length, because a dark or plain target is near to everything
        without being taken for anything. All steps are spent on that one.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            x_candidates: For each source, `m` target images of other classes, five in the paper,
                of shape `(n, m, H, W, C)`.
            y_source: Integer classes of the sources in `0..K-1`, shape `(n,)`.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted images with their distances; `y_target` is `None`.

        Raises:
            ValueError: The images do not fit the Teacher or each other, or are not in 0..255.
            FloatingPointError: The loss became NaN or infinite.
        """
        source = self._check(x_source, "x_source")
        candidates = np.asarray(x_candidates)
        if candidates.ndim != source.ndim + 1 or candidates.shape[1] < 1:
            raise ValueError(
                "Candidates must have shape (n, m, H, W, C): m target images for each source. "
                f"Received: x_candidates.shape={candidates.shape}"
            )
        _check_count("x_candidates", candidates, "x_source", source)
        source_classes = _check_classes(y_source, len(source), "y_source")
        n, m = candidates.shape[:2]
        flat = self._check(candidates.reshape(n * m, *candidates.shape[2:]), "x_candidates")
        probe = min(_PROBE_STEPS, self.steps)
        bar = self._progress(n * m, probe, verbose)
        _, distance, _ = self._craft(np.repeat(source, m, axis=0), flat, probe, bar)
        starts = range(0, len(flat), self.batch_size)
        parts = [self._features_of(flat[s : s + self.batch_size]) for s in starts]
        lengths = np.concatenate([np.linalg.norm(part, axis=1) for part in parts])
        relative = distance / np.maximum(lengths, 1e-12)
        best = relative.reshape(n, m).argmin(axis=1)
        target = candidates[np.arange(n), best]
        return self._attack(source, target, source_classes, None, verbose)

    def _attack(
        self,
        source: np.ndarray,
        target: np.ndarray,
        y_source: np.ndarray | None,
        y_target: np.ndarray | None,
        verbose: int | str,
    ) -> AttackResult:
        bar = self._progress(len(source), self.steps, verbose)
        adversarial, distance, dissimilarity = self._craft(source, target, self.steps, bar)
        return AttackResult(
            adversarial=adversarial,
            distance=distance,
            dssim=dissimilarity,
            within_budget=dissimilarity <= self.budget,
            source=source,
            target=target,
            y_source=y_source,
            y_target=y_target,
        )

    def _check(self, images: Any, name: str) -> np.ndarray:
        images = check_images(images, self._graph.input_shape, name)
        return check_pixels(check_finite(images, name=name), name)

    def _progress(self, images: int, steps: int, verbose: int | str) -> Any:
        batches = -(-images // self.batch_size)
        return keras.utils.Progbar(batches * steps, verbose=0 if verbose == 0 else 1)

    def _craft(
        self, source: np.ndarray, target: np.ndarray, steps: int, bar: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The nearest images within budget, their distances and their dissimilarities.

        Where none was within budget, the image that came closest to it.
        """
        parts = []
        for start in range(0, len(source), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self._craft_batch(source[part], target[part], steps, bar))
        return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))  # type: ignore[return-value]

    def _craft_batch(
        self, source: np.ndarray, target: np.ndarray, steps: int, bar: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        original = tf.constant(source, tf.float32)
        wanted = self._features(tf.constant(target, tf.float32))
        start = tf.atanh((original / 255 - 0.5) * _SHRINK)
        zero = tf.zeros_like(start)
        state: Any = (zero + 1e-6, zero, zero)
        advance = self._advance(source.shape[1:])
        best = np.zeros(source.shape, np.uint8)
        distance = np.full(len(source), np.inf, np.float32)
        dissimilarity = np.full(len(source), np.inf, np.float32)
        done = 0
        while done < steps:
            count = min(_CHECK_EVERY, steps - done)
            image, finite, *state = advance(start, original, wanted, *state, tf.constant(count))
            done += count
            if not finite:
                raise FloatingPointError(
                    f"The attack's loss became NaN or infinite within step {done} of {steps}. "
                    "Lower `penalty`, or check the Teacher on these images. "
                    f"Received: penalty={self.penalty}, layer={self.layer!r}"
                )
            rounded = np.rint(np.clip(image.numpy(), 0, 255)).astype(np.uint8)
            new_distance, new_dissimilarity = self._score(rounded, original, wanted)
            within, was_within = new_dissimilarity <= self.budget, dissimilarity <= self.budget
            nearer = within & (new_distance < distance)
            better = np.where(was_within, nearer, within | (new_dissimilarity < dissimilarity))
            best[better] = rounded[better]
            distance = np.where(better, new_distance, distance)
            dissimilarity = np.where(better, new_dissimilarity, dissimilarity)
            bar.add(count, [("distance", float(distance.mean()))])
        return best, distance, dissimilarity

    def _score(
        self, images: np.ndarray, original: tf.Tensor, wanted: tf.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        crafted = tf.constant(images, tf.float32)
        distance = _distance(self._features(crafted), wanted)
        return distance.numpy(), dssim(crafted, original).numpy()

    def _compute_features(self, images: tf.Tensor) -> tf.Tensor:
        images = self.preprocessing(images) if self.preprocessing else images
        features = self._graph.run(images, [self._tensor])[self._tensor]
        return tf.reshape(tf.cast(features, tf.float32), (tf.shape(features)[0], -1))

    def _features_of(self, images: np.ndarray) -> np.ndarray:
        starts = range(0, len(images), self.batch_size)
        parts = [tf.constant(images[s : s + self.batch_size], tf.float32) for s in starts]
        return np.concatenate([self._features(part).numpy() for part in parts])

    def _run_steps(
        self,
        start: tf.Tensor,
        original: tf.Tensor,
        wanted: tf.Tensor,
        delta: tf.Tensor,
        squared_gradient: tf.Tensor,
        squared_update: tf.Tensor,
        count: tf.Tensor,
    ) -> tuple[tf.Tensor, ...]:
        finite = tf.constant(True)
        for _ in tf.range(count):
            with tf.GradientTape() as tape:
                tape.watch(delta)
                image = _to_image(start + delta)
                excess = tf.nn.relu(dssim(image, original) - self.budget)
                distance = _distance(self._features(image), wanted)
                loss = self.penalty * tf.square(excess) + distance
            gradient = tape.gradient(loss, delta)
            squared_gradient = _DECAY * squared_gradient + (1 - _DECAY) * tf.square(gradient)
            update = gradient * tf.sqrt((squared_update + _EPSILON) / (squared_gradient + _EPSILON))
            squared_update = _DECAY * squared_update + (1 - _DECAY) * tf.square(update)
            delta = delta - self.learning_rate * update
            finite = tf.reduce_all(tf.math.is_finite(delta)) & finite
        return _to_image(start + delta), finite, delta, squared_gradient, squared_update


def _to_image(w: tf.Tensor) -> tf.Tensor:
    return (tf.tanh(w) / _SHRINK + 0.5) * 255


def _distance(features: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """Euclidean distance of each row, with a gradient of 0 (not NaN) where it is 0."""
    squared = tf.reduce_sum(tf.square(features - wanted), axis=1)
    return tf.sqrt(tf.maximum(squared, 1e-12))


def _check_count(name: str, array: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if len(array) != len(other):
        raise ValueError(
            f"There must be as many in `{name}` as in `{other_name}`. Received: "
            f"{name}.shape={array.shape}, {other_name}.shape={other.shape}"
        )


def _check_classes(y: Any, count: int, name: str) -> np.ndarray | None:
    return None if y is None else check_labels(y, None, count, name)
