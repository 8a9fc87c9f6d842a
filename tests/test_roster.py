"""Which classes the differentiators know, and the votes of all pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from keras_tl_defense.ensemble.roster import Roster, find_members, most_members, pair_number
from keras_tl_defense.ensemble.voting import find_winner


@given(st.integers(2, 30), st.data())
def test_every_class_has_its_partners(classes: int, data: st.DataObject) -> None:
    each = data.draw(st.integers(1, classes - 1))
    roster = Roster(classes, 2, each)
    pairs = roster.draw(np.zeros((classes, 0)), np.random.default_rng(data.draw(st.integers(0, 9))))
    assert len(pairs) == roster.count <= classes * each
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    times = np.bincount(pairs.ravel(), minlength=classes)
    assert times.min() == each
    assert times.sum() == classes * each + classes * each % 2
    check_table(pairs, roster)


@given(st.integers(4, 30), st.data())
def test_every_class_is_in_its_groups(classes: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(3, classes - 1))
    each = data.draw(st.integers(1, min(6, most_members(classes, size))))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    roster = Roster(classes, size, each, data.draw(st.booleans()))
    groups = roster.draw(rng.normal(size=(classes, 5)), rng)
    assert groups.shape == (roster.count, size)
    assert (np.diff(groups, axis=1) > 0).all()
    times = np.bincount(groups.ravel(), minlength=classes)
    assert each <= times.min() <= times.max() <= roster.most
    assert len(np.unique(groups, axis=0)) == len(groups)
    check_table(groups, roster)


def test_a_thousand_classes() -> None:
    roster = Roster(1000, 2, 10)
    pairs = roster.draw(np.zeros((1000, 0)), np.random.default_rng(0))
    assert pairs.shape == (5000, 2)
    assert (np.bincount(pairs.ravel()) == 10).all()
    assert len(np.unique(pairs, axis=0)) == 5000
    check_table(pairs, roster)


def test_partners_of_partners_tell_nothing() -> None:
    """Six classes of two partners each: 60 rings and 10 pairs of triangles, all as likely."""
    rng = np.random.default_rng(0)
    drawn = [Roster(6, 2, 2).draw(np.zeros((6, 0)), rng) for _ in range(700)]
    triangles = 0
    for pairs in drawn:
        known = np.zeros((6, 6), int)
        known[tuple(pairs.T)] = 1
        known += known.T
        triangles += np.trace(known @ known @ known) > 0
    assert 70 <= triangles <= 135  # 100 are expected; a ring in random order has none


def check_table(member_classes: np.ndarray, roster: Roster) -> None:
    members, counts = find_members(member_classes, roster)
    assert members.shape == (roster.classes, roster.most)
    for number, (row, count) in enumerate(zip(members, counts, strict=True)):
        expected = np.flatnonzero((member_classes == number).any(axis=1))
        np.testing.assert_array_equal(row[:count], expected)


def test_partners_are_drawn_evenly() -> None:
    """Every graph on five classes in which all have two partners: twelve rings of five."""
    rng = np.random.default_rng(0)
    drawn = [Roster(5, 2, 2).draw(np.zeros((5, 0)), rng) for _ in range(1200)]
    graphs, times = np.unique(drawn, axis=0, return_counts=True)
    assert len(graphs) == 12
    assert chisquare(times).pvalue > 1e-4


def test_a_class_with_a_partner_more_is_drawn_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = [Roster(5, 2, 1).draw(np.zeros((5, 0)), rng) for _ in range(900)]
    graphs, times = np.unique(drawn, axis=0, return_counts=True)
    assert len(graphs) == 30
    assert chisquare(times).pvalue > 1e-4


def test_all_pairs_need_no_draw() -> None:
    pairs = Roster(5, 2, 4).draw(np.zeros((5, 0)), np.random.default_rng())
    np.testing.assert_array_equal(pairs, list(combinations(range(5), 2)))
    np.testing.assert_array_equal(pair_number(pairs[:, 1], pairs[:, 0], 5), np.arange(10))


def test_groups_gather_classes_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.repeat(np.arange(4), 3))
    profiles = rng.normal(size=(4, 20))[kinds] + 0.1 * rng.normal(size=(12, 20))
    alike = Roster(12, 3, 1).draw(profiles, rng)
    assert all(len(set(kinds[group])) == 1 for group in alike)
    several = Roster(12, 3, 8).draw(profiles, rng)
    assert len(np.unique(several, axis=0)) > 24

    def mixed(groups: np.ndarray) -> float:
        return float(np.mean([len(set(kinds[group])) for group in groups]))

    kinds = rng.permutation(np.repeat(np.arange(20), 5))
    profiles = rng.normal(size=(20, 30))[kinds] + 0.1 * rng.normal(size=(100, 30))
    rounds = Roster(100, 3, 6).draw(profiles, rng).reshape(6, 34, 3)
    assert mixed(rounds[0]) < 1.8
    assert mixed(rounds[-1]) < 2.1  # 2.9 at random


@given(st.integers(2, 9), st.integers(0, 99), st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_the_winner_is_the_one_of_all_pairs(classes: int, seed: int, champion: bool) -> None:
    """Tournaments drawn at random, in half of which some class wins against all others."""
    rng = np.random.default_rng(seed)
    wins = np.triu(rng.random((4, classes, classes)) < 0.5, 1)
    wins = wins | np.tril(~wins.transpose(0, 2, 1), -1)
    if champion:
        for table in wins:
            best = rng.integers(classes)
            table[best], table[:, best] = True, False
    asked = []

    def beats(rows: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        asked.append(first.shape[1])
        return tf.constant(wins[rows.numpy()[:, None], first.numpy(), second.numpy()])

    rows = tf.constant([2, 0, 3, 1, 2])
    winner = find_winner(beats, rows, classes).numpy()
    for row, found in zip(rows.numpy(), winner, strict=True):
        others = ~np.eye(classes, dtype=bool)
        votes = (wins[row] & others).sum(axis=1)
        expected = np.flatnonzero(votes == classes - 1)
        assert found == (expected[0] if len(expected) else -1)
    assert sum(asked) == 2 * (classes - 1)
    assert not champion or (winner >= 0).all()
