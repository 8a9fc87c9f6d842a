"""Rates and areas under curves, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, rankdata

_EDGE = 1e-9  # how near 0 and 1 the ends of an AUROC's interval are sought


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
        return cls.of_counts(int(np.sum(hits)), len(hits))

    @classmethod
    def of_counts(cls, count: int, n: int) -> Rate:
        """The rate of `count` among `n`.

        Example:
            >>> print(Rate.of_counts(3, 4))
            0.750 [0.301, 0.954] (3/4)
        """
        if n == 0:
            return cls(0, 0, float("nan"), float("nan"), float("nan"))
        interval = binomtest(count, n).proportion_ci(0.95, method="wilson")
        return cls(count, n, count / n, float(interval.low), float(interval.high))

    def __str__(self) -> str:
        return f"{self.rate:.3f} [{self.low:.3f}, {self.high:.3f}] ({self.count}/{self.n})"


@dataclass(frozen=True)
class Auroc:
    """How likely an honest input scores higher than a crafted one, with its 95 % interval.

    The area under the ROC curve; two equal scores count one half. The interval holds the areas that
    lie within 1.96 standard errors of the one observed, the error by Hanley and McNeil's formula at
    the area in question, not at the one observed: Newcombe's method 5. So it has a width when the
    scores part perfectly, too. It takes the inputs for independent of each other.

    Attributes:
        auroc: The area, in 0..1; NaN when there is no input of a kind.
        low: Lower end of the interval.
        high: Upper end of the interval.

    Reference:
        Hanley and McNeil, "The Meaning and Use of the Area under a Receiver Operating
        Characteristic (ROC) Curve", Radiology 1982. Newcombe, "Confidence Intervals for an Effect
        Size Measure Based on the Mann-Whitney Statistic. Part 2", Statistics in Medicine 2006.
    """

    auroc: float
    low: float
    high: float

    @classmethod
    def of(cls, honest: np.ndarray, crafted: np.ndarray) -> Auroc:
        """The area that the scores of two kinds of inputs have.

        Args:
            honest: Scores of honest inputs, float array of shape `(m,)`.
            crafted: Scores of crafted inputs, float array of shape `(n,)`.

        Example:
            >>> print(Auroc.of(np.array([0.5, 1.0, 2.0]), np.array([0.0, 0.5])))
            0.917 [0.372, 0.995]
        """
        m, n = len(honest), len(crafted)
        if m == 0 or n == 0:
            return cls(float("nan"), float("nan"), float("nan"))
        ranks = rankdata(np.concatenate([honest, crafted]))[:m]
        area = float(ranks.sum() - m * (m + 1) / 2) / (m * n)
        z, others = norm.ppf(0.975), (m + n) / 2 - 1

        def outside(a: float) -> float:
            spread = 1 + others * ((1 - a) / (2 - a) + a / (1 + a))
            return (area - a) ** 2 - z * z * a * (1 - a) * spread / (m * n)

        inside = min(max(area, _EDGE), 1 - _EDGE)
        return cls(area, float(brentq(outside, 0, inside)), float(brentq(outside, inside, 1)))

    def __str__(self) -> str:
        return f"{self.auroc:.3f} [{self.low:.3f}, {self.high:.3f}]"


def clean_rates(
    labels: np.ndarray, student_class: np.ndarray, answer: np.ndarray
) -> dict[str, Rate]:
    """How a defence treats honest inputs.

    Args:
        labels: True classes in `0..K-1`, int array of shape `(n,)`.
        student_class: The Student's classes in `0..K-1`, same shape.
        answer: The defence's answers, 0 for rejected or `1..K`, same shape.

    Returns:
        `student_accuracy`; `retention`, given the Student's answer of those that the Student
        answers rightly (what a user loses); `clean_acceptance`, accepted of all (the paper's "TPR",
        which is not the usual one); `clean_accuracy`, accepted and right of all.
    """
    right, accepted = student_class == labels, answer > 0
    return {
        "student_accuracy": Rate.of(right),
        "retention": Rate.of((answer - 1 == student_class)[right]),
        "clean_acceptance": Rate.of(accepted),
        "clean_accuracy": Rate.of(accepted & (answer - 1 == labels)),
    }
