"""Where the score's threshold lies, so that a share of the honest inputs stays above it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from keras_tl_defense.metrics import Rate


@dataclass(frozen=True)
class Calibration:
    """What `DifferentiatorEnsemble.calibrate` set.

    Attributes:
        asked: The retention asked for.
        retention: The one realised on the images given, with its interval.
        threshold: Inputs that score lower are rejected.
    """

    asked: float
    retention: Rate
    threshold: float


def score_threshold(scores: np.ndarray, retention: float) -> float:
    """The highest threshold that keeps the share `retention` of future inputs, on average.

    Of `n` scores the one of rank `floor((n + 1) * (1 - retention))` from below: an input like
    these lies above it with a probability of at least `retention`.

    Args:
        scores: Float array of shape `(n,)`, of honest inputs that were not trained on.
        retention: Share of inputs to keep, in (0, 1).

    Raises:
        ValueError: There are too few scores for so high a retention.

    Example:
        >>> score_threshold(np.arange(1.0, 100.0), retention=0.95)
        5.0

    Reference:
        Vovk et al., "Algorithmic Learning in a Random World", Springer 2005 (conformal prediction).
    """
    rank = math.floor((len(scores) + 1) * (1 - retention) + 1e-9)
    if rank < 1:
        raise ValueError(
            f"To set a threshold for a retention of {retention:g}, at least "
            f"{math.ceil(1 / (1 - retention) - 1e-9) - 1} images are needed that the Student "
            "answers rightly and was not trained on. Give more, or ask for less; where it should "
            "answer many rightly, check the labels and `preprocessing`. "
            f"Received: {len(scores)} such images, retention={retention:g}"
        )
    return float(np.sort(scores)[min(rank, len(scores)) - 1])
