"""Which neurons of a layer pruning and retraining are likely to keep."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_callable
from keras_tl_defense.blocks import block_end
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.layer_kinds import NEW_CHANNELS, TRANSPOSED


class Neurons:
    """The filters of a convolution, or the units of a Dense layer.

    A neuron's activation is read at the end of its block, after the batch normalisation and the
    activation that follow the layer, and averaged over its positions.

    Args:
        teacher: A built Functional or Sequential Keras model.
        layer: Name of a convolution or a Dense layer, not the last of the Teacher.
        preprocessing: Callable from inputs to what the Teacher takes.

    Attributes:
        model: The Teacher.
        graph: The Teacher's layer calls.
        layer: The layer's name.
        count: How many neurons there are.
        tensor: Number of the tensor in which they are read.

    Raises:
        ValueError: There is no such layer, or it is of another kind, or the last.
    """

    def __init__(self, teacher: Any, layer: str, preprocessing: Any = None) -> None:
        self.model = teacher
        self.graph = ModelGraph(teacher, "teacher")
        self.layer = layer
        tensor = self.graph.layer_output(layer)
        producer = self.graph.steps[self.graph.producer[tensor]].layer
        if isinstance(producer, NEW_CHANNELS):
            tensor = block_end(self.graph, self.graph.steps[self.graph.producer[tensor]])
        if not isinstance(producer, NEW_CHANNELS) or tensor == self.graph.output:
            raise ValueError(
                "The neurons must be those of a convolution or a Dense layer before the Teacher's "
                f"last, which a Student replaces. Received: layer={layer!r}, a "
                f"{type(producer).__name__}{' that is the last' * (tensor == self.graph.output)}"
            )
        self.tensor = tensor
        self.count = int(self.graph.shapes[tensor][-1] or 0)
        self.preprocessing = check_callable("preprocessing", preprocessing)
        self._compiled = tf.function(partial(self.excitation), reduce_retracing=True)

    def run(self, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The layer's features and the Teacher's outputs, with gradients."""
        inputs = self.preprocessing(inputs) if self.preprocessing else inputs
        values = self.graph.run(inputs, [self.tensor, self.graph.output])
        return values[self.tensor], values[self.graph.output]

    def excitation(
        self, inputs: tf.Tensor, masks: Mapping[int, tf.Tensor] | None = None
    ) -> tf.Tensor:
        """Mean activation of each neuron, of shape `(batch, neurons)`, with a gradient.

        Args:
            inputs: Tensor of shape `(batch, …)`.
            masks: Numbers of tensors, and what their channels are multiplied by: those of pruned
                filters by 0.
        """
        inputs = self.preprocessing(inputs) if self.preprocessing else inputs
        values = {self.graph.input: tf.cast(inputs, self.graph.input_dtype)}
        for number in self.graph.ancestors(self.tensor):
            step = self.graph.steps[number]
            for tensor, value in zip(step.outputs, step(values), strict=True):
                values[tensor] = value * masks[tensor] if masks and tensor in masks else value
        features = values[self.tensor]
        return tf.reduce_mean(features, axis=list(range(1, features.shape.rank - 1)))

    def excitation_of(self, x: np.ndarray, batch_size: int = 64) -> np.ndarray:
        """The same of any number of inputs, batch by batch."""
        parts = [
            self._compiled(tf.constant(x[start : start + batch_size], tf.float32)).numpy()
            for start in range(0, len(x), batch_size)
        ]
        return np.concatenate(parts)

    def outgoing(self) -> np.ndarray:
        """Euclidean length of the weights that leave each neuron, to the next weighted layers.

        Weights beyond a concatenation are not counted; where none are found, all lengths are 1.
        """
        squares = np.zeros(self.count)
        ahead, copies = [self.tensor], {self.tensor: 1}  # channels that each neuron has become
        while ahead:
            tensor = ahead.pop()
            for number in self.graph.consumers[tensor]:
                step = self.graph.steps[number]
                multiplied = copies[tensor] * getattr(step.layer, "depth_multiplier", 1)
                if isinstance(step.layer, NEW_CHANNELS):
                    squares += _squares(step.layer, self.count, multiplied)
                elif not isinstance(step.layer, keras.layers.Concatenate):
                    ahead += [output for output in step.outputs if output not in copies]
                    copies |= dict.fromkeys(step.outputs, multiplied)
        return np.sqrt(squares) if squares.any() else np.ones(self.count)

    def rank(self, x: np.ndarray) -> np.ndarray:
        """All neurons, the one that is likeliest to be kept first.

        The score is what a neuron brings to the next layer, `mean |activation| * ‖outgoing
        weights‖₂`: pruning by activation keeps it for the first factor, pruning by weights for the
        second, and fine-tuning changes what is large by little.

        Args:
            x: Inputs of shape `(n, …)`.

        Returns:
            Int array of shape `(neurons,)`.
        """
        score = self.mean_activations(x, [self.tensor])[0] * self.outgoing()
        return np.argsort(-score, kind="stable")

    def mean_activations(
        self, x: np.ndarray, tensors: list[int], batch_size: int = 64
    ) -> list[np.ndarray]:
        """The mean absolute activation of each channel of some tensors, over inputs and positions.

        Args:
            x: Inputs of shape `(n, …)`.
            tensors: Numbers of tensors.
            batch_size: Inputs at once.

        Returns:
            For each tensor a float array of shape `(channels,)`.
        """

        @tf.function(reduce_retracing=True)
        def sums(part: tf.Tensor) -> list[tf.Tensor]:
            prepared = self.preprocessing(part) if self.preprocessing else part
            values = self.graph.run(prepared, tensors)
            found = [tf.abs(values[tensor]) for tensor in tensors]
            means = [tf.reduce_mean(v, axis=list(range(1, v.shape.rank - 1))) for v in found]
            return [tf.reduce_sum(mean, axis=0) for mean in means]

        starts = range(0, len(x) if tensors else 0, batch_size)
        parts = [sums(tf.constant(x[s : s + batch_size], tf.float32)) for s in starts]
        return [np.sum(found, axis=0) / len(x) for found in zip(*parts, strict=True)]


def _squares(layer: Any, count: int, copies: int) -> np.ndarray:
    """The sum of squared weights into a layer from each of `count` channels, `copies` times."""
    kernel = getattr(layer, "pointwise_kernel", None)
    weights = (layer.kernel if kernel is None else kernel).numpy()
    if isinstance(layer, TRANSPOSED):
        weights = np.swapaxes(weights, -1, -2)
    if np.prod(weights.shape[:-1]) % (count * copies):
        return np.zeros(count)
    squares = np.square(weights.reshape(-1, count, copies * weights.shape[-1]))
    return np.asarray(squares.sum(axis=(0, 2)))
