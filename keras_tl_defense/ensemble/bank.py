"""All differentiators of a Student, stacked: masks, heads and own layers as a few weights.

Nothing here is of the Student's size. A differentiator is a row in each weight. A few more bodies
are the *references*: pruned by the activations of all classes together, under a head for each
class, they say what else an image may be. They differ by their jitter, and their margins are
averaged: what one of them believes because of the filters that it happens to have, others do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras, to_numpy
from keras_tl_defense.blocks import find_blocks
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.head_bank import HeadBank
from keras_tl_defense.ensemble.mask_bank import LEVELS, MaskBank, assign_rows
from keras_tl_defense.ensemble.member_bodies import MemberBodies
from keras_tl_defense.ensemble.roster import Roster, find_members, pair_number
from keras_tl_defense.ensemble.selection import draw
from keras_tl_defense.ensemble.tops import OwnTop
from keras_tl_defense.ensemble.training import HeadKind, head_count
from keras_tl_defense.ensemble.voting import find_winner
from keras_tl_defense.graph import ModelGraph

_REFERENCES = 4  # one where nothing makes them differ
_TOO_MANY_BYTES = 8 << 30
_HEAD_BYTES = 2  # a number of a head


class DifferentiatorBank(keras.layers.Layer):
    """The differentiators of a Student.

    Args:
        graph: The Student.
        tensor: Number of the tensor that the heads read; the frozen body ends there.
        ratios: Ratio of each pruned layer.
        roster: How many differentiators there are, and which classes they know.
        head: `"pair"`: the classes of a differentiator against each other, one head for two of
            them; or `"one_vs_rest"`: a head for each against all other classes.
        jitter: Standard deviation of the normal noise on the logarithms of the filters' scores.
        top: The layers after the tensor, of which each differentiator has its own; `None` lets the
            heads read the tensor itself.

    Attributes:
        count: Number of differentiators.
        references: Numbers of the references, which follow those of the differentiators.
        features: Size of what the heads read.
        tensor: Number of the tensor that the heads read, or that own layers begin with.
    """

    def __init__(
        self,
        graph: ModelGraph,
        tensor: int,
        ratios: dict[str, float],
        roster: Roster,
        *,
        head: HeadKind,
        jitter: float,
        top: OwnTop | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=False, **kwargs)
        blocks = [b.checked() for b in find_blocks(graph, before=tensor) if b.name in ratios]
        self._graph = graph
        self._body = MemberBodies(graph, tensor, blocks, ratios)
        self.tensor = tensor
        self._roster, self._head = roster, head
        self.top = top
        width = _feature_count(graph, tensor)
        self.features = width if top is None else top.features
        count, classes, heads = roster.count, roster.classes, head_count(head, roster.size)
        _check_size(roster, heads, self.features, width, top)
        self.count = count
        differ = jitter and any(block.kind == "filters" for block in blocks)
        self.references = count + np.arange(_REFERENCES if differ else 1)
        self.masks = MaskBank(
            blocks,
            [] if top is None else top.blocks,
            ratios,
            classes=classes,
            bodies=count + len(self.references),
            size=roster.size,
            jitter=jitter,
            name="masks",
        )
        add = self.add_weight
        self._members_of = add(
            name="members_of", shape=(classes, roster.most), dtype="int32", initializer="zeros"
        )
        self._known_by = add(name="known_by", shape=(classes,), dtype="int32", initializer="zeros")
        self.heads = HeadBank(count, heads, self.features, name="heads")
        self.reference_heads = HeadBank(
            len(self.references), classes, width, name="reference_heads"
        )
        self._top_weights, self._top_kept = {}, {}
        if top is not None:
            for number, (name, shape) in enumerate(top.weight_shapes().items()):
                self._top_weights[name] = add(
                    name=f"top_{number}", shape=(count, *shape), initializer="zeros"
                )
            for number, (name, kept) in enumerate(top.kept_counts().items()):
                self._top_kept[name] = add(
                    name=f"top_kept_{number}",
                    shape=(count, kept),
                    dtype="int32",
                    initializer="zeros",
                )
        self.built = True

    def prune(
        self,
        activations: Mapping[str, np.ndarray],
        jitter_seed: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        """Draw every differentiator's classes, and set its masks by their activations.

        Args:
            activations: The classes' mean activations of each pruned layer, `(classes, units)`.
            jitter_seed: Two int64 that decide the noise on the scores.
            rng: Decides the classes of each.
        """
        roster = self._roster
        nothing = np.zeros((roster.classes, 0))
        drawn = roster.draw(np.concatenate([nothing, *activations.values()], axis=1), rng)
        members_of, known_by = find_members(drawn, roster)
        self._members_of.assign(members_of)
        self._known_by.assign(known_by)
        every = np.full((len(self.references), roster.size), roster.classes)
        self.masks.prune(activations, np.concatenate([drawn, every]), jitter_seed)

    @property
    def pruning_weights(self) -> list[Any]:
        """The weights that `prune` sets."""
        return [self._members_of, self._known_by, *self.masks.weights]

    def parts(self) -> dict[str, list[Any]]:
        """All weights, by what they are for."""
        activations = {id(weight) for weight in self.masks.activations}
        return {
            "heads": self.heads.weights,
            "own layers": [*self._top_weights.values(), *self._top_kept.values()],
            "masks": [w for w in self.masks.weights if id(w) not in activations],
            "activations": self.masks.activations,
            "references": self.reference_heads.weights,
            "draw": [self._members_of, self._known_by],
        }

    @property
    def member_classes(self) -> np.ndarray:
        """The classes that each differentiator knows, int array of shape `(count, size)`."""
        return to_numpy(self.masks.class_sets)[: self.count]

    @property
    def all_pairs(self) -> bool:
        """Whether every two classes have a differentiator, which is no secret."""
        return self._roster.size == 2 and self._roster.each == self._roster.classes - 1

    def set_tops(
        self, members: np.ndarray, weights: dict[str, np.ndarray], kept: dict[str, np.ndarray]
    ) -> None:
        """Set the own layers of some differentiators, as `tune_tops` returns them."""
        for stacks, arrays in ((self._top_weights, weights), (self._top_kept, kept)):
            for name, array in arrays.items():
                assign_rows(stacks[name], members, array)

    def kept(self) -> list[tuple[int, int, str, int, int]]:
        """Level, its differentiators, and name, units and units kept of each pruned layer.

        A unit is a filter or a connection.
        """
        counts = np.bincount(to_numpy(self.masks.levels)[: self.count], minlength=len(LEVELS))
        own = [] if self.top is None else self.top.kept()
        return [
            (int(level), int(counts[level]), *row)
            for level in np.flatnonzero(counts)
            for row in [*self.masks.kept(int(level)), *own]
        ]

    def draw(
        self, numbers: tf.Tensor, key: tf.Tensor, student_class: tf.Tensor, size: int
    ) -> tf.Tensor:
        """Differentiators that know the Student's class; see `selection.draw`.

        Args:
            numbers: Tensor of shape `(batch,)`, uint64: what decides the draw.
            key: The secret, int64 tensor of shape `(2,)`.
            student_class: Int tensor of shape `(batch,)`.
            size: How many are drawn for each example.

        Returns:
            Int32 tensor of shape `(batch, size)`.
        """
        known_by = tf.gather(self._known_by, student_class)
        slots = draw(numbers, key, known_by, self._roster.most, size)
        return tf.gather(tf.gather(self._members_of, student_class), slots, batch_dims=1)

    def winner(self, values: dict[int, tf.Tensor], rows: tf.Tensor) -> tf.Tensor:
        """The class that wins the votes of all pairs, or -1, of some images: `find_winner`."""

        def beats(rows: tf.Tensor, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
            members = pair_number(first, second, self._roster.classes)
            places = tf.repeat(rows, members.shape[1])[:, None]
            features = self.body_features(values, places, tf.reshape(members, [-1]))
            return self.margins(features, members, first) > 0

        return tf.cond(  # oneDNN gives convolutions of no images a wrong shape
            tf.size(rows) > 0,
            lambda: find_winner(beats, rows, self._roster.classes),
            lambda: tf.zeros_like(rows),
        )

    def body_features(
        self, values: dict[int, tf.Tensor], rows: tf.Tensor, members: tf.Tensor
    ) -> tf.Tensor:
        """What the heads read of images, under the masks of differentiators; see `MemberBodies`."""
        body = self.member_bodies(values, rows, members)
        if self.top is None:
            return body
        body = tf.reshape(body, (-1, *self.top.cut_shape))
        return self.top.run_members(
            body, members, tf.shape(rows)[1], self._top_weights, self._top_kept
        )

    def member_bodies(
        self, values: dict[int, tf.Tensor], rows: tf.Tensor, members: tf.Tensor
    ) -> tf.Tensor:
        """The frozen body under the masks of differentiators; see `MemberBodies`."""
        filters = self.masks.filter_masks(members)
        return self._body(values, rows, members, filters, self.masks.connection_mask)

    def compact_body(self, preprocessing: Any) -> CompactBody:
        """The frozen body of one differentiator at a time, from images."""
        masks = self.masks
        return CompactBody(
            self._graph, self.tensor, masks.blocks, preprocessing, masks.connection_mask
        )

    def rows_at_once(self, memory: int) -> int:
        """How many rows of `body_features` keep each tensor below `memory` bytes, 1 to 512."""
        return int(np.clip(memory // self._body.row_bytes, 1, 512))

    def margins(self, features: tf.Tensor, members: tf.Tensor, classes: tf.Tensor) -> tf.Tensor:
        """How surely each member takes an image for a class that it knows.

        Args:
            features: Float tensor of shape `(batch * k, features)`, the members' features of the
                first image, then of the second, and so on.
            members: Int tensor of shape `(batch, k)`.
            classes: Int tensor of shape `(batch,)`, a class for all members of an image, such as
                the Student's; or `(batch, k)`.

        Returns:
            Float tensor of shape `(batch, k)`, above 0 where a member agrees; +1 is usual for an
            honest image of the class, -1 for one of another class, and 0 is what heads say that
            tell nothing.
        """
        flat = tf.reshape(members, [-1])
        if len(classes.shape) == 1:
            classes = classes[:, None]
        own = tf.equal(tf.gather(self.masks.class_sets, members), classes[..., None])
        own = tf.reshape(own, (-1, self._roster.size))
        apart = self._head == "pair"
        if apart and self._roster.size > 2:
            every = self.heads.every(features, flat)
            best = tf.reduce_max(tf.where(own, every.dtype.min, every), axis=1)
            margins = (tf.reduce_max(tf.where(own, every, every.dtype.min), axis=1) - best) / 2
            return tf.reshape(margins, tf.shape(members))
        place = tf.argmax(own, axis=1, output_type=tf.int32)
        sign = tf.ones_like(place, tf.float32)
        if apart:
            sign, place = 1 - 2 * tf.cast(place, tf.float32), tf.zeros_like(place)
        return tf.reshape(self.heads.one(features, flat, place) * sign, tf.shape(members))

    def reference_features(self, values: dict[int, tf.Tensor]) -> tf.Tensor:
        """What the references' heads read, `(references, batch, features)`, of a pass's tensors."""
        images, count = tf.shape(values[self.tensor])[0], len(self.references)
        rows = tf.tile(tf.range(images)[None], [count, 1])
        features = self.member_bodies(values, rows, tf.constant(self.references, tf.int32))
        return tf.reshape(features, (count, images, self.reference_heads.features))

    def reference_margins(self, features: tf.Tensor) -> tf.Tensor:
        """How surely the references take each image for each class, on average.

        Args:
            features: From `reference_features`.

        Returns:
            Float tensor of shape `(batch, classes)`.
        """
        return tf.reduce_mean(self.reference_heads.all(features), axis=0)


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


def most_features(roster: Roster, head: HeadKind) -> int:
    """How many features the heads of so many differentiators may read."""
    heads = head_count(head, roster.size) * roster.count
    return _TOO_MANY_BYTES // (_HEAD_BYTES * (heads + _REFERENCES * roster.classes))


def _check_size(roster: Roster, heads: int, features: int, width: int, top: OwnTop | None) -> None:
    count = roster.count
    own = 0 if top is None else top.bytes_per_differentiator
    size = count * (_HEAD_BYTES * heads * features + own)
    size += _HEAD_BYTES * _REFERENCES * roster.classes * width
    if size <= _TOO_MANY_BYTES:
        return
    remedy = (
        "Have fewer of them with `members_per_class=`, let the heads read a layer with fewer "
        'features, with `head_layer=` or `cut=`, or give each pair one head with `head="pair"`.'
    )
    if own > _HEAD_BYTES * heads * features:
        remedy = (
            "Have fewer of them with `members_per_class=`, leave the unfrozen layers to the "
            'Student with `tune="head"`, or prune them harder.'
        )
    raise ValueError(
        f"The {count} differentiators and the references would take "
        f"{size / 2**30:.1f} GiB, "
        f"with {heads} heads of {features} features and {own / 2**20:.1f} MiB of layers of its "
        f"own each. {remedy} Received: {count} differentiators"
    )
