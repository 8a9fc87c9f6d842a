"""What several tests compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense.graph import ModelGraph


def connection_mask(
    weights: np.ndarray, scores: np.ndarray, threshold: float, tie: int
) -> np.ndarray:
    """The mask that a threshold and a tie index stand for.

    Args:
        weights: Float32 array of shape `(inputs, units)`.
        scores: Float32 array of shape `(inputs,)`.
        threshold: As from `connection_thresholds`.
        tie: As from `connection_thresholds`.

    Returns:
        Boolean array of shape `(inputs, units)`, `True` where the connection stays.
    """
    score = np.abs(weights) * scores[:, None]
    index = np.arange(score.size).reshape(score.shape)
    return (score > threshold) | ((score == threshold) & (index > tie))


class Physical:
    """A network from which channels were taken out, computed layer by layer.

    A value is what is left of a tensor, and which of its channels these are. Nothing here knows
    masks: weights are sliced to the channels that there are.

    Args:
        graph: The model's layer calls.
        removed: For each pruned convolution the numbers of its removed filters.
    """

    def __init__(self, graph: ModelGraph, removed: dict[str, np.ndarray]) -> None:
        self.graph, self.removed = graph, removed

    def __call__(self, x: np.ndarray, tensor: int) -> np.ndarray:
        """A tensor, with 0 where channels were removed."""
        values = {self.graph.input: (tf.constant(x), np.arange(x.shape[-1]))}
        for number in self.graph.ancestors(tensor):
            step = self.graph.steps[number]
            values[step.outputs[0]] = self.run(step, [values[t] for t in step.inputs])
        return np.asarray(self.widen(values[tensor], tensor))

    def widen(self, value: Any, tensor: int) -> tf.Tensor:
        narrow, left = value
        width = int(self.graph.shapes[tensor][-1] or 0)
        places = np.full(width, len(left))
        places[left] = np.arange(len(left))
        padded = tf.concat([narrow, tf.zeros_like(narrow[..., :1])], axis=-1)
        return tf.gather(padded, places, axis=-1)

    def run(self, step: Any, inputs: list[Any]) -> Any:
        layer, width = step.layer, int(self.graph.shapes[step.outputs[0]][-1] or 0)
        kind = type(layer).__name__.lower().replace("tfoplambda", getattr(layer, "symbol", ""))
        if kind in ("conv2d", "conv1d", "separableconv2d", "dense"):
            return self.new_channels(step, *inputs[0], width)
        if kind == "depthwiseconv2d":
            (x, left), kernel = inputs[0], layer.get_weights()[0]
            strides, padding = (1, *layer.strides, 1), layer.padding.upper()
            x = tf.nn.depthwise_conv2d(x, kernel[:, :, left], strides, padding)
            return layer.activation(
                x + (layer.get_weights()[1][left] if layer.use_bias else 0)
            ), left
        if kind == "batchnormalization":
            x, left = inputs[0]
            weights = {w.name.split("/")[-1].split(":")[0]: np.array(w) for w in layer.weights}
            scale = weights.get("gamma", np.ones(width)) / np.sqrt(
                weights["moving_variance"] + layer.epsilon
            )
            shift = weights.get("beta", np.zeros(width)) - weights["moving_mean"] * scale
            return x * scale[left].astype(np.float32) + shift[left].astype(np.float32), left
        if kind == "concatenate":
            widths = [int(self.graph.shapes[t][-1] or 0) for t in step.inputs]
            starts = np.cumsum([0, *widths[:-1]])
            left = np.concatenate([v[1] + s for v, s in zip(inputs, starts, strict=True)])
            return tf.concat([v[0] for v in inputs], axis=-1), left
        if len(inputs) > 1 and "mul" in kind:
            left = np.intersect1d(inputs[0][1], inputs[1][1])
            a, b = (tf.gather(v, np.searchsorted(own, left), axis=-1) for v, own in inputs)
            return a * b, left
        if len(inputs) > 1:
            assert "add" in kind, kind
            wide = [self.widen(v, t) for v, t in zip(inputs, step.inputs, strict=True)]
            return tf.add_n(wide), np.arange(width)
        x, left = inputs[0]
        if kind == "reshape":
            x = tf.reshape(x, (-1, *layer.target_shape[:-1], len(left)))
        else:
            (x,) = step({step.inputs[0]: x})
        return x, left

    def new_channels(self, step: Any, x: tf.Tensor, left: np.ndarray, width: int) -> Any:
        layer = step.layer
        stays = np.setdiff1d(np.arange(width), self.removed.get(step.name, np.zeros(0, int)))
        weights = list(layer.get_weights())
        bias = weights.pop()[stays] if layer.use_bias else 0
        if len(weights) == 2:  # depthwise, pointwise
            strides, padding = (1, *layer.strides, 1), layer.padding.upper()
            x = tf.nn.depthwise_conv2d(x, weights[0][:, :, left], strides, padding)
            x = tf.nn.conv2d(x, weights[1][:, :, left][..., stays], 1, "VALID")
        elif weights[0].ndim == 2:
            x = x @ weights[0][left][:, stays]
        else:
            kernel, padding = np.take(weights[0], left, axis=-2)[..., stays], layer.padding.upper()
            if padding == "CAUSAL":
                x, padding = tf.pad(x, [[0, 0], [len(kernel) - 1, 0], [0, 0]]), "VALID"
            x = tf.nn.convolution(x, kernel, layer.strides, padding)
        return layer.activation(x + bias), stays
