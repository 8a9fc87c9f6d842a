"""Run a frozen body under the masks of many differentiators at once.

One batched pass: every row is an image under the masks of one differentiator. What comes before the
first mask is the same for all of them and is computed once per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tensorflow as tf

from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import channel_sources
from keras_tl_defense.graph import ModelGraph, Step

ConnectionMask = Callable[[str, tf.Tensor], tf.Tensor]
"""Maps a Dense layer's name and a member's number to the kernel's mask, `(inputs, units)`."""


class MaskedBody:
    """The layers from a model's input to a tensor, with filters and connections masked per row.

    Args:
        graph: The Student.
        end: Number of the tensor at which they end; each of them returns one tensor.
        blocks: The layers that are pruned; filters are numbered in this order, one block after the
            other.
        start: Number of a tensor that everything passes through, of which each row has its own;
            the layers begin there.
    """

    def __init__(
        self, graph: ModelGraph, end: int, blocks: Sequence[Block], start: int | None = None
    ) -> None:
        self._graph = graph
        self._start, self._end = start, end
        done = set() if start is None else set(graph.ancestors(start))
        self._steps = [graph.steps[index] for index in graph.ancestors(end) if index not in done]
        filters = [block for block in blocks if block.kind == "filters"]
        self._sources = channel_sources(graph, filters, end)
        self._connections = {block.name for block in blocks if block.kind == "connections"}

    def __call__(
        self,
        values: dict[int, tf.Tensor],
        rows: tf.Tensor,
        members: tf.Tensor,
        filter_masks: tf.Tensor,
        connection_mask: ConnectionMask,
        started: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """The tensor at the end.

        Args:
            values: The unmasked tensors of a pass over the images, from `ModelGraph.run`.
            rows: Int tensor of shape `(groups, n)`: for each row the number of its image.
            members: Int tensor of shape `(groups,)`: the differentiator of each group of rows.
            filter_masks: Boolean tensor of shape `(groups, filters)`, `True` to keep.
            connection_mask: The mask of a Dense layer's kernel for one differentiator.
            started: Where the layers begin at a tensor, that tensor of each row.

        Returns:
            Float tensor of shape `(groups * n, …)`.
        """
        flat_rows = tf.reshape(rows, [-1])
        per_group = tf.shape(rows)[1]
        owned = tf.cast(filter_masks, tf.float32)
        owned = tf.concat([owned, tf.ones_like(owned[:, :1])], axis=1)
        masked = {} if self._start is None else {self._start: started}

        def value(tensor: int) -> tf.Tensor:
            if tensor not in masked:
                masked[tensor] = tf.gather(values[tensor], flat_rows)
            return masked[tensor]

        for step in self._steps:
            (tensor,) = step.outputs
            if step.name in self._connections:
                masked[tensor] = _masked_dense(
                    step, value(step.inputs[0]), members, per_group, connection_mask
                )
            elif any(t in masked for t in step.inputs):
                (masked[tensor],) = step({t: value(t) for t in step.inputs})
            if tensor in self._sources:
                sources = self._sources[tensor]
                width = owned.shape[1] - 1
                mask = tf.gather(owned, [width if s < 0 else int(s) for s in sources], axis=1)
                mask = tf.repeat(mask, per_group, axis=0)
                rank = len(self._graph.shapes[tensor])
                shape = [tf.shape(mask)[0], *[1] * (rank - 2), mask.shape[1]]
                unmasked = value(tensor)
                masked[tensor] = unmasked * tf.reshape(tf.cast(mask, unmasked.dtype), shape)
        return value(self._end)


def _masked_dense(
    step: Step,
    x: tf.Tensor,
    members: tf.Tensor,
    per_group: tf.Tensor,
    connection_mask: ConnectionMask,
) -> tf.Tensor:
    layer = step.layer
    kernel = tf.convert_to_tensor(layer.kernel)
    shape = tf.shape(x)
    groups = tf.shape(members)[0]
    x = tf.reshape(x, tf.concat([[groups], [-1], [x.shape[-1]]], axis=0))

    def one_group(element: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        images, member = element
        mask = tf.cast(connection_mask(step.name, member), kernel.dtype)
        return tf.linalg.matmul(images, tf.cast(kernel * mask, x.dtype))

    out = tf.map_fn(one_group, (x, members), fn_output_signature=x.dtype, parallel_iterations=2)
    out = tf.reshape(out, tf.concat([shape[:-1], [kernel.shape[1]]], axis=0))
    if layer.use_bias:
        out = out + tf.cast(tf.convert_to_tensor(layer.bias), x.dtype)
    return layer.activation(out)
