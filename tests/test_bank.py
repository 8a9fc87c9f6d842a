"""Masks of the differentiators: noise on the ranks, gentler levels, the layer that heads read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images, draw_images, fitted, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble import bank
from keras_tl_defense.ensemble.mask_bank import assign_rows

PAIRS = np.stack(np.triu_indices(CLASSES, 1), axis=1)


def masks(student: Any, images: Images, ratios: Any, **options: Any) -> np.ndarray:
    """Masks of the 8 filters of conv1 and the 10 of conv2, the references' last."""
    defence = ktd.DifferentiatorEnsemble(student, ratios, **options)
    defence.adapt(images.x_train, images.y_train, verbose=0)
    return weights_of(defence)["filter_masks"]


def test_without_jitter_the_least_active_filters_go(student: Any, images: Images) -> None:
    base = student.get_layer("base")
    expected = []
    for layer in ("conv1", "relu2"):
        probe = keras.Model(base.inputs[0], base.get_layer(layer).output)
        out = np.abs(probe(images.x_train.astype(np.float32)).numpy()).mean(axis=(1, 2))
        means = np.stack([out[images.y_train == c].mean(axis=0) for c in range(CLASSES)])
        scores = np.concatenate([means[PAIRS].max(axis=1), means.max(axis=0)[None]])
        ranks = scores.argsort(axis=1, kind="stable").argsort(axis=1)
        expected.append(ranks >= scores.shape[1] // 2)
    for seed in (0, 1, None):
        got = masks(student, images, {"conv*": 0.5}, jitter=0, seed=seed)
        np.testing.assert_array_equal(got, np.concatenate(expected, axis=1))


def test_jitter_follows_the_seed(student: Any, images: Images) -> None:
    one, same, other = (masks(student, images, {"conv*": 0.5}, seed=s) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    exact, little, much = (
        masks(student, images, {"conv*": 0.5}, seed=3, jitter=j) for j in (0, 0.1, 5.0)
    )
    assert (little[:15] != exact[:15]).sum() < (much[:15] != exact[:15]).sum()
    assert (len(exact), len(much)) == (15 + 1, 15 + 4)  # with the references
    assert len(np.unique(much[15:], axis=0)) > 1
    distance = [np.mean(m[:15, None] != m[None, :15]) for m in (exact, little, much)]
    assert distance == sorted(distance)  # the differentiators resemble each other less


def test_jitter_of_no_seed_comes_from_elsewhere(student: Any, images: Images) -> None:
    one, other = (masks(student, images, {"conv*": 0.5}) for _ in range(2))
    assert (one != other).any()


@settings(max_examples=8)
@given(st.floats(0, 0.95), st.floats(0, 20), st.integers(0, 99))
def test_counts_are_exact_whatever_the_jitter(
    student: Any, images: Images, ratio: float, jitter: float, seed: int
) -> None:
    if ratio == 0:
        return
    few = Images(images.x_train[::5], images.y_train[::5], *images[2:])
    got = masks(student, few, {"conv*": ratio}, jitter=jitter, seed=seed)
    for part, filters in ((got[:, :8], 8), (got[:, 8:], 10)):
        assert (part.sum(axis=1) == filters - min(int(ratio * filters), filters - 1)).all()


def test_a_loaded_defence_keeps_its_noise(student: Any, images: Images, tmp_path: Path) -> None:
    """What is fitted again can take another level; its ranks must be those of before."""
    defence = ktd.DifferentiatorEnsemble(student, {"conv*": 0.5})
    defence.adapt(images.x_train, images.y_train, verbose=0)
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    masks = loaded.get_layer("differentiators").masks
    before = weights_of(defence)
    masks.set_level(np.arange(len(PAIRS)), 2)
    gentle = weights_of(loaded)["filter_masks"]
    assert (gentle[:15].sum(axis=1) == 8 - 2 + 10 - 2).all()
    assert (gentle | ~before["filter_masks"]).all()  # what was kept is kept
    masks.set_level(np.arange(len(PAIRS)), 0)
    np.testing.assert_array_equal(weights_of(loaded)["filter_masks"], before["filter_masks"])


@pytest.fixture(scope="module")
def twins() -> Images:
    """Images of which classes 0 and 1 cannot be told apart."""
    x, y = draw_images(20, seed=0)
    other, _ = draw_images(20, seed=9)
    x[y == 1] = other[y == 0]
    return Images(x, y, *draw_images(10, seed=1))


@pytest.mark.parametrize("head", ["pair", "one_vs_rest"])
def test_classes_that_cannot_be_told_apart_are_pruned_more_gently(
    head: str, student: Any, twins: Images
) -> None:
    defence = fitted(student, twins, {"conv*": 0.5}, head=head)
    with pytest.warns(UserWarning, match="tell fewer than 70%.* of their classes: 0, 1"):
        history = defence.fit(twins.x_train, twins.y_train, verbose=0).history
    assert len(history["loss"]) == len(history["accuracy"]) == 3
    weights = weights_of(defence)
    levels, kept = weights["levels"][:15], weights["filter_masks"]
    assert defence.member_classes[0].tolist() == [0, 1]
    assert levels[0] == 2
    alike = (defence.member_classes < 2).any(axis=1)
    assert (levels[~alike] == 0).all()
    if head == "pair":
        assert (levels[1:] == 0).all()
    table = defence.sparsity()
    expected = [{"conv1": 4, "conv2": 5}, {"conv1": 5, "conv2": 7}, {"conv1": 6, "conv2": 8}]
    assert set(table["level"]) == set(levels)
    for row in table.itertuples():
        assert row.kept == expected[row.level][row.layer]
        assert row.differentiators == (levels == row.level).sum()
        part = kept[:, :8] if row.layer == "conv1" else kept[:, 8:]
        assert (part[:15][levels == row.level].sum(axis=1) == row.kept).all()
    assert (kept[15:].sum(axis=1) == 9).all()  # references are never gentler
    assert not weights["levels"][15:].any()
    defence.adapt(twins.x_train, twins.y_train, verbose=0)
    assert not weights_of(defence)["levels"].any()


def test_heads_can_read_an_earlier_layer(student: Any, images: Images, tmp_path: Path) -> None:
    defence = fitted(student, images, {"conv1": 0.5}, head_layer="pool1", ensemble_size=3)
    assert (defence.head_layer, defence.cut) == ("pool1", "dropout")
    assert weights_of(defence)["kernel"].shape == (15, 2, 6 * 6 * 8)
    assert weights_of(defence)["reference_kernel"].shape == (4, CLASSES, 6 * 6 * 8)
    rates = defence.evaluate(images.x_test, images.y_test, verbose=0)
    assert rates["clean_acceptance"].rate > 0.8
    defence.save(tmp_path / "defence.keras")
    loaded = keras.models.load_model(tmp_path / "defence.keras")
    assert (loaded.head_layer, loaded.cut) == ("pool1", "dropout")
    np.testing.assert_array_equal(
        loaded.predict(images.x_test, verbose=0), defence.predict(images.x_test, verbose=0)
    )


def test_layers_that_heads_cannot_read(student: Any) -> None:
    with pytest.raises(ValueError, match=r"at the cut or before it.*Received: .*'head'"):
        ktd.DifferentiatorEnsemble(student, 0.5, head_layer="head")
    with pytest.raises(ValueError, match=r"at the cut or before it.*Received: .*'flatten'"):
        ktd.DifferentiatorEnsemble(student, 0.5, cut="pool1", head_layer="flatten")
    with pytest.raises(ValueError, match="no layer called 'fc9'"):
        ktd.DifferentiatorEnsemble(student, 0.5, head_layer="fc9")
    with pytest.raises(ValueError, match=r"matches no prunable layer.*Those are: conv1\."):
        ktd.DifferentiatorEnsemble(student, {"conv2": 0.5}, head_layer="pool1")


def test_too_many_heads_are_refused(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (15 * 2 + 4 * CLASSES) * 2 * 20  # and the references
    monkeypatch.setattr(bank, "_TOO_MANY_BYTES", size)
    ktd.DifferentiatorEnsemble(student, 0.5)
    monkeypatch.setattr(bank, "_TOO_MANY_BYTES", size - 1)
    with pytest.raises(ValueError, match=r"GiB.*`members_per_class=`.*`head=\"pair\"`.*15 diff"):
        ktd.DifferentiatorEnsemble(student, 0.5)
    ktd.DifferentiatorEnsemble(student, 0.5, head="pair")


def test_a_weight_is_read_as_fast_after_some_rows_were_set() -> None:
    """TensorFlow copies a weight at every read since rows of it were scattered, unless told."""
    weight = tf.Variable(tf.zeros((64, 1 << 18)))
    read = tf.function(lambda: tf.gather_nd(weight.read_value(), [[1, 2]]))

    def seconds() -> float:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            read().numpy()
            times.append(time.perf_counter() - start)
        return float(np.median(times))

    read()
    before = seconds()
    assign_rows(weight, np.array([1]), 3)
    assert read().numpy() == [3]
    assert seconds() < 8 * before  # 30 times as long else
