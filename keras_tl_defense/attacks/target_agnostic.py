"""The target-agnostic attack: inputs that excite one unit of the Teacher's bottleneck each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any, Literal

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_choice, check_integer, check_positive
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.box import (
    Box,
    check_change,
    check_in_range,
    check_range,
    is_grey,
)
from keras_tl_defense.attacks.defended import sum_to_one
from keras_tl_defense.attacks.descent import Descent, adam
from keras_tl_defense.attacks.features import LayerFeatures, distance
from keras_tl_defense.data import check_images, check_labels, check_pixels
from keras_tl_defense.metrics import Rate

_BLANK = 0.01  # of the range of values
_SAMPLES = 64  # random inputs that tell how large features are
_TIMES = 100.0  # a wanted feature, in sizes of the largest that random inputs have


class TargetAgnosticAttack:
    """Craft inputs that drive one unit of a layer high and all others to zero.

    The Student's own layers take such features for one class or other with great confidence,
    whatever the Student: the attacker needs neither its answers nor any image of its classes, and
    tries one unit after the other. Each input minimises the mean squared distance of its features
    from `strength` at its unit and 0 elsewhere, by Adam over `w`, with `input = (tanh(w) / c +
    1/2)` times the range of values, or of what the budget allows.

    Args:
        teacher: A built Functional or Sequential Keras model, of images or of other arrays.
        layer: Name of the layer that is excited, the Student's cut; defaults to the last before the
            output.
        start: What inputs begin as, when they are not given: `"blank"`, the middle of the range
            with a hundredth of noise, without which no unit may stir, or `"random"`, uniform noise.
        strength: What is wanted of the unit: the more, the less it counts that others stir, too.
            Defaults to 100 times the largest feature that random inputs have.
        budget: Largest change of any number from inputs that are given, in their units; `None`
            sets no limit but the range.
        steps: Steps of Adam. Defaults to `300`.
        learning_rate: Of Adam, for `w`. Defaults to `0.05`.
        value_range: Lowest and highest value of inputs. Defaults to `(0, 255)` for images, which
            then have whole grey levels; other inputs need it, and results of theirs are not
            rounded.
        batch_size: Inputs that are crafted at once. Defaults to `64`.
        preprocessing: Callable from inputs to what the Teacher takes.
        seed: Decides the noise.

    Raises:
        ValueError: An argument is out of range, or the Teacher has no such layer.

    Example:
        >>> attack = TargetAgnosticAttack(teacher, "flatten", steps=60)
        >>> result = attack(units=range(8))
        >>> result.adversarial.shape
        (8, 32, 32, 3)

    Reference:
        Rezaei and Liu, "A Target-Agnostic Attack on Deep Models: Exploiting Security
        Vulnerabilities of Transfer Learning", ICLR 2020.
    """

    def __init__(
        self,
        teacher: Any,
        layer: str | None = None,
        *,
        start: Literal["blank", "random"] = "blank",
        strength: float | None = None,
        budget: float | None = None,
        steps: int = 300,
        learning_rate: float = 0.05,
        value_range: tuple[float, float] | None = None,
        batch_size: int = 64,
        preprocessing: Any = None,
        seed: int = 0,
    ) -> None:
        self._features = LayerFeatures(teacher, layer, preprocessing)
        self._shape = self._features.fixed_shape
        self.layer = self._features.layer
        self._start = check_choice("start", start, ("blank", "random"))
        self.strength = strength if strength is None else check_positive("strength", strength)
        self.budget = budget if budget is None else check_positive("budget", budget)
        self.value_range = check_range(value_range, self._shape)
        self._grey = is_grey(self._shape, self.value_range)
        if self._grey and self.budget is not None:
            check_change("budget", self.budget)
        self.steps = check_integer("steps", steps, 1)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.seed = check_integer("seed", seed, 0)
        rule = adam(check_positive("learning_rate", learning_rate))
        hint = f"Or lower `learning_rate` or `strength`. Received: layer={self.layer!r}"
        self._descent = Descent(self._loss, rule, hint)

    def __call__(
        self,
        units: Sequence[int] | None = None,
        x: Any = None,
        y_source: Any = None,
        *,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft an input for each unit.

        Args:
            units: Numbers of units of the layer's flat output; `None` takes all.
            x: Inputs to begin with, of shape `(len(units), …)`, or one for all.
            y_source: Their integer classes, shape `(len(units),)`; `evaluate_defence` then counts
                which inputs are taken for another class.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted inputs, in the order of the units. Which classes they are taken for, and how
            surely, is for `effectiveness` to say.

        Raises:
            ValueError: A unit does not exist, or inputs do not fit the Teacher or the range; or a
                budget is set and no inputs are given.
            FloatingPointError: A gradient became NaN or infinite.
        """
        started = time.perf_counter()
        size = self._features.of(np.full((1, *self._shape), self.value_range[0]), 1).shape[1]
        numbers = np.arange(size) if units is None else np.asarray(units)
        if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "iu":
            raise ValueError(
                "`units` must be some integers; inputs to begin with are passed as `x`. "
                f"Received: {numbers.dtype} of shape {numbers.shape}"
            )
        if numbers.min() < 0 or numbers.max() >= size:
            raise ValueError(
                f"The layer {self.layer!r} has the units 0..{size - 1}. "
                f"Received: units from {numbers.min()} to {numbers.max()}"
            )
        if x is None and self.budget is not None:
            raise ValueError(
                "A budget bounds the change of inputs that are given. Pass them as `x`. "
                f"Received: budget={self.budget}, x=None"
            )
        given = None if x is None else self._check(x, len(numbers))
        own = None if y_source is None else check_labels(y_source, None, len(numbers), "y_source")
        rng = np.random.default_rng(self.seed)
        strength = self.strength or self._usual_strength()
        rounds = -(-len(numbers) // self.batch_size)
        bar = keras.utils.Progbar(rounds * self.steps, verbose=0 if verbose == 0 else 1)
        raws, crafted, far, within = [], [], [], []
        for first in range(0, len(numbers), self.batch_size):
            part = slice(first, first + self.batch_size)
            wanted = strength * tf.one_hot(numbers[part], size)
            source = self._begin(rng, len(wanted)) if given is None else given[part]
            raw, clipped = self._craft(tf.constant(source), wanted, bar)
            raws.append(raw)
            crafted.append(self._whole(clipped))
            inputs = crafted[-1].astype(np.float32)
            far.append(distance(self._features.of(inputs, self.batch_size), wanted).numpy())
            within.append(self._within(inputs, source))
        return AttackResult(
            adversarial=np.concatenate(crafted),
            within_budget=np.concatenate(within),
            source=given,
            y_source=own,
            layer=self.layer,
            raw=np.concatenate(raws),
            distance=np.concatenate(far),
            gradients=self.steps,
            seconds=time.perf_counter() - started,
        )

    def _check(self, x: Any, count: int) -> np.ndarray:
        x = np.asarray(x)
        x = np.repeat(x[None], count, axis=0) if x.ndim == len(self._shape) else x
        x = check_in_range(check_images(x, self._shape), self.value_range)
        if len(x) != count:
            raise ValueError(
                f"There must be an input for each of the {count} units, or one for all. "
                f"Received: x.shape={x.shape}"
            )
        return (np.rint(check_pixels(x)) if self._grey else x).astype(np.float32)

    def _begin(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Inputs that nobody gave."""
        low, high = self.value_range
        noise = rng.uniform(low, high, (count, *self._shape)).astype("f")
        if self._start == "random":
            return noise
        middle = (low + high) / 2
        return (_BLANK * (noise - middle) + middle).astype("f")

    def _within(self, crafted: np.ndarray, source: np.ndarray) -> np.ndarray:
        if self.budget is None:
            return np.ones(len(crafted), bool)
        change = np.abs(crafted - source).reshape(len(crafted), -1).max(axis=1)
        rounding = 2 * np.spacing(np.float32(np.abs(self.value_range).max()))
        return np.asarray(change <= self.budget + rounding)

    def _usual_strength(self) -> float:
        rng = np.random.default_rng(self.seed)
        noise = rng.uniform(*self.value_range, (_SAMPLES, *self._shape)).astype("f")
        largest = self._features.of(noise, self.batch_size).max()
        return _TIMES * max(float(largest), 1e-3)

    def _box(self, source: tf.Tensor) -> Box:
        budget = self.budget
        if self._grey and budget is not None:
            budget = float(np.floor(budget))
        return Box.around(source, *self.value_range, budget)

    def _loss(self, w: tf.Tensor, source: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
        features = self._features(self._box(source).read(w))
        return tf.reduce_mean(tf.math.squared_difference(features, wanted), axis=1)

    def _craft(
        self, source: tf.Tensor, wanted: tf.Tensor, bar: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs, and the same within range and budget."""
        box = self._box(source)
        w = self._descent.run(box.write(source), (source, wanted), self.steps, bar)
        raw = box.read(w).numpy()
        return raw, box.clip(raw)

    def _whole(self, inputs: np.ndarray) -> np.ndarray:
        return np.rint(inputs).astype(np.uint8) if self._grey else inputs


def effectiveness(
    probabilities: np.ndarray,
    accepted: np.ndarray | None = None,
    confidences: Sequence[float] = (0.95, 0.99),
) -> pd.DataFrame:
    """How many crafted inputs are taken for some class with confidence, and for how many classes.

    Args:
        probabilities: The Student's, `(n, K)`, of inputs in the order in which they are tried.
        accepted: Boolean array of shape `(n,)`: which inputs a defence accepts; others are not
            effective. `None` counts all.
        confidences: Probabilities in `(0, 1)` that count as taken for a class.

    Returns:
        A row for each confidence: `confidence`; `count`, `n`, `rate`, `low` and `high` (Wilson
        95 % interval) of effective inputs; `classes`, how many classes they reach; and `attempts`,
        how many inputs were tried until every class was reached, NaN where not all were.

    Raises:
        ValueError: The probabilities are not rows that sum to 1, a confidence is not in `(0, 1)`,
            or `accepted` has another length.

    Example:
        >>> rows = np.array([[0.99, 0.01], [0.5, 0.5], [0.02, 0.98]])
        >>> table = effectiveness(rows, confidences=[0.95])
        >>> table[["count", "classes", "attempts"]].to_numpy().tolist()
        [[2, 2, 3]]

    Reference:
        Rezaei and Liu (see `TargetAgnosticAttack`), "effectiveness" and "NABAC".
    """
    probabilities = np.asarray(probabilities)
    sums = probabilities.sum(axis=-1)
    if probabilities.ndim != 2 or not sum_to_one(probabilities):
        raise ValueError(
            "Probabilities must be rows that sum to 1, such as those of `tf.nn.softmax`. "
            f"Received: shape {probabilities.shape}, sums from {np.min(sums):g} to {np.max(sums):g}"
        )
    if np.ndim(confidences) != 1 or not all(0 < confidence < 1 for confidence in confidences):
        raise ValueError(
            "`confidences` must be a list of probabilities in (0, 1). "
            f"Received: confidences={confidences!r}"
        )
    if accepted is not None and np.shape(accepted) != (len(probabilities),):
        raise ValueError(
            f"`accepted` must be a boolean for each of the {len(probabilities)} inputs. "
            f"Received: accepted.shape={np.shape(accepted)}"
        )
    taken = probabilities.argmax(axis=1)
    rows = []
    for confidence in confidences:
        effective = probabilities.max(axis=1) >= confidence
        if accepted is not None:
            effective &= np.asarray(accepted, bool)
        classes, first = np.unique(taken[effective], return_index=True)
        every = len(classes) == probabilities.shape[1]
        attempts = np.flatnonzero(effective)[first].max() + 1 if every else np.nan
        rows.append((confidence, *astuple(Rate.of(effective)), len(classes), attempts))
    names = ["confidence", *(field.name for field in fields(Rate)), "classes", "attempts"]
    return pd.DataFrame(rows, columns=names)
