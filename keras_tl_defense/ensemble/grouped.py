"""Run frozen layers for many differentiators, each for its own rows, without what it lost.

What comes before the first pruned layer is the Student's own and is not computed again. After it
each differentiator runs once for all its rows, with kernels gathered to the filters that it keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import tensorflow as tf

from keras_tl_defense.blocks import Block
from keras_tl_defense.ensemble.compact import CompactLayers, can_gather
from keras_tl_defense.ensemble.masked import ConnectionMask
from keras_tl_defense.graph import ModelGraph

_PARALLEL = 2  # differentiators at a time


class GroupedBody:
    """The layers from a model's input to a tensor, compact.

    Args:
        graph: The Student.
        end: Number of the tensor at which the layers end; each of them returns one tensor.
        blocks: The layers that are pruned; filters are numbered in this order, one block after the
            other. Those that do not come before the end do not matter.
        late, masked: Names of layers that run in another way; see `CompactLayers`.
    """

    def __init__(
        self,
        graph: ModelGraph,
        end: int,
        blocks: Sequence[Block],
        late: Collection[str] = (),
        masked: Collection[str] = (),
    ) -> None:
        self._end = end
        self._shape = graph.shapes[end]
        pruned = {block.name for block in blocks}
        dense = {block.name for block in blocks if block.kind == "connections"}
        changed: set[int] = set()
        self._first: list[int] = []  # tensors that are the Student's, less the filters
        steps = []
        for index in graph.ancestors(end):
            step = graph.steps[index]
            if not changed.isdisjoint(step.inputs) or step.name in dense:
                steps.append(step)
            elif step.name in pruned:
                self._first.append(step.outputs[0])
            else:
                continue
            changed.update(step.outputs)
        self._connections = [step.name for step in steps if step.name in dense]
        needed = {end, *(tensor for step in steps for tensor in step.inputs)}
        self._shared = sorted(needed - changed)
        self._layers = CompactLayers(
            graph,
            steps,
            end,
            [block for block in blocks if block.kind == "filters"],
            gathered=lambda step: step.name in dense or can_gather(graph, step),
            late=late,
            masked=masked,
        )

    def __call__(
        self,
        values: dict[int, tf.Tensor],
        rows: tf.Tensor,
        members: tf.Tensor,
        filter_masks: tf.Tensor,
        connection_mask: ConnectionMask,
    ) -> tf.Tensor:
        """The tensor at the end, with zeros where channels were removed.

        Args:
            values: The unmasked tensors of a pass over the images, from `ModelGraph.run`.
            rows: Int tensor of shape `(groups, n)`: for each row the number of its image.
            members: Int tensor of shape `(groups,)`: the differentiator of each group of rows.
            filter_masks: Boolean tensor of shape `(groups, filters)`, `True` to keep.
            connection_mask: The mask of a Dense layer's kernel for one differentiator.

        Returns:
            Float32 tensor of shape `(groups * n, …)`.
        """
        group = tf.repeat(tf.range(tf.size(members)), tf.shape(rows)[1])
        of = tf.gather(members, group)
        order = tf.argsort(of, stable=True)
        images, group = tf.gather(tf.reshape(rows, [-1]), order), tf.gather(group, order)
        unique, _, counts = tf.unique_with_counts(tf.gather(of, order))
        ends = tf.cumsum(counts)
        found = tf.TensorArray(
            tf.float32,
            size=tf.size(unique),
            infer_shape=False,
            element_shape=self._shape,
        )

        def one(number: tf.Tensor, found: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            start = ends[number] - counts[number]
            own, mask = images[start : ends[number]], filter_masks[group[start]]
            value = self._run(values, own, unique[number], mask, connection_mask)
            return number + 1, found.write(number, value)

        _, found = tf.while_loop(
            lambda number, _: number < tf.size(unique),
            one,
            (0, found),
            parallel_iterations=_PARALLEL,
        )
        return tf.gather(found.concat(), tf.math.invert_permutation(order))

    def _run(
        self,
        values: dict[int, tf.Tensor],
        images: tf.Tensor,
        member: tf.Tensor,
        mask: tf.Tensor,
        connection_mask: ConnectionMask,
    ) -> tf.Tensor:
        """The tensor at the end for some images, under the masks of one differentiator."""
        channels = self._layers.keep_masked(mask)
        start = {t: tf.gather(values[t], images) for t in [*self._first, *self._shared]}
        start |= {t: channels.narrow(start[t], t) for t in self._first}
        connections = {name: connection_mask(name, member) for name in self._connections}
        return tf.ensure_shape(self._layers.frozen_end(start, channels, connections), self._shape)
