"""The unfrozen layers after the cut, of which every differentiator has its own.

Their weights are kept *compact*: gathered to the channels that stay. They run as they are, and one
traced graph trains one differentiator after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import to_numpy
from keras_tl_defense.blocks import Block, find_blocks
from keras_tl_defense.ensemble.compact import (
    Arrays,
    Channels,
    CompactLayers,
    obstacle,
    steps_between,
)
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.masks import (
    Ratio,
    connection_thresholds,
    filter_masks,
    pruned_count,
)


def own_blocks(graph: ModelGraph, cut: int, end: int) -> list[Block]:
    """The unfrozen prunable layers between two tensors, in the order in which they run."""
    inside = {step.name for step in steps_between(graph, cut, end) if not step.frozen}
    return [block for block in find_blocks(graph, before=end) if block.name in inside]


class OwnTop:
    """The layers from the cut to the features of a head, run with a differentiator's own weights.

    Every unfrozen weighted layer is owned: each differentiator has its kernel, bias, gamma and
    beta, gathered to the output channels that it keeps and to the input channels that the layers
    before left. Moving statistics of batch normalisations stay the Student's. Everything else runs
    as it is. The result equals that of the network from which the channels were removed.

    Weights are dicts from `"layer/kernel"` and the like to compact float32 arrays. Kept filters
    are dicts from the names of pruned convolutions to sorted int32 arrays. Connections of a Dense
    layer are pruned as zeros in its kernel.

    Args:
        graph: The Student.
        cut: Number of the tensor at which the layers begin; all else of the Student that they need
            must pass through it.
        end: Number of the tensor at which they end.
        ratios: Ratio of each pruned layer.

    Attributes:
        cut_shape: Shape of the tensor `cut`, without the batch.
        blocks: The pruned layers.
        ratios: Their ratios.
        pruned_kernels: Names of the weights with pruned connections, and the layers they are of.
        features: Size of the tensor `end`, flattened. Features of removed channels are 0.

    Raises:
        ValueError: An unfrozen layer is of a kind that cannot be owned, a ratio names a layer that
            is not an unfrozen prunable one, or the size of `end` is not known.
    """

    def __init__(self, graph: ModelGraph, cut: int, end: int, ratios: Mapping[str, Ratio]) -> None:
        _check_ownable(graph, cut, end)
        self._graph = graph
        self._cut, self._end = cut, end
        self.cut_shape = graph.shapes[cut][1:]
        self.features = _feature_count(graph, end)
        prunable = own_blocks(graph, cut, end)
        _check_ratios(ratios, [block.name for block in prunable])
        self.ratios = dict(ratios)
        self.blocks = [block.checked() for block in prunable if block.name in ratios]
        self._filters = [block for block in self.blocks if block.kind == "filters"]
        self.pruned_kernels = {
            f"{block.name}/kernel": block for block in self.blocks if block.kind == "connections"
        }
        self._layers = CompactLayers(
            graph,
            steps_between(graph, cut, end),
            end,
            self._filters,
            gathered=lambda step: not step.frozen,
        )
        self._weights = self._layers.weights

    def kept_counts(self, ratios: Mapping[str, Ratio] | None = None) -> dict[str, int]:
        """How many filters stay in each pruned convolution.

        Args:
            ratios: Ratios of the pruned layers. Defaults to the final ones.
        """
        ratios = self.ratios if ratios is None else ratios
        return {b.name: b.units - pruned_count(ratios[b.name], b.units) for b in self._filters}

    def weight_shapes(
        self, ratios: Mapping[str, Ratio] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Shape of each compact weight, the same for every differentiator.

        Args:
            ratios: Ratios of the pruned layers. Defaults to the final ones.
        """
        kept = {name: np.arange(count) for name, count in self.kept_counts(ratios).items()}
        shapes = {}
        for name, weight in self._weights.items():
            shape = list(weight.variable.shape)
            for axis, tensor in weight.channels.items():
                if tensor in self._layers.sources:
                    shape[axis] = len(self.channels(tensor, kept))
            shapes[name] = tuple(shape)
        return shapes

    @property
    def bytes_per_differentiator(self) -> int:
        """Size of the compact weights and kept filters of one differentiator."""
        weights = sum(int(np.prod(shape)) for shape in self.weight_shapes().values())
        return 4 * (weights + sum(self.kept_counts().values()))

    def kept(self) -> list[tuple[str, int, int]]:
        """Name, units and units kept of each pruned layer.

        A unit is a filter or a connection, of removed inputs, too.
        """
        return [
            (block.name, block.size, block.size - pruned_count(self.ratios[block.name], block.size))
            for block in self.blocks
        ]

    def start(self) -> tuple[Arrays, Arrays]:
        """The Student's weights, and all filters kept."""
        weights = {name: to_numpy(weight.variable) for name, weight in self._weights.items()}
        return weights, self._all_filters()

    def narrow(self, weights: Arrays, kept: Arrays, fewer: Arrays) -> Arrays:
        """Gather compact weights to fewer filters.

        Args:
            weights: Weights, or other arrays of their shapes under their names.
            kept: The filters that they have.
            fewer: The filters, among these, that they shall have.
        """
        narrowed = {}
        for name, array in weights.items():
            for axis, tensor in self._weights[name].channels.items():
                if tensor in self._layers.sources:
                    channels = self.channels(tensor, kept)
                    places = np.searchsorted(channels, self.channels(tensor, fewer))
                    array = np.take(array, places, axis)
            narrowed[name] = array
        return narrowed

    def channels(self, tensor: int, kept: Arrays) -> np.ndarray:
        """Numbers of the channels of a tensor that stay when these filters are kept."""
        return self._layers.channels(tensor, kept)

    def run(
        self, cut_values: tf.Tensor, weights: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> tf.Tensor:
        """Features under one differentiator's weights, differentiable in them.

        Args:
            cut_values: Tensor of shape `(n, *cut shape)`.
            weights: Compact weights: arrays, tensors or variables.
            kept: Kept filters: arrays, tensors or variables of known shapes.

        Returns:
            Float32 tensor of shape `(n, features)`.
        """
        channels = self._layers.keep(kept)
        found = self._layers.forward({self._cut: cut_values}, weights, channels)
        return self._features(found, channels)

    def run_members(
        self,
        cut_values: tf.Tensor,
        members: tf.Tensor,
        per_group: int | tf.Tensor,
        weights: Mapping[str, Any],
        kept: Mapping[str, Any],
    ) -> tf.Tensor:
        """Features of groups of rows, each group under the weights of its differentiator.

        Args:
            cut_values: Tensor of shape `(groups * per_group, *cut shape)`.
            members: Int tensor of shape `(groups,)`: the differentiator of each group.
            per_group: Rows of each group.
            weights: Compact weights, stacked: each of shape `(differentiators, …)`.
            kept: Kept filters, each of shape `(differentiators, filters)`.

        Returns:
            Float32 tensor of shape `(groups * per_group, features)`.
        """
        shape = tf.concat([[tf.shape(members)[0], per_group], tf.shape(cut_values)[1:]], axis=0)
        groups = tf.reshape(cut_values, shape)
        stacks = tf.nest.map_structure(tf.convert_to_tensor, (dict(weights), dict(kept)))

        def one_group(element: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            rows, member = element
            rows = tf.ensure_shape(rows, (None, *self.cut_shape))
            return self.run(rows, *tf.nest.map_structure(lambda s: tf.gather(s, member), stacks))

        out = tf.map_fn(
            one_group,
            (groups, members),
            fn_output_signature=tf.TensorSpec((groups.shape[1], self.features), tf.float32),
            parallel_iterations=2,
        )
        return tf.reshape(out, (-1, self.features))

    def prune(
        self,
        ratios: Mapping[str, Ratio],
        scores: Arrays,
        weights: Arrays,
        kept: Arrays,
    ) -> tuple[Arrays, Arrays]:
        """Prune what is left, to ratios that are not lower than those that led to it.

        Filters are removed and connections of Dense layers set to 0, the lowest scores first, until
        each layer has what its ratio leaves; each layer on its own, so that connections of removed
        inputs count as any others. Those score by the Student's weights.

        Args:
            ratios: Ratio of each pruned layer.
            scores: Score of each unit of each pruned layer, `(units,)`, the same in every round.
            weights: Compact weights.
            kept: Kept filters.

        Returns:
            The weights and the kept filters that are left.
        """
        fewer = {}
        for block in self._filters:
            (stays,) = filter_masks(scores[block.name][None], ratios[block.name])
            fewer[block.name] = np.flatnonzero(stays).astype(np.int32)
        weights = self.narrow(weights, kept, fewer)
        for name, block in self.pruned_kernels.items():
            inputs = self.channels(block.tensor, fewer)
            kernel = to_numpy(self._weights[name].variable)
            kernel[inputs] = weights[name]
            own = scores[block.name]
            (threshold,), (tie,) = connection_thresholds(kernel, own[None], ratios[block.name])
            score = np.abs(kernel) * own[:, None]
            index = np.arange(score.size).reshape(score.shape)
            stays = (score > threshold) | ((score == threshold) & (index > tie))
            weights[name] = np.where(stays, kernel, 0)[inputs]
        return weights, fewer

    def _features(self, values: dict[int, tf.Tensor], channels: Channels) -> tf.Tensor:
        features = channels.widen(values[self._end], self._end)
        return tf.cast(tf.reshape(features, (-1, self.features)), tf.float32)

    def _all_filters(self) -> Arrays:
        return {block.name: np.arange(block.units, dtype=np.int32) for block in self._filters}


def _check_ownable(graph: ModelGraph, cut: int, end: int) -> None:
    steps = steps_between(graph, cut, end)
    if all(step.frozen or not getattr(step.layer, "weights", ()) for step in steps):
        raise ValueError(
            f"The {graph.role} has no retrained layers between the cut and its last weighted "
            "layer, so a differentiator would have none of its own. Leave `tune` out. "
            f"Received: cut={graph.steps[graph.producer[cut]].name!r}"
        )
    for step in steps:
        problem = None if step.frozen else obstacle(graph, step)
        if problem is not None:
            raise ValueError(
                f"The unfrozen layer {step.name!r} {problem}, and differentiators cannot have "
                'their own of it. Give `tune="head"`, which leaves the layers after the cut aside, '
                f"or cut the {graph.role} after it with `cut=`. Received: layer={step.name!r}"
            )


def _feature_count(graph: ModelGraph, end: int) -> int:
    shape = graph.shapes[end][1:]
    count = tf.TensorShape(shape).num_elements()
    if not count:
        raise ValueError(
            f"The size of what a head takes must be known, but the {graph.role} takes images of "
            "any size. Give its input a fixed shape, or let a global pooling layer come before its "
            f"last layer. Received: shape {shape} before the last layer"
        )
    return int(count)


def _check_ratios(ratios: Mapping[str, Ratio], layers: list[str]) -> None:
    for name in ratios:
        if name not in layers:
            raise ValueError(
                f"The layer {name!r} is not an unfrozen convolution or Dense layer after the cut. "
                f"Those are: {', '.join(layers) or 'none'}. Received: ratios={dict(ratios)!r}"
            )
