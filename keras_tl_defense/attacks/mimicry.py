"""The mimicry attack: an image that a Teacher's layer takes for another one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.bounded import BoundedDescent, Optimizer
from keras_tl_defense.attacks.features import LayerFeatures, distance
from keras_tl_defense.attacks.inputs import check_takes_images, whole_pixels
from keras_tl_defense.attacks.limits import Limit, Norm
from keras_tl_defense.attacks.targets import check_apart
from keras_tl_defense.data import check_labels

_PROBE_STEPS = 50


class MimicryAttack:
    """Craft images whose features at a layer of the Teacher are those of a target image.

    Whoever has the Teacher can make a Student take an image of one class for another without
    knowing the Student: where the two share their first layers, equal features in gives equal
    answers out. Each image minimises `penalty * max(DSSIM - budget, 0)² + ‖features(target) -
    features(image)‖₂` by descent over `w + δ`, with `w = arctanh((source / 255 - 1/2) * c)` and
    `image = (tanh(w + δ) / c + 1/2) * 255`, `c = 1.98`. Under `norm="linf"` the changes are bounded
    by such a `tanh` instead of a penalty. The answer is the closest image within budget after
    rounding to whole grey levels, looked for every 10 steps; where no image was within budget, the
    one that came closest to it, marked as a failure.

    Args:
        teacher: A built Functional or Sequential Keras model.
        layer: Name of the layer whose output is imitated; the Student's cut is the strongest place.
            See `best_layer`.
        budget: How much an image may differ from its source, by `norm`: a structural dissimilarity
            in `(0, 1]`, of which 1 lifts the limit, or grey levels. Defaults to 0.01, 500 or 8.
        norm: `"dssim"`, of five scales for images of 176 pixels and more, else of one; `"l2"`,
            Euclidean over all numbers of an image; or `"linf"`, the largest change of any number.
        steps: Steps of descent. Defaults to `2000`.
        restarts: Further tries, from noise on the source; the best of all is the answer. Defaults
            to `0`.
        optimizer: `"adadelta"`, as in the paper, or `"adam"`, which succeeded as often with a
            quarter of the steps on faces. Defaults to `"adadelta"`.
        learning_rate: Of the optimizer. Defaults to 1 for Adadelta and 0.01 for Adam, 0.1 under
            `norm="linf"`.
        penalty: Weight of leaving the budget, at first: every ten steps each image's own doubles
            where it is over budget, and falls by a third where it is not. Defaults to `100 /
            budget²`, which is 1e6 at 0.01.
        batch_size: Images that are crafted at once. Defaults to `64`.
        preprocessing: Callable from images in 0..255 to what the Teacher takes, when it does not
            take images in 0..255.
        seed: Decides the noise of restarts.

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
        budget: float | None = None,
        norm: Norm = "dssim",
        steps: int = 2000,
        restarts: int = 0,
        optimizer: Optimizer = "adadelta",
        learning_rate: float | None = None,
        penalty: float | None = None,
        batch_size: int = 64,
        preprocessing: Any = None,
        seed: int = 0,
    ) -> None:
        self._features = LayerFeatures(teacher, layer, preprocessing)
        check_takes_images(self._features.input_shape, "Teacher")
        self.layer = layer
        self._limit = Limit(norm, budget)
        self.budget, self.norm = self._limit.budget, self._limit.norm
        hint = f"Received: layer={layer!r}"
        if self._limit.penalised:
            usual = "100 / budget²" if penalty is None else penalty
            hint = f"Or lower `penalty`. {hint}, penalty={usual}"
        self._search = BoundedDescent(
            self._aim,
            self._limit,
            steps=steps,
            restarts=restarts,
            optimizer=optimizer,
            learning_rate=learning_rate,
            penalty=penalty,
            batch_size=batch_size,
            seed=seed,
            hint=hint,
        )
        self.steps, self.restarts = self._search.steps, self._search.restarts
        self.batch_size, self.penalty = self._search.batch_size, self._search.penalty

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
            FloatingPointError: A gradient became NaN or infinite.
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
            check_apart(source_classes, target_classes)
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
        own = check_labels(y_source, None, len(source), "y_source")
        others = check_labels(y_pool, None, len(pool), "y_pool")
        count = check_integer("count", count, 1)
        classes = np.unique(others)
        if len(classes) == 1 and (own == classes).any():
            raise ValueError(
                "Targets must be of another class than their sources. Give a pool with more "
                f"classes. Received: a pool of class {classes[0]} alone, and sources of it"
            )
        given = self._features.of(source, self.batch_size)
        apart = np.full((len(source), len(classes)), np.inf)
        nearest = np.zeros(apart.shape, int)
        for start in range(0, len(pool), self.batch_size):
            part = slice(start, start + self.batch_size)
            wanted, columns = self._features.of(pool[part], self.batch_size), others[part]
            square = np.sum(wanted**2, axis=1)
            relative = np.sum(given**2, axis=1)[:, None] + square - 2 * given @ wanted.T
            relative /= np.maximum(square, 1e-12)
            for column in np.unique(columns):
                number = int(np.searchsorted(classes, column))
                rows = np.flatnonzero(columns == column)
                best = rows[relative[:, rows].argmin(axis=1)]
                least = relative[np.arange(len(source)), best]
                nearer = least < apart[:, number]
                apart[nearer, number] = least[nearer]
                nearest[nearer, number] = start + best[nearer]
        apart[own[:, None] == classes] = np.inf
        order = apart.argsort(axis=1, kind="stable")
        least_others = min(count, int(min(np.sum(classes != label) for label in own)))
        return np.take_along_axis(nearest, order[:, :least_others], axis=1)

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
            FloatingPointError: A gradient became NaN or infinite.
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
        started, probe = time.perf_counter(), min(_PROBE_STEPS, self.steps)
        bar = self._search.progress(n * m, verbose, probe)
        every = np.repeat(source, m, axis=0)
        apart = self._search(every, self._wanted(flat), bar, probe).aim
        parts = [
            flat[start : start + self.batch_size] for start in range(0, n * m, self.batch_size)
        ]
        lengths = np.concatenate(
            [np.linalg.norm(self._features.of(part, self.batch_size), axis=1) for part in parts]
        )
        relative = apart / np.maximum(lengths, 1e-12)
        best = relative.reshape(n, m).argmin(axis=1)
        target = flat.reshape(candidates.shape)[np.arange(n), best]
        result = self._attack(source, target, source_classes, None, verbose)
        return replace(
            result,
            gradients=result.gradients + m * probe,
            seconds=time.perf_counter() - started,
        )

    def _attack(
        self,
        source: np.ndarray,
        target: np.ndarray,
        y_source: np.ndarray | None,
        y_target: np.ndarray | None,
        verbose: int | str,
    ) -> AttackResult:
        started = time.perf_counter()
        found = self._search(
            source, self._wanted(target), self._search.progress(len(source), verbose)
        )
        return self._search.result(
            found,
            started,
            source=source,
            y_source=y_source,
            y_target=y_target,
            target=target,
            layer=self.layer,
        )

    def _check(self, images: Any, name: str) -> np.ndarray:
        return whole_pixels(images, self._features.input_shape, name)

    def _wanted(self, target: np.ndarray) -> Callable[[slice, int], tuple[tf.Tensor]]:
        """The targets' features, computed once for each part."""
        known: dict[int, tf.Tensor] = {}

        def context(part: slice, _: int) -> tuple[tf.Tensor]:
            if part.start not in known:
                known.clear()
                known[part.start] = tf.constant(self._features.of(target[part], self.batch_size))
            return (known[part.start],)

        return context

    def _aim(self, images: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
        return distance(self._features(images), wanted)


def _check_count(name: str, array: np.ndarray, other_name: str, other: np.ndarray) -> None:
    if len(array) != len(other):
        raise ValueError(
            f"There must be as many in `{name}` as in `{other_name}`. Received: "
            f"{name}.shape={array.shape}, {other_name}.shape={other.shape}"
        )


def _check_classes(y: Any, count: int, name: str) -> np.ndarray | None:
    return None if y is None else check_labels(y, None, count, name)
