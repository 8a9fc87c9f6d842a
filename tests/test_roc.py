"""Curves: areas, thresholds and shares counted again by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from conftest import Images
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import trapezoid

import keras_tl_defense as ktd
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.evaluation import RocReport
from keras_tl_defense.metrics import Auroc, Rate

# few distinct scores, so that there are ties
SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=30).map(lambda s: np.array(s) / 2)


@st.composite
def details(draw: Any) -> dict[str, dict[str, np.ndarray]]:
    """What a report keeps, of any clean images of which one at least is right, and an attack."""
    found = {}
    for inputs, flag in (("clean", "right"), ("mimicry", "reached")):
        score = draw(SCORES).astype(np.float32)
        flags = st.lists(st.booleans(), min_size=len(score), max_size=len(score)).map(np.array)
        found[inputs] = {"score": score, flag: draw(flags), "accepted": draw(flags)}
    found["clean"]["right"][0] = True
    return found


@given(SCORES, SCORES)
def test_the_area_counts_pairs(honest: np.ndarray, crafted: np.ndarray) -> None:
    won = 0.0
    for a in honest:
        for b in crafted:
            won += 1 if a > b else 0.5 if a == b else 0
    found = Auroc.of(honest, crafted)
    assert found.auroc == pytest.approx(won / (len(honest) * len(crafted)), abs=1e-12)
    assert 0 <= found.low <= found.auroc <= found.high <= 1
    assert found.low < found.high


@given(SCORES, SCORES)
def test_negated_scores_turn_the_area_round(honest: np.ndarray, crafted: np.ndarray) -> None:
    found = Auroc.of(honest, crafted)
    for other in (Auroc.of(-honest, -crafted), Auroc.of(crafted, honest)):
        assert other.auroc == pytest.approx(1 - found.auroc, abs=1e-9)
        assert other.low == pytest.approx(1 - found.high, abs=1e-6)
        assert other.high == pytest.approx(1 - found.low, abs=1e-6)


@given(SCORES, SCORES)
def test_the_ends_of_the_interval_lie_1_96_errors_away(
    honest: np.ndarray, crafted: np.ndarray
) -> None:
    """The error as Hanley and McNeil write it, the counts in its middle both their mean."""
    found = Auroc.of(honest, crafted)
    m, n = len(honest), len(crafted)
    for end in (found.low, found.high):
        q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
        variance = end * (1 - end) + ((m + n) / 2 - 1) * (q1 - end**2 + q2 - end**2)
        error = math.sqrt(max(variance, 0) / (m * n))
        assert abs(end - found.auroc) == pytest.approx(1.959964 * error, abs=1e-4)


def test_the_interval_holds_the_true_area_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(0)
    true = 0.5 * (1 + math.erf(1.5 / 2))  # of normal scores whose means are 1.5 apart
    drawn = [Auroc.of(rng.normal(1.5, 1, 25), rng.normal(0, 1, 15)) for _ in range(400)]
    assert 0.93 <= np.mean([a.low <= true <= a.high for a in drawn]) <= 0.98


def test_an_area_without_inputs_is_no_number() -> None:
    for none in (Auroc.of(np.zeros(0), np.ones(3)), Auroc.of(np.ones(3), np.zeros(0))):
        assert math.isnan(none.auroc)
        assert math.isnan(none.low)
        assert math.isnan(none.high)


@given(details())
def test_the_curve(details: dict[str, dict[str, np.ndarray]]) -> None:
    roc = RocReport(details)
    clean, crafted = details["clean"], details["mimicry"]
    honest, reached = clean["score"][clean["right"]], crafted["reached"]
    assert roc.curve["threshold"].tolist() == sorted(
        {*honest.tolist(), *crafted["score"][reached].tolist(), math.inf}
    )
    for row in roc.curve.itertuples():
        assert row.retention == np.mean(honest >= row.threshold)
        assert row.attack_success == np.mean(reached & (crafted["score"] >= row.threshold))
    assert (np.diff(roc.curve["retention"]) <= 0).all()
    assert (np.diff(roc.curve["attack_success"]) <= 0).all()
    assert roc.curve[["retention", "attack_success"]].iloc[0].tolist() == [1, reached.mean()]
    assert roc.curve[["retention", "attack_success"]].iloc[-1].tolist() == [0, 0]
    if reached.any():
        area = -trapezoid(roc.curve["attack_success"], roc.curve["retention"])
        assert roc.table["auroc"][0] == pytest.approx(1 - area / reached.mean())


@given(details())
def test_the_table(details: dict[str, dict[str, np.ndarray]]) -> None:
    roc = RocReport(details)
    clean, crafted = details["clean"], details["mimicry"]
    honest = clean["score"][clean["right"]]
    assert roc.table["asked"].tolist() == [0.95, 0.90]
    for row in roc.table.itertuples():
        assert row.retention == np.mean(honest >= row.threshold) >= row.asked
        assert np.mean(honest > row.threshold) < row.asked  # no higher one keeps so many
        success = crafted["reached"] & (crafted["score"] >= row.threshold)
        rate = Rate.of(success)
        assert (row.count, row.n, row.rate, row.low, row.high) == tuple(vars(rate).values())
    own = roc.operating.iloc[0]
    assert own["retention"] == np.mean(clean["accepted"][clean["right"]])
    assert own["attack_success"] == np.mean(crafted["reached"] & crafted["accepted"])


@pytest.fixture
def report(defence: Any, images: Images) -> Any:
    """Two stand-ins for attacks, images of other classes; the second is always over budget."""
    x, y = images.x_test, images.y_test
    nothing = np.zeros(60)
    shared = {"adversarial": x[::-1], "distance": nothing, "dssim": nothing}
    shared |= {"source": x, "target": x[::-1], "y_source": y, "y_target": y[::-1]}
    attacks = {
        "mimicry": AttackResult(**shared, within_budget=np.ones(60, bool)),
        "feeble": AttackResult(**shared, within_budget=np.zeros(60, bool)),
    }
    return ktd.evaluate_defence(defence, x, y, attacks=attacks, verbose=0)


def test_a_report_has_it(report: Any, tmp_path: Any) -> None:
    roc = report.roc()
    assert roc.table.groupby("inputs").size().to_dict() == {"mimicry": 2, "feeble": 2}
    for own in roc.operating.itertuples():
        assert own.retention == report.rate("clean", "retention")
        assert own.attack_success == report.rate(own.inputs, "defended_success")
    undefended = roc.curve.groupby("inputs")["attack_success"].max()
    for name in ("mimicry", "feeble"):
        assert undefended[name] == report.rate(name, "undefended_success")
    feeble = roc.table[roc.table["inputs"] == "feeble"]
    assert feeble[["auroc", "auroc_low", "auroc_high"]].isna().all(axis=None)
    assert (feeble["rate"] == 0).all()
    assert repr(roc).startswith("RocReport\n")
    assert "mimicry" in repr(roc)
    lines = roc.to_markdown().splitlines()
    assert len(lines) == 2 + len(roc.table)
    assert lines[-1].startswith("| feeble | – | – | ")
    roc.plot().savefig(tmp_path / "roc.png")


def test_the_picture(report: Any) -> None:
    roc = report.roc()
    figure = roc.plot()
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    area = roc.table["auroc"][0]
    curve = lines[f"mimicry (AUROC {area:.2f})"].get_xydata()
    drawn = roc.curve.loc[roc.curve["inputs"] == "mimicry", ["retention", "attack_success"]]
    np.testing.assert_array_equal(curve, drawn)
    points = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"]
    assert roc.table.loc[:1, ["retention", "rate"]].to_numpy().tolist() in points
    assert roc.operating.iloc[:1, 1:].to_numpy().tolist() in points
    assert "feeble (no success)" in lines
    assert "retention" in axes.get_xlabel()
    assert "all crafted" in axes.get_ylabel()
    assert len(figure.legends[0].get_texts()) == 4


def test_what_has_no_curve(defence: Any, images: Images, report: Any) -> None:
    clean = ktd.evaluate_defence(defence, images.x_test, images.y_test, verbose=0)
    with pytest.raises(ValueError, match=r'attacks=\{"mimicry": result\}.*details of clean'):
        clean.roc()
    with pytest.raises(ValueError, match=r"Received: details of nothing"):
        ktd.DefenceReport(clean.table).roc()
    report.details["clean"]["right"] = np.zeros(60, bool)
    with pytest.raises(ValueError, match=r"no clean image rightly.*60 clean images, none"):
        report.roc()
