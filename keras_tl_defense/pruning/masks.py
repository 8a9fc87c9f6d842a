"""Which filters and which Dense connections a ratio prunes.

A ratio prunes an exact number of units: `floor(ratio * units)`, the ones with the lowest scores, of
equal scores the lower index first. So every differentiator keeps the same number of units in a
layer, and the same activations always give the same masks.

Reference:
    Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

Ratio = float | Fraction


def exact(ratio: Ratio) -> Fraction:
    """A ratio as the decimal number that it prints as, so that 0.29 of 100 is 29, not 28."""
    return ratio if isinstance(ratio, Fraction) else Fraction(repr(float(ratio)))


def pruned_count(ratio: Ratio, units: int) -> int:
    """Number of units that `ratio` prunes.

    Args:
        ratio: Fraction of the units, in `[0, 1)`; see `exact`.
        units: Number of units.

    Returns:
        `floor(ratio * units)`, at most `units - 1`.
    """
    return min(math.floor(exact(ratio) * units), units - 1)


def class_set_scores(activations: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Score of each unit for sets of classes: the largest of the classes' mean activations.

    Args:
        activations: Float array of shape `(K, units)`, the class means.
        classes: Integer array of shape `(sets, m)`.

    Returns:
        Array of shape `(sets, units)`.
    """
    return activations[classes].max(axis=1)


def filter_masks(scores: np.ndarray, ratio: Ratio) -> np.ndarray:
    """Which filters stay.

    Args:
        scores: Float array of shape `(sets, filters)`.
        ratio: Fraction pruned, in `[0, 1)`.

    Returns:
        Boolean array of the same shape, `True` where the filter stays.

    Example:
        >>> filter_masks(np.array([[3.0, 1.0, 2.0, 1.0]]), 0.5)
        array([[ True, False,  True, False]])
    """
    order = np.argsort(scores, axis=1, kind="stable")
    masks = np.ones(scores.shape, bool)
    np.put_along_axis(masks, order[:, : pruned_count(ratio, scores.shape[1])], False, axis=1)
    return masks


def connection_thresholds(
    weights: np.ndarray, scores: np.ndarray, ratio: Ratio
) -> tuple[np.ndarray, np.ndarray]:
    """Which Dense connections are pruned, as a threshold and a tie index for each set of classes.

    The connection from input `p` to unit `q` scores `|weights[p, q]| * scores[p]`. It is pruned
    when that is below the threshold, or equal to it at a flat index `p * units + q` of at most the
    tie index. Two numbers say what would take a bit for each connection.

    Args:
        weights: Float32 array of shape `(inputs, units)`.
        scores: Float32 array of shape `(sets, inputs)`.
        ratio: Fraction pruned, in `[0, 1)`.

    Returns:
        Thresholds, float32 of shape `(sets,)`, and tie indices, int64 of shape `(sets,)`.
    """
    count = pruned_count(ratio, weights.size)
    magnitude = np.abs(weights)
    thresholds = np.full(len(scores), -1, np.float32)
    ties = np.full(len(scores), -1, np.int64)
    if count == 0:
        return thresholds, ties
    for index, row in enumerate(scores):
        flat = (magnitude * row[:, None]).ravel()
        threshold = np.partition(flat, count - 1)[count - 1]
        below = np.count_nonzero(flat < threshold)
        thresholds[index] = threshold
        ties[index] = np.flatnonzero(flat == threshold)[count - below - 1]
    return thresholds, ties
