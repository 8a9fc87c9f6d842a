"""Which filter each channel of a network's tensors belongs to.

Channels are followed from the end of their block, so that no later offset revives a pruned one.
"""

from __future__ import annotations

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense.blocks import Block
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import (
    DEPTHWISE,
    INACTIVE,
    NEW_CHANNELS,
    SPATIAL,
    is_product,
    is_softmax,
    is_sum,
    may_revive,
    normalises_positions,
)

_layers = keras.layers


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
    return masked_tensors(graph, ends, cut)


def masked_tensors(
    graph: ModelGraph, ends: dict[int, np.ndarray], cut: int
) -> dict[int, np.ndarray]:
    """What `channel_sources` returns, of filters whose blocks end at these tensors."""
    return {
        tensor: source
        for tensor, source in follow_channels(graph, ends, cut).items()
        if tensor in ends or may_revive(graph.steps[graph.producer[tensor]])
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


def _follow(graph: ModelGraph, step: Step, known: list[np.ndarray | None]) -> np.ndarray | None:
    """Sources of the channels that `step` returns, `None` where it makes new channels."""
    layer, source = step.layer, known[0]
    last = len(graph.shapes[step.outputs[0]]) - 1
    if isinstance(layer, _layers.Concatenate) and layer.axis in (-1, last):
        widths = [int(graph.shapes[t][-1] or 0) for t in step.inputs]
        return np.concatenate(
            [np.full(w, -1) if s is None else s for s, w in zip(known, widths, strict=True)]
        )
    if is_product(step):
        return _product_sources(graph, step, known)
    if is_sum(step) or isinstance(layer, NEW_CHANNELS):
        return None
    if source is not None and not is_softmax(layer) and not normalises_positions(layer, last):
        if isinstance(layer, DEPTHWISE):
            return np.repeat(source, layer.depth_multiplier)
        if isinstance(layer, _layers.Reshape) and graph.shapes[step.outputs[0]][-1] == len(source):
            return source
        if isinstance(layer, _layers.Flatten) and layer.data_format == "channels_last":
            return np.tile(source, int(graph.shapes[step.outputs[0]][-1] or 0) // len(source))
        apart = getattr(layer, "keeps_channels_apart", False)
        last_too = getattr(layer, "data_format", "channels_last") != "channels_first"
        if last_too and (apart or may_revive(step) or isinstance(layer, INACTIVE + SPATIAL)):
            return source
    raise ValueError(
        f"The layer {step.name!r} ({type(layer).__name__}) comes after a pruned convolution, and "
        "it is not known what becomes of a removed channel there. Leave the convolutions before it "
        "alone (with `ratios` by name, or the `layers` of `ClassActivations`), or use layers whose "
        "channels stay apart (pooling, padding, activations, batch normalisation, depthwise "
        "convolutions, Flatten, Concatenate, Add, Multiply). "
        f"Received: layer={step.name!r}"
    )


def _product_sources(graph: ModelGraph, step: Step, known: list[np.ndarray | None]) -> np.ndarray:
    """A channel of a product is gone where it is gone in one of the factors."""
    merged = np.full(int(graph.shapes[step.outputs[0]][-1] or 0), -1)
    for source in known:
        if source is None:
            continue
        if len(source) != len(merged) or np.any((merged >= 0) & (source >= 0) & (merged != source)):
            raise ValueError(
                f"The layer {step.name!r} multiplies channels of different pruned convolutions, "
                "and one filter cannot stand for both. Leave one of them alone, by name. "
                f"Received: layer={step.name!r}"
            )
        merged = np.where(source >= 0, source, merged)
    return merged
