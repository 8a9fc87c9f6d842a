"""The frozen layers under the masks of many differentiators, run the cheapest way that is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_tl_defense.blocks import Block
from keras_tl_defense.ensemble.grouped import GroupedBody
from keras_tl_defense.ensemble.masked import ConnectionMask, MaskedBody
from keras_tl_defense.ensemble.plan import plan_execution
from keras_tl_defense.graph import ModelGraph


class MemberBodies:
    """The layers from a model's input to a tensor: compact as far as that pays, then masked.

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
        plan = plan_execution(graph, end, blocks, ratios)
        self._compact = None
        if plan.split is not None:
            self._compact = GroupedBody(graph, plan.split, blocks, plan.late, plan.masked)
        self._masked = MaskedBody(graph, end, blocks, plan.split)
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
        started = None if self._compact is None else self._compact(*given)
        return tf.reshape(self._masked(*given, started), (-1, self._width))
