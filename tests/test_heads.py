"""Heads in closed form against regressions that are fitted again for each image left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, Images, fitted

from keras_tl_defense.ensemble import heads as heads_module
from keras_tl_defense.ensemble.heads import fit_heads

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def ridge(x: np.ndarray, target: np.ndarray, weight: np.ndarray, penalty: float) -> np.ndarray:
    """Kernel and, last, bias that make the weighted squared error and the penalty least."""
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    free = np.diag([penalty] * (x.shape[1] - 1) + [0.0])  # the bias has no penalty
    return np.linalg.solve(x.T @ (weight[:, None] * x) + free, x.T @ (weight * target))


def left_out(
    x: np.ndarray, positive: np.ndarray, weight: np.ndarray
) -> dict[float, tuple[float, np.ndarray, np.ndarray]]:
    """For each strength the error, and the margins `(rows, heads)`, of images left out in turn.

    Third, the kernels with their biases, `(heads, features + 1)`, that all images give.
    """
    weight = weight / weight.sum()
    scale = np.sum(weight[:, None] * (x - weight @ x) ** 2) * np.sum(weight**2)
    targets = np.where(positive, 1.0, -1.0)
    found = {}
    for strength in STRENGTHS:
        margins = np.zeros(targets.shape)
        for head, target in enumerate(targets.T):
            for row in range(len(x)):
                rest = np.arange(len(x)) != row
                fit = ridge(x[rest], target[rest], weight[rest], strength * scale)
                margins[row, head] = x[row] @ fit[:-1] + fit[-1]
        whole = np.stack([ridge(x, target, weight, strength * scale) for target in targets.T])
        error = np.sum(weight[:, None] * (margins - targets) ** 2)
        found[strength] = (float(error), margins, whole)
    return found


def problem(noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images that a class moves a little, the first half of them of the first head's class."""
    rng = np.random.default_rng(seed)
    positive = np.zeros((18, 2), bool)
    positive[:6, 0] = positive[6:11, 1] = True
    x = rng.normal(3, noise, (18, 30)).astype(np.float32)
    x[:6, :4] += 1
    x[6:11, 2:9] -= 1
    return x, positive, rng.uniform(0.2, 2, 18)


def test_held_out_margins_are_those_of_heads_fitted_without_the_image() -> None:
    cases = [problem(noise, seed) for seed, noise in enumerate((0.05, 0.4, 1.0, 3.0))]
    heads = fit_heads(*(np.stack(arrays) for arrays in zip(*cases, strict=True)))
    assert len(set(heads.strength)) > 1
    for number, (x, positive, weight) in enumerate(cases):
        found = left_out(x.astype(float), positive, weight)
        best = min(found, key=lambda strength: found[strength][0])
        assert heads.strength[number] == best
        _, margins, whole = found[best]
        for head in range(2):
            own = positive[:, head]
            high = np.average(margins[own, head], weights=weight[own])
            low = np.average(margins[~own, head], weights=weight[~own])
            half, middle = (high - low) / 2, (high + low) / 2
            if high - low <= 0.05:  # noise alone
                assert number == 3
                np.testing.assert_array_equal(heads.margins[number, :, head], -1)
                continue
            tolerance = {"rtol": 1e-3, "atol": 2e-3 / half}
            np.testing.assert_allclose(
                heads.margins[number, :, head], (margins[:, head] - middle) / half, **tolerance
            )
            expected = (x @ whole[head, :-1] + whole[head, -1] - middle) / half
            got = x @ heads.kernel[number, head] + heads.bias[number, head]
            np.testing.assert_allclose(got, expected, **tolerance)


def test_a_head_that_tells_nothing_says_no() -> None:
    x, _, weight = problem(0.4, seed=5)
    positive = np.zeros((18, 2), bool)
    positive[0, 0] = True  # a single image, which is never left out and told
    positive[:9, 1] = True
    heads = fit_heads(x[None], positive[None], weight[None])
    np.testing.assert_array_equal(heads.margins[0, :, 0], -1)
    np.testing.assert_array_equal(x @ heads.kernel[0, 0] + heads.bias[0, 0], -1)
    assert np.std(x @ heads.kernel[0, 1]) > 0.1


def test_held_out_margins_lie_at_one_and_minus_one_on_average() -> None:
    x, positive, weight = problem(0.4, seed=5)
    margins = fit_heads(x[None], positive[None], weight[None]).margins[0]
    for head in range(2):
        for own, middle in ((positive[:, head], 1), (~positive[:, head], -1)):
            mean = np.average(margins[own, head], weights=weight[own])
            assert mean == pytest.approx(middle, abs=1e-3)


def test_rows_that_only_fill_up_change_nothing() -> None:
    x, positive, weight = problem(0.4, seed=6)
    plain = fit_heads(x[None], positive[None], weight[None])
    rng = np.random.default_rng(0)
    more = np.concatenate([x, rng.normal(50, 9, (5, 30)).astype(np.float32)])
    marked = np.concatenate([positive, rng.random((5, 2)) < 0.5])
    padded = fit_heads(more[None], marked[None], np.r_[weight, np.zeros(5)][None])
    np.testing.assert_array_equal(padded.strength, plain.strength)
    np.testing.assert_allclose(padded.kernel, plain.kernel, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(padded.bias, plain.bias, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(padded.margins[:, :18], plain.margins, rtol=1e-3, atol=1e-3)


def test_bodies_do_not_touch_each_other() -> None:
    cases = [problem(noise, seed) for seed, noise in enumerate((0.1, 2.0))]
    together = fit_heads(*(np.stack(arrays) for arrays in zip(*cases, strict=True)))
    for number, case in enumerate(cases):
        alone = fit_heads(*(array[None] for array in case))
        for array, part in zip(together, alone, strict=True):
            np.testing.assert_allclose(array[number], part[0], rtol=1e-3, atol=1e-4)


def test_many_images_give_the_heads_that_the_eigenvectors_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, positive, weight = problem(0.4, seed=7)
    plain = fit_heads(x[None], positive[None], weight[None])
    monkeypatch.setattr(heads_module, "_STRENGTHS", tuple(plain.strength))
    monkeypatch.setattr(heads_module, "_EIGEN_ROWS", 8)
    for array, expected in zip(
        fit_heads(x[None], positive[None], weight[None]), plain, strict=True
    ):
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("least", [1e-2, 1e-12])
def test_an_inverse_is_found_however_small_its_least_eigenvalue(least: float) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
    matrix = (basis * np.geomspace(least, 1, 30)) @ basis.T
    inverse = heads_module._inverse(matrix.astype(np.float32))
    assert np.isfinite(inverse).all()
    if least > 1e-6:
        np.testing.assert_allclose(inverse, np.linalg.inv(matrix), atol=1e-3)


def test_identical_images_do_no_harm() -> None:
    own = np.repeat([True, False], 4)[None, :, None]
    heads = fit_heads(np.ones((1, 8, 5), np.float32), own, np.ones((1, 8)))
    assert all(np.isfinite(array).all() for array in heads)


def other_classes_rejected(defence: Any, images: Images) -> float:
    """How often a member says no to an image of a class that it was not pruned for."""
    bank = defence.get_layer("differentiators")
    values = defence._graph.run(images.x_test.astype(np.float32), [bank.tensor])
    rejected = []
    for number, pair in enumerate(defence.member_classes):
        foreign = np.flatnonzero(~np.isin(images.y_test, pair))
        features = bank.body_features(values, foreign[None].astype(np.int32), np.int32([number]))
        members = np.full((len(foreign), 1), number, np.int32)
        for label in pair:
            answered = np.full(len(foreign), label, np.int32)
            rejected.append(bank.margins(features, members, answered).numpy() < 0)
    assert len(rejected) == CLASSES * (CLASSES - 1)
    return float(np.mean(rejected))


def test_a_head_against_the_rest_knows_other_classes_and_a_pairs_does_not(
    student: Any, images: Images, defence: Any
) -> None:
    pair = fitted(student, images, {"conv*": 0.5}, ensemble_size=3, head="pair")
    assert other_classes_rejected(pair, images) < 0.7
    assert other_classes_rejected(defence, images) > 0.9


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_half_precision_keeps_margins_however_large_the_mean(scale: float) -> None:
    """Features of a large mean and a small spread, whose offsets a rounded kernel would miss."""
    rng = np.random.default_rng(0)
    positive = (np.arange(60) < 30)[None, :, None]
    x = rng.normal(1e4, 1, (1, 60, 256)) + 0.5 * positive
    x = (scale * x).astype(np.float32)
    heads = fit_heads(x, positive, np.ones((1, 60)))
    rounded = heads.rounded()
    plain, half = (x[0].astype(float) @ h.kernel[0, 0] + h.bias[0, 0] for h in (heads, rounded))
    half_bits = rounded.kernel[0, 0] / np.abs(rounded.kernel[0, 0]).max()
    np.testing.assert_allclose(half_bits, half_bits.astype(np.float16).astype(float), rtol=1e-6)
    assert np.abs(plain - half).max() < 0.02
    kept = heads.kernel[0, 0] - rounded.kernel[0, 0]
    assert np.abs(x[0].astype(float) @ kept).max() > 0.1  # what an unchanged offset would give
