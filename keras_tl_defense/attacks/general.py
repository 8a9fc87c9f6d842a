"""General attacks, which know nothing of transfer learning, from adversarial-robustness-toolbox."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_choice, check_integer, check_positive
from keras_tl_defense.attacks.art import make_estimator
from keras_tl_defense.attacks.art_methods import SAMPLES, expected, levelled, patient
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.defended import is_defence
from keras_tl_defense.attacks.dssim import dssim
from keras_tl_defense.attacks.inputs import check_takes_images, whole_pixels
from keras_tl_defense.attacks.limits import Limit, Norm
from keras_tl_defense.attacks.targets import check_apart
from keras_tl_defense.data import check_labels

Method = Literal["fgsm", "pgd", "eot-pgd", "deepfool", "carlini-wagner", "hop-skip-jump"]
_NORMS: dict[str, Norm] = {
    "fgsm": "linf",
    "pgd": "linf",
    "eot-pgd": "linf",
    "deepfool": "l2",
    "carlini-wagner": "l2",
    "hop-skip-jump": "l2",
}
_STEPS = {
    "fgsm": 1,
    "pgd": 40,
    "eot-pgd": 40,
    "deepfool": 10,  # at a class's border it makes no headway, until the overshoot takes it across
    "carlini-wagner": 20,
    "hop-skip-jump": 20,
}
_OVERSHOOT = 0.02  # of DeepFool, as in its paper
_CONST = 1.0  # where Carlini and Wagner's search for a weight begins; ART's 0.01 finds less
_TRIES = 100  # of random images, for HopSkipJump to start from
_LARGER = (1.1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)  # multiples of a change that is too small


class GeneralAttack:
    """A general attack on a Student, on its Teacher or on a defence, by any of several methods.

    `"fgsm"`, one step along the gradient's sign; `"pgd"`, projected gradient descent, and
    `"eot-pgd"`, which attacks the mean output under eight draws of Gaussian noise, of standard
    deviations of up to 8 grey levels: all within the budget, a largest change. `"deepfool"` and
    `"carlini-wagner"` look for the smallest Euclidean change that works, `"hop-skip-jump"` does so
    by questions alone, without a gradient. What rounding to grey levels undoes is enlarged until it
    holds; where the change is above the budget they have failed. On a Teacher, inputs are crafted
    away from the classes that the Teacher itself gives; whether the Student is fooled, too, is then
    to be seen.

    Args:
        classifier: A Keras model of images that returns logits or probabilities, or a fitted
            `DifferentiatorEnsemble` with `mode="validate"`, on which attacks are targeted, so not
            by `"deepfool"`.
        method: One of the above.
        budget: Largest change, or Euclidean change over all numbers of an image, in grey levels.
            Defaults to 8 or 500.
        steps: Steps of the method, each of one or more passes. Defaults to 1 for `"fgsm"`, 40 for
            `"pgd"` and `"eot-pgd"`, 10 for `"deepfool"`, 20 for `"carlini-wagner"` and
            `"hop-skip-jump"`.
        confidence: By how much, under `"carlini-wagner"`, the logit of another class shall exceed
            that of the class that is left, or the target's all others: images that are to mislead
            another classifier, too, want more than 0. Defaults to `0`.
        batch_size: Images that are crafted at once, `"deepfool"` always one. Defaults to `64`.
        preprocessing: Callable from images in 0..255 to what a Keras model takes; a defence has its
            own, and refuses another.
        seed: Decides random starts and noise, in `0..2**32-1`.

    Raises:
        ImportError: adversarial-robustness-toolbox is not installed.
        ValueError: An argument is out of range or does not fit the method or the classifier, all
            pairs of a defence vote, or the classifier takes no images.

    Example:
        >>> attack = GeneralAttack(student, "pgd", budget=16)
        >>> result = attack(x_source, y_source)
        >>> result.adversarial.shape, bool(result.within_budget.all())
        ((4, 32, 32, 3), True)

    Reference:
        Goodfellow et al. (fgsm), ICLR 2015; Madry et al. (pgd), ICLR 2018; Athalye et al. (eot-pgd)
        and Moosavi-Dezfooli et al. (deepfool), ICML 2018 and CVPR 2016; Carlini and Wagner, S&P
        2017; Chen et al. (hop-skip-jump), S&P 2020.
    """

    def __init__(
        self,
        classifier: Any,
        method: Method,
        *,
        budget: float | None = None,
        steps: int | None = None,
        confidence: float = 0.0,
        batch_size: int = 64,
        preprocessing: Any = None,
        seed: int = 0,
    ) -> None:
        self.method = check_choice("method", method, tuple(_NORMS))
        self._limit = Limit(_NORMS[method], budget)
        self.budget, self.norm = self._limit.budget, self._limit.norm
        most = 1 if method == "fgsm" else None
        self.steps = check_integer("steps", _STEPS[method] if steps is None else steps, 1, most)
        self.confidence = 0.0 if confidence == 0 else check_positive("confidence", confidence)
        if self.confidence and method != "carlini-wagner":
            raise ValueError(
                'Only "carlini-wagner" takes a `confidence`. Leave it out. '
                f"Received: confidence={confidence!r}, method={method!r}"
            )
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.seed = check_integer("seed", seed, 0, 2**32 - 1)
        self._noise = tf.random.Generator.from_seed(seed)
        around: Any = {
            "fgsm": levelled,
            "pgd": levelled,
            "eot-pgd": partial(expected, random=self._noise),
        }.get(method)
        # DeepFool, and Carlini and Wagner, are written there for images in 0..1
        self._estimator = make_estimator(classifier, preprocessing, around, highest=1.0)
        self._defended = int(is_defence(classifier))
        if self._defended and method == "deepfool":
            raise ValueError(
                "DeepFool takes no target, and attacks on a defence need one. Take "
                '"carlini-wagner" or "pgd". Received: method=\'deepfool\' with a defence'
            )
        check_takes_images(self._estimator.input_shape, "classifier")

    def __call__(
        self,
        x_source: Any,
        y_source: Any = None,
        y_target: Any = None,
        *,
        x_start: Any = None,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft images that look like `x_source` and are taken for `y_target`, or anything else.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            y_source: The Student's classes of the sources in `0..K-1`, shape `(n,)`. They go into
                the result; which class an attack without target leaves is for the classifier to
                say.
            y_target: The Student's classes of the targets, also for a defence. A Teacher, whose
                classes are others, is attacked without target: `None`.
            x_start: For `"hop-skip-jump"` with targets: images that the classifier takes for them,
                of the same shape.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted images, rounded to whole grey levels; `gradients` is NaN where the method
            decides how many it takes.

        Raises:
            ValueError: The images or classes do not fit the classifier, a target is of its source's
                class, a defence is attacked without targets, or images to start from are missing.
            FloatingPointError: A gradient became NaN or infinite, or an output NaN.
        """
        started = time.perf_counter()
        shape = self._estimator.input_shape
        source = whole_pixels(x_source, shape, "x_source")
        own, wanted = (
            None if labels is None else check_labels(labels, classes, len(source), name)
            for name, labels, classes in (
                ("y_source", y_source, None),  # a Teacher may have fewer than the Student
                ("y_target", y_target, self._classes),
            )
        )
        if wanted is None and self._defended:
            raise ValueError(
                "A defence gives the rejected a class of their own, so away from the right class "
                "is no success. Pass `y_target`. Received: y_target=None"
            )
        if own is not None and wanted is not None:
            check_apart(own, wanted)
        if wanted is not None and self.method == "deepfool":
            raise ValueError(
                "DeepFool looks for the nearest other class and takes no target. Leave "
                "`y_target` out. Received: method='deepfool' with y_target"
            )
        if x_start is not None and (wanted is None or self.method != "hop-skip-jump"):
            raise ValueError(
                'Only `"hop-skip-jump"` with `y_target` starts elsewhere than at the sources. '
                f"Leave `x_start` out. Received: method={self.method!r}, y_target={y_target!r}"
            )
        given: dict[str, Any] = {}
        if wanted is not None:
            given["y"] = np.eye(self._estimator.nb_classes, dtype=np.float32)[
                wanted + self._defended
            ]
        if self.method == "hop-skip-jump":
            start = self._starts(source) if wanted is None else self._given(x_start, source, wanted)
            given["x_adv_init"] = start.astype(np.float32) / 255
        attack = self._make(targeted=wanted is not None, verbose=verbose != 0)
        self._estimator.gradients = 0
        self._noise.reset_from_seed(self.seed)
        before = np.random.get_state()
        np.random.seed(self.seed)
        try:
            raw = np.asarray(255 * attack.generate(source.astype(np.float32) / 255, **given), "f")
        finally:
            np.random.set_state(before)
        raw, images = self._rounded(raw, source, wanted)
        measured = [self._measure(images, source, part) for part in self._parts(len(source))]
        likeness, measure = (np.concatenate(values) for values in zip(*measured, strict=True))
        passes = {"fgsm": 1, "pgd": self.steps, "eot-pgd": self.steps * SAMPLES}
        return AttackResult(
            adversarial=images,
            within_budget=measure <= self.budget,
            source=source,
            y_source=own,
            y_target=wanted,
            raw=raw,
            dssim=likeness,
            gradients=passes.get(self.method, np.nan),
            seconds=time.perf_counter() - started,
        )

    @property
    def _classes(self) -> int:
        return int(self._estimator.nb_classes) - self._defended

    def _given(self, x_start: Any, source: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Images to start from, as they are given."""
        if x_start is None:
            raise ValueError(
                "Without a gradient, no image of the target class is found but by chance. Pass "
                "some that the classifier takes for it, as `x_start`. Received: x_start=None"
            )
        start = whole_pixels(x_start, self._estimator.input_shape, "x_start")
        if len(start) != len(source):
            raise ValueError(
                "There must be an image to start from for each source. Received: "
                f"x_start.shape={start.shape}, x_source.shape={source.shape}"
            )
        taken = self._answers(start) == wanted + self._defended
        if not taken.all():
            warnings.warn(
                "The classifier does not take all of `x_start` for their targets, and attacks from "
                "the others change nothing. Pass images that it answers as the targets. "
                f"Received: {taken.sum()} of {len(taken)} that it does",
                stacklevel=3,
            )
        return start

    def _starts(self, source: np.ndarray) -> np.ndarray:
        """Random images that are answered otherwise; the source where none is found."""
        rng = np.random.default_rng(self.seed)
        before, start, missing = self._answers(source), source.copy(), np.arange(len(source))
        for _ in range(_TRIES):
            if not len(missing):
                break
            drawn = rng.integers(0, 256, (len(missing), *source.shape[1:]), np.uint8)
            found = self._answers(drawn) != before[missing]
            start[missing[found]] = drawn[found]
            missing = missing[~found]
        return start

    def _make(self, targeted: bool, verbose: bool) -> Any:
        """The attack of adversarial-robustness-toolbox, which takes options apart for each."""
        from art.attacks import evasion

        largest = float(np.floor(self.budget)) / 255  # images have whole grey levels
        if self.method == "fgsm":
            return evasion.FastGradientMethod(
                self._estimator,
                eps=largest,
                targeted=targeted,
                batch_size=self.batch_size,
            )
        common = {"batch_size": self.batch_size, "verbose": verbose}
        if self.method in ("pgd", "eot-pgd"):
            return evasion.ProjectedGradientDescent(
                self._estimator,
                eps=largest,
                eps_step=2.5 * largest / self.steps,
                max_iter=self.steps,
                num_random_init=1,
                targeted=targeted,
                **common,
            )
        if self.method == "deepfool":
            return evasion.DeepFool(
                self._estimator,
                max_iter=self.steps,
                epsilon=_OVERSHOOT,
                nb_grads=self._estimator.nb_classes,
                batch_size=1,  # all classes' gradients of a batch, until its last image is done
                verbose=verbose,
            )
        if self.method == "carlini-wagner":
            return evasion.CarliniL2Method(
                self._estimator,
                max_iter=self.steps,
                confidence=self.confidence,
                learning_rate=0.05,
                initial_const=_CONST,
                binary_search_steps=5,
                targeted=targeted,
                **common,
            )
        return patient(evasion.HopSkipJump)(
            self._estimator, max_iter=self.steps, targeted=targeted, init_eval=50, **common
        )

    def _rounded(
        self, raw: np.ndarray, source: np.ndarray, wanted: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images and whole grey levels; where rounding undoes a smallest change, a multiple."""
        change, kept = raw - source, raw.copy()
        images = np.rint(np.clip(kept, 0, 255)).astype(np.uint8)
        if self.norm == "linf":
            return kept, images
        before = self._answers(source)
        for factor in (*_LARGER, 1.0):
            found = self._answers(images)
            holds = found != before if wanted is None else found == wanted + self._defended
            if holds.all():
                break
            kept[~holds] = (source + factor * change)[~holds]
            images = np.rint(np.clip(kept, 0, 255)).astype(np.uint8)
        return kept, images

    def _answers(self, images: np.ndarray) -> np.ndarray:
        scaled = images.astype(np.float32) / 255
        return np.asarray(self._estimator.predict(scaled, self.batch_size).argmax(axis=1))

    def _parts(self, count: int) -> list[slice]:
        return [slice(s, s + self.batch_size) for s in range(0, count, self.batch_size)]

    def _measure(
        self, images: np.ndarray, source: np.ndarray, part: slice
    ) -> tuple[np.ndarray, np.ndarray]:
        crafted, original = (tf.constant(x[part], tf.float32) for x in (images, source))
        return dssim(crafted, original).numpy(), self._limit.measure(crafted, original).numpy()
