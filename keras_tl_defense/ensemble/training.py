"""Train the heads of many differentiators as one batched problem, in chunks of bounded memory."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.data import Batches, check_every_class

_CHUNK_BYTES = 256 << 20
_RIDGE = 0.1  # of the mean squared length of a centred image

RowFeatures = Callable[[np.ndarray, np.ndarray, np.ndarray], tf.Tensor]
"""Maps images, rows `(groups, n)` and members `(groups,)` to features `(groups * n, features)`."""


class TrainedHeads(NamedTuple):
    """What `HeadTrainer.fit` returns.

    Attributes:
        kernel: Float32 array of shape `(heads, features)`.
        bias: Float32 array of shape `(heads,)`.
        loss: Binary cross-entropy in each epoch, array of shape `(heads, epochs)`.
        accuracy: Accuracy in each epoch, array of shape `(heads, epochs)`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray


class HeadTrainer:
    """Logistic regressions, one for each differentiator of a chunk, trained side by side.

    A head of thousands of features and some tens of images lives in the span of these images, so
    it is trained in coordinates of that span: a few numbers for each image. It starts at the ridge
    regression of the two classes, which has a closed form, and the optimizer refines it. The graph
    is traced once and serves every chunk.

    Args:
        optimizer: Configuration of a Keras optimizer, as `keras.optimizers.serialize` gives it.
        heads: Number of heads in a chunk.
        rows: Number of images of each head.
    """

    def __init__(self, optimizer: Any, heads: int, rows: int) -> None:
        self._optimizer = keras.optimizers.deserialize(optimizer)
        weights = keras.layers.Layer()
        self._kernel = weights.add_weight(name="kernel", shape=(heads, rows))
        self._bias = weights.add_weight(name="bias", shape=(heads, 1))
        self._optimizer.build([self._kernel, self._bias])
        self._fresh_state = [_to_numpy(v) for v in self._optimizer.variables]
        self._step = tf.function(self._train_step, reduce_retracing=True)

    def _train_step(self, x: tf.Tensor, positive: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = tf.einsum("hnr,hr->hn", x, self._kernel) + self._bias
            target = tf.broadcast_to(positive, tf.shape(logits))
            loss = tf.nn.sigmoid_cross_entropy_with_logits(target, logits)
            total = tf.reduce_sum(tf.reduce_mean(loss, axis=1))
        variables = [self._kernel, self._bias]
        gradients = tape.gradient(total, variables)
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))
        right = tf.equal(logits > 0, target > 0.5)
        return tf.reduce_mean(loss, axis=1), tf.reduce_mean(tf.cast(right, tf.float32), axis=1)

    def fit(
        self,
        features: np.ndarray,
        positive: np.ndarray,
        epochs: int,
        batch_size: int,
        rng: np.random.Generator,
    ) -> TrainedHeads:
        """Train the heads of one chunk.

        Args:
            features: Float32 array of shape `(heads, rows, features)`.
            positive: Float32 array of shape `(rows,)`: 1 for the rows of a head's first class.
            epochs: Passes over the rows.
            batch_size: Rows of each head in a step.
            rng: Shuffles the rows.
        """
        for variable, value in zip(self._optimizer.variables, self._fresh_state, strict=True):
            variable.assign(value)
        mean = features.mean(axis=1, keepdims=True)
        centred = features - mean
        energy, basis = np.linalg.eigh(centred @ centred.transpose(0, 2, 1))
        total = np.maximum(energy.sum(axis=1, keepdims=True), 1e-12)
        used = energy > 1e-6 * total
        length = np.sqrt(np.where(used, energy, 1))
        rows = features.shape[1]
        unit = np.sqrt(total / rows)[:, None]
        coordinates = np.where(used[:, None], basis * length[:, None], 0) / unit
        ridge = np.einsum("hnr,n->hr", coordinates, 2 * positive - 1)
        ridge /= (energy + _RIDGE * total / rows) / unit[:, 0] ** 2
        self._kernel.assign(ridge)
        self._bias.assign(np.zeros(self._bias.shape, np.float32))
        history = []
        for _ in range(epochs):
            order = rng.permutation(rows)
            steps = [
                self._step(coordinates[:, batch], positive[batch])
                for batch in np.array_split(order, -(-rows // batch_size))
            ]
            history.append(np.mean(steps, axis=0))
        loss, accuracy = np.moveaxis(np.array(history), 0, -1)
        dual = np.where(used, _to_numpy(self._kernel) / (length * unit[:, 0]), 0)
        kernel = np.einsum("hnr,hr,hnf->hf", basis, dual, centred, optimize=True)
        bias = _to_numpy(self._bias)[:, 0] - np.einsum("hf,hf->h", kernel, mean[:, 0])
        return TrainedHeads(kernel, bias.astype(np.float32), loss, accuracy)


def _to_numpy(variable: Any) -> np.ndarray:
    return tf.convert_to_tensor(variable).numpy()


class ClassImages(NamedTuple):
    """The same number of training images of every class.

    Attributes:
        images: Array of shape `(count, …)`, the images of all classes.
        rows: Int array of shape `(classes, per_class)`, numbers of each class's images. A class
            that has fewer repeats its own in turn.
    """

    images: np.ndarray
    rows: np.ndarray


def sample_classes(batches: Batches, per_class: int, rng: np.random.Generator) -> ClassImages:
    """Choose up to `per_class` images of each class at random, in one pass over the data.

    Args:
        batches: Images with labels.
        per_class: Images of each class that are kept at most.
        rng: Decides which.

    Returns:
        The images that were kept. Which ones does not depend on the size of the batches.
    """
    pools: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in range(batches.classes or 0)]
    seen = 0
    for images, labels in batches:
        for priority, image, label in zip(rng.random(len(images)), images, labels, strict=True):
            pool, seen = pools[label], seen + 1
            if len(pool) < per_class:
                heapq.heappush(pool, (priority, seen, image.copy()))
            elif priority > pool[0][0]:
                heapq.heapreplace(pool, (priority, seen, image.copy()))
    counts = np.array([len(pool) for pool in pools])
    check_every_class(counts)
    starts = np.cumsum(counts) - counts
    rows = starts[:, None] + np.arange(counts.max()) % counts[:, None]
    images = np.stack([image for pool in pools for _, _, image in sorted(pool, key=itemgetter(1))])
    return ClassImages(images, rows)


def train_heads(
    row_features: RowFeatures,
    sample: ClassImages,
    pairs: np.ndarray,
    width: int,
    optimizer: Any,
    *,
    epochs: int,
    batch_size: int,
    rows_at_once: int,
    rng: np.random.Generator,
    progress: Callable[[int, dict[str, float]], None],
) -> TrainedHeads:
    """Train the head of every pair of classes on the images of these classes.

    Args:
        row_features: Computes features under the masks of differentiators.
        sample: Training images.
        pairs: Int array of shape `(heads, 2)`: the classes of each differentiator.
        width: Number of features.
        optimizer: Configuration of a Keras optimizer.
        epochs: Passes over the images.
        batch_size: Images of each head in a step.
        rows_at_once: Rows that `row_features` may be given in one call.
        rng: Shuffles the images.
        progress: Called with the number of heads whose features are there, and, after each chunk,
            with the last epoch's figures.
    """
    per_class = sample.rows.shape[1]
    rows = 2 * per_class
    chunk = max(1, min(len(pairs), _CHUNK_BYTES // (4 * rows * width)))
    trainer = HeadTrainer(optimizer, chunk, rows)
    positive = np.repeat(np.array([1, 0], np.float32), per_class)
    features = np.zeros((chunk, rows, width), np.float32)
    parts: list[TrainedHeads] = []
    for start in range(0, len(pairs), chunk):
        members = np.arange(start, min(start + chunk, len(pairs)))
        numbers = sample.rows[pairs[members]].reshape(len(members), rows)
        groups = max(1, rows_at_once // rows)
        for first in range(0, len(members), groups):
            part = slice(first, first + groups)
            for column in range(0, rows, rows_at_once):
                columns = slice(column, column + rows_at_once)
                unique, index = np.unique(numbers[part, columns], return_inverse=True)
                index = index.reshape(numbers[part, columns].shape)
                computed = row_features(sample.images[unique], index, members[part])
                computed = computed.numpy().reshape(*index.shape, width)
                features[part, columns][: len(index)] = computed
            progress(len(members[part]), {})
        heads = trainer.fit(features, positive, epochs, batch_size, rng)
        parts.append(TrainedHeads(*(array[: len(members)] for array in heads)))
        loss, accuracy = parts[-1].loss[:, -1].mean(), parts[-1].accuracy[:, -1].mean()
        progress(0, {"loss": float(loss), "accuracy": float(accuracy)})
    return TrainedHeads(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
