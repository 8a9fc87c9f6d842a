"""All differentiators of a Student, stacked: masks, thresholds and heads as a few weights.

Nothing here is of the Student's size. A differentiator is a row in each weight. One more row is the
*reference*: the body pruned by the activations of all classes together, under a head for each
class, which says what else an image may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import Block, find_blocks
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.ensemble.tops import OwnTop
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.masks import (
    class_set_scores,
    connection_thresholds,
    exact,
    filter_masks,
    pruned_count,
)

LEVELS = (1.0, 0.75, 0.5)
"""Shares of the common ratios; a differentiator that they leave too little takes the next."""

# How much the reference's margin of the Student's class counts, and its largest of another.
_OWN, _OTHER = 2.0, 2.25

_TOO_MANY_BYTES = 8 << 30


class DifferentiatorBank(keras.layers.Layer):
    """The differentiators of all pairs of classes.

    Args:
        graph: The Student.
        tensor: Number of the tensor that the heads read; the frozen body ends there.
        ratios: Ratio of each pruned layer.
        classes: Number of classes K.
        heads: Heads of each differentiator: 1, the first class against the second, or 2, each
            against all other classes.
        jitter: Standard deviation of the normal noise on the logarithms of the filters' scores.
        top: The layers after the tensor, of which each differentiator has its own; `None` lets the
            heads read the tensor itself.

    Attributes:
        pairs: Int array of shape `(K(K-1)/2, 2)`: the classes of each differentiator.
        features: Size of what the heads read.
        needs: Numbers of the tensors that `body_features` takes from a pass over the images.
    """

    def __init__(
        self,
        graph: ModelGraph,
        tensor: int,
        ratios: dict[str, float],
        classes: int,
        *,
        heads: int,
        jitter: float,
        top: OwnTop | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=False, **kwargs)
        blocks = [b.checked() for b in find_blocks(graph, before=tensor) if b.name in ratios]
        self._layout = _Layout(blocks, ratios)
        self._graph = graph
        self._body = MaskedBody(graph, tensor, blocks)
        self.needs = (tensor,)
        self._classes = classes
        self._jitter = jitter
        self.pairs = np.stack(np.triu_indices(classes, 1), axis=1)
        self.top = top
        self.features = _feature_count(graph, tensor) if top is None else top.features
        pairs = len(self.pairs)
        _check_size(pairs, heads, self.features, top)
        self.reference = pairs
        add = self.add_weight
        filters = sum(block.units for block in self._layout.filters)
        self.filter_masks = add(
            name="filter_masks", shape=(pairs + 1, filters), dtype="bool", initializer="ones"
        )
        self.jitter_seed = add(name="jitter_seed", shape=(2,), dtype="int64", initializer="zeros")
        self.levels = add(name="levels", shape=(pairs,), dtype="int32", initializer="zeros")
        self._activations, self._thresholds, self._ties = {}, {}, {}
        for number, block in enumerate(self._layout.scored(top)):
            suffix = f"_{number}"
            self._activations[block.name] = add(
                name="activations" + suffix, shape=(classes, block.units), initializer="zeros"
            )
            if block.kind == "connections" and block.name in self._layout.by_name:
                self._thresholds[block.name] = add(
                    name="thresholds" + suffix, shape=(pairs + 1,), initializer="zeros"
                )
                self._ties[block.name] = add(
                    name="ties" + suffix, shape=(pairs + 1,), dtype="int64", initializer="zeros"
                )
        self.kernel = add(name="kernel", shape=(pairs, heads, self.features), initializer="zeros")
        self.bias = add(name="bias", shape=(pairs, heads), initializer="zeros")
        width = _feature_count(graph, tensor)
        self.rival_kernel = add(name="rival_kernel", shape=(width, classes), initializer="zeros")
        self.rival_bias = add(name="rival_bias", shape=(classes,), initializer="zeros")
        self._top_weights, self._top_kept = {}, {}
        if top is not None:
            for number, (name, shape) in enumerate(top.weight_shapes().items()):
                self._top_weights[name] = add(
                    name=f"top_{number}", shape=(pairs, *shape), initializer="zeros"
                )
            for number, (name, count) in enumerate(top.kept_counts().items()):
                self._top_kept[name] = add(
                    name=f"top_kept_{number}",
                    shape=(pairs, count),
                    dtype="int32",
                    initializer="zeros",
                )
        self.built = True

    def prune(self, activations: Mapping[str, np.ndarray], jitter_seed: np.ndarray) -> None:
        """Set every differentiator's masks by the activations of its two classes.

        Args:
            activations: The classes' mean activations of each pruned layer, `(classes, units)`.
            jitter_seed: Two int64 that decide the noise on the scores.
        """
        for name, weight in self._activations.items():
            weight.assign(activations[name])
        self.jitter_seed.assign(jitter_seed)
        self.set_level(np.arange(len(self.pairs)), 0)
        self._set_masks(np.array([self.reference]), [np.arange(self._classes)], 0)

    def set_level(self, members: np.ndarray, level: int) -> None:
        """Prune some differentiators by `LEVELS[level]` of the ratios.

        Args:
            members: Int array of shape `(n,)`: their numbers.
            level: A position in `LEVELS`.
        """
        self.levels.assign(_replaced(self.levels, members, level))
        self._set_masks(members, self.pairs[members], level)

    def _set_masks(self, members: np.ndarray, class_sets: Any, level: int) -> None:
        layout = self._layout
        masks = []
        for number, block in enumerate(layout.blocks):
            ratio = level_ratio(layout.ratios[block.name], level)
            scores = self._scores(number, block, members, class_sets)
            if block.kind == "filters":
                masks.append(filter_masks(scores, ratio))
                continue
            kernel = np.array(block.step.layer.kernel)
            found = connection_thresholds(kernel, scores, ratio)
            for weight, values in zip((self._thresholds, self._ties), found, strict=True):
                weight[block.name].assign(_replaced(weight[block.name], members, values))
        if masks:
            whole = np.concatenate(masks, axis=1)
            self.filter_masks.assign(_replaced(self.filter_masks, members, whole))

    def own_scores(self, member: int) -> dict[str, np.ndarray]:
        """Score of each unit of a differentiator's own layers, `(units,)` of each."""
        own = [] if self.top is None else self.top.blocks
        members = np.array([member])
        return {
            block.name: self._scores(number, block, members, self.pairs[members])[0]
            for number, block in enumerate(own, len(self._layout.blocks))
        }

    def _scores(
        self, number: int, block: Block, members: np.ndarray, class_sets: Any
    ) -> np.ndarray:
        """Scores of a layer's units, `(members, units)`; those of filters with jitter."""
        means = np.array(self._activations[block.name])
        scores = class_set_scores(means, np.asarray(class_sets))
        if block.kind == "connections":
            return scores
        seed = [*np.array(self.jitter_seed).view(np.uint64).tolist(), number]
        noise = np.random.default_rng(seed).normal(size=(len(self.pairs) + 1, block.units))
        return scores * np.exp(self._jitter * noise[members])

    @property
    def blocks(self) -> list[Block]:
        """The pruned layers of the body."""
        return list(self._layout.blocks)

    def set_heads(self, members: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Set the heads of some differentiators, arrays of their number as first dimension."""
        self.kernel.assign(_replaced(self.kernel, members, kernel))
        self.bias.assign(_replaced(self.bias, members, bias))

    def set_tops(
        self, members: np.ndarray, weights: dict[str, np.ndarray], kept: dict[str, np.ndarray]
    ) -> None:
        """Set the own layers of some differentiators, as `tune_tops` returns them."""
        for stacks, arrays in ((self._top_weights, weights), (self._top_kept, kept)):
            for name, array in arrays.items():
                stacks[name].assign(_replaced(stacks[name], members, array))

    def set_rivals(self, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Set the reference's heads, of shapes `(features, classes)` and `(classes,)`."""
        self.rival_kernel.assign(kernel)
        self.rival_bias.assign(bias)

    def kept(self) -> list[tuple[int, int, str, int, int]]:
        """Level, its differentiators, and name, units and units kept of each pruned layer.

        A unit is a filter or a connection.
        """
        rows = []
        counts = np.bincount(np.array(self.levels), minlength=len(LEVELS))
        for level in np.flatnonzero(counts):
            for block in self._layout.blocks:
                ratio = level_ratio(self._layout.ratios[block.name], int(level))
                kept = block.size - pruned_count(ratio, block.size)
                rows.append((int(level), int(counts[level]), block.name, block.size, kept))
            if self.top is not None:
                rows.extend((int(level), int(counts[level]), *row) for row in self.top.kept())
        return rows

    def index(self, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """Number of the differentiator of two different classes, in either order."""
        low, high = tf.minimum(first, second), tf.maximum(first, second)
        return low * (2 * self._classes - low - 1) // 2 + high - low - 1

    def body_features(
        self, values: dict[int, tf.Tensor], rows: tf.Tensor, members: tf.Tensor
    ) -> tf.Tensor:
        """What the heads read of images, under the masks of differentiators; see `MaskedBody`."""
        body = self.masked_body(values, rows, members)
        if self.top is None:
            return body
        body = tf.reshape(body, (-1, *self.top.cut_shape))
        return self.top.run_members(
            body, members, tf.shape(rows)[1], self._top_weights, self._top_kept
        )

    def masked_body(
        self, values: dict[int, tf.Tensor], rows: tf.Tensor, members: tf.Tensor
    ) -> tf.Tensor:
        """The frozen body under the masks of differentiators; see `MaskedBody`."""
        masks = tf.convert_to_tensor(self.filter_masks)
        return self._body(values, rows, members, masks, self._connection_mask)

    def compact_body(self, preprocessing: Any) -> CompactBody:
        """The frozen body of one differentiator at a time, from images."""
        return CompactBody(
            self._graph, self.needs[0], self._layout.blocks, preprocessing, self._connection_mask
        )

    def filter_mask(self, member: int) -> np.ndarray:
        """Which filters a differentiator, or the reference, keeps: boolean, `(filters,)`."""
        return np.asarray(tf.convert_to_tensor(self.filter_masks)[member])

    def own_features(self, values: tf.Tensor, member: tf.Tensor) -> tf.Tensor:
        """What the heads read, of what `compact_body` gives, under layers of its own."""
        assert self.top is not None
        values = tf.reshape(values, (-1, *self.top.cut_shape))
        stacks = tf.nest.map_structure(tf.convert_to_tensor, (self._top_weights, self._top_kept))
        return self.top.run(values, *tf.nest.map_structure(lambda s: tf.gather(s, member), stacks))

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
            Float tensor of shape `(batch, k)`, negative where a member disagrees; +1 is usual for
            an honest image of the class, -1 for one of another class.
        """
        flat = tf.reshape(members, [-1])
        first = tf.gather(tf.constant(self.pairs[:, 0], tf.int32), members)
        agrees = tf.equal(first, student_class[:, None])
        kernel, bias = tf.convert_to_tensor(self.kernel), tf.convert_to_tensor(self.bias)
        if kernel.shape[1] == 1:
            kernel, bias = tf.gather(kernel[:, 0], flat), tf.gather(bias[:, 0], flat)
            sign = tf.where(agrees, 1.0, -1.0)
        else:
            chosen = tf.stack([flat, tf.cast(~tf.reshape(agrees, [-1]), tf.int32)], axis=1)
            kernel, bias = tf.gather_nd(kernel, chosen), tf.gather_nd(bias, chosen)
            sign = tf.ones(tf.shape(members))
        logits = tf.reduce_sum(tf.cast(features, kernel.dtype) * kernel, axis=1) + bias
        return tf.reshape(logits, tf.shape(members)) * sign

    def rivals(self, values: dict[int, tf.Tensor]) -> tf.Tensor:
        """How surely the reference takes each image for each class.

        Args:
            values: The unmasked tensors of a pass over the images.

        Returns:
            Float tensor of shape `(batch, classes)`.
        """
        rows = tf.range(tf.shape(values[self.needs[0]])[0])[None]
        features = self.masked_body(values, rows, tf.constant([self.reference]))
        kernel = tf.convert_to_tensor(self.rival_kernel)
        margins = tf.linalg.matmul(tf.cast(features, kernel.dtype), kernel)
        return margins + tf.convert_to_tensor(self.rival_bias)

    def _connection_mask(self, name: str, member: tf.Tensor) -> tf.Tensor:
        """The kernel mask of a threshold and a tie index; see `connection_thresholds`."""
        means = tf.convert_to_tensor(self._activations[name])
        pairs = tf.constant(np.concatenate([self.pairs, [[0, 0]]]), tf.int32)
        own = tf.reduce_max(tf.gather(means, tf.gather(pairs, member)), axis=0)
        every = tf.reduce_max(means, axis=0)
        unit_scores = tf.where(tf.equal(member, self.reference), every, own)
        kernel = tf.convert_to_tensor(self._layout.by_name[name].step.layer.kernel)
        score = tf.abs(kernel) * unit_scores[:, None]
        index = tf.reshape(tf.range(tf.size(score, tf.int64), dtype=tf.int64), tf.shape(score))
        threshold = tf.gather(self._thresholds[name], member)
        tie = tf.gather(self._ties[name], member)
        return (score > threshold) | (tf.equal(score, threshold) & (index > tie))


def input_score(margins: tf.Tensor, rivals: tf.Tensor, student_class: tf.Tensor) -> tf.Tensor:
    """How sure the differentiators are that an image is what the Student says.

    The members' mean margin, plus 2 times the reference's margin of the Student's class, less 2.25
    times its largest margin of another class. An honest image of the class has about 4.

    Args:
        margins: Float tensor of shape `(batch, k)`, of the members.
        rivals: Float tensor of shape `(batch, classes)`, of the reference.
        student_class: Int tensor of shape `(batch,)`.

    Returns:
        Float tensor of shape `(batch,)`.
    """
    own = tf.one_hot(student_class, rivals.shape[1], on_value=True, off_value=False)
    other = tf.reduce_max(tf.where(own, tf.float32.min, rivals), axis=1)
    own_margin = tf.gather(rivals, student_class, batch_dims=1)
    return tf.reduce_mean(margins, axis=1) + _OWN * own_margin - _OTHER * other


def level_ratio(ratio: float, level: int) -> Fraction:
    """What is left of a common ratio at a level, exactly."""
    return exact(LEVELS[level]) * exact(ratio)


class _Layout:
    """The pruned layers, by kind and name. A plain object, so that Keras tracks no layer twice."""

    def __init__(self, blocks: list[Any], ratios: dict[str, float]) -> None:
        self.blocks = blocks
        self.ratios = ratios
        self.filters = [block for block in blocks if block.kind == "filters"]
        self.connections = [block for block in blocks if block.kind == "connections"]
        self.by_name = {block.name: block for block in blocks}

    def scored(self, top: OwnTop | None) -> list[Block]:
        """The pruned layers of the body, then those that each differentiator has of its own."""
        return [*self.blocks, *([] if top is None else top.blocks)]


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


def _replaced(weight: Any, rows: np.ndarray, values: Any) -> np.ndarray:
    """The weight's values with some rows replaced."""
    array = np.array(weight)
    array[rows] = values
    return array


def most_features(pairs: int, heads: int) -> int:
    """How many features the heads of so many pairs of classes may read."""
    return _TOO_MANY_BYTES // (4 * heads * pairs)


def _check_size(pairs: int, heads: int, features: int, top: OwnTop | None) -> None:
    own = 0 if top is None else top.bytes_per_differentiator
    size = pairs * (4 * heads * features + own)
    if size <= _TOO_MANY_BYTES:
        return
    remedy = (
        "Let the heads read a layer with fewer features, with `head_layer=` or `cut=`, or give "
        'each pair one head with `head="pair"`.'
    )
    if own > 4 * heads * features:
        remedy = (
            'Leave the unfrozen layers to the Student with `tune="head"`, or prune them harder.'
        )
    raise ValueError(
        f"The differentiators of all {pairs} pairs of classes would take {size / 2**30:.1f} GiB, "
        f"with {heads} heads of {features} features and {own / 2**20:.1f} MiB of layers of its "
        f"own each. {remedy} Received: {pairs} pairs of classes"
    )
