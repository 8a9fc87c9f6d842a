"""Craft images within a budget: what the attacks on images have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_choice, check_integer, check_positive
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.descent import NO_GRADIENT, Descent, Rule, State, adadelta, adam
from keras_tl_defense.attacks.dssim import dssim
from keras_tl_defense.attacks.limits import Limit

_CHECK_EVERY = 10
Optimizer = Literal["adadelta", "adam"]
_RULES: dict[str, tuple[Callable[[float], Rule], float]] = {
    "adadelta": (adadelta, 1.0),
    "adam": (adam, 0.01),
}
_DEARER, _CHEAPER = 2.0, 1 / 1.5  # an image's penalty after steps that leave it over budget, or not
_MOST = 1000.0  # times the penalty, or a part of it
_RESTART_NOISE = 0.03  # of the variable, where 1 is about half of the grey levels
_NARROW_NOISE = 1.0  # the same, where it is about half of the budget
_NARROW_RATE = 10.0  # times the rate of Adam there, for changes that are not far smaller


class Found(NamedTuple):
    """Crafted images and their measures, a row for each source.

    Attributes:
        images: Whole grey levels, uint8 array of shape `(n, H, W, C)`.
        raw: The same before they were clipped and rounded, float32.
        aim: What was to become small, shape `(n,)`.
        dssim: Structural dissimilarity of each from its source.
        measure: What the budget bounds.
    """

    images: np.ndarray
    raw: np.ndarray
    aim: np.ndarray
    dssim: np.ndarray
    measure: np.ndarray

    @classmethod
    def nothing(cls, shape: tuple[int, ...]) -> Found:
        """What anything is better than."""
        far = [np.full(shape[0], np.inf, np.float32) for _ in range(3)]
        return cls(np.zeros(shape, np.uint8), np.zeros(shape, np.float32), *far)

    def improve(self, other: Found, budget: float) -> None:
        """Take from `other` what has no larger aim within budget, or comes nearer to the budget.

        Of equals the later: an aim of 0, reached for the members of one draw, holds for more then.
        """
        within, was_within = other.measure <= budget, self.measure <= budget
        nearer = within & (other.aim <= self.aim)
        better = np.where(was_within, nearer, within | (other.measure < self.measure))
        for own, new in zip(self, other, strict=True):
            own[better] = new[better]


class BoundedDescent:
    """Change images so that something becomes small, within a budget.

    Minimises `penalty * max(measure - budget, 0)² + aim`; see `MimicryAttack`. Each image has its
    own penalty, which rises while the image is over budget and falls while it is not.

    Args:
        aim: Maps images of shape `(batch, H, W, C)` and the context to numbers of shape `(batch,)`.
        limit: The budget.
        steps: Steps of descent.
        restarts: Further tries, from noise on the sources.
        optimizer: `"adadelta"` or `"adam"`.
        learning_rate: Of the optimizer; `None` takes 1 for Adadelta and 0.01 for Adam, 0.1 under
            a largest change.
        penalty: Weight of leaving the budget at first; `None` takes `100 / budget²`.
        batch_size: Images at once.
        seed: Decides the noise of restarts.
        hint: What to do where a gradient is no number.
    """

    def __init__(
        self,
        aim: Callable[..., tf.Tensor],
        limit: Limit,
        *,
        steps: int,
        restarts: int,
        optimizer: str,
        learning_rate: float | None,
        batch_size: int,
        seed: int,
        hint: str,
        penalty: float | None = None,
    ) -> None:
        self._aim, self._limit, self._seed = aim, limit, check_integer("seed", seed, 0)
        self.steps = check_integer("steps", steps, 1)
        self.restarts = check_integer("restarts", restarts, 0)
        rule, usual = _RULES[check_choice("optimizer", optimizer, tuple(_RULES))]
        if optimizer == "adam" and limit.norm == "linf":
            usual *= _NARROW_RATE
        rate = check_positive("learning_rate", usual if learning_rate is None else learning_rate)
        penalty = 100 / limit.budget**2 if penalty is None else penalty
        self.penalty = check_positive("penalty", penalty)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self._descent = Descent(self._loss, rule(rate), hint)
        self._checked = False
        self._judge = tf.function(partial(aim), reduce_retracing=True)

    def progress(self, images: int, verbose: int | str, steps: int | None = None) -> Any:
        """A progress bar for so many images; for all tries, unless steps are given."""
        steps = (self.restarts + 1) * self.steps if steps is None else steps
        batches = -(-images // self.batch_size)
        return keras.utils.Progbar(batches * steps, verbose=0 if verbose == 0 else 1)

    def __call__(
        self,
        source: np.ndarray,
        context: Callable[[slice, int], State],
        bar: Any,
        steps: int | None = None,
    ) -> Found:
        """The images of the smallest aim within budget, looked for every ten steps.

        Where none was within budget, the image that came closest to it.

        Args:
            source: Images of shape `(n, H, W, C)` in 0..255.
            context: Maps part of the sources and the steps done to tensors of shape `(batch, …)`
                for the aim of the next ten.
            bar: Progress bar.
            steps: Of a single try, in place of all.

        Raises:
            ValueError: The aim has no gradient.
            FloatingPointError: A gradient became NaN or infinite.
        """
        if not self._checked:
            first = slice(0, min(self.batch_size, len(source)))
            self._check_aim(tf.constant(source[first], tf.float32), context(first, 0))
            self._checked = True
        parts = []
        for start in range(0, len(source), self.batch_size):
            part = slice(start, min(start + self.batch_size, len(source)))
            original = tf.constant(source[part], tf.float32)
            best = Found.nothing(source[part].shape)
            for number in range(self.restarts + 1 if steps is None else 1):
                delta = self._start(number, start, original.shape)
                given = partial(context, part)
                self._descend(original, given, delta, steps or self.steps, best, bar)
            parts.append(best)
        return Found(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def result(self, found: Found, started: float, **known: Any) -> AttackResult:
        """What was found, as an attack returns it.

        Args:
            found: The images.
            started: When, by `time.perf_counter`.
            **known: What else the result says, such as `source`.
        """
        return AttackResult(
            adversarial=found.images,
            within_budget=found.measure <= self._limit.budget,
            raw=found.raw,
            distance=found.aim,
            dssim=found.dssim,
            gradients=(self.restarts + 1) * self.steps,
            seconds=time.perf_counter() - started,
            **known,
        )

    def _check_aim(self, images: tf.Tensor, context: State) -> None:
        """Check, without computing it, that there is a gradient beside that of the penalty."""

        @tf.function
        def slope(images: tf.Tensor, *context: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                tape.watch(images)
                aim = self._aim(images, *context)
            gradient = tape.gradient(aim, images)
            if gradient is None:
                raise ValueError(NO_GRADIENT)
            return gradient

        slope.get_concrete_function(images, *context)

    def _start(self, number: int, first: int, shape: tuple[int, ...]) -> tf.Tensor:
        """Where a try begins, whatever the size of batches; the first at the sources."""
        if number == 0:
            return tf.fill(shape, 1e-6)
        noise = [
            np.random.default_rng([self._seed, number, first + image]).standard_normal(shape[1:])
            for image in range(shape[0])
        ]
        size = _NARROW_NOISE if self._limit.norm == "linf" else _RESTART_NOISE
        return tf.constant(size * np.stack(noise), tf.float32)

    def _descend(
        self,
        original: tf.Tensor,
        context: Callable[[int], State],
        delta: tf.Tensor,
        steps: int,
        best: Found,
        bar: Any,
    ) -> None:
        """Craft a batch from `delta` on, and keep in `best` what is better."""
        box = self._limit.box(original)
        written = box.write(original)
        state = self._descent.start(delta)
        weight = np.full(len(original), self.penalty, np.float32)
        done = 0
        while done < steps:
            count, given = min(_CHECK_EVERY, steps - done), context(done)
            known = (written, original, tf.constant(weight), *given)
            state = self._descent(state, known, done, count)
            done += count
            raw = box.read(written + state[0]).numpy()
            images = np.rint(box.clip(raw)).astype(np.uint8)
            crafted = tf.constant(images, tf.float32)
            aim = self._judge(crafted, *given).numpy()
            likeness = measure = dssim(crafted, original).numpy()
            if self._limit.norm != "dssim":
                measure = self._limit.measure(crafted, original).numpy()
            weight *= np.where(measure > self._limit.budget, _DEARER, _CHEAPER)
            weight = np.clip(weight, self.penalty / _MOST, self.penalty * _MOST)
            best.improve(Found(images, raw, aim, likeness, measure), self._limit.budget)
            bar.add(count, [("aim", float(best.aim.mean()))])

    def _loss(
        self,
        delta: tf.Tensor,
        written: tf.Tensor,
        original: tf.Tensor,
        weight: tf.Tensor,
        *context: tf.Tensor,
    ) -> tf.Tensor:
        image = self._limit.box(original).read(written + delta)
        aim = self._aim(image, *context)
        if not self._limit.penalised:
            return aim
        excess = tf.nn.relu(self._limit.measure(image, original) - self._limit.budget)
        return weight * tf.square(excess) + aim
