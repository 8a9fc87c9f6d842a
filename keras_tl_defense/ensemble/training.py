"""Fit the heads of many differentiators, in chunks of bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np

from keras_tl_defense.data import Batches, check_every_class
from keras_tl_defense.ensemble.heads import fit_heads

HeadKind = Literal["pair", "one_vs_rest"]
MemberFeatures = Callable[[np.ndarray, int], np.ndarray]
"""Maps images and the number of a differentiator to features `(images, features)`."""

_MOST_AT_ONCE = 64  # differentiators, so that there is something to share out and to go on from
_REFERENCE_ROWS = 8000
_SAMPLE_BYTES = 512 << 20
_SQUARES = 4  # arrays of rows by rows that `fit_heads` holds at a time
_COPIES = 4  # of the features
_OTHERS = 128  # images of other classes for each differentiator


class ClassImages(NamedTuple):
    """Training images of every class.

    Attributes:
        images: Array of shape `(count, …)`, ordered by class, in random order within a class.
        counts: Int array of shape `(classes,)`: images of each class.
        seen: Number of images that they were chosen from.
    """

    images: np.ndarray
    counts: np.ndarray
    seen: int

    def first(self, per_class: int) -> ClassImages:
        """The first images of each class, `per_class` at most."""
        counts = np.minimum(self.counts, per_class)
        starts = np.cumsum(self.counts) - self.counts
        chosen = [start + np.arange(count) for start, count in zip(starts, counts, strict=True)]
        return ClassImages(self.images[np.concatenate(chosen)], counts, self.seen)


class HeadRows(NamedTuple):
    """Which images the heads of some differentiators are fitted on.

    Attributes:
        numbers: Int array of shape `(bodies, rows)`, numbers of images.
        positive: Boolean array of shape `(bodies, rows, heads)`: images of the head's class.
        weight: Float array of shape `(bodies, rows)`: each of a differentiator's classes, and the
            others, count the same in all; rows that only fill up have 0.
    """

    numbers: np.ndarray
    positive: np.ndarray
    weight: np.ndarray


class FittedHeads(NamedTuple):
    """What `train_heads` returns.

    Attributes:
        kernel: Float32 array of shape `(bodies, heads, features)`.
        bias: Float32 array of shape `(bodies, heads)`.
        accuracy: Float array of shape `(bodies,)`: share of right verdicts on held-out images, own
            and other classes counted the same.
        loss: Float array of shape `(bodies,)`: mean squared error of the held-out margins.
    """

    kernel: np.ndarray
    bias: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray


def sample_classes(
    batches: Batches, per_class: int, rng: np.random.Generator, *, for_reference: bool = False
) -> ClassImages:
    """Choose up to `per_class` images of each class at random, in one pass over the data.

    Args:
        batches: Images with labels.
        per_class: Images of each class that are kept at most.
        rng: Decides which.
        for_reference: Keep more where `per_class` gives less than 8000 in all, as long as 512 MiB
            hold as many of each class as single-precision numbers.

    Returns:
        The images that were kept. Which ones does not depend on the size of the batches, and those
        of a smaller `per_class` are the first of each class.
    """
    pools: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in range(batches.classes or 0)]
    seen, asked = 0, per_class
    for images, labels in batches:
        if for_reference and not seen:
            most = _SAMPLE_BYTES // (4 * images[0].size * len(pools))
            per_class = max(per_class, min(_REFERENCE_ROWS, most))
        for priority, image, label in zip(rng.random(len(images)), images, labels, strict=True):
            pool, seen = pools[label], seen + 1
            if len(pool) < per_class:
                heapq.heappush(pool, (priority, seen, image.copy()))
            elif priority > pool[0][0]:
                heapq.heapreplace(pool, (priority, seen, image.copy()))
    counts = np.array([len(pool) for pool in pools])
    check_every_class(counts)
    if for_reference:
        per_class = max(asked, _most_of_each(counts, _REFERENCE_ROWS))
        pools = [heapq.nlargest(per_class, pool, key=itemgetter(0)) for pool in pools]
        counts = np.minimum(counts, per_class)
    images = np.stack(
        [image for pool in pools for _, _, image in sorted(pool, key=itemgetter(0), reverse=True)]
    )
    return ClassImages(images, counts, seen)


def choose_rows(
    counts: np.ndarray,
    class_sets: np.ndarray,
    head: HeadKind,
    rngs: Sequence[np.random.Generator],
) -> HeadRows:
    """Choose the images of each differentiator: all of its classes, and some of the others.

    Args:
        counts: Int array of shape `(classes,)`: images of each class, which stand in this order.
        class_sets: Int array of shape `(bodies, size)`: the classes of each differentiator.
        head: `"pair"` takes no others.
        rngs: Each differentiator's own, which chooses the others: as many of each class that has so
            many, no image twice, 128 at most.
    """
    ends = np.cumsum(counts)
    starts = ends - counts
    most = int(counts.max())
    slots = np.arange(most)
    own = starts[class_sets][..., None] + np.minimum(slots, counts[class_sets][..., None] - 1)
    filled = slots < counts[class_sets][..., None]
    bodies, size = class_sets.shape
    numbers, used = own.reshape(bodies, -1), filled.reshape(bodies, -1)
    group = np.repeat(np.arange(size), most)
    classes = len(counts)
    if head == "one_vs_rest" and classes > size:
        rounds = -(-_OTHERS // (classes - size))
        drawn = np.stack([rng.random((2, classes)) for rng in rngs])
        order = np.argsort(drawn[:, 0], axis=1)
        foreign = (order[..., None] != class_sets[:, None]).all(axis=-1)
        order = order[foreign].reshape(bodies, classes - size)
        labels = np.tile(order, rounds)[:, :_OTHERS]
        turn = np.arange(labels.shape[1]) // (classes - size)
        first = (drawn[:, 1] * counts).astype(int)
        first = np.take_along_axis(first, labels, axis=1)
        others = starts[labels] + (first + turn) % counts[labels]
        numbers = np.concatenate([numbers, others], axis=1)
        used = np.concatenate([used, turn < counts[labels]], axis=1)
        group = np.concatenate([group, np.full(others.shape[1], size)])
    weight = np.zeros(numbers.shape)
    for part in np.unique(group):
        rows = used[:, group == part]
        weight[:, group == part] = rows / rows.sum(axis=1, keepdims=True)
    heads = head_count(head, size)
    positive = np.broadcast_to(group[:, None] == np.arange(heads), (*numbers.shape, heads))
    return HeadRows(numbers, positive, weight)


def head_count(head: HeadKind, size: int) -> int:
    """Heads of a differentiator of `size` classes."""
    return 1 if head == "pair" and size == 2 else size


def members_at_once(sample: ClassImages, size: int, width: int, memory: int) -> int:
    """How many differentiators' heads are fitted in about `memory` bytes, 64 at most.

    Args:
        sample: Training images.
        size: Classes of a differentiator.
        width: Number of features.
        memory: Bytes.
    """
    rows = size * int(sample.counts.max()) + _OTHERS
    each = 4 * rows * max(_COPIES * width, _COPIES * _SQUARES * rows)
    return int(np.clip(memory // each, 1, _MOST_AT_ONCE))


def train_heads(
    member_features: MemberFeatures,
    sample: ClassImages,
    members: np.ndarray,
    class_sets: np.ndarray,
    width: int,
    head: HeadKind,
    rngs: Sequence[np.random.Generator],
) -> FittedHeads:
    """Fit the heads of differentiators on the images of their classes, as one problem.

    Args:
        member_features: Computes features under the masks of a differentiator.
        sample: Training images.
        members: Int array of shape `(bodies,)`: numbers of the differentiators.
        class_sets: Int array of shape `(bodies, size)`: their classes.
        width: Number of features.
        head: `"pair"` or `"one_vs_rest"`.
        rngs: Each differentiator's own, which chooses its images of other classes.
    """
    rows = choose_rows(sample.counts, class_sets, head, rngs)
    weight, positive = rows.weight, rows.positive
    features = np.zeros((*rows.numbers.shape, width), np.float32)
    for place, member in enumerate(members):
        unique, index = np.unique(rows.numbers[place], return_inverse=True)
        features[place] = member_features(sample.images[unique], int(member))[index]
    heads = fit_heads(features, positive, weight).rounded()
    right = (heads.margins > 0) == positive
    error = (heads.margins - np.where(positive, 1, -1)) ** 2
    # A head of two classes that tells nothing speaks for neither.
    nothing = (head_count(head, class_sets.shape[1]) == 1) & ~heads.kernel.any(axis=2)
    return FittedHeads(
        heads.kernel,
        np.where(nothing, 0, heads.bias).astype(np.float32),
        _balanced(right, positive, weight),
        _balanced(error, positive, weight),
    )


def train_reference(
    member_features: MemberFeatures, sample: ClassImages, reference: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a head for each class on the features of one body.

    Args:
        member_features: Computes features under the masks of a body.
        sample: Training images, of which 8000 are used, or as many as memory allows.
        reference: Number of the body.
        width: Number of features.

    Returns:
        Kernel of shape `(classes, features)` and bias of shape `(classes,)`.
    """
    classes = np.arange(len(sample.counts))
    most = min(_REFERENCE_ROWS, _SAMPLE_BYTES // (4 * width))
    sample = sample.first(max(2, _most_of_each(sample.counts, most)))
    labels = np.repeat(classes, sample.counts)
    features = member_features(sample.images, reference)
    positive = labels[:, None] == classes
    heads = fit_heads(features[None], positive[None], (1 / sample.counts)[labels][None]).rounded()
    return heads.kernel[0], heads.bias[0]


def _most_of_each(counts: np.ndarray, rows: int) -> int:
    """How many images of each class, or all where there are fewer, give at most `rows` in all."""
    totals = np.minimum(counts, np.arange(1, counts.max() + 1)[:, None]).sum(axis=1)
    return int(np.sum(totals <= rows))


def _balanced(values: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Mean over a body's heads, with a head's own class and the others counted the same."""
    means = [
        (values * group * weight[..., None]).sum(axis=1) / (group * weight[..., None]).sum(axis=1)
        for group in (positive, ~positive)
    ]
    return np.asarray(np.mean(means, axis=(0, 2)))
