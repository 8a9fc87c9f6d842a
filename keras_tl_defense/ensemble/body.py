"""The frozen layers of one differentiator at a time, without the filters that it lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import number_filters
from keras_tl_defense.ensemble.compact import CompactLayers, can_gather, steps_between
from keras_tl_defense.ensemble.masked import ConnectionMask
from keras_tl_defense.graph import ModelGraph

_ROW_BYTES = 64 << 20  # for one tensor of the images that are computed at once


class CompactBody:
    """The layers from a model's input to a tensor under one differentiator's masks, compact.

    It gives what `MemberBodies` gives, one differentiator at a time. Its arithmetic shrinks with
    what is pruned: for training, where each differentiator sees many images.

    Args:
        graph: The Student.
        tensor: Number of the tensor at which the body ends.
        blocks: The layers that are pruned; filters are numbered in this order, one block after the
            other.
        preprocessing: Callable from the images to what the model takes, or `None`.
        connection_mask: The mask of a Dense layer's kernel for one differentiator, where
            connections are pruned.
    """

    def __init__(
        self,
        graph: ModelGraph,
        tensor: int,
        blocks: Sequence[Block],
        preprocessing: Any = None,
        connection_mask: ConnectionMask | None = None,
    ) -> None:
        self._graph = graph
        self._tensor = tensor
        self._preprocessing = preprocessing
        self._connection_mask = connection_mask
        self._filters = [block for block in blocks if block.kind == "filters"]
        self._numbers = number_filters(self._filters)
        self._connections = {block.name for block in blocks if block.kind == "connections"}
        self._start = _last_unpruned(graph, tensor, blocks)
        self._layers = CompactLayers(
            graph,
            steps_between(graph, self._start, tensor),
            tensor,
            self._filters,
            gathered=lambda step: step.name in self._connections or can_gather(graph, step),
        )
        steps = [graph.steps[number] for number in graph.ancestors(tensor)]
        largest = max((graph.size(step.outputs[0]) for step in steps), default=1)
        self._at_once = int(np.clip(_ROW_BYTES // (4 * largest), 1, 512))
        self._loader: Any = None
        self._compiled: dict[tuple[int, ...], Any] = {}

    def load(self, images: np.ndarray) -> np.ndarray:
        """What `__call__` takes of images, to be computed once.

        It is never more numbers than the images themselves are.
        """
        if self._start == self._graph.input:
            return images
        if self._loader is None:
            self._loader = _compiled(self._values_at_start, self._image_spec())
        return self._in_parts(self._loader, images, self._graph.shapes[self._start][1:])

    def __call__(self, loaded: np.ndarray, mask: np.ndarray, member: int = 0) -> np.ndarray:
        """The tensor of images, flattened; 0 for what is removed.

        Args:
            loaded: Images, as `load` gives them.
            mask: Boolean array of shape `(filters,)`, `True` to keep.
            member: The differentiator's number, for `connection_mask`.

        Returns:
            Float32 array of shape `(n, features)`.
        """
        kept = [np.flatnonzero(mask[numbers]).astype(np.int32) for numbers in self._numbers]
        run = self._function(tuple(len(filters) for filters in kept))
        size = self._graph.size(self._tensor)
        return self._in_parts(
            lambda values: run(
                tf.constant(values), [tf.constant(k) for k in kept], tf.constant(member, tf.int32)
            ),
            loaded,
            (size,),
        )

    def _in_parts(self, function: Any, values: np.ndarray, shape: Any) -> np.ndarray:
        if not len(values):  # oneDNN's convolutions refuse an empty batch
            return np.zeros((0, *shape), np.float32)
        starts = range(0, len(values), self._at_once)
        parts = [values[start : start + self._at_once].astype(np.float32) for start in starts]
        return np.concatenate([function(part).numpy() for part in parts])

    def _image_spec(self) -> tf.TensorSpec:
        return tf.TensorSpec((None, *self._graph.input_shape), tf.float32)

    def _values_at_start(self, images: tf.Tensor) -> tf.Tensor:
        inputs = images if self._preprocessing is None else self._preprocessing(images)
        return tf.cast(self._graph.run(inputs, [self._start])[self._start], tf.float32)

    def _function(self, counts: tuple[int, ...]) -> Any:
        """The body for these numbers of kept filters, compiled once."""
        if counts not in self._compiled:
            start = tf.TensorSpec((None, *self._graph.shapes[self._start][1:]), tf.float32)
            kept = [tf.TensorSpec((count,), tf.int32) for count in counts]
            member = tf.TensorSpec((), tf.int32)
            self._compiled[counts] = _compiled(self._run, start, kept, member)
        return self._compiled[counts]

    def _run(self, values: tf.Tensor, kept: list[tf.Tensor], member: tf.Tensor) -> tf.Tensor:
        if self._start == self._graph.input:
            values = self._values_at_start(values)
        names = [block.name for block in self._filters]
        channels = self._layers.keep(dict(zip(names, kept, strict=True)))
        connections = {}
        for name in self._connections:
            assert self._connection_mask is not None
            connections[name] = self._connection_mask(name, member)
        features = self._layers.frozen_end({self._start: values}, channels, connections)
        return tf.reshape(features, (-1, self._graph.size(self._tensor)))


def _compiled(function: Any, *signature: Any) -> Any:
    """The function, traced once; TensorFlow does not warn of bodies that are made one by one."""
    return tf.function(function, input_signature=signature).get_concrete_function()


def _last_unpruned(graph: ModelGraph, tensor: int, blocks: Sequence[Block]) -> int:
    """The last tensor that no pruned layer comes before and that is not larger than the images."""
    pruned = {block.name for block in blocks}
    found = graph.input
    for candidate in graph.bottlenecks(tensor):
        names = {graph.steps[number].name for number in graph.ancestors(candidate)}
        if names.isdisjoint(pruned) and graph.size(candidate) <= graph.size(graph.input):
            found = candidate
    return found
