"""Ensembles of several sizes, from one pass over the images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Images, fitted, once
from test_report import results

import keras_tl_defense as ktd
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.evaluation import evaluate_ensemble_sizes

__all__ = ["results"]  # a fixture


@once
@pytest.mark.parametrize(("size", "threshold"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_every_size_is_that_of_a_defence_of_the_size(
    size: int,
    threshold: int,
    student: Any,
    images: Images,
    results: dict[str, AttackResult],
) -> None:
    x, y = images.x_test, images.y_test
    options = {"ensemble_size": size, "reject_threshold": threshold}
    defence = fitted(student, images, {"conv*": 0.5}, **options)
    expected = ktd.evaluate_defence(defence, x, y, results, verbose=0)
    sizes = evaluate_ensemble_sizes(defence, x, y, results, verbose=0).table
    assert sizes["ensemble_size"].max() == 5  # 15 are asked for, and 5 know a class
    assert (sizes["reject_threshold"] <= sizes["ensemble_size"]).all()
    chosen = (sizes["ensemble_size"] == size) & (sizes["reject_threshold"] == threshold)
    rows = list(sizes[chosen].itertuples())
    assert len(rows) == 2 + 2 * len(results)
    for row in rows:
        assert row.rate == expected.rate(row.inputs, row.metric)
        assert row.low <= row.rate <= row.high


@once
def test_more_members_accept_less(
    defence: Any, images: Images, results: dict[str, AttackResult]
) -> None:
    report = evaluate_ensemble_sizes(
        defence, images.x_test, images.y_test, results, thresholds=[2], verbose=0
    )
    for _, rows in report.table.groupby(["inputs", "metric"]):
        assert (np.diff(rows["count"]) <= 0).all()
        assert rows["ensemble_size"].tolist() == [2, 3, 4, 5]
    figure = report.plot()
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert set(lines) == {"retention", "targeted: success", "untargeted: success"}
    kept = report.table[report.table["metric"] == "retention"]["rate"]
    np.testing.assert_allclose(lines["retention"], kept)
    assert "retention" in repr(report)


def test_the_defences_own_threshold_does_not_count(
    defence: Any, student: Any, images: Images, results: dict[str, AttackResult]
) -> None:
    options: dict[str, Any] = {"sizes": [1, 2], "verbose": 0}
    strict = fitted(student, images, {"conv*": 0.5}, ensemble_size=4, reject_threshold=4)
    tables = [
        evaluate_ensemble_sizes(d, images.x_test, images.y_test, results, **options).table
        for d in (defence, strict)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_what_has_no_sizes(student: Any, defence: Any, images: Images) -> None:
    x, y = images.x_test, images.y_test
    with pytest.raises(ValueError, match="No size is left: 5 differentiators know a class"):
        evaluate_ensemble_sizes(defence, x, y, sizes=[6, 7], verbose=0)
    with pytest.raises(ValueError, match="No size is left"):
        evaluate_ensemble_sizes(defence, x, y, sizes=[1, 2], thresholds=[3], verbose=0)
    with pytest.raises(TypeError, match=r"must be several integers.*Received: sizes=15"):
        evaluate_ensemble_sizes(defence, x, y, sizes=15, verbose=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`sizes` must be an integer of at least 1"):
        evaluate_ensemble_sizes(defence, x, y, sizes=[0], verbose=0)
    votes = ktd.DifferentiatorEnsemble(student, 0.5, head="pair", mode="vote")
    with pytest.raises(ValueError, match="all pairs vote"):
        evaluate_ensemble_sizes(votes, x, y, verbose=0)
