"""Run layers with weights gathered to the channels that stay, so that arithmetic shrinks, too.

A ratio prunes an exact number of filters, so what is left of a layer has the same shape in every
differentiator, and one traced graph serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import follow_channels, number_filters
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import treats_channels_alike

_layers = keras.layers
_GATHERED = (
    _layers.Conv1D,
    _layers.Conv2D,
    _layers.DepthwiseConv2D,
    _layers.Dense,
    _layers.BatchNormalization,
)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Weight:
    """A weight of a layer.

    Attributes:
        layer: Name of the layer's step.
        variable: The Student's weight.
        channels: For each axis along which channels lie, the tensor whose channels they are.
    """

    layer: str
    variable: Any
    channels: dict[int, int]


class CompactLayers:
    """The layers between two tensors, run without the filters that are removed.

    Weights are dicts from `"layer/kernel"` and the like to arrays or tensors. Kept filters are
    dicts from the names of pruned convolutions to sorted int32 arrays. A layer that is not gathered
    runs as it is, with zeros where channels are missing. The result equals that of the network from
    which the channels were removed.

    Args:
        graph: The Student.
        start: Number of the tensor at which the layers begin; all else of the Student that they
            need must pass through it.
        end: Number of the tensor at which they end.
        filters: The pruned convolutions.
        gathered: Whether a layer runs with gathered weights. Those that are pruned should.

    Attributes:
        steps: The layers' steps.
        weights: The weights of the gathered layers.
    """

    def __init__(
        self,
        graph: ModelGraph,
        start: int,
        end: int,
        filters: Sequence[Block],
        gathered: Callable[[Step], bool],
    ) -> None:
        self._graph = graph
        self._start = start
        self.steps = steps_between(graph, start, end)
        self.weights: dict[str, Weight] = {}
        for step in self.steps:
            if gathered(step):
                self.weights.update(_layer_weights(step))
        self._gathered = {weight.layer for weight in self.weights.values()}
        numbers = number_filters(list(filters))
        self.numbers = {b.name: n for b, n in zip(filters, numbers, strict=True)}
        self.filter_count = sum(block.units for block in filters)
        starts = {block.step.outputs[0]: n for block, n in zip(filters, numbers, strict=True)}
        # A channel of no pruned layer counts as one more filter, which always stays.
        self.sources = {
            tensor: np.where(source < 0, self.filter_count, source)
            for tensor, source in follow_channels(graph, starts, end).items()
        }

    def channels(self, tensor: int, kept: Arrays) -> np.ndarray:
        """Numbers of the channels of a tensor that stay when these filters are kept."""
        if tensor not in self.sources:
            return np.arange(int(self._graph.shapes[tensor][-1] or 0))
        stays = np.zeros(self.filter_count + 1, bool)
        stays[-1] = True
        for name, filters in kept.items():
            stays[self.numbers[name][filters]] = True
        return np.flatnonzero(stays[self.sources[tensor]])

    def forward(
        self, values: tf.Tensor, weights: Mapping[str, Any], channels: Channels
    ) -> dict[int, tf.Tensor]:
        """Every tensor after the start, compact.

        Args:
            values: The tensor at the start.
            weights: Compact weights of the gathered layers.
            channels: What stays.
        """
        found = {self._start: values}
        for step in self.steps:
            if step.name in self._gathered:
                found[step.outputs[0]] = _run_gathered(step, found, weights, channels)
            elif treats_channels_alike(step.layer):
                found.update(zip(step.outputs, step(found), strict=True))
            else:
                full = {t: channels.widen(found[t], t) for t in step.inputs}
                for tensor, value in zip(step.outputs, step(full), strict=True):
                    found[tensor] = channels.narrow(value, tensor)
        return found


class Channels:
    """Which channels of each tensor stay, inside a TensorFlow graph.

    Args:
        layers: The layers.
        kept: Kept filters: arrays, tensors or variables of known shapes.
    """

    def __init__(self, layers: CompactLayers, kept: Mapping[str, Any]) -> None:
        self._layers = layers
        self._first = {name: np.arange(filters.shape[0]) for name, filters in kept.items()}
        numbers = [tf.constant([layers.filter_count])]
        for name, filters in kept.items():
            numbers.append(tf.cast(filters, tf.int32) + int(layers.numbers[name][0]))
        index = tf.concat(numbers, axis=0)
        self._stays = tf.scatter_nd(
            index[:, None], tf.ones_like(index, tf.bool), [layers.filter_count + 1]
        )

    def narrow(self, x: tf.Tensor, tensor: int, axis: int = -1) -> tf.Tensor:
        """Gather the channels of `tensor` that stay, along an axis of `x`."""
        if tensor not in self._layers.sources:
            return x
        index = tf.where(tf.gather(self._stays, self._layers.sources[tensor]))[:, 0]
        index = tf.ensure_shape(index, [len(self._layers.channels(tensor, self._first))])
        return tf.gather(x, index, axis=axis)

    def narrow_weights(self, weights: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Gather whole weights of the gathered layers to the channels that stay."""
        narrowed = {}
        for name, tensor in weights.items():
            for axis, channels in self._layers.weights[name].channels.items():
                tensor = self.narrow(tensor, channels, axis)
            narrowed[name] = tensor
        return narrowed

    def widen(self, x: tf.Tensor, tensor: int) -> tf.Tensor:
        """Put zeros where channels of `tensor` were removed, along the last axis of `x`."""
        if tensor not in self._layers.sources:
            return x
        stays = tf.gather(self._stays, self._layers.sources[tensor])
        place = tf.maximum(tf.cumsum(tf.cast(stays, tf.int32)) - 1, 0)
        return tf.where(stays, tf.gather(x, place, axis=-1), tf.zeros((), x.dtype))


def _run_gathered(
    step: Step, values: dict[int, tf.Tensor], weights: Mapping[str, Any], channels: Channels
) -> tf.Tensor:
    """The output of a layer under gathered weights, in inference mode."""
    layer = step.layer
    own = {
        part: tf.convert_to_tensor(weights[f"{step.name}/{part}"])
        for part in ("kernel", "bias", "gamma", "beta")
        if f"{step.name}/{part}" in weights
    }
    x = tf.cast(values[step.inputs[0]], tf.float32)
    if isinstance(layer, _layers.BatchNormalization):
        mean, variance = (
            channels.narrow(tf.convert_to_tensor(statistic), step.outputs[0])
            for statistic in (layer.moving_mean, layer.moving_variance)
        )
        return tf.nn.batch_normalization(
            x, mean, variance, own.get("beta"), own.get("gamma"), layer.epsilon
        )
    if isinstance(layer, _layers.Dense):
        x = tf.linalg.matmul(x, own["kernel"])
    elif isinstance(layer, _layers.DepthwiseConv2D):
        x = tf.nn.depthwise_conv2d(
            x,
            own["kernel"],
            (1, *layer.strides, 1),
            layer.padding.upper(),
            dilations=layer.dilation_rate,
        )
    else:
        padding = layer.padding.upper()
        if padding == "CAUSAL":
            before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            x, padding = tf.pad(x, [[0, 0], [before, 0], [0, 0]]), "VALID"
        x = tf.nn.convolution(
            x, own["kernel"], layer.strides, padding, dilations=layer.dilation_rate
        )
    if "bias" in own:
        x += own["bias"]
    return layer.activation(x)


def steps_between(graph: ModelGraph, cut: int, end: int) -> list[Step]:
    """The steps that `end` depends on and that depend on `cut`."""
    reached, steps = {cut}, []
    for index in graph.ancestors(end):
        step = graph.steps[index]
        if reached.isdisjoint(step.inputs):
            continue
        if not reached.issuperset(step.inputs):
            raise ValueError(
                f"The layer {step.name!r} after the cut also takes a tensor that does not pass "
                f"through it. Cut the {graph.role} with `cut=` at a layer that everything passes "
                f"through. Received: layer={step.name!r}"
            )
        steps.append(step)
        reached.update(step.outputs)
    return steps


def obstacle(graph: ModelGraph, step: Step) -> str | None:
    """Why a layer cannot run under gathered weights, as the rest of a sentence about it."""
    layer = step.layer
    uses = sum(other.layer is layer for other in graph.steps)
    if type(layer) not in _GATHERED:
        return f"is a {type(layer).__name__}"
    if uses > 1:
        return f"is used {uses} times"
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return "has its channels first"
    if getattr(layer, "groups", 1) > 1:
        return f"convolves in {layer.groups} groups"
    if isinstance(layer, _layers.BatchNormalization):
        rank = len(graph.shapes[step.outputs[0]])
        if [axis % rank for axis in np.ravel(layer.axis)] != [rank - 1]:
            return "does not normalise the last axis"
    return None


def _layer_weights(step: Step) -> dict[str, Weight]:
    """The weights of a layer, by `"layer/kernel"` and the like."""
    layer, before, after = step.layer, step.inputs[0], step.outputs[0]
    depthwise = isinstance(layer, _layers.DepthwiseConv2D)
    parts = {part: getattr(layer, part, None) for part in ("kernel", "bias", "gamma", "beta")}
    if hasattr(layer, "depthwise_kernel"):  # the legacy Keras's name
        parts["kernel"] = layer.depthwise_kernel
    channels = {part: {-1: after} for part in parts}
    channels["kernel"] = {-2: before} if depthwise else {-2: before, -1: after}
    return {
        f"{step.name}/{part}": Weight(step.name, variable, channels[part])
        for part, variable in parts.items()
        if variable is not None
    }
