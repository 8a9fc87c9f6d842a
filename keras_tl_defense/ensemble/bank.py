"""All differentiators of a Student, stacked: masks, thresholds and heads as a few weights.

Nothing here is of the Student's size. A differentiator is a row in each weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.blocks import find_blocks
from keras_tl_defense.pruning.masks import (
    class_set_scores,
    connection_thresholds,
    filter_masks,
    pruned_count,
)

_TOO_MANY_BYTES = 8 << 30


class DifferentiatorBank(keras.layers.Layer):
    """The differentiators of all pairs of classes.

    Args:
        graph: The Student.
        cut: Number of the tensor at which the frozen body ends.
        ratios: Ratio of each pruned layer.
        classes: Number of classes K.

    Attributes:
        pairs: Int array of shape `(K(K-1)/2, 2)`: the classes of each differentiator.
        features: Size of the cut, flattened.
        needs: Numbers of the tensors that `body_features` takes from a pass over the images.
    """

    def __init__(
        self, graph: ModelGraph, cut: int, ratios: dict[str, float], classes: int, **kwargs: Any
    ) -> None:
        super().__init__(trainable=False, **kwargs)
        blocks = [b.checked() for b in find_blocks(graph, before=cut) if b.name in ratios]
        self._layout = _Layout(blocks, ratios)
        self._body = MaskedBody(graph, cut, blocks)
        self.needs = (cut,)
        self._classes = classes
        self.pairs = np.stack(np.triu_indices(classes, 1), axis=1)
        self.features = _feature_count(graph, cut)
        pairs = len(self.pairs)
        _check_size(pairs, self.features)
        add = self.add_weight
        filters = sum(block.units for block in self._layout.filters)
        self.filter_masks = add(
            name="filter_masks", shape=(pairs, filters), dtype="bool", initializer="ones"
        )
        self._activations, self._thresholds, self._ties = {}, {}, {}
        for number, block in enumerate(self._layout.connections):
            suffix = f"_{number}"
            self._activations[block.name] = add(
                name="activations" + suffix, shape=(classes, block.units), initializer="zeros"
            )
            self._thresholds[block.name] = add(
                name="thresholds" + suffix, shape=(pairs,), initializer="zeros"
            )
            self._ties[block.name] = add(
                name="ties" + suffix, shape=(pairs,), dtype="int64", initializer="zeros"
            )
        self.kernel = add(name="kernel", shape=(pairs, self.features), initializer="zeros")
        self.bias = add(name="bias", shape=(pairs,), initializer="zeros")
        self.built = True

    def prune(self, activations: ClassActivations) -> None:
        """Set every differentiator's masks by the activations of its two classes."""
        layout = self._layout
        masks = [
            filter_masks(
                class_set_scores(activations[block.name], self.pairs), layout.ratios[block.name]
            )
            for block in layout.filters
        ]
        if masks:
            self.filter_masks.assign(np.concatenate(masks, axis=1))
        for block in layout.connections:
            means = activations[block.name]
            thresholds, ties = connection_thresholds(
                np.array(block.step.layer.kernel),
                class_set_scores(means, self.pairs),
                layout.ratios[block.name],
            )
            self._activations[block.name].assign(means)
            self._thresholds[block.name].assign(thresholds)
            self._ties[block.name].assign(ties)

    def kept(self) -> list[tuple[str, int, int]]:
        """Name, units and units kept of each pruned layer; a unit is a filter or a connection."""
        rows = []
        for block in self._layout.blocks:
            units = block.units
            if block.kind == "connections":
                units = int(np.prod(block.step.layer.kernel.shape))
            pruned = pruned_count(self._layout.ratios[block.name], units)
            rows.append((block.name, units, units - pruned))
        return rows

    def index(self, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """Number of the differentiator of two different classes, in either order."""
        low, high = tf.minimum(first, second), tf.maximum(first, second)
        return low * (2 * self._classes - low - 1) // 2 + high - low - 1

    def body_features(
        self, values: dict[int, tf.Tensor], rows: tf.Tensor, members: tf.Tensor
    ) -> tf.Tensor:
        """Features of images under the masks of differentiators; see `MaskedBody`."""
        masks = tf.convert_to_tensor(self.filter_masks)
        return self._body(values, rows, members, masks, self._connection_mask)

    def rows_at_once(self, memory: int) -> int:
        """How many rows of `body_features` keep each tensor below `memory` bytes, 1 to 512."""
        return int(np.clip(memory // self._body.row_bytes, 1, 512))

    def margins(
        self, features: tf.Tensor, members: tf.Tensor, student_class: tf.Tensor
    ) -> tf.Tensor:
        """How surely each member takes an image for the Student's class.

        Args:
            features: Float tensor of shape `(batch * k, features)`, the members' features of the
                first image, then of the second, and so on.
            members: Int tensor of shape `(batch, k)`: differentiators that know the class.
            student_class: Int tensor of shape `(batch,)`.

        Returns:
            Float tensor of shape `(batch, k)`: logits, negative where a member disagrees.
        """
        flat = tf.reshape(members, [-1])
        kernel = tf.gather(tf.convert_to_tensor(self.kernel), flat)
        logits = tf.reduce_sum(tf.cast(features, kernel.dtype) * kernel, axis=1)
        logits += tf.gather(tf.convert_to_tensor(self.bias), flat)
        first = tf.gather(tf.constant(self.pairs[:, 0], tf.int32), members)
        sign = tf.where(tf.equal(first, student_class[:, None]), 1.0, -1.0)
        return tf.reshape(logits, tf.shape(members)) * sign

    def _connection_mask(self, name: str, member: tf.Tensor) -> tf.Tensor:
        """The kernel mask of a threshold and a tie index; see `connection_thresholds`."""
        classes = tf.gather(tf.constant(self.pairs, tf.int32), member)
        unit_scores = tf.reduce_max(tf.gather(self._activations[name], classes), axis=0)
        kernel = tf.convert_to_tensor(self._layout.by_name[name].step.layer.kernel)
        score = tf.abs(kernel) * unit_scores[:, None]
        index = tf.reshape(tf.range(tf.size(score, tf.int64), dtype=tf.int64), tf.shape(score))
        threshold = tf.gather(self._thresholds[name], member)
        tie = tf.gather(self._ties[name], member)
        return (score > threshold) | (tf.equal(score, threshold) & (index > tie))


class _Layout:
    """The pruned layers, by kind and name. A plain object, so that Keras tracks no layer twice."""

    def __init__(self, blocks: list[Any], ratios: dict[str, float]) -> None:
        self.blocks = blocks
        self.ratios = ratios
        self.filters = [block for block in blocks if block.kind == "filters"]
        self.connections = [block for block in blocks if block.kind == "connections"]
        self.by_name = {block.name: block for block in blocks}


def _feature_count(graph: ModelGraph, cut: int) -> int:
    shape = graph.shapes[cut][1:]
    count = tf.TensorShape(shape).num_elements()
    if not count:
        raise ValueError(
            "The size of the cut must be known, but the student takes images of any size. Give "
            "its input a fixed shape, or let a global pooling layer follow the frozen layers. "
            f"Received: shape {shape} at the cut"
        )
    return int(count)


def _check_size(pairs: int, features: int) -> None:
    size = 4 * pairs * features
    if size > _TOO_MANY_BYTES:
        raise ValueError(
            f"The heads of all {pairs} pairs of classes, each with {features} features, would take "
            f"{size / 2**30:.1f} GiB. Cut the Student where it has fewer features, for example "
            f"after a global pooling layer. Received: {pairs} pairs of {features} features"
        )
