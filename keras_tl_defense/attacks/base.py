"""What an attack returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Crafted inputs, what they were made from, and what it took.

    Attributes:
        adversarial: Crafted inputs as a classifier gets them: images of whole grey levels, uint8
            array of shape `(n, H, W, C)`; other inputs float32.
        within_budget: Boolean array of shape `(n,)`. A crafted input that is not within its budget
            counts as a failure.
        source: What they were made from, of the same shape, or `None` when from nothing.
        y_source: Classes of the sources in `0..K-1`, int array of shape `(n,)`, or `None` when they
            were not given.
        y_target: Classes of the targets, or `None` when any other class than the source's will do.
        target: The inputs that they imitate, or `None` when they imitate none.
        layer: Name of the Teacher's layer that was attacked, or `None` when there was none.
        members: The differentiators that were attacked, int array of shape `(n, k)`: rows of a
            defence's `member_classes`; `None` when there were none, or they were sampled.
        raw: Float32 array: the inputs before they were clipped and rounded.
        distance: Float array of shape `(n,)`: Euclidean distance between the Teacher's features of
            the crafted input and those wanted, at the attacked layer; of attacks on a defence, what
            they make small in its place; `None` of `GeneralAttack`.
        dssim: Float array of shape `(n,)`: structural dissimilarity of crafted image and source;
            `None` of `TargetAgnosticAttack`.
        gradients: Passes forward and backward for each input.
        seconds: Time that the whole attack took.

    Raises:
        ValueError: There is not a boolean, or a class, for each crafted input.

    An attack of one's own goes into `evaluate_defence` as `AttackResult(images, within_budget,
    y_source=…)`; so do stamped images of a `Backdoor`, all within budget.

    Example:
        >>> student_class = student.predict(result.adversarial, verbose=0).argmax(axis=1)
        >>> result.reached(student_class).shape
        (4,)
    """

    adversarial: np.ndarray
    within_budget: np.ndarray
    source: np.ndarray | None = None
    y_source: np.ndarray | None = None
    y_target: np.ndarray | None = None
    target: np.ndarray | None = None
    layer: str | None = None
    members: np.ndarray | None = None
    raw: np.ndarray | None = None
    distance: np.ndarray | None = None
    dssim: np.ndarray | None = None
    gradients: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("within_budget", "y_source", "y_target"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else np.asarray(given))
        count, within = len(self.adversarial), self.within_budget
        if within.shape != (count,) or within.dtype != bool:
            raise ValueError(
                "`within_budget` must be a boolean for each crafted input, as `change <= budget` "
                f"gives it. Received: {within.dtype} of shape {within.shape} for "
                f"{count} inputs"
            )
        for name in ("y_source", "y_target"):
            labels = getattr(self, name)
            if labels is not None and np.shape(labels) != (count,):
                raise ValueError(
                    f"`{name}` must be a class for each crafted input. "
                    f"Received: shape {np.shape(labels)} for {count} inputs"
                )

    def __repr__(self) -> str:
        kind = "targeted" if self.targeted else "non-targeted"
        within = int(self.within_budget.sum())
        return f"AttackResult({len(self.adversarial)} {kind} attacks, {within} within budget)"

    @property
    def targeted(self) -> bool:
        """Whether a certain class was to be reached."""
        return self.y_target is not None

    def reached(self, student_class: np.ndarray) -> np.ndarray:
        """Which crafted images do what they were made for.

        Args:
            student_class: Classes that a classifier gives them, in `0..K-1`, int array of shape
                `(n,)`. Of a defence, `defence.predict(...) - 1`: the rejected, -1, are no success.

        Returns:
            Boolean array of shape `(n,)`: within budget, and classified as the target (targeted) or
            as another class than the source's (non-targeted).

        Raises:
            ValueError: The classes have another shape, or the attack is non-targeted and does not
                know the classes of its sources.
            TypeError: The classes are no integers.
        """
        student_class = np.asarray(student_class)
        if student_class.shape != (len(self.adversarial),):
            raise ValueError(
                "There must be one class for each crafted input, not probabilities. Received: "
                f"shape {student_class.shape} for {len(self.adversarial)} inputs"
            )
        if student_class.dtype.kind not in "iu":
            raise TypeError(
                "Classes must be integers, such as those of `argmax`. "
                f"Received: student_class.dtype={student_class.dtype}"
            )
        answered = self.within_budget & (student_class >= 0)
        if self.y_target is not None:
            return answered & (student_class == self.y_target)
        if self.y_source is None:
            raise ValueError(
                "Whether a non-targeted attack succeeds depends on the classes of its sources. "
                "Pass `y_source` to the attack; of inputs made from nothing, which have none, "
                "`effectiveness` counts those that are taken for any class. Received: y_source=None"
            )
        return answered & (student_class != self.y_source)
