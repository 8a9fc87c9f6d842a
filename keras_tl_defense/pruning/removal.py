"""Which weights must be 0 for pruned units to be gone from a model that goes on training.

A filter is gone when its kernel and bias are 0, and with them whatever later layers would put in
its channel's place: offsets and moving means of batch normalisations, biases of depthwise
convolutions. A Dense layer loses single connections.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import follow_channels, number_filters
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import treats_positions_alone
from keras_tl_defense.pruning.masks import class_set_scores

PrunedCount = Callable[[int], tf.Tensor]
"""Maps the number of a layer's units to how many of them are pruned now, an int32 tensor."""

_layers = keras.layers
_WEIGHTS = {
    _layers.SeparableConv1D: ("pointwise_kernel", "bias"),
    _layers.SeparableConv2D: ("pointwise_kernel", "bias"),
    _layers.BatchNormalization: ("gamma", "beta", "moving_mean"),
    _layers.DepthwiseConv1D: ("bias",),
    _layers.DepthwiseConv2D: ("bias",),
}


@dataclass(frozen=True)
class Removal:
    """Weights of a layer that are set to 0 where units are pruned.

    Attributes:
        weights: Names of the layer's attributes. The last axis of each is that of its channels.
        scores: Float array: the score of each unit of one pruned layer after the other.
        sizes: Units of each of these pruned layers.
        sources: For each channel the position of its filter in `scores`, -1 for a channel that is
            never pruned; empty where connections are pruned, of which `scores` has the inputs.
    """

    weights: tuple[str, ...]
    scores: np.ndarray
    sizes: tuple[int, ...]
    sources: tuple[int, ...]

    def mask(self, weight: tf.Tensor, pruned: PrunedCount) -> tf.Tensor:
        """What is left of a weight: boolean tensor of its shape.

        Args:
            weight: The weight's values.
            pruned: How many units are pruned.
        """
        scores = tf.constant(self.scores, tf.float32)
        if not self.sources:
            connections = tf.reshape(tf.abs(weight) * tf.cast(scores[:, None], weight.dtype), [-1])
            return tf.reshape(_stays(connections, pruned), tf.shape(weight))
        parts = [_stays(part, pruned) for part in tf.split(scores, self.sizes)]
        places = np.where(np.array(self.sources) < 0, len(self.scores), self.sources)
        kept = tf.gather(tf.concat([*parts, [True]], axis=0), places)
        return tf.broadcast_to(kept, tf.shape(weight))


def find_removals(
    graph: ModelGraph, activations: ClassActivations, classes: Sequence[int]
) -> dict[str, Removal]:
    """What has to become 0 in each layer of a model, by the layer's name.

    Args:
        graph: The model.
        activations: The classes' mean activations; its layers are those that are pruned.
        classes: The classes whose activations count.

    Raises:
        ValueError: A pruned channel meets a layer that puts something else than 0 in its place.
    """
    blocks = activations.blocks_of(graph)
    chosen = np.array(activations.check_classes(classes))
    scores = {
        block.name: class_set_scores(activations[block.name], chosen[None])[0] for block in blocks
    }
    found = {
        block.name: Removal(("kernel",), scores[block.name], (block.units,), ())
        for block in blocks
        if block.kind == "connections"
    }
    filters = [block for block in blocks if block.kind == "filters"]
    for name, (names, sources) in _channels(graph, filters).items():
        owners = [
            (block, numbers)
            for block, numbers in zip(filters, number_filters(filters), strict=True)
            if np.isin(numbers, sources).any()
        ]
        places = {int(n): i for i, n in enumerate(np.concatenate([n for _, n in owners]))}
        found[name] = Removal(
            names,
            np.concatenate([scores[block.name] for block, _ in owners]),
            tuple(block.units for block, _ in owners),
            tuple(places.get(int(source), -1) for source in sources),
        )
    return found


def _channels(
    graph: ModelGraph, filters: list[Block]
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """For each layer with weights that must become 0: their names, and each channel's filter."""
    numbers = number_filters(filters)
    starts = {b.step.outputs[0]: n for b, n in zip(filters, numbers, strict=True)}
    followed = follow_channels(graph, starts, graph.output)
    _check_stay_zero(graph, followed, starts)
    uses = Counter(id(step.layer) for step in graph.steps)
    found = {}
    for tensor, sources in followed.items():
        step = graph.steps[graph.producer[tensor]]
        names = next((n for kind, n in _WEIGHTS.items() if isinstance(step.layer, kind)), ())
        if tensor in starts:
            names = names or ("kernel", "bias")
        names = tuple(name for name in names if getattr(step.layer, name, None) is not None)
        if names and uses[id(step.layer)] > 1:
            raise ValueError(
                f"The layer {step.layer.name!r} is used more than once, and a channel that is "
                "removed in one place may stay in another. Give `ClassActivations` the `layers` to "
                f"prune, without those before it. Received: layer={step.name!r}"
            )
        if names:
            found[step.name] = (names, sources)
    return found


def _check_stay_zero(
    graph: ModelGraph, followed: dict[int, np.ndarray], starts: dict[int, np.ndarray]
) -> None:
    """Refuse networks that make something else of a removed channel, whatever their weights.

    The values that removed channels take are followed to where they are added to others, or read
    by a layer that makes new channels; there they must be 0.
    """
    values: dict[int, np.ndarray] = {}
    makers: dict[int, str] = {}
    for step in graph.steps:
        tensor = step.outputs[0]
        for read in step.inputs:
            if tensor not in followed and read in values and values[read].any():
                largest = values[read][np.abs(values[read]).argmax()]
                raise ValueError(
                    f"The layer {makers[read]!r} makes {largest:.3g} of a channel that is 0, so no "
                    f"weights of the {graph.role} can remove the channels before it. Give "
                    "`ClassActivations` the `layers` to prune, without those before it. "
                    f"Received: layer={makers[read]!r}"
                )
        if tensor in followed:
            known = [values.get(t) for t in step.inputs]
            values[tensor] = np.where(
                followed[tensor] < 0, 0, _removed_values(graph, step, known, tensor in starts)
            )
            before = [makers[t] for t in step.inputs if t in makers and values[t].any()]
            makers[tensor] = before[0] if before else step.name


def _removed_values(
    graph: ModelGraph, step: Step, known: list[np.ndarray | None], start: bool
) -> np.ndarray:
    """What the channels of a step's output are where they are removed."""
    layer, channels = step.layer, int(graph.shapes[step.outputs[0]][-1] or 0)
    if start:
        return _applied(layer.activation, np.zeros(channels))
    given = [np.zeros(channels) if value is None else value for value in known]
    if isinstance(layer, _layers.BatchNormalization):
        return given[0] * (layer.gamma is None)
    if isinstance(layer, (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)):
        return _applied(layer.activation, np.repeat(given[0], layer.depth_multiplier))
    if isinstance(layer, _layers.Concatenate):
        widths = [int(graph.shapes[t][-1] or 0) for t in step.inputs]
        return np.concatenate(
            [np.zeros(w) if v is None else v for v, w in zip(known, widths, strict=True)]
        )
    if len(step.inputs) > 1:  # a product is 0 where one factor is
        return np.prod([np.ones(channels) if value is None else value for value in known], axis=0)
    if isinstance(layer, _layers.PReLU) or treats_positions_alone(layer):
        return np.resize(given[0], channels)
    rank = len(graph.shapes[step.inputs[0]])
    row = tf.constant(given[0].reshape([1] * (rank - 1) + [-1]), tf.float32)
    return np.asarray(step({step.inputs[0]: row})[0], np.float64).reshape(-1)


def _applied(function: Any, values: np.ndarray) -> np.ndarray:
    return np.asarray(function(tf.constant(values[None], tf.float32)), np.float64)[0]


def _stays(scores: tf.Tensor, pruned: PrunedCount) -> tf.Tensor:
    """Which units are not among the lowest, of equal scores the lower index first."""
    order = tf.argsort(scores, stable=True)
    ranks = tf.scatter_nd(order[:, None], tf.range(tf.size(scores)), tf.shape(scores))
    return ranks >= pruned(int(scores.shape[0]))
