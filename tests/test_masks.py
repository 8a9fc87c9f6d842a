"""Which units a ratio prunes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import connection_mask

from keras_tl_defense.pruning.masks import (
    class_set_scores,
    connection_thresholds,
    filter_masks,
    pruned_count,
)
from keras_tl_defense.pruning.ratios import resolve_ratios

percent = st.integers(0, 99).map(lambda p: p / 100)
scores = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 30)),
    elements=st.sampled_from([0.0, 0.5, 1.0, 2.0]),  # ties are common, as dead filters are
)


def pruned_by_sorting(row: np.ndarray, count: int) -> set[int]:
    """The `count` lowest, of equal ones the lower index first."""
    return set(sorted(range(len(row)), key=lambda index: (row[index], index))[:count])


@given(st.integers(0, 99), st.integers(1, 3000))
def test_a_ratio_prunes_its_floor_exactly(hundredths: int, units: int) -> None:
    exact = int(Fraction(hundredths, 100) * units)
    assert pruned_count(hundredths / 100, units) == min(exact, units - 1)


@given(scores, percent)
def test_filter_masks_prune_the_lowest(values: np.ndarray, ratio: float) -> None:
    masks = filter_masks(values, ratio)
    for row, mask in zip(values, masks, strict=True):
        assert set(np.flatnonzero(~mask)) == pruned_by_sorting(row, pruned_count(ratio, len(row)))
        assert mask.any()


@given(
    arrays(np.float32, (5, 7), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])),
    arrays(np.float32, (3, 5), elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])),
    percent,
)
def test_threshold_and_tie_stand_for_the_lowest_connections(
    weights: np.ndarray, unit_scores: np.ndarray, ratio: float
) -> None:
    thresholds, ties = connection_thresholds(weights, unit_scores, ratio)
    for row, threshold, tie in zip(unit_scores, thresholds, ties, strict=True):
        mask = connection_mask(weights, row, threshold, tie)
        expected = pruned_by_sorting(
            (np.abs(weights) * row[:, None]).ravel(), pruned_count(ratio, weights.size)
        )
        assert set(np.flatnonzero(~mask.ravel())) == expected


def test_a_pair_scores_the_larger_of_its_classes() -> None:
    activations = np.array([[1.0, 5.0], [3.0, 2.0], [9.0, 9.0]])
    assert class_set_scores(activations, np.array([[0, 1]])).tolist() == [[3.0, 5.0]]


class TestRatios:
    layers = ("conv1_1", "conv1_2", "conv2_1", "fc1")

    def test_one_number_counts_for_every_layer(self) -> None:
        assert resolve_ratios(0.5, self.layers) == dict.fromkeys(self.layers, 0.5)

    def test_the_first_pattern_that_matches_counts(self) -> None:
        ratios = {"conv1_1": 0.9, "conv1*": 0.5}
        assert resolve_ratios(ratios, self.layers) == {"conv1_1": 0.9, "conv1_2": 0.5}

    def test_a_name_means_the_layer_of_that_name(self) -> None:
        """Saved ratios are names, whatever characters are in them."""
        layers = ["conv[1]", "conv1", "conv*"]
        ratios = {"conv[1]": 0.5, "conv*": 0.7}
        assert resolve_ratios(ratios, layers) == ratios

    def test_zero_leaves_a_layer_alone(self) -> None:
        assert resolve_ratios({"fc1": 0, "*": 0.5}, self.layers) == dict.fromkeys(
            self.layers[:3], 0.5
        )

    @pytest.mark.parametrize("bad", [1.0, -0.1, 1.5, float("nan"), float("inf")])
    def test_outside_the_range(self, bad: float) -> None:
        with pytest.raises(ValueError, match=r"must be in \[0, 1\).*Received: ratios\['conv1\*'\]"):
            resolve_ratios({"conv1*": bad}, self.layers)

    def test_a_pattern_without_a_layer(self) -> None:
        with pytest.raises(ValueError, match=r"'block1\*' matches no prunable layer.*conv1_1"):
            resolve_ratios({"block1*": 0.5}, self.layers)

    @pytest.mark.parametrize("bad", ["0.5", None, [0.5], True])
    def test_neither_number_nor_mapping(self, bad: object) -> None:
        with pytest.raises(TypeError, match="must be a number in"):
            resolve_ratios(bad, self.layers)  # type: ignore[arg-type]
