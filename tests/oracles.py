"""What several tests compare with."""

from __future__ import annotations

import numpy as np


def connection_mask(
    weights: np.ndarray, scores: np.ndarray, threshold: float, tie: int
) -> np.ndarray:
    """The mask that a threshold and a tie index stand for.

    Args:
        weights: Float32 array of shape `(inputs, units)`.
        scores: Float32 array of shape `(inputs,)`.
        threshold: As from `connection_thresholds`.
        tie: As from `connection_thresholds`.

    Returns:
        Boolean array of shape `(inputs, units)`, `True` where the connection stays.
    """
    score = np.abs(weights) * scores[:, None]
    index = np.arange(score.size).reshape(score.shape)
    return (score > threshold) | ((score == threshold) & (index > tie))
