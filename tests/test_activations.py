"""Class means of activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from conftest import CLASSES, Images

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras


def expected_means(student: Any, layer: str, images: Images) -> np.ndarray:
    """The class means of a layer inside the base, by Keras and NumPy."""
    base = student.get_layer("base")
    probe = keras.Model(base.inputs[0], base.get_layer(layer).output)
    out = np.abs(probe.predict(images.x_train.astype(np.float32), verbose=0))
    per_image = out.reshape(len(out), -1, out.shape[-1]).mean(axis=1)
    return np.stack([per_image[images.y_train == c].mean(axis=0) for c in range(CLASSES)])


@pytest.mark.parametrize(
    ("layer", "read_at"),
    [("conv1", "conv1"), ("conv2", "relu2"), ("fc1", "flatten"), ("head", "fc1")],
)
def test_means_are_read_at_the_end_of_the_block(
    student: Any, images: Images, layer: str, read_at: str
) -> None:
    activations = ktd.ClassActivations(student)
    activations.adapt(images.x_train, images.y_train, batch_size=7, verbose=0)
    np.testing.assert_allclose(
        activations[layer], expected_means(student, read_at, images), rtol=1e-4, atol=1e-5
    )


def test_arrays_tensors_and_datasets_give_the_same(student: Any, images: Images) -> None:
    x, y = images.x_train, images.y_train
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(200, seed=1).batch(11)
    means = []
    for data in ((x, y), (tf.constant(x), tf.constant(y)), (x.astype(np.float32), y), (dataset,)):
        activations = ktd.ClassActivations(student)
        activations.adapt(*data, verbose=0)
        means.append(activations["conv2"])
        assert activations.counts.tolist() == [20] * CLASSES
    for other in means[1:]:
        np.testing.assert_allclose(other, means[0], rtol=1e-5)


def test_adapt_starts_afresh(student: Any, images: Images) -> None:
    activations = ktd.ClassActivations(student)
    activations.adapt(255 - images.x_train, images.y_train, verbose=0)
    other = activations["conv1"]
    activations.adapt(images.x_train, images.y_train, verbose=0)
    again = ktd.ClassActivations(student)
    again.adapt(images.x_train, images.y_train, verbose=0)
    np.testing.assert_array_equal(activations["conv1"], again["conv1"])
    assert not np.allclose(activations["conv1"], other)


def test_a_class_without_images_is_named(student: Any, images: Images) -> None:
    chosen = ~np.isin(images.y_train, (2, 4))
    activations = ktd.ClassActivations(student)
    with pytest.raises(ValueError, match=r"Add images of class 2, 4\. .*no image of 2 of 6"):
        activations.adapt(images.x_train[chosen], images.y_train[chosen], verbose=0)


def test_asked_too_early_or_for_what_is_not_there(student: Any, images: Images) -> None:
    activations = ktd.ClassActivations(student)
    with pytest.raises(RuntimeError, match="Call `adapt"):
        activations["conv1"]
    activations.adapt(images.x_train, images.y_train, verbose=0)
    with pytest.raises(KeyError, match=r"not a prunable layer\. .*: conv1, conv2, fc1, head"):
        activations["pool1"]
