"""Run layers with weights gathered to the channels that stay, so that arithmetic shrinks, too.

A ratio prunes an exact number of filters, so what is left of a layer has the same shape in every
differentiator, and one traced graph serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import follow_channels, masked_tensors, number_filters
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import is_product, treats_channels_alike

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
    """Some layers, run without the filters that are removed.

    Weights are dicts from `"layer/kernel"` and the like to arrays or tensors. Kept filters are
    dicts from the names of pruned convolutions to sorted int32 arrays. A layer that is not gathered
    runs as it is, with zeros where channels are missing. The result equals that of the network from
    which the channels were removed.

    Args:
        graph: The Student.
        steps: The layers' steps, in the order in which they run.
        end: Number of the tensor at which they end.
        filters: The pruned convolutions.
        gathered: Whether a layer runs with gathered weights. Those that are pruned should.
        late: Names of gathered layers whose kernels keep all outputs, which are dropped from what
            the layer computes: cheaper where it has few positions.
        masked: Names of pruned convolutions whose channels all stay and are set to 0: cheaper where
            a sum follows, which needs all channels.

    Attributes:
        steps: As given.
        weights: The weights of the gathered layers.
        sources: For each tensor with channels that may be removed, the filter of each channel.
        shapes: Of all tensors of the Student, whole.
    """

    def __init__(
        self,
        graph: ModelGraph,
        steps: Sequence[Step],
        end: int,
        filters: Sequence[Block],
        gathered: Callable[[Step], bool],
        late: Collection[str] = (),
        masked: Collection[str] = (),
    ) -> None:
        self.shapes = graph.shapes
        self.steps, self._end = steps, end
        self._late = late
        self.weights: dict[str, Weight] = {}
        for step in self.steps:
            if gathered(step):
                self.weights.update(layer_weights(step, late=step.name in late))
        self._gathered = {weight.layer for weight in self.weights.values()}
        numbers = number_filters(list(filters))
        self.numbers = {b.name: n for b, n in zip(filters, numbers, strict=True)}
        self.filter_count = sum(block.units for block in filters)
        starts = {b.step.outputs[0]: self.numbers[b.name] for b in filters if b.name not in masked}
        ends = {b.tensor: self.numbers[b.name] for b in filters if b.name in masked}
        self._masks = masked_tensors(graph, ends, end)
        # A channel of no pruned layer counts as one more filter, which always stays.
        self.sources = {
            tensor: np.where(source < 0, self.filter_count, source)
            for tensor, source in follow_channels(graph, starts, end).items()
        }

    def keep(self, kept: Mapping[str, Any]) -> Channels:
        """What stays when these filters are kept: arrays, tensors or variables of known shapes."""
        first = {name: np.arange(filters.shape[0]) for name, filters in kept.items()}
        numbers = [
            tf.cast(filters, tf.int32) + int(self.numbers[name][0])
            for name, filters in kept.items()
        ]
        index = tf.concat([*numbers, tf.constant([self.filter_count])], axis=0)
        stays = tf.scatter_nd(index[:, None], tf.ones_like(index, tf.bool), [self.filter_count + 1])
        widths = {tensor: len(self.channels(tensor, first)) for tensor in self.sources}
        return Channels(self, stays, widths)

    def keep_masked(self, mask: tf.Tensor) -> Channels:
        """What stays under a boolean mask of all filters, `(filters,)`, of any number."""
        stays = tf.concat([mask, [True]], axis=0)
        return Channels(self, tf.ensure_shape(stays, [self.filter_count + 1]), {})

    def channels(self, tensor: int, kept: Arrays) -> np.ndarray:
        """Numbers of the channels of a tensor that stay when these filters are kept."""
        if tensor not in self.sources:
            return np.arange(int(self.shapes[tensor][-1] or 0))
        stays = np.zeros(self.filter_count + 1, bool)
        stays[-1] = True
        for name, filters in kept.items():
            stays[self.numbers[name][filters]] = True
        return np.flatnonzero(stays[self.sources[tensor]])

    def forward(
        self, start: Mapping[int, tf.Tensor], weights: Mapping[str, Any], channels: Channels
    ) -> dict[int, tf.Tensor]:
        """Every tensor that the layers return, compact.

        Args:
            start: The tensors at which the layers begin, compact.
            weights: Compact weights of the gathered layers.
            channels: What stays.
        """
        found = {tensor: self._masked(x, tensor, channels) for tensor, x in start.items()}
        for step in self.steps:
            if step.name in self._gathered:
                late = step.name in self._late
                found[step.outputs[0]] = _run_gathered(step, found, weights, channels, late)
            elif isinstance(step.layer, _layers.Flatten) and step.inputs[0] in self.sources:
                x = found[step.inputs[0]]  # Keras's layer wants to know the channels
                found[step.outputs[0]] = tf.reshape(x, (tf.shape(x)[0], -1))
            elif treats_channels_alike(step.layer):
                found.update(zip(step.outputs, step(found), strict=True))
            elif is_product(step):
                (out,) = step.outputs
                same = {t: channels.move(found[t], t, out) for t in step.inputs}
                (found[out],) = step(same)
            else:
                full = {t: channels.widen(found[t], t) for t in step.inputs}
                for tensor, value in zip(step.outputs, step(full), strict=True):
                    found[tensor] = channels.narrow(value, tensor)
            for tensor in step.outputs:
                found[tensor] = self._masked(found[tensor], tensor, channels)
        return found

    def frozen_end(
        self,
        start: Mapping[int, tf.Tensor],
        channels: Channels,
        connections: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        """The tensor at the end under the Student's weights, zeros where channels are missing.

        Args:
            start: The tensors at which the layers begin, compact.
            channels: What stays.
            connections: Masks of the kernels of Dense layers, by the layers' names.
        """
        weights = {name: tf.convert_to_tensor(w.variable) for name, w in self.weights.items()}
        for name, mask in connections.items():
            weights[f"{name}/kernel"] *= tf.cast(mask, tf.float32)
        found = self.forward(start, channels.narrow_weights(weights), channels)
        return tf.cast(channels.widen(found[self._end], self._end), tf.float32)

    def _masked(self, x: tf.Tensor, tensor: int, channels: Channels) -> tf.Tensor:
        if tensor not in self._masks:
            return x
        kept = channels.stays(self._masks[tensor])
        if tensor in self.sources:
            kept = channels.narrow(kept, tensor)
        return x * tf.cast(kept, x.dtype)


class Channels:
    """Which channels of each tensor stay, inside a TensorFlow graph.

    Args:
        layers: The layers.
        stays: Boolean tensor of shape `(filters + 1,)`, the last of which is `True`.
        widths: How many channels of a tensor stay, where that is known.
    """

    def __init__(self, layers: CompactLayers, stays: tf.Tensor, widths: Mapping[int, int]) -> None:
        self._layers = layers
        self._stays = stays
        self._widths = widths
        self._indices: dict[bytes, tf.Tensor] = {}

    def narrow(self, x: tf.Tensor, tensor: int, axis: int = -1) -> tf.Tensor:
        """Gather the channels of `tensor` that stay, along an axis of `x`."""
        if tensor not in self._layers.sources:
            return x
        sources = self._layers.sources[tensor]
        known = sources.tobytes()
        if known not in self._indices:
            index = tf.where(self.stays(sources))[:, 0]
            index = tf.ensure_shape(index, [self._widths.get(tensor)])
            self._indices[known] = tf.cast(index, tf.int32)
        if axis == -1 and len(x.shape) > 1:
            return _gather_columns(x, self._indices[known])
        return tf.gather(x, self._indices[known], axis=axis)

    def narrow_weights(self, weights: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Gather whole weights of the gathered layers to the channels that stay."""
        narrowed = {}
        for name, tensor in weights.items():
            for axis, channels in self._layers.weights[name].channels.items():
                tensor = self.narrow(tensor, channels, axis)
            narrowed[name] = tensor
        return narrowed

    def stays(self, sources: np.ndarray) -> tf.Tensor:
        """Which of these filters stay, a boolean tensor; -1 stands for one that always does."""
        return tf.gather(self._stays, np.where(sources < 0, self._layers.filter_count, sources))

    def widen(self, x: tf.Tensor, tensor: int) -> tf.Tensor:
        """Put zeros where channels of `tensor` were removed, along the last axis of `x`."""
        if tensor not in self._layers.sources:
            return x
        stays = self.stays(self._layers.sources[tensor])
        place = tf.where(stays, tf.cumsum(tf.cast(stays, tf.int32)) - 1, tf.shape(x)[-1])
        return _gather_columns(x, place, zero=True)

    def move(self, x: tf.Tensor, tensor: int, other: int) -> tf.Tensor:
        """Keep the channels that stay in another tensor instead of those that stay in `tensor`.

        A single channel, which serves all of the other's, stays as it is.
        """
        sources, shapes = self._layers.sources, self._layers.shapes
        if shapes[tensor][-1] != shapes[other][-1]:
            return x
        if np.array_equal(sources.get(tensor, ()), sources.get(other, ())):
            return x
        return self.narrow(self.widen(x, tensor), other)


def _gather_columns(x: tf.Tensor, index: tf.Tensor, zero: bool = False) -> tf.Tensor:
    """`tf.gather(x, index, axis=-1)`, as whole rows, which are faster to copy than single numbers.

    With `zero`, the index after the last stands for zeros.
    """
    rows = tf.transpose(tf.reshape(x, (-1, tf.shape(x)[-1])))
    if zero:
        rows = tf.pad(rows, [[0, 1], [0, 0]])
    found = tf.transpose(tf.gather(rows, index))
    found = tf.reshape(found, tf.concat([tf.shape(x)[:-1], tf.shape(index)], axis=0))
    return tf.ensure_shape(found, [*x.shape[:-1], index.shape[0]])


def _run_gathered(
    step: Step,
    values: dict[int, tf.Tensor],
    weights: Mapping[str, Any],
    channels: Channels,
    late: bool,
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
    if late and not isinstance(layer, _layers.DepthwiseConv2D):
        x = channels.narrow(x, step.outputs[0])
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


def can_gather(graph: ModelGraph, step: Step) -> bool:
    """Whether a layer has weights and computes the same when they are gathered."""
    softmax = "softmax" in getattr(getattr(step.layer, "activation", None), "__name__", "")
    single = getattr(step.layer, "compute_dtype", "float32") == "float32"
    return obstacle(graph, step) is None and single and not softmax


def layer_weights(step: Step, late: bool = False) -> dict[str, Weight]:
    """The weights of a layer, by `"layer/kernel"` and the like; see `CompactLayers`."""
    layer, before, after = step.layer, step.inputs[0], step.outputs[0]
    depthwise = isinstance(layer, _layers.DepthwiseConv2D)
    parts = {part: getattr(layer, part, None) for part in ("kernel", "bias", "gamma", "beta")}
    if hasattr(layer, "depthwise_kernel"):  # the legacy Keras's name
        parts["kernel"] = layer.depthwise_kernel
    channels = {part: {-1: after} for part in parts}
    channels["kernel"] = {-2: before} if depthwise or late else {-2: before, -1: after}
    return {
        f"{step.name}/{part}": Weight(step.name, variable, channels[part])
        for part, variable in parts.items()
        if variable is not None
    }
