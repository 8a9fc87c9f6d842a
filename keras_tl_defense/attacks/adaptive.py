"""Attacks on the defence itself, by who has it or has rebuilt it."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_positive
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.bounded import BoundedDescent
from keras_tl_defense.attacks.defended import as_logits, least_score
from keras_tl_defense.attacks.inputs import check_takes_images, whole_pixels
from keras_tl_defense.attacks.limits import Limit, Norm
from keras_tl_defense.attacks.members import MemberChoice, Members
from keras_tl_defense.attacks.targets import check_apart
from keras_tl_defense.data import check_labels


class AdaptiveAttack:
    """Craft images against the differentiators of a defence that the attacker knows.

    The attacker has a defence: the very one that is attacked, or one rebuilt with guessed ratios
    and images of their own. The Student's logit of the target class shall exceed all others by 1,
    every member's margin be 1, and the score, where it decides, be `confidence` above the threshold
    that it has when the attack is made: what is missing of these is made small. Images and budgets
    are as for `MimicryAttack`.

    Args:
        defence: A fitted `DifferentiatorEnsemble` with `mode="validate"`.
        members: Which differentiators that know the target class are attacked: `"all"`;
            `"sampled"`, five others every ten steps, so that the image holds whichever are drawn;
            or `"fixed"`, five for each image, drawn by `seed`, as if they were known to check it:
            `members` of the result says which, and `defence.white_box(images, members)` what they
            say. Defaults to `"sampled"`.
        samples: How many are sampled or fixed. Defaults to `5`.
        confidence: By how much the score shall exceed its threshold. A large number, 100 for one,
            raises it as far as the budget allows, as suits a defence that was rebuilt by guess.
            Nothing where votes decide. Defaults to `0.5`.
        budget, norm, restarts: As for `MimicryAttack`.
        steps: Steps of Adam. Defaults to `600`.
        learning_rate: Of Adam. Defaults to `0.01`, or `0.1` under
            `norm="linf"`.
        batch_size: Images that are crafted at once. Defaults to `16`.
        seed: Decides the samples, and the noise of restarts.

    Raises:
        TypeError: It is no `DifferentiatorEnsemble`.
        RuntimeError: The defence was not fitted.
        ValueError: An argument is out of range, the defence votes with all pairs, or it takes no
            images.

    Example:
        >>> attack = AdaptiveAttack(defence, budget=0.05, steps=20)
        >>> result = attack(x_source, y_source, y_target)
        >>> result.adversarial.shape
        (4, 32, 32, 3)

    Reference:
        Tramèr et al., "On Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020.
    """

    def __init__(
        self,
        defence: Any,
        *,
        members: Members = "sampled",
        samples: int = 5,
        confidence: float = 0.5,
        budget: float | None = None,
        norm: Norm = "dssim",
        steps: int = 600,
        restarts: int = 0,
        learning_rate: float | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self._choose = MemberChoice(defence, members, samples, seed)
        self._shape = tuple(defence.student.inputs[0].shape[1:])
        check_takes_images(self._shape, "Student")
        self.defence = defence
        self.confidence = check_positive("confidence", confidence)
        least = least_score(defence)
        self._asked = None if least is None else least + self.confidence
        self._limit = Limit(norm, budget)
        self.budget, self.norm = self._limit.budget, norm
        self._search = BoundedDescent(
            self._missing,
            self._limit,
            steps=steps,
            restarts=restarts,
            optimizer="adam",
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            hint="Or lower `learning_rate`.",
        )
        self.steps = self._search.steps

    def __call__(
        self,
        x_source: Any,
        y_source: Any,
        y_target: Any = None,
        *,
        verbose: int | str = "auto",
    ) -> AttackResult:
        """Craft images that look like `x_source` and are accepted as `y_target`, or anything else.

        Args:
            x_source: Images of shape `(n, H, W, C)` in 0..255.
            y_source: Integer classes of the sources in `0..K-1`, shape `(n,)`.
            y_target: Integer classes of the targets. `None` aims, for each source, at the class
                that the Student takes for likeliest after the source's own; any other will do.
            verbose: 0 shows no progress bar.

        Returns:
            The crafted images; their `distance` is what was to become small.

        Raises:
            ValueError: The images do not fit the defence, are not in 0..255, or a target is of its
                source's class.
            FloatingPointError: A gradient became NaN or infinite.
        """
        started = time.perf_counter()
        source = whole_pixels(x_source, self._shape, "x_source")
        classes, count = self.defence.classes, len(source)
        own = check_labels(y_source, classes, count, "y_source")
        if y_target is None:
            wanted = self._likeliest_other(source, own)
        else:
            wanted = check_labels(y_target, classes, count, "y_target")
            check_apart(own, wanted)
        chosen = self._choose(wanted)

        def context(part: slice, done: int) -> tuple[tf.Tensor, ...]:
            return tf.constant(chosen(part, done), tf.int32), tf.constant(wanted[part], tf.int32)

        found = self._search(source, context, self._search.progress(count, verbose))
        return self._search.result(
            found,
            started,
            source=source,
            y_source=own,
            y_target=None if y_target is None else wanted,
            members=self._choose.kept(chosen, count),
        )

    def _likeliest_other(self, source: np.ndarray, own: np.ndarray) -> np.ndarray:
        prepare = self.defence.preprocessing
        images = source.astype(np.float32)
        outputs = self.defence.student.predict(
            np.asarray(prepare(images)) if prepare else images, verbose=0
        )
        outputs[np.arange(len(own)), own] = -np.inf
        return np.asarray(outputs.argmax(axis=1))

    def _missing(self, images: tf.Tensor, members: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
        found = self.defence.white_box(images, members, classes)
        logits = as_logits(found["logits"])
        own = tf.one_hot(classes, logits.shape[1], on_value=True, off_value=False)
        other = tf.reduce_max(tf.where(own, logits.dtype.min, logits), axis=1)
        lead = tf.gather(logits, classes, batch_dims=1) - other
        missing = tf.nn.relu(1 - lead)
        missing += tf.reduce_sum(tf.nn.relu(1 - found["margins"]), axis=1)
        if self._asked is not None:
            missing += tf.nn.relu(self._asked - found["score"])
        return missing
