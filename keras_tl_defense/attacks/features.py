"""What a Teacher's layer makes of inputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._validation import check_callable
from keras_tl_defense.graph import ModelGraph


class LayerFeatures:
    """The output of a layer for batches of inputs, flat.

    Args:
        teacher: A built Functional or Sequential Keras model.
        layer: Name of the layer; `None` takes the last before the output.
        preprocessing: Callable from inputs as they are attacked to what the Teacher takes.

    Attributes:
        layer: The layer's name.
        input_shape: Of one input.

    Raises:
        ValueError: The Teacher has no such layer.
    """

    def __init__(self, teacher: Any, layer: str | None, preprocessing: Any = None) -> None:
        self._graph = ModelGraph(teacher, "teacher")
        if layer is None:
            before = self._graph.steps[self._graph.producer[self._graph.output]].inputs[0]
            if before not in self._graph.producer:
                raise ValueError(
                    "The Teacher has no layer before its last. Name the one to attack as `layer`. "
                    f"Received: {teacher!r}"
                )
            layer = self._graph.steps[self._graph.producer[before]].name
        self._tensor = self._graph.layer_output(layer)
        self._preprocessing = check_callable("preprocessing", preprocessing)
        self.layer = layer
        self.input_shape = self._graph.input_shape
        self._compiled = tf.function(partial(self.__call__), reduce_retracing=True)

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of one input, where inputs are made from nothing."""
        if None in self.input_shape:
            raise ValueError(
                "Inputs are made from nothing, so the Teacher's input must have a fixed shape. "
                f"Received: shape {self.input_shape}"
            )
        return tuple(size or 0 for size in self.input_shape)

    def __call__(self, inputs: tf.Tensor) -> tf.Tensor:
        """Features of shape `(batch, features)`, with a gradient."""
        inputs = self._preprocessing(inputs) if self._preprocessing else inputs
        features = self._graph.run(inputs, [self._tensor])[self._tensor]
        return tf.reshape(tf.cast(features, tf.float32), (tf.shape(features)[0], -1))

    def of(self, inputs: np.ndarray, batch_size: int) -> np.ndarray:
        """Features of any number of inputs, batch by batch."""
        starts = range(0, len(inputs), batch_size)
        parts = [tf.constant(inputs[s : s + batch_size], tf.float32) for s in starts]
        return np.concatenate([self._compiled(part).numpy() for part in parts])


def distance(features: tf.Tensor, wanted: tf.Tensor) -> tf.Tensor:
    """Euclidean distance of each row, with a gradient of 0 (not NaN) where it is 0."""
    squared = tf.reduce_sum(tf.square(features - wanted), axis=1)
    return tf.sqrt(tf.maximum(squared, 1e-12))
