"""Which differentiators there are: the classes that each one knows."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import tensorflow as tf
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist

_SWAPS = 20  # of each pair of classes, until the draw forgets where it began
_NOISE = 0.2  # on the logarithms of distances, so that every round gathers other groups
_TRIES = 100  # to make a group new that there is already, by changing places with a near class


@dataclass(frozen=True)
class Roster:
    """How many differentiators there are, and how their classes are drawn.

    Attributes:
        classes: Number of classes K.
        size: Classes that a differentiator knows.
        each: Differentiators that know a class, at least; at most one more for pairs, and twice as
            many for groups.
        alike: Whether groups of more than two are gathered by likeness, or at random.
    """

    classes: int
    size: int
    each: int
    alike: bool = True

    @property
    def count(self) -> int:
        """Number of differentiators."""
        if self.size == 2:
            return -(-self.classes * self.each // 2)
        return self.each * -(-self.classes // self.size)

    @property
    def most(self) -> int:
        """How many differentiators know a class at most."""
        if self.size == 2:
            return self.each + self.classes * self.each % 2
        return self.each * (1 + (self.classes % self.size > 0))

    def draw(self, profiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the classes of every differentiator.

        Args:
            profiles: Float array of shape `(classes, units)`: the classes' activations, by which
                groups are gathered.
            rng: Decides; all pairs need no decision.

        Returns:
            Int32 array of shape `(count, size)`, ascending within a differentiator.
        """
        if self.size > 2:
            drawn = self._groups(profiles, rng)
        elif self.each == self.classes - 1:
            drawn = np.stack(np.triu_indices(self.classes, 1), axis=1)
        else:
            drawn = self._pairs(rng)
        return np.sort(drawn, axis=1).astype(np.int32)

    def _pairs(self, rng: np.random.Generator) -> np.ndarray:
        """A random graph in which every class has `each` partners, one has one more if need be.

        A ring in which everyone knows the nearest is shuffled by swapping the partners of two pairs
        at a time, which leaves the number of everyone's partners as it is.
        """
        steps = list(range(1, self.each // 2 + 1))
        ring = rng.permutation(self.classes)
        parts = [np.stack([ring, np.roll(ring, -step)], axis=1) for step in steps]
        if self.each % 2:
            half = self.classes // 2
            parts.append(np.stack([ring[: self.classes - half], ring[half:]], axis=1))
        pairs = np.concatenate(parts).tolist()
        known = {frozenset(pair) for pair in pairs}
        chosen = rng.integers(len(pairs), size=(_SWAPS * len(pairs), 2)).tolist()
        turned = rng.integers(2, size=len(chosen)).tolist()
        for (one, other), turn in zip(chosen, turned, strict=True):
            (a, b), (c, d) = pairs[one], pairs[other][:: -1 if turn else 1]
            new = frozenset((a, d)), frozenset((c, b))
            if min(map(len, new)) == 2 and new[0] != new[1] and known.isdisjoint(new):
                known -= {frozenset((a, b)), frozenset((c, d))}
                known |= set(new)
                pairs[one], pairs[other] = [a, d], [c, b]
        return np.unique(np.sort(pairs, axis=1), axis=0)

    def _groups(self, profiles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """In each round every class is in a group: runs of an order in which like classes meet."""
        spread = profiles.std(axis=0)
        informative = profiles[:, spread > 0] / spread[spread > 0]
        distances = pdist(informative) if self.alike and informative.size else None
        starts = [*range(0, self.classes - self.size, self.size), self.classes - self.size]
        found: list[tuple[int, ...]] = []
        known: set[tuple[int, ...]] = set()
        for _ in range(self.each):
            order = self._order(distances, rng)
            for reach in range(_TRIES):
                groups = [tuple(sorted(order[s : s + self.size].tolist())) for s in starts]
                again = [s for s, group in zip(starts, groups, strict=True) if group in known]
                if not again:
                    break
                for start in again:
                    here = start + rng.integers(self.size)
                    beyond = rng.integers(min(reach + 1, self.classes - self.size))
                    there = start + self.size + beyond if rng.integers(2) else start - 1 - beyond
                    there %= self.classes
                    order[[here, there]] = order[[there, here]]
            found += groups
            known.update(groups)
        return np.array(found)

    def _order(self, distances: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
        if distances is None:
            return rng.permutation(self.classes)
        distances = np.maximum(distances, 1e-6 * distances.max())
        noisy = distances * np.exp(_NOISE * rng.normal(size=len(distances)))
        return np.asarray(leaves_list(linkage(noisy, method="average")))


def most_members(classes: int, size: int) -> int:
    """How many differentiators may know a class, so that all can be different.

    Of groups as many as use up half of the possible ones: more are hard to find by drawing.
    """
    if size == 2:
        return classes - 1
    return max(1, comb(classes, size) // (2 * -(-classes // size)))


def pair_number(first: Any, second: Any, classes: int) -> tf.Tensor:
    """Where `Roster.draw` puts a pair of different classes when it draws all of them."""
    low, high = tf.minimum(first, second), tf.maximum(first, second)
    return low * (2 * classes - low - 1) // 2 + high - low - 1


def find_members(member_classes: np.ndarray, roster: Roster) -> tuple[np.ndarray, np.ndarray]:
    """Which differentiators know each class.

    Args:
        member_classes: Int array of shape `(count, size)`.
        roster: What it was drawn from.

    Returns:
        Int32 array of shape `(classes, most)`: their numbers, ascending, filled up with 0; and
        int32 array of shape `(classes,)`: how many they are.
    """
    flat = member_classes.ravel()
    counts = np.bincount(flat, minlength=roster.classes)
    members = np.argsort(flat, kind="stable") // roster.size
    table = np.zeros((roster.classes, roster.most), np.int32)
    table[np.arange(roster.most) < counts[:, None]] = members
    return table, counts.astype(np.int32)
