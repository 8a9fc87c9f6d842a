"""The frozen layers under the masks of many differentiators, run the cheapest way that is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_tl_defense.blocks import Block
from keras_tl_defense.ensemble.grouped import GroupedBody
from keras_tl_defense.ensemble.masked import ConnectionMask, MaskedBody
from keras_tl_defense.ensemble.plan import Plan, plan_execution
from keras_tl_defense.graph import ModelGraph

_Given = tuple[dict[int, tf.Tensor], tf.Tensor, tf.Tensor, tf.Tensor, ConnectionMask]
MANY = 16  # rows of a differentiator, from which on they share what its kernels cost


class MemberBodies:
    """The layers from a model's input to a tensor: compact as far as that pays, then masked.

    How far it pays may depend on how many rows each differentiator has, so there may be two ways,
    of which every call takes one.

    Args:
        graph: The Student.
        end: Number of the tensor at which they end.
        blocks: The layers that are pruned; filters are numbered in this order, one block after the
            other.
        ratios: Their ratios, by name.

    Attributes:
        row_bytes: Size of the largest tensor of a row, unpruned.

    Raises:
        ValueError: One of the layers returns several tensors.
    """

    def __init__(
        self, graph: ModelGraph, end: int, blocks: Sequence[Block], ratios: Mapping[str, float]
    ) -> None:
        steps = [graph.steps[index] for index in graph.ancestors(end)]
        for step in steps:
            if len(step.outputs) != 1:
                raise ValueError(
                    f"The layer {step.name!r} of the frozen part returns {len(step.outputs)} "
                    "tensors. Cut the Student before it with `cut=`. "
                    f"Received: layer={step.name!r}"
                )
        given = (graph, end, blocks, ratios)
        few = plan_execution(*given)
        many = plan_execution(*given, images=MANY, instead_of=few)
        self._few = _Way(graph, end, blocks, few)
        self._many = self._few if many == few else _Way(graph, end, blocks, many)
        self._width = graph.size(end)
        self.row_bytes = 4 * max(graph.size(step.outputs[0]) for step in steps)

    def __call__(
        self,
        values: dict[int, tf.Tensor],
        rows: tf.Tensor,
        members: tf.Tensor,
        filter_masks: tf.Tensor,
        connection_mask: ConnectionMask,
    ) -> tf.Tensor:
        """Features at the end.

        Args:
            values: The unmasked tensors of a pass over the images, from `ModelGraph.run`.
            rows: Int tensor of shape `(groups, n)`: for each row the number of its image.
            members: Int tensor of shape `(groups,)`: the differentiator of each group of rows.
            filter_masks: Boolean tensor of shape `(groups, filters)`, `True` to keep.
            connection_mask: The mask of a Dense layer's kernel for one differentiator.

        Returns:
            Float tensor of shape `(groups * n, features)`, the tensor flattened.
        """
        given = (values, rows, members, filter_masks, connection_mask)
        if self._many is self._few:
            found = self._few(given)
        else:
            least = MANY * tf.size(tf.unique(members)[0])
            found = tf.cond(
                tf.size(rows) < least, lambda: self._few(given), lambda: self._many(given)
            )
        return tf.reshape(found, (-1, self._width))


class _Way:
    """One way to run the layers, see `Plan`."""

    def __init__(self, graph: ModelGraph, end: int, blocks: Sequence[Block], plan: Plan) -> None:
        self._compact = None
        if plan.split is not None:
            self._compact = GroupedBody(graph, plan.split, blocks, plan.late, plan.masked)
        self._masked = MaskedBody(graph, end, blocks, plan.split)

    def __call__(self, given: _Given) -> tf.Tensor:
        """The tensor at the end; see `MemberBodies` for the arguments."""
        started = None if self._compact is None else self._compact(*given)
        return tf.cast(self._masked(*given, started), tf.float32)  # whatever a layer's own is
