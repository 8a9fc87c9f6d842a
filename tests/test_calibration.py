"""The score's threshold: what it keeps, and where it is kept."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, draw_images, fitted
from hypothesis import assume, given
from hypothesis import strategies as st

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble.calibration import Calibration, score_threshold


@given(
    st.lists(st.integers(-20, 20), min_size=2, max_size=60), st.integers(1, 99), st.integers(0, 9)
)
def test_of_exchangeable_inputs_the_share_asked_is_kept(
    values: list[int], percent: int, seed: int
) -> None:
    """Whichever of them comes last, the others set its threshold: exact, as all are as likely."""
    retention = percent / 100
    assume(Fraction(100 - percent, 100) * len(values) >= 1)
    scores = np.random.default_rng(seed).permutation(np.array(values, float))
    kept = [
        score >= score_threshold(np.delete(scores, index), retention)
        for index, score in enumerate(scores)
    ]
    assert sum(kept) * 100 >= percent * len(scores)


def test_a_retention_of_next_to_nothing() -> None:
    assert score_threshold(np.arange(9.0), 1e-12) == 8


@given(st.integers(1, 200), st.integers(1, 99))
def test_no_more_is_kept_than_must_be_and_too_few_images_are_refused(n: int, percent: int) -> None:
    """The next higher score as the threshold would keep too few."""
    scores = np.random.default_rng(n).permutation(n).astype(float)
    needed = math.ceil(Fraction(100, 100 - percent)) - 1
    if n < needed:
        with pytest.raises(ValueError, match=rf"at least {needed} images.*Received: {n} such"):
            score_threshold(scores, percent / 100)
        return
    above = n - score_threshold(scores, percent / 100)  # scores at the threshold or higher
    assert above * 100 >= percent * (n + 1) - 100
    assert (above - 1) * 100 < percent * (n + 1)


@pytest.fixture(scope="module")
def calibrated(student: Any, images: Images) -> Any:
    """A defence calibrated to 0.8 on images of its own."""
    defence = fitted(student, images, {"conv*": 0.5}, ensemble_size=3)
    assert defence.decision == "count"
    assert defence.calibration is None
    defence.calibrate(*draw_images(25, seed=11), retention=0.8, verbose=0)
    return defence


def test_the_threshold_is_that_of_the_rightly_answered_images(
    calibrated: Any, student: Any, images: Images
) -> None:
    x, y = draw_images(25, seed=11)
    y[:5] = 3  # as good as answered wrongly: not counted
    details = calibrated.explain(x, verbose=0)
    scores = np.sort(details["score"][details["student_class"] == y])
    assert len(scores) < len(y)
    kept = calibrated.calibrate(x, y, retention=0.9, verbose=0)
    threshold = scores[math.floor(0.1 * (len(scores) + 1) + 1e-9) - 1]
    assert calibrated.calibration == Calibration(0.9, kept, float(threshold))
    assert (kept.count, kept.n) == ((scores >= threshold).sum(), len(scores))
    details = calibrated.explain(x, verbose=0)
    np.testing.assert_array_equal(details["accepted"], details["score"] >= threshold)
    answer = np.where(details["accepted"], details["student_class"] + 1, 0)
    np.testing.assert_array_equal(details["answer"], answer)
    calibrated.calibrate(*draw_images(25, seed=11), retention=0.8, verbose=0)


def test_fresh_images_are_kept_as_asked(calibrated: Any) -> None:
    kept = calibrated.evaluate(*draw_images(40, seed=12), verbose=0)["retention"]
    assert kept.low <= 0.8 + 0.1  # the threshold has an error of its own
    assert kept.high >= 0.8
    stricter = calibrated.calibration.threshold
    calibrated.calibrate(*draw_images(25, seed=11), verbose=0)
    assert calibrated.calibration.asked == calibrated.retention == 0.95
    assert calibrated.calibration.threshold < stricter
    calibrated.calibrate(*draw_images(25, seed=11), retention=0.8, verbose=0)
    assert calibrated.calibration.threshold == stricter


def test_the_decision_can_be_switched(calibrated: Any, images: Images) -> None:
    noise = np.random.default_rng(5).integers(0, 256, (30, *images.x_test.shape[1:]))
    x = np.concatenate([images.x_test, noise])
    accepted = {}
    for decision in ("count", "score"):
        calibrated.decision = decision
        assert calibrated.decision == decision
        details = calibrated.explain(x, verbose=0)
        accepted[decision] = details["accepted"]
    threshold = calibrated.calibration.threshold
    np.testing.assert_array_equal(accepted["score"], details["score"] >= threshold)
    np.testing.assert_array_equal(accepted["count"], details["disagreements"] < 1)
    assert (accepted["score"] != accepted["count"]).any()
    with pytest.raises(ValueError, match="Received: decision='both'"):
        calibrated.decision = "both"


@pytest.mark.parametrize("decision", ["score", "count"])
def test_a_file_and_an_exported_graph_decide_alike(
    decision: str, calibrated: Any, images: Images, tmp_path: Path
) -> None:
    calibrated.decision = decision
    details = calibrated.explain(images.x_test, verbose=0)
    calibrated.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    folder = calibrated.export(tmp_path / "serving")
    calibrated.decision = "score"
    assert loaded.decision == decision
    assert loaded.calibration == calibrated.calibration
    again = loaded.explain(images.x_test, verbose=0)
    serve = tf.saved_model.load(str(folder)).signatures["serving_default"]
    served = serve(tf.constant(images.x_test, tf.float32))
    for name in ("answer", "accepted"):
        np.testing.assert_array_equal(again[name], details[name])
        np.testing.assert_array_equal(served[name].numpy(), details[name])


def test_an_uncalibrated_score_decides_nothing(defence: Any) -> None:
    assert defence.calibration is None
    with pytest.raises(RuntimeError, match=r"Call `calibrate\(x_val, y_val\)` first"):
        defence.decision = "score"
    assert defence.decision == "count"


def test_adapt_and_fit_begin_afresh(student: Any, images: Images) -> None:
    defence = fitted(student, images, {"conv*": 0.5})
    for step in (defence.fit, defence.adapt):
        defence.calibrate(images.x_test, images.y_test, retention=0.9, verbose=0)
        assert defence.decision == "score"
        step(images.x_train, images.y_train, verbose=0)
        assert defence.decision == "count"
        assert defence.calibration is None
        with pytest.raises(RuntimeError, match="There is no threshold"):
            defence.decision = "score"


def test_bad_input(calibrated: Any, images: Images) -> None:
    x, y = images.x_test, images.y_test
    before = calibrated.calibration
    wrong = (calibrated.explain(x, verbose=0)["student_class"] + 1) % CLASSES
    with pytest.raises(ValueError, match=r"at least 19 images .*Received: \d+ such images"):
        calibrated.calibrate(x[::6], y[::6], verbose=0)
    with pytest.raises(ValueError, match=r"at least 1 images .*Received: 0 such images"):
        calibrated.calibrate(x, wrong, retention=0.5, verbose=0)
    with pytest.raises(ValueError, match=r"in 0..5.*Received: y from 1 to 6"):
        calibrated.calibrate(x, y + 1, verbose=0)
    with pytest.raises(ValueError, match="labels are missing"):
        calibrated.calibrate(x, verbose=0)
    for retention in (0, 1, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="Received: retention="):
            calibrated.calibrate(x, y, retention=retention, verbose=0)
    assert calibrated.calibration == before
    with pytest.raises(AttributeError):
        calibrated.calibration = before


def test_a_dataset_will_do(calibrated: Any, images: Images) -> None:
    x, y = draw_images(25, seed=11)
    before = calibrated.calibration
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(9)
    calibrated.calibrate(dataset.shuffle(8), retention=0.8, verbose=0)
    assert calibrated.calibration.asked == before.asked
    assert calibrated.calibration.retention == before.retention
    assert calibrated.calibration.threshold == pytest.approx(before.threshold, abs=1e-5)


def test_retention_is_checked(student: Any) -> None:
    for retention in (0, 1, -0.5):
        with pytest.raises(ValueError, match="Received: retention="):
            ktd.DifferentiatorEnsemble(student, 0.5, retention=retention)
