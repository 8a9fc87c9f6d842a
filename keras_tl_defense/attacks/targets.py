"""Which images an experiment attacks, and what they are to be taken for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from keras_tl_defense._validation import check_integer


class AttackPlan(NamedTuple):
    """Numbers of images, for targeted and for non-targeted attacks.

    Attributes:
        sources: Int array of shape `(n,)`.
        targets: Int array of shape `(n,)`, each of another class than its source.
        candidates: Int array of shape `(n, m)`, of `m` different classes, none the source's.
    """

    sources: np.ndarray
    targets: np.ndarray
    candidates: np.ndarray


def plan_attacks(
    y: np.ndarray, student_class: np.ndarray, count: int, *, candidates: int = 5, seed: int = 0
) -> AttackPlan:
    """Choose sources and targets at random among the images that the Student answers rightly.

    `MimicryAttack.likest` chooses targets that are like their sources, which fools more often.

    Args:
        y: True classes of test images, int array of shape `(n,)`.
        student_class: The Student's classes of the same images, same shape.
        count: Number of attacks; fewer when fewer images are answered rightly, since no image is a
            source twice.
        candidates: Candidate targets for each non-targeted attack; fewer when there are fewer
            other classes.
        seed: Decides the choice.

    Returns:
        The numbers of the images chosen.

    Raises:
        ValueError: The Student answers images of fewer than two classes rightly, or a number is
            out of range.

    Example:
        >>> labels = np.array([0, 0, 1, 1, 2, 2])
        >>> plan = plan_attacks(labels, student_class=labels, count=4, candidates=2)
        >>> bool((labels[plan.sources] != labels[plan.targets]).all())
        True
        >>> plan.candidates.shape
        (4, 2)
    """
    count = check_integer("count", count, 1)
    candidates = check_integer("candidates", candidates, 1)
    rng = np.random.default_rng(check_integer("seed", seed, 0))
    y, student_class = np.asarray(y), np.asarray(student_class)
    if y.ndim != 1 or y.shape != student_class.shape:
        raise ValueError(
            "There must be one class of the Student for each label. "
            f"Received: y.shape={y.shape}, student_class.shape={student_class.shape}"
        )
    right = np.flatnonzero(student_class == y)
    classes = np.unique(y[right])
    if len(classes) < 2:
        raise ValueError(
            "An attack needs rightly answered images of at least two classes. Train the Student "
            f"better or give more test images. Received: {len(right)} such images of "
            f"{len(classes)} classes"
        )
    sources = rng.permutation(right)[:count]
    pools = {label: right[y[right] == label] for label in classes}
    chosen = []
    for source in sources:
        others = rng.permutation(classes[classes != y[source]])[:candidates]
        chosen.append([rng.choice(pools[label]) for label in others])
    grid = np.array(chosen)
    return AttackPlan(sources, grid[:, 0], grid)


def check_apart(y_source: np.ndarray, y_target: np.ndarray) -> None:
    """Check that no target is of its source's class.

    Raises:
        ValueError: One is; the message says which.
    """
    same = np.flatnonzero(y_source == y_target)
    if len(same):
        raise ValueError(
            "A target must be of another class than its source, or nothing is attacked. "
            f"Received: y_source[{same[0]}]=y_target[{same[0]}]={y_source[same[0]]}"
        )
