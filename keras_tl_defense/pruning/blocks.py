"""Where a filter's or a connection's activation is read, and where its mask takes effect.

A filter's *block* is its convolution and the chain of batch normalisation, activation and dropout
layers that follow it with a single consumer. Its activation is read at the end of the block, and
there a pruned filter becomes exactly 0. `channel_sources` follows the channels from there, so that
no later offset revives a pruned one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense.graph import ModelGraph, Step

_layers = keras.layers
_CONVOLUTIONS = (
    _layers.Conv1D,
    _layers.Conv2D,
    _layers.SeparableConv1D,
    _layers.SeparableConv2D,
)
_DEPTHWISE = (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
_TRANSPOSED = (_layers.Conv1DTranspose, _layers.Conv2DTranspose)
ACTIVATIONS = (
    _layers.Activation,
    _layers.ReLU,
    _layers.LeakyReLU,
    _layers.PReLU,
    _layers.ELU,
)
_INACTIVE = (
    _layers.Dropout,
    _layers.SpatialDropout1D,
    _layers.SpatialDropout2D,
    _layers.GaussianDropout,
    _layers.GaussianNoise,
    _layers.AlphaDropout,
    _layers.ActivityRegularization,
    _layers.Identity,
)
_SPATIAL = (
    _layers.MaxPooling1D,
    _layers.MaxPooling2D,
    _layers.AveragePooling1D,
    _layers.AveragePooling2D,
    _layers.GlobalMaxPooling1D,
    _layers.GlobalMaxPooling2D,
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
)
_REVIVING = (
    _layers.BatchNormalization,
    _layers.Rescaling,
    _layers.Normalization,
    *ACTIVATIONS,
    *_DEPTHWISE,
)
_NEW_CHANNELS = (*_CONVOLUTIONS, *_TRANSPOSED, _layers.Dense)
_SUMS = (_layers.Add, _layers.Subtract, _layers.Average)
_CHAIN = (_layers.BatchNormalization, *ACTIVATIONS, *_INACTIVE)


@dataclass(frozen=True)
class Block:
    """A prunable layer.

    Attributes:
        name: Name of the layer.
        step: The layer's call.
        kind: `"filters"` are pruned whole, `"connections"` of a Dense layer singly.
        tensor: Number of the tensor whose units' activations are scored: the end of the block for
            filters, the layer's input for connections.
        units: Number of those units.
        problem: Why the layer cannot be pruned, or `None`.
    """

    name: str
    step: Step
    kind: Literal["filters", "connections"]
    tensor: int
    units: int
    problem: str | None

    def checked(self) -> Block:
        """The block itself.

        Raises:
            ValueError: It cannot be pruned; the message names the layer and says why.
        """
        if self.problem is not None:
            raise ValueError(self.problem)
        return self


def find_blocks(graph: ModelGraph, before: int | None = None) -> list[Block]:
    """The prunable layers of a model, in the order in which they run.

    Args:
        graph: The model.
        before: Number of a tensor; only layers that it depends on are returned. Defaults to the
            model's output.
    """
    target = graph.output if before is None else before
    numbers = graph.ancestors(target)
    steps = [graph.steps[i] for i in numbers]
    uses: dict[int, int] = {}
    for step in steps:
        uses[id(step.layer)] = uses.get(id(step.layer), 0) + 1
    blocks = []
    for step in steps:
        dense = isinstance(step.layer, _layers.Dense)
        convolution = isinstance(step.layer, _CONVOLUTIONS + _DEPTHWISE) and not isinstance(
            step.layer, _TRANSPOSED
        )
        if not (dense or convolution):
            continue
        problem = None
        if uses[id(step.layer)] > 1:
            problem = (
                f"The layer {step.layer.name!r} is used {uses[id(step.layer)]} times in the "
                f"{graph.role}, and one mask cannot serve every place. Leave it unpruned, or use a "
                f"layer of its own in each. Received: layer={step.name!r}"
            )
        elif getattr(step.layer, "data_format", "channels_last") != "channels_last":
            problem = (
                f"The layer {step.name!r} has its channels first. Build the {graph.role} with "
                f"`data_format='channels_last'`. Received: data_format={step.layer.data_format!r}"
            )
        if dense:
            blocks.append(_block(graph, step, "connections", step.inputs[0], problem))
        elif not isinstance(step.layer, _DEPTHWISE):
            blocks.append(
                _block(graph, step, "filters", _block_end(graph, step, set(numbers)), problem)
            )
    return blocks


def _block(
    graph: ModelGraph,
    step: Step,
    kind: Literal["filters", "connections"],
    tensor: int,
    problem: str | None,
) -> Block:
    units = graph.shapes[tensor][-1]
    assert units is not None, "Keras builds kernels for known sizes only"
    return Block(step.name, step, kind, tensor, units, problem)


def _block_end(graph: ModelGraph, step: Step, inside: set[int]) -> int:
    """Number of the last tensor of the block, within the steps `inside`."""
    tensor = step.outputs[0]
    while len(graph.consumers[tensor]) == 1 and graph.consumers[tensor][0] in inside:
        follower = graph.steps[graph.consumers[tensor][0]]
        if not isinstance(follower.layer, _CHAIN) or _softmax(follower.layer):
            break
        tensor = follower.outputs[0]
    return tensor


def channel_sources(graph: ModelGraph, blocks: list[Block], cut: int) -> dict[int, np.ndarray]:
    """Which tensors must be masked, and by which filter each of their channels.

    The filters of `blocks` are numbered one block after the other. Besides the end of each block,
    a channel is masked again wherever an offset could revive it: after a batch normalisation, an
    activation or a depthwise convolution, through pooling, padding, flattening and concatenation.

    Args:
        graph: The model.
        blocks: Blocks of kind `"filters"`.
        cut: Number of the tensor up to which channels are followed.

    Returns:
        For each tensor to be masked, an int array of shape `(channels,)`: the filter's number, or
        `-1` for a channel that no block owns.

    Raises:
        ValueError: A pruned channel meets a layer after which it is not known what "removed" means
            (a normalisation over channels, a product, a layer that this library does not know).
    """
    ends = {
        block.tensor: numbers for block, numbers in zip(blocks, number_filters(blocks), strict=True)
    }
    return {
        tensor: source
        for tensor, source in follow_channels(graph, ends, cut).items()
        if tensor in ends or isinstance(graph.steps[graph.producer[tensor]].layer, _REVIVING)
    }


def number_filters(blocks: list[Block]) -> list[np.ndarray]:
    """The numbers of each block's filters, counted through all blocks."""
    ends = np.cumsum([block.units for block in blocks])
    return [np.arange(end - block.units, end) for block, end in zip(blocks, ends, strict=True)]


def follow_channels(
    graph: ModelGraph, starts: dict[int, np.ndarray], end: int
) -> dict[int, np.ndarray]:
    """The filter to which each channel of every tensor belongs.

    Args:
        graph: The model.
        starts: For each tensor with channels to be followed, an int array of shape `(channels,)`:
            the filters' numbers.
        end: Number of the tensor up to which channels are followed.

    Returns:
        For each tensor with such channels, `starts` among them, an int array of shape
        `(channels,)`: the filter's number, or `-1` for a channel of no filter in `starts`.

    Raises:
        ValueError: It is not known what becomes of a channel; see `channel_sources`.
    """
    sources: dict[int, np.ndarray] = {}
    for index in graph.ancestors(end):
        step = graph.steps[index]
        tensor = step.outputs[0]
        known = [sources.get(t) for t in step.inputs]
        if tensor in starts:
            sources[tensor] = starts[tensor]
        elif any(source is not None for source in known):
            followed = _follow(graph, step, known)
            if followed is not None:
                sources[tensor] = followed
    return sources


def treats_channels_alike(layer: Any) -> bool:
    """Whether the layer does to some of a tensor's channels what it does to all of them."""
    alike = (*ACTIVATIONS, *_INACTIVE, *_SPATIAL, _layers.Flatten, _layers.Concatenate)
    return isinstance(layer, alike) and not layer.weights


def _follow(graph: ModelGraph, step: Step, known: list[np.ndarray | None]) -> np.ndarray | None:
    """Sources of the channels that `step` returns, `None` where it makes new channels."""
    layer, source = step.layer, known[0]
    last = len(graph.shapes[step.outputs[0]]) - 1
    if isinstance(layer, _layers.Concatenate) and layer.axis in (-1, last):
        widths = [int(graph.shapes[t][-1] or 0) for t in step.inputs]
        return np.concatenate(
            [np.full(w, -1) if s is None else s for s, w in zip(known, widths, strict=True)]
        )
    if isinstance(layer, _SUMS) or (isinstance(layer, _NEW_CHANNELS) and not _softmax(layer)):
        return None
    if source is not None and not _softmax(layer):
        if isinstance(layer, _DEPTHWISE):
            return np.repeat(source, layer.depth_multiplier)
        if isinstance(layer, _layers.Reshape) and graph.shapes[step.outputs[0]][-1] == len(source):
            return source
        if isinstance(layer, _layers.Flatten):
            return np.tile(source, int(graph.shapes[step.outputs[0]][-1] or 0) // len(source))
        if isinstance(layer, _REVIVING + _INACTIVE + _SPATIAL):
            return source
    raise ValueError(
        f"The layer {step.name!r} ({type(layer).__name__}) comes after a pruned convolution, and "
        "it is not known what becomes of a removed channel there. Give ratios that leave the "
        "convolutions before it alone, or use layers whose channels stay apart (pooling, padding, "
        "activations, batch normalisation, depthwise convolutions, Flatten, Concatenate, Add). "
        f"Received: layer={step.name!r}"
    )


def _softmax(layer: Any) -> bool:
    """Whether the layer ends in a softmax, which mixes channels."""
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return name in ("softmax", "log_softmax")
