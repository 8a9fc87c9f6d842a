"""The heads of a number of bodies, as a few weights."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble.mask_bank import assign_rows


class HeadBank(keras.layers.Layer):
    """Linear heads: kernels in half precision, each with a scale, and offsets.

    Args:
        bodies: Number of bodies.
        heads: Heads of each.
        features: Size of what they read.

    Attributes:
        count: Heads of each body.
        features: As given.
    """

    def __init__(self, bodies: int, heads: int, features: int, *, name: str) -> None:
        super().__init__(trainable=False, name=name)
        self.count, self.features = heads, features
        add = self.add_weight
        shape = (bodies, heads)
        self._kernel = add(
            name="kernel", shape=(*shape, features), dtype="float16", initializer="zeros"
        )
        self._scale = add(name="scale", shape=shape, dtype="float32", initializer="zeros")
        self._bias = add(name="bias", shape=shape, dtype="float32", initializer="zeros")
        self.built = True

    def set(self, bodies: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Set the heads of some bodies.

        Args:
            bodies: Int array of shape `(n,)`: their numbers.
            kernel: Float32 array of shape `(n, heads, features)`.
            bias: Float32 array of shape `(n, heads)`.
        """
        scale = np.abs(kernel).max(axis=2)
        assign_rows(self._kernel, bodies, kernel / np.where(scale > 0, scale, 1)[..., None])
        assign_rows(self._scale, bodies, scale)
        assign_rows(self._bias, bodies, bias)

    def one(self, features: tf.Tensor, bodies: tf.Tensor, places: tf.Tensor) -> tf.Tensor:
        """What one head of a body says of each row.

        Args:
            features: Float tensor of shape `(rows, features)`.
            bodies: Int tensor of shape `(rows,)`.
            places: Int tensor of shape `(rows,)`: which head of the body.
        """
        chosen = tf.stack([bodies, places], axis=1)
        kernel = tf.cast(tf.gather_nd(self._kernel, chosen), tf.float32)
        said = tf.reduce_sum(tf.cast(features, tf.float32) * kernel, axis=1)
        return said * tf.gather_nd(self._scale, chosen) + tf.gather_nd(self._bias, chosen)

    def every(self, features: tf.Tensor, bodies: tf.Tensor) -> tf.Tensor:
        """What all heads of a body say of each row, `(rows, heads)`; arguments as for `one`."""
        kernel = tf.cast(tf.gather(self._kernel, bodies), tf.float32)
        said = tf.einsum("rf,rhf->rh", tf.cast(features, tf.float32), kernel)
        return said * tf.gather(self._scale, bodies) + tf.gather(self._bias, bodies)

    def all(self, features: tf.Tensor) -> tf.Tensor:
        """What all heads say of rows of every body, `(bodies, rows, heads)`.

        Args:
            features: Float tensor of shape `(bodies, rows, features)`.
        """
        kernel = tf.cast(self._kernel, tf.float32)
        said = tf.linalg.matmul(tf.cast(features, tf.float32), kernel, transpose_b=True)
        return said * tf.convert_to_tensor(self._scale)[:, None] + self._bias[:, None]
