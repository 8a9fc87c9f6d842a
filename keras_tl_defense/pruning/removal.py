"""Which weights must be 0 for pruned units to be gone from a model that goes on training.

A filter is gone when its kernel and bias are 0, and with them whatever later layers would put in
its channel's place: offsets and moving means of batch normalisations, biases of depthwise
convolutions. A Dense layer loses single connections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.pruning.blocks import ACTIVATIONS, Block, follow_channels, number_filters
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

    def mask(self, weight: tf.Tensor, scores: tf.Tensor, pruned: PrunedCount) -> tf.Tensor:
        """What is left of a weight: boolean tensor of its shape.

        Args:
            weight: The weight's values.
            scores: `scores` as a tensor.
            pruned: How many units are pruned.
        """
        if not self.sources:
            connections = tf.reshape(tf.abs(weight) * tf.cast(scores[:, None], weight.dtype), [-1])
            return tf.reshape(_stays(connections, pruned), tf.shape(weight))
        parts = [_stays(part, pruned) for part in tf.split(scores, self.sizes)]
        kept = tf.gather(tf.concat([*parts, [True]], axis=0), np.array(self.sources))
        return tf.broadcast_to(kept, tf.shape(weight))


def check_classes(classes: Sequence[int], activations: ClassActivations) -> tuple[int, ...]:
    """The classes as integers.

    Raises:
        RuntimeError: The activations were not computed yet.
        ValueError: There are none, or the activations do not know them.
    """
    activations.require_adapted()
    highest = activations.classes - 1
    numbers = tuple(
        check_integer("classes", number, 0, highest, "the classes of the activations")
        for number in classes
    )
    if not numbers:
        raise ValueError(f"Give at least one class. Received: classes={classes!r}")
    return numbers


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
    chosen = np.array(check_classes(classes, activations))
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
    found = {}
    for tensor, sources in follow_channels(graph, starts, graph.output).items():
        step = graph.steps[graph.producer[tensor]]
        _check_stays_zero(graph, step)
        names = next((n for kind, n in _WEIGHTS.items() if isinstance(step.layer, kind)), ())
        if tensor in starts:
            names = names or ("kernel", "bias")
        names = tuple(name for name in names if getattr(step.layer, name, None) is not None)
        if names:
            found[step.name] = (names, sources)
    return found


def _check_stays_zero(graph: ModelGraph, step: Step) -> None:
    """Refuse layers that make something else of a removed channel, whatever their weights."""
    layer = step.layer
    function: Any = layer if isinstance(layer, ACTIVATIONS) else getattr(layer, "activation", None)
    offset = 0.0
    if isinstance(layer, _layers.Rescaling):
        offset = float(np.max(np.abs(layer.offset)))
    elif isinstance(layer, _layers.Normalization):
        offset = 1.0
    elif function is not None and not isinstance(layer, _layers.PReLU):
        offset = float(abs(function(tf.zeros((1, 1)))[0, 0]))
    if offset:
        raise ValueError(
            f"The layer {step.name!r} makes {offset:g} of a channel that is 0, so no weights of "
            f"the {graph.role} can remove the channels before it. Give `ClassActivations` the "
            f"`layers` to prune, without those before it. Received: layer={step.name!r}"
        )


def _stays(scores: tf.Tensor, pruned: PrunedCount) -> tf.Tensor:
    """Which units are not among the lowest, of equal scores the lower index first."""
    order = tf.argsort(scores, stable=True)
    ranks = tf.scatter_nd(order[:, None], tf.range(tf.size(scores)), tf.shape(scores))
    return ranks >= pruned(int(scores.shape[0]))
