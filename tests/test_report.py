"""The report: its figures counted again by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import Images, draw_history
from hypothesis import given
from hypothesis import strategies as st

import keras_tl_defense as ktd
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.evaluation import plot_attacks, plot_search
from keras_tl_defense.metrics import Rate


@given(st.integers(1, 500), st.data())
def test_the_interval_is_wilsons(n: int, data: Any) -> None:
    count = data.draw(st.integers(0, n))
    rate = Rate.of(np.arange(n) < count)
    assert rate == Rate.of_counts(count, n)
    z, p = 1.959963984540054, count / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert (rate.count, rate.n, rate.rate) == (count, n, p)
    assert rate.low == pytest.approx(max(centre - half, 0), abs=1e-9)
    assert rate.high == pytest.approx(min(centre + half, 1), abs=1e-9)


def test_a_rate_of_nothing_is_no_number() -> None:
    assert math.isnan(Rate.of(np.zeros(0, bool)).rate)


@pytest.fixture
def results(images: Images) -> dict[str, AttackResult]:
    """Stand-ins for attacks: images of other classes, some of them over budget."""
    x, y = images.x_test, images.y_test
    shared = {
        "adversarial": x[::-1],
        "distance": np.zeros(60),
        "dssim": np.zeros(60),
        "within_budget": np.arange(60) % 3 > 0,
        "source": x,
        "target": x[::-1],
        "y_source": y,
    }
    return {
        "targeted": AttackResult(**shared, y_target=y[::-1]),
        "untargeted": AttackResult(**shared, y_target=None),
    }


def test_every_figure(defence: Any, images: Images, results: dict[str, AttackResult]) -> None:
    x, y = images.x_test, images.y_test
    report = ktd.evaluate_defence(defence, x, y, attacks=results, verbose=0)
    table = report.table
    assert list(table.columns) == ["inputs", "metric", "count", "n", "rate", "low", "high"]
    clean, crafted = (defence.explain(a, verbose=0) for a in (x, x[::-1]))
    right, accepted = clean["student_class"] == y, clean["answer"] > 0
    within = np.arange(60) % 3 > 0
    hit = within & (crafted["student_class"] == y[::-1])
    away = within & (crafted["student_class"] != y)
    taken = crafted["answer"] > 0
    expected = {
        ("clean", "student_accuracy"): (right.sum(), 60),
        ("clean", "retention"): ((accepted & right).sum(), right.sum()),
        ("clean", "clean_acceptance"): (accepted.sum(), 60),
        ("clean", "clean_accuracy"): ((clean["answer"] == y + 1).sum(), 60),
        ("targeted", "undefended_success"): (hit.sum(), 60),
        ("targeted", "defended_success"): ((hit & taken).sum(), 60),
        ("targeted", "accepted"): (taken.sum(), 60),
        ("targeted", "adversarial_accuracy"): ((crafted["answer"] == y + 1).sum(), 60),
        ("untargeted", "undefended_success"): (away.sum(), 60),
        ("untargeted", "defended_success"): ((away & taken).sum(), 60),
        ("untargeted", "accepted"): (taken.sum(), 60),
        ("untargeted", "adversarial_accuracy"): ((crafted["answer"] == y + 1).sum(), 60),
    }
    got = {(r.inputs, r.metric): (r.count, r.n) for r in table.itertuples()}
    assert got == expected
    for (inputs, metric), (count, n) in expected.items():
        assert report.rate(inputs, metric) == pytest.approx(count / n)
    assert hit.any()
    assert away.any()
    extra = {
        "clean": {"right": right},
        "targeted": {"reached": hit, "succeeded": hit & taken},
        "untargeted": {"reached": away, "succeeded": away & taken},
    }
    assert set(report.details) == set(extra)
    for inputs, answers in report.details.items():
        kept = {**(clean if inputs == "clean" else crafted), **extra[inputs]}
        assert set(answers) == set(kept)
        for name, values in answers.items():
            np.testing.assert_array_equal(values, kept[name])
    with pytest.raises(KeyError, match="no 'roc' of 'clean'"):
        report.rate("clean", "roc")
    lines = report.to_markdown().splitlines()
    assert len(lines) == 2 + len(expected)
    assert f"| targeted | accepted | {taken.sum()}/60 | {taken.mean():.1%} |" in lines[8]


def test_pictures(
    defence: Any, images: Images, results: dict[str, AttackResult], tmp_path: Any
) -> None:
    report = ktd.evaluate_defence(defence, images.x_test, images.y_test, attacks=results, verbose=0)
    bars = report.plot().axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], report.table["rate"])
    assert "untargeted" in repr(report)
    names = [f"class {c}" for c in range(6)]
    result = results["targeted"]
    student_class, answer = np.zeros(60, int), np.where(np.arange(60) % 2, 3, 0)
    figure = plot_attacks(result, student_class, answer, [0, 1], names)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == [
        "undefended: class 0",
        "defended: rejected",
        "undefended: class 0",
        "defended: class 2",
    ]
    with pytest.raises(ValueError, match="at least one attack"):
        plot_attacks(result, student_class, answer, [], names)
    (hit,) = np.flatnonzero(result.within_budget)[:1]
    for said, color in ((0, "tab:green"), (1, "tab:red"), (2, "tab:green")):
        answer[hit] = said and (result.y_target[hit] + said - 1) % 6 + 1
        verdict = plot_attacks(result, student_class, answer, [hit], names).axes[-1].texts[1]
        assert verdict.get_color() == color  # red where the attack succeeds
    shown = figure.axes[3].images[0].get_array()
    difference = 10.0 * (result.adversarial[0].astype(float) - result.source[0])
    np.testing.assert_array_equal(shown, np.clip(127.5 + difference, 0, 255).astype(np.uint8))
    report.plot().savefig(tmp_path / "rates.png")
    figure.savefig(tmp_path / "attacks.png")


def test_bad_input(defence: Any, images: Images, results: dict[str, AttackResult]) -> None:
    x, y = images.x_test, images.y_test
    result = results["targeted"]
    nameless = AttackResult(**{**vars(results["untargeted"]), "y_source": None})
    with pytest.raises(ValueError, match=r"Pass `y_source`"):
        ktd.evaluate_defence(defence, x, y, attacks={"a": nameless}, verbose=0)
    small = AttackResult(**{**vars(result), "adversarial": x[:, :8, :8]})
    with pytest.raises(ValueError, match=r"another input than the Student.*attacks\['a'\]"):
        ktd.evaluate_defence(defence, x, y, attacks={"a": small}, verbose=0)
    shifted = AttackResult(**{**vars(result), "y_target": result.y_target + 1})
    with pytest.raises(ValueError, match=r"in 0..5.*attacks\['a'\].y_target from 1 to 6"):
        ktd.evaluate_defence(defence, x, y, attacks={"a": shifted}, verbose=0)
    for wrong in (result, {"a": x}):
        with pytest.raises(TypeError, match=r'attacks=\{"mimicry": result\}'):
            ktd.evaluate_defence(defence, x, y, attacks=wrong, verbose=0)
    with pytest.raises(TypeError, match=r"must be a `DifferentiatorEnsemble`.*Functional"):
        ktd.evaluate_defence(defence.student, x, y, verbose=0)
    assert repr(result) == "AttackResult(60 targeted attacks, 40 within budget)"
    with pytest.raises(ValueError, match='cannot be called "clean"'):
        ktd.evaluate_defence(defence, x, y, attacks={"clean": result}, verbose=0)


@pytest.mark.parametrize(
    ("layer", "late"),
    [("fc1", False), ("base", False), ("flatten_7", False), ("conv1_7", True), ("head", True)],
)
def test_an_attack_after_the_cut_is_told(
    layer: str, late: bool, defence: Any, images: Images, results: dict[str, AttackResult]
) -> None:
    result = AttackResult(**{**vars(results["targeted"]), "layer": layer})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ktd.evaluate_defence(
            defence, images.x_test, images.y_test, attacks={"a": result}, verbose=0
        )
    told = [str(w.message) for w in caught if "imitates the layer" in str(w.message)]
    assert len(told) == late
    assert not late or repr(layer) in told[0]


def test_a_dataset_will_do(defence: Any, images: Images) -> None:
    """One that comes in another order each time, too: images and labels are of one pass."""
    passes = []

    def draw() -> Any:
        order = np.random.default_rng(len(passes)).permutation(60)
        passes.append(order)
        yield from zip(images.x_test[order], images.y_test[order], strict=True)

    spec = tf.TensorSpec((12, 12, 3), tf.uint8), tf.TensorSpec((), tf.int64)
    dataset = tf.data.Dataset.from_generator(draw, output_signature=spec).batch(8)
    shuffled = ktd.evaluate_defence(defence, dataset, verbose=0)
    arrays = ktd.evaluate_defence(defence, images.x_test, images.y_test, verbose=0)
    pd.testing.assert_frame_equal(shuffled.table, arrays.table)
    (order,) = passes
    for name, values in shuffled.details["clean"].items():
        expected = arrays.details["clean"][name][order]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="an empty dataset"):
        ktd.evaluate_defence(defence, dataset.take(0), verbose=0)
    with pytest.raises(ValueError, match=r"Pass `y`"):
        ktd.evaluate_defence(defence, images.x_test, verbose=0)


def test_a_picture_of_the_search(tmp_path: Any) -> None:
    history = draw_history()
    figure = plot_search(history)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert len(axes.lines) == 5
    for label, values in {
        "nothing pruned": [0.5, 0.6, 0.7],
        "candidate": [0.4, 0.3, 0.5],
        "lowest of all": [0.05, 0.2, 0.3],
        "chosen: 2 layers pruned, heads read flatten": [0.1, 0.2, 0.3],
    }.items():
        np.testing.assert_array_equal(lines[label].get_xdata(), [0.9, 0.95, 0.99])
        np.testing.assert_allclose(lines[label].get_ydata(), values)
    assert axes.get_title() == "What the search measured: 4 candidates"
    assert len(figure.legends[0].get_texts()) == 4
    figure.savefig(tmp_path / "search.png")
    with pytest.raises(ValueError, match=r'ratios="auto".*Received: history=None'):
        plot_search(None)
    with pytest.raises(ValueError, match=r"lacks the columns chosen, acceptance_at_…\. Pass"):
        plot_search(history[["ratios", "head_layer"]])
