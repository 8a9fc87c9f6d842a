"""Which differentiators of a defence an adaptive attack works against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from keras_tl_defense._validation import check_choice, check_integer
from keras_tl_defense.attacks.defended import check_defence

Members = Literal["all", "fixed", "sampled"]


class MemberChoice:
    """Differentiators that know a class, for the attacks that take a defence.

    Args:
        defence: A fitted `DifferentiatorEnsemble` with `mode="validate"`.
        members: `"all"`; `"fixed"`, some for each image that stay, which is all that an attacker
            needs who knows the draw; or `"sampled"`, other ones every ten steps.
        samples: How many are fixed or sampled.
        seed: Decides which.

    Raises:
        TypeError: It is no defence.
        RuntimeError: It was not fitted.
        ValueError: An argument is out of range, or the defence votes with all pairs.
    """

    def __init__(self, defence: Any, members: str, samples: int, seed: int) -> None:
        check_defence(defence)
        self.members = check_choice("members", members, ("all", "fixed", "sampled"))
        self.samples = check_integer("samples", samples, 1)
        self._known, self._seed = defence.member_classes, check_integer("seed", seed, 0)

    def __call__(self, classes: np.ndarray) -> Callable[[slice, int], np.ndarray]:
        """A function from part of the images and the steps done to rows of differentiators."""
        knowing = [np.flatnonzero((self._known == label).any(axis=1)) for label in classes]
        most = max(len(members) for members in knowing)
        if self.members == "all" or most <= self.samples:
            every = np.stack([np.resize(members, most) for members in knowing])  # few come again
            return lambda part, _: every[part]
        fixed = self.members == "fixed"

        def some(part: slice, done: int) -> np.ndarray:
            step = 0 if fixed else done
            rows = [
                np.random.default_rng([self._seed, number, step]).permutation(knowing[number])
                for number in range(part.start, part.stop)
            ]
            return np.stack([np.resize(row, self.samples) for row in rows])

        return some

    def kept(self, chosen: Callable[[slice, int], np.ndarray], count: int) -> np.ndarray | None:
        """The differentiators of each image, unless they are sampled."""
        return None if self.members == "sampled" else chosen(slice(0, count), 0)
