"""Rates with their counts and Wilson intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True)
class Rate:
    """A share of counted inputs, with its 95 % Wilson score interval.

    Attributes:
        count: Inputs that have the property.
        n: Inputs counted.
        rate: `count / n`, NaN when `n` is 0.
        low: Lower end of the interval.
        high: Upper end of the interval.

    Reference:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """

    count: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: np.ndarray) -> Rate:
        """The rate of `True` in a boolean array.

        Args:
            hits: Boolean array of shape `(n,)`.

        Example:
            >>> print(Rate.of(np.array([True, True, False, True])))
            0.750 [0.301, 0.954] (3/4)
        """
        count, n = int(np.sum(hits)), len(hits)
        if n == 0:
            return cls(0, 0, float("nan"), float("nan"), float("nan"))
        interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
        return cls(count, n, count / n, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.count}/{self.n})"


def clean_rates(
    labels: np.ndarray, student_class: np.ndarray, answer: np.ndarray
) -> dict[str, Rate]:
    """How a defence treats honest inputs.

    Args:
        labels: True classes in `0..K-1`, int array of shape `(n,)`.
        student_class: The Student's classes in `0..K-1`, same shape.
        answer: The defence's answers, 0 for rejected or `1..K`, same shape.

    Returns:
        `student_accuracy`; `retention`, accepted of those that the Student answers rightly (what
        a user loses); `clean_acceptance`, accepted of all (the paper's "TPR", which is not the
        usual one); `clean_accuracy`, accepted and right of all.
    """
    right, accepted = student_class == labels, answer > 0
    return {
        "student_accuracy": Rate.of(right),
        "retention": Rate.of(accepted[right]),
        "clean_acceptance": Rate.of(accepted),
        "clean_accuracy": Rate.of(accepted & (answer - 1 == labels)),
    }
