"""What every differentiator and reference keeps of the frozen layers, as a few weights."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras, to_numpy
from keras_tl_defense.blocks import Block
from keras_tl_defense.pruning.masks import (
    class_set_scores,
    connection_thresholds,
    exact,
    filter_masks,
    pruned_count,
)

LEVELS = (1.0, 0.75, 0.5)
"""Shares of the common ratios; a differentiator that they leave too little takes the next."""


class MaskBank(keras.layers.Layer):
    """The masks of a number of bodies, and the activations that they come from.

    Filters are kept as a bit each, connections of a Dense layer as a threshold and a tie index.

    Args:
        blocks: The layers of the body that are pruned.
        own: Layers that each differentiator has of its own, which are scored here, not pruned.
        ratios: Ratio of each pruned layer.
        classes: Number of classes K.
        bodies: Number of bodies.
        size: Number of classes by whose activations a body is pruned.
        jitter: Standard deviation of the normal noise on the logarithms of the filters' scores.

    Attributes:
        blocks: As given.
        class_sets: Int weight of shape `(bodies, size)`: the classes of each; K stands for all.
        filter_bits: Uint8 weight of shape `(bodies, bytes)`, eight filters in a byte, 1 to keep.
        levels: Int weight of shape `(bodies,)`: positions in `LEVELS`.
    """

    def __init__(
        self,
        blocks: list[Block],
        own: list[Block],
        ratios: Mapping[str, float],
        *,
        classes: int,
        bodies: int,
        size: int,
        jitter: float,
        name: str,
    ) -> None:
        super().__init__(trainable=False, name=name)
        self._layers_of = _Layers(blocks, own, ratios)
        self._jitter = jitter
        add = self.add_weight
        self.class_sets = add(
            name="class_sets", shape=(bodies, size), dtype="int32", initializer="zeros"
        )
        self._units = sum(block.units for block in blocks if block.kind == "filters")
        self.filter_bits = add(
            name="filter_bits",
            shape=(bodies, -(-self._units // 8)),
            dtype="uint8",
            initializer="zeros",
        )
        self.jitter_seed = add(name="jitter_seed", shape=(2,), dtype="int64", initializer="zeros")
        self.levels = add(name="levels", shape=(bodies,), dtype="int32", initializer="zeros")
        self._activations, self._thresholds, self._ties = {}, {}, {}
        for number, block in enumerate([*blocks, *own]):
            self._activations[block.name] = add(
                name=f"activations_{number}",
                shape=(classes + 1, block.units),  # of every class, and the largest of all
                initializer="zeros",
            )
        for number, block in enumerate(blocks):
            if block.kind == "connections":
                self._thresholds[block.name] = add(
                    name=f"thresholds_{number}", shape=(bodies,), initializer="zeros"
                )
                self._ties[block.name] = add(
                    name=f"ties_{number}", shape=(bodies,), dtype="int64", initializer="zeros"
                )
        self.built = True

    @property
    def blocks(self) -> list[Block]:
        """The pruned layers of the body."""
        return self._layers_of.body

    @property
    def activations(self) -> list[tf.Variable]:
        """The weights that are not masks: what the scores of units come from."""
        return list(self._activations.values())

    def prune(
        self,
        activations: Mapping[str, np.ndarray],
        class_sets: np.ndarray,
        jitter_seed: np.ndarray,
    ) -> None:
        """Set every body's masks by the activations of its classes.

        Args:
            activations: The classes' mean activations of each layer, `(classes, units)`.
            class_sets: Int array of shape `(bodies, size)`; K stands for all classes.
            jitter_seed: Two int64 that decide the noise on the scores.
        """
        for name, weight in self._activations.items():
            means = activations[name]
            weight.assign(np.concatenate([means, means.max(axis=0, keepdims=True)]))
        self.class_sets.assign(class_sets)
        self.jitter_seed.assign(jitter_seed)
        self._prune(np.arange(len(class_sets)), 0)

    def set_level(self, bodies: np.ndarray, level: int) -> None:
        """Prune some bodies by `LEVELS[level]` of the ratios, where they are not yet."""
        self._prune(bodies[to_numpy(self.levels)[bodies] != level], level)

    def _prune(self, bodies: np.ndarray, level: int) -> None:
        assign_rows(self.levels, bodies, level)
        masks = []
        for number, block in enumerate(self.blocks):
            ratio = self._ratio(block, level)
            scores = self._scores(number, block, bodies)
            if block.kind == "filters":
                masks.append(filter_masks(scores, ratio))
                continue
            kernel = to_numpy(block.step.layer.kernel)
            threshold, tie = connection_thresholds(kernel, scores, ratio)
            assign_rows(self._thresholds[block.name], bodies, threshold)
            assign_rows(self._ties[block.name], bodies, tie)
        if masks:
            bits = np.packbits(np.concatenate(masks, axis=1), axis=1, bitorder="little")
            assign_rows(self.filter_bits, bodies, bits)

    def own_scores(self, bodies: np.ndarray) -> dict[str, np.ndarray]:
        """Score of each unit of layers that bodies have of their own, `(bodies, units)` of each."""
        first = len(self.blocks)
        return {
            block.name: self._scores(number, block, bodies)
            for number, block in enumerate(self._layers_of.own, first)
        }

    def _scores(self, number: int, block: Block, bodies: np.ndarray) -> np.ndarray:
        """Scores of a layer's units, `(bodies, units)`; those of filters with jitter."""
        means = to_numpy(self._activations[block.name])
        scores = class_set_scores(means, to_numpy(self.class_sets)[bodies])
        if block.kind == "connections":
            return scores
        seed = [*to_numpy(self.jitter_seed).view(np.uint64).tolist(), number]
        noise = np.random.default_rng(seed).normal(size=(self.levels.shape[0], block.units))
        return scores * np.exp(self._jitter * noise[bodies])

    def _ratio(self, block: Block, level: int) -> Fraction:
        return exact(LEVELS[level]) * exact(self._layers_of.ratios[block.name])

    def kept(self, level: int) -> list[tuple[str, int, int]]:
        """Name, units and units kept of each pruned layer at a level."""
        return [
            (block.name, block.size, block.size - pruned_count(ratio, block.size))
            for block in self.blocks
            for ratio in [self._ratio(block, level)]
        ]

    def filter_masks(self, bodies: tf.Tensor) -> tf.Tensor:
        """Which filters bodies keep: boolean tensor of shape `(n, filters)`."""
        bits = tf.gather(tf.convert_to_tensor(self.filter_bits), bodies)[..., None]
        each = tf.constant(1 << np.arange(8), tf.uint8)
        stays = tf.not_equal(tf.bitwise.bitwise_and(bits, each), 0)
        return tf.reshape(stays, (tf.size(bodies), 8 * bits.shape[1]))[:, : self._units]

    def connection_mask(self, name: str, body: tf.Tensor) -> tf.Tensor:
        """The kernel mask of a threshold and a tie index; see `connection_thresholds`."""
        (block,) = (block for block in self.blocks if block.name == name)
        means = tf.convert_to_tensor(self._activations[name])
        unit_scores = tf.reduce_max(tf.gather(means, tf.gather(self.class_sets, body)), axis=0)
        score = tf.abs(tf.convert_to_tensor(block.step.layer.kernel)) * unit_scores[:, None]
        index = tf.reshape(tf.range(tf.size(score, tf.int64), dtype=tf.int64), tf.shape(score))
        threshold = tf.gather(self._thresholds[name], body)
        tie = tf.gather(self._ties[name], body)
        return (score > threshold) | (tf.equal(score, threshold) & (index > tie))


def assign_rows(weight: tf.Variable, rows: np.ndarray, values: np.ndarray | int) -> None:
    """Replace some rows of a weight, in place where it is not mirrored on several devices."""
    variable = weight if isinstance(weight, tf.Variable) else weight.value  # the latter of Keras 3
    rows = np.asarray(rows)
    values = np.broadcast_to(values, (len(rows), *weight.shape[1:]))
    if not values.size:
        return
    try:
        variable.scatter_nd_update(rows[:, None], tf.cast(values, variable.dtype))
        variable.read_value_no_copy()  # or else every later read copies the whole weight
    except NotImplementedError:
        array = to_numpy(weight)
        array[rows] = values
        weight.assign(array)


class _Layers:
    """The layers that are pruned. A plain object, so that Keras tracks no layer twice."""

    def __init__(self, body: list[Block], own: list[Block], ratios: Mapping[str, float]) -> None:
        self.body, self.own, self.ratios = body, own, dict(ratios)
