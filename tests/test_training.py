"""The images that heads are fitted on, and heads fitted chunk by chunk."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, Images
from hypothesis import given
from hypothesis import strategies as st

from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble import training
from keras_tl_defense.ensemble.training import (
    choose_rows,
    members_at_once,
    sample_classes,
    train_heads,
    train_reference,
)


def own_rngs(members: Any) -> list[np.random.Generator]:
    return [np.random.default_rng([0, int(member)]) for member in members]


@pytest.mark.parametrize("head", ["pair", "one_vs_rest"])
def test_chunks_give_what_one_piece_gives(head: Any) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 6)
    x = rng.normal(0, 1, (24, 15)).astype(np.float32) + y[:, None]
    sample = sample_classes(Batches(x, y, shape=(15,), classes=4), 6, np.random.default_rng(1))
    pairs = np.stack(np.triu_indices(4, 1), axis=1)
    scales = np.linspace(0.5, 1.5, len(pairs)).astype(np.float32)

    def member_features(images: np.ndarray, member: int) -> np.ndarray:
        return images * scales[member]

    def train(members: np.ndarray) -> Any:
        given = (member_features, sample, members, pairs[members], 15, head)
        return train_heads(*given, own_rngs(members))

    whole = train(np.arange(6))
    assert whole.kernel.shape == (6, 1 if head == "pair" else 2, 15)
    assert whole.accuracy.shape == whole.loss.shape == (6,)
    for members in np.split(np.arange(6), [1, 4]):
        for part, expected in zip(train(members), whole, strict=True):
            np.testing.assert_allclose(part, expected[members], rtol=1e-3, atol=1e-4)


def test_a_chunk_counts_the_rows_squared() -> None:
    """With few features the products of the images are what takes memory."""
    sample = training.ClassImages(np.zeros((54, 2)), np.full(9, 6), 54)
    rows = 2 * 6 + 128
    products = 4 * 4 * 4 * rows**2
    assert members_at_once(sample, 2, 2, 10 * products) == 10
    assert members_at_once(sample, 2, 2, 1) == 1
    assert members_at_once(sample, 2, 2, 1 << 40) == 64
    features = 4 * 4 * rows * 9999
    assert members_at_once(sample, 2, 9999, 10 * features) == 10


def test_members_keep_their_own_masks() -> None:
    """Features are asked for by the differentiator's number, whichever of them are fitted."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 6)
    x = rng.normal(0, 1, (24, 15)).astype(np.float32) + y[:, None]
    sample = sample_classes(Batches(x, y, shape=(15,), classes=4), 6, np.random.default_rng(1))
    pairs = np.stack(np.triu_indices(4, 1), axis=1)
    asked = []

    def member_features(images: np.ndarray, member: int) -> np.ndarray:
        asked.append(member)
        return images * (1 + member)

    members = np.array([4, 1])
    heads = train_heads(
        member_features,
        sample,
        members,
        pairs[members],
        15,
        "pair",
        own_rngs(members),
    )
    assert set(asked) == {1, 4}
    for head, member in enumerate(members):
        first, second = pairs[member]
        own = sample.images.reshape(4, 6, 15) * (1 + member)
        margins = own @ heads.kernel[head, 0] + heads.bias[head, 0]
        assert (margins[first] > 0).mean() > 0.8
        assert (margins[second] < 0).mean() > 0.8


def test_the_reference_has_a_head_for_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), [5, 6, 7, 30])
    x = rng.normal(0, 0.3, (48, 9)).astype(np.float32)
    x[np.arange(48), y] += 3
    sample = sample_classes(Batches(x, y, shape=(9,), classes=4), 30, np.random.default_rng(1))
    monkeypatch.setattr(training, "_REFERENCE_ROWS", 40)
    seen = []

    def member_features(images: np.ndarray, member: int) -> np.ndarray:
        assert member == 6
        seen.append(len(images))
        return images

    kernel, bias = train_reference(member_features, sample, 6, width=9)
    assert kernel.shape == (4, 9)
    assert bias.shape == (4,)
    assert seen == [5 + 6 + 7 + 22]
    monkeypatch.setattr(training, "_SAMPLE_BYTES", 4 * 9 * 24)
    train_reference(member_features, sample, 6, width=9)
    assert seen[1:] == [5 + 6 + 6 + 6]
    margins = x @ kernel.T + bias
    np.testing.assert_array_equal(margins.argmax(axis=1), y)
    assert ((margins > 0) == (np.arange(4) == y[:, None])).all()


@given(
    st.lists(st.integers(1, 70), min_size=2, max_size=7),
    st.sampled_from(["pair", "one_vs_rest"]),
    st.integers(2, 4),
    st.integers(0, 99),
)
def test_every_group_of_rows_counts_the_same(
    counts: list[int], head: Any, size: int, seed: int
) -> None:
    classes = len(counts)
    size = min(size, classes)
    label = np.repeat(np.arange(classes), counts)
    sets = np.array(list(combinations(range(classes), size)))
    rngs = [np.random.default_rng([seed, number]) for number in range(len(sets))]
    rows = choose_rows(np.array(counts), sets, head, rngs)
    heads = 1 if head == "pair" and size == 2 else size
    assert rows.numbers.shape == rows.weight.shape
    assert rows.positive.shape == (*rows.numbers.shape, heads)
    others = head == "one_vs_rest" and classes > size
    for numbers, weight, positive, pair in zip(
        rows.numbers, rows.weight, rows.positive, sets, strict=True
    ):
        used = weight > 0
        foreign = used & ~np.isin(label[numbers], pair)
        assert foreign.any() == others
        for group in pair:
            own = used & (label[numbers] == group)
            assert sorted(numbers[own]) == np.flatnonzero(label == group).tolist()
            np.testing.assert_allclose(weight[own], 1 / counts[group])
        for index in range(heads):
            np.testing.assert_array_equal(
                positive[used, index], label[numbers[used]] == pair[index]
            )
        if others:
            drawn = foreign
            assert len(np.unique(numbers[drawn])) == drawn.sum()
            np.testing.assert_allclose(weight[drawn], 1 / drawn.sum())
            times = np.bincount(label[numbers[drawn]], minlength=classes)
            assert (times[pair] == 0).all()
            rest = np.delete(np.arange(classes), pair)
            most = -(-128 // len(rest))
            assert (times[rest] >= np.minimum(counts, most - 1)[rest]).all()
            assert (times[rest] <= np.minimum(counts, most)[rest]).all()
            assert drawn.sum() <= 128


class TestSample:
    def sample(self, images: Images, batch_size: int, per_class: int, seed: int = 0) -> Any:
        batches = Batches(
            images.x_train,
            images.y_train,
            shape=images.x_train.shape[1:],
            classes=CLASSES,
            batch_size=batch_size,
        )
        return sample_classes(batches, per_class, np.random.default_rng(seed))

    def test_it_takes_as_many_as_asked_whatever_the_batches(self, images: Images) -> None:
        one, other = self.sample(images, 7, 5), self.sample(images, 64, 5)
        assert one.images.shape == (5 * CLASSES, *images.x_train.shape[1:])
        np.testing.assert_array_equal(one.images, other.images)
        assert (one.images != self.sample(images, 7, 5, seed=1).images).any()
        fewer, first = self.sample(images, 7, 3), one.first(3)
        np.testing.assert_array_equal(first.images, fewer.images)
        assert first.counts.tolist() == fewer.counts.tolist() == [3] * CLASSES

    def test_the_reference_gets_as_many_as_memory_holds(
        self, images: Images, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        batches = Batches(
            images.x_train, images.y_train, shape=images.x_train.shape[1:], classes=CLASSES
        )

        def count(per_class: int) -> int:
            rng = np.random.default_rng(0)
            sample = sample_classes(batches, per_class, rng, for_reference=True)
            return int(sample.counts.max())

        assert count(5) == np.bincount(images.y_train).max()
        size = 4 * next(iter(batches))[0][0].size
        monkeypatch.setattr(training, "_SAMPLE_BYTES", 7 * CLASSES * size)
        assert [count(5), count(9)] == [7, 9]
        monkeypatch.setattr(training, "_REFERENCE_ROWS", 6 * CLASSES + 2)
        assert [count(5), count(9)] == [6, 9]

    def test_small_classes_give_what_they_have(self, images: Images) -> None:
        keep = np.r_[0:3, 20:120]  # class 0 has three images, the others twenty
        few = Images(images.x_train[keep], images.y_train[keep], images.x_test, images.y_test)
        sample = self.sample(few, 32, 8)
        assert sample.counts.tolist() == [3, 8, 8, 8, 8, 8]
        start = 0
        for label, count in enumerate(sample.counts):
            own = few.x_train[few.y_train == label]
            chosen = sample.images[start : start + count]
            places = [np.flatnonzero((image == own).all(axis=(1, 2, 3))) for image in chosen]
            assert len(np.unique(np.concatenate(places))) == count
            start += count
