"""Heads trained side by side, and the images that they are trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images

from keras_tl_defense._keras import keras
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble import training
from keras_tl_defense.ensemble.training import HeadTrainer, sample_classes, train_heads


def optimizer(rate: float) -> Any:
    return keras.optimizers.serialize(keras.optimizers.Adam(rate))


def problem(heads: int = 4, rows: int = 24, features: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    positive = np.repeat(np.float32([1, 0]), rows // 2)
    x = rng.normal(3, 1, (heads, rows, features)).astype(np.float32)
    x[:, : rows // 2, :5] += 1
    x[:, :, 10:20] = 2  # features that never change
    return x, positive


def test_heads_start_at_the_ridge_regression() -> None:
    x, positive = problem()
    heads = HeadTrainer(optimizer(1e-12), 4, 24).fit(x, positive, 1, 8, np.random.default_rng(0))
    for head in range(4):
        centred = (x[head] - x[head].mean(axis=0)).astype(float)
        gram = centred @ centred.T
        ridge = training._RIDGE * np.trace(gram) / 24 * np.eye(24)
        kernel = centred.T @ np.linalg.solve(gram + ridge, 2.0 * positive - 1)
        np.testing.assert_allclose(heads.kernel[head], kernel, atol=1e-5)
        np.testing.assert_allclose(heads.bias[head], -kernel @ x[head].mean(axis=0), atol=1e-4)


def test_the_optimizer_lowers_the_loss_and_a_trainer_can_be_used_again() -> None:
    x, positive = problem()
    trainer = HeadTrainer(optimizer(0.05), 4, 24)
    first = trainer.fit(x, positive, 40, 8, np.random.default_rng(0))
    assert (first.loss[:, -1] < 0.5 * first.loss[:, 0]).all()
    logits = np.einsum("hnf,hf->hn", x, first.kernel) + first.bias[:, None]
    assert ((logits > 0) == (positive > 0)).all()
    again = trainer.fit(x, positive, 40, 8, np.random.default_rng(0))
    np.testing.assert_allclose(again.kernel, first.kernel, rtol=1e-5, atol=1e-7)


def test_identical_images_do_no_harm() -> None:
    x = np.ones((2, 8, 5), np.float32)
    heads = HeadTrainer(optimizer(1e-3), 2, 8).fit(
        x, np.repeat(np.float32([1, 0]), 4), 2, 8, np.random.default_rng(0)
    )
    assert np.isfinite(heads.kernel).all()
    assert np.isfinite(heads.bias).all()


def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(4), 6)
    x = rng.normal(0, 1, (24, 15)).astype(np.float32) + y[:, None]
    sample = sample_classes(Batches(x, y, shape=(15,), classes=4), 6, np.random.default_rng(1))
    pairs = np.stack(np.triu_indices(4, 1), axis=1)
    scales = np.linspace(0.5, 1.5, len(pairs)).astype(np.float32)

    def row_features(images: np.ndarray, rows: np.ndarray, members: np.ndarray) -> tf.Tensor:
        scaled = images[rows] * scales[members][:, None, None]
        return tf.constant(scaled.reshape(-1, 15))

    def train(chunk_bytes: int, rows_at_once: int) -> Any:
        monkeypatch.setattr(training, "_CHUNK_BYTES", chunk_bytes)
        done = []
        heads = train_heads(
            row_features,
            sample,
            pairs,
            15,
            optimizer(1e-12),
            epochs=1,
            batch_size=32,
            rows_at_once=rows_at_once,
            rng=np.random.default_rng(0),
            progress=lambda count, figures: done.append((count, figures)),
        )
        assert sum(count for count, _ in done) == len(pairs)
        return heads, sum(bool(figures) for _, figures in done)

    whole, pieces = train(1 << 20, 512)
    assert pieces == 1
    for chunk_bytes, rows_at_once in ((1, 512), (4 * 12 * 15 * 4, 24), (4 * 12 * 15 * 4, 5)):
        heads, pieces = train(chunk_bytes, rows_at_once)
        assert pieces > 1
        np.testing.assert_allclose(heads.kernel, whole.kernel, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(heads.bias, whole.bias, rtol=1e-3, atol=1e-4)


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

    def test_small_classes_repeat_their_images(self, images: Images) -> None:
        keep = np.r_[0:3, 20:120]  # class 0 has three images, the others twenty
        few = Images(images.x_train[keep], images.y_train[keep], images.x_test, images.y_test)
        sample = self.sample(few, 32, 8)
        assert sample.rows.shape == (CLASSES, 8)
        assert np.bincount(sample.rows[0]).tolist() == [3, 3, 2]
        for label, rows in enumerate(sample.rows):
            own = few.x_train[few.y_train == label]
            for image in sample.images[rows]:
                assert (image == own).all(axis=(1, 2, 3)).any()
