"""Where a filter's or a connection's activation is read, and where its mask takes effect.

A filter's *block* is its convolution and the chain of batch normalisation, activation and dropout
layers that follow it with a single consumer. Its activation is read at the end of the block, and
there a pruned filter becomes exactly 0. `channel_sources` follows the channels from there, so that
no later offset revives a pruned one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any, Literal

import numpy as np
import tensorflow as tf

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
_ACTIVATIONS = (
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
    *_ACTIVATIONS,
    *_DEPTHWISE,
)
_NEW_CHANNELS = (*_CONVOLUTIONS, *_TRANSPOSED, _layers.Dense)
_SUMS = (_layers.Add, _layers.Subtract, _layers.Average)
_PRODUCTS = (_layers.Multiply,)
_CHAIN = (_layers.BatchNormalization, *_ACTIVATIONS, *_INACTIVE)


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

    @property
    def size(self) -> int:
        """How many filters or connections there are."""
        filters = self.kind == "filters"
        return self.units if filters else int(np.prod(self.step.layer.kernel.shape))

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

    Gates are left out, the layers of squeeze-and-excite blocks; see `find_gates`.

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
    gates = find_gates(graph, target)
    for step in steps:
        if step.name in gates:
            continue
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
        elif not dense and _softmax(step.layer):
            problem = (
                f"The convolution {step.name!r} ends in a softmax, in which every filter changes "
                f"the others. Leave it unpruned. Received: layer={step.name!r}"
            )
        if dense:
            blocks.append(_block(graph, step, "connections", step.inputs[0], problem))
        elif not isinstance(step.layer, _DEPTHWISE):
            blocks.append(
                _block(graph, step, "filters", _block_end(graph, step, set(numbers)), problem)
            )
    return blocks


def find_gates(graph: ModelGraph, before: int) -> dict[str, str]:
    """The layers between a tensor and what it is multiplied with, as in squeeze-and-excite.

    Args:
        graph: The model.
        before: Number of a tensor; only layers that it depends on are looked at.

    Returns:
        Names of convolutions and Dense layers, and for each the name of the product.
    """
    gates = {}
    for number in graph.ancestors(before):
        product = graph.steps[number]
        if not _is_product(product):
            continue
        depends = {t: set(graph.ancestors(t)) for t in product.inputs}
        for gate, base in permutations(product.inputs, 2):
            if not depends[base] < depends[gate]:
                continue
            waiting = [gate]
            while waiting:
                maker = graph.producer.get(waiting.pop())
                if maker is None or maker in depends[base]:
                    continue
                step = graph.steps[maker]
                if isinstance(step.layer, (*_NEW_CHANNELS, *_DEPTHWISE)):
                    gates[step.name] = product.name
                waiting.extend(step.inputs)
    return gates


def left_alone(graph: ModelGraph, before: int, pruned: Collection[str]) -> dict[str, str]:
    """Why convolutions and Dense layers are not pruned.

    Args:
        graph: The model.
        before: Number of a tensor; only layers that it depends on are looked at.
        pruned: Names of the layers that are pruned.

    Returns:
        Names of the others, each with a few words that say why.
    """
    gates = find_gates(graph, before)
    problems = {block.name: block.problem for block in find_blocks(graph, before)}
    found = {}
    for number in graph.ancestors(before):
        step = graph.steps[number]
        if step.name in pruned or not isinstance(step.layer, (*_NEW_CHANNELS, *_DEPTHWISE)):
            continue
        if step.name in gates:
            found[step.name] = f"a gate of {gates[step.name]!r}"
        elif isinstance(step.layer, _DEPTHWISE):
            found[step.name] = "depthwise: loses the channels that are pruned before it"
        elif isinstance(step.layer, _TRANSPOSED):
            found[step.name] = "a transposed convolution"
        else:
            found[step.name] = problems[step.name] or "no ratio"
    return found


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
        if tensor in ends or _may_revive(graph.steps[graph.producer[tensor]])
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
    alike = (*_ACTIVATIONS, *_INACTIVE, *_SPATIAL, _layers.Flatten, _layers.Concatenate)
    return isinstance(layer, alike) and not layer.weights


def treats_positions_alone(layer: Any) -> bool:
    """Whether a layer leaves a channel that is the same everywhere as it is."""
    return isinstance(layer, (*_INACTIVE, *_SPATIAL, _layers.Flatten, _layers.Reshape))


def _follow(graph: ModelGraph, step: Step, known: list[np.ndarray | None]) -> np.ndarray | None:
    """Sources of the channels that `step` returns, `None` where it makes new channels."""
    layer, source = step.layer, known[0]
    last = len(graph.shapes[step.outputs[0]]) - 1
    if isinstance(layer, _layers.Concatenate) and layer.axis in (-1, last):
        widths = [int(graph.shapes[t][-1] or 0) for t in step.inputs]
        return np.concatenate(
            [np.full(w, -1) if s is None else s for s, w in zip(known, widths, strict=True)]
        )
    if _is_product(step):
        return _product_sources(graph, step, known)
    if _is_sum(step) or isinstance(layer, _NEW_CHANNELS):
        return None
    if source is not None and not _softmax(layer) and not _normalises_positions(layer, last):
        if isinstance(layer, _DEPTHWISE):
            return np.repeat(source, layer.depth_multiplier)
        if isinstance(layer, _layers.Reshape) and graph.shapes[step.outputs[0]][-1] == len(source):
            return source
        if isinstance(layer, _layers.Flatten) and layer.data_format == "channels_last":
            return np.tile(source, int(graph.shapes[step.outputs[0]][-1] or 0) // len(source))
        apart = getattr(layer, "keeps_channels_apart", False)
        if apart or _may_revive(step) or isinstance(layer, _INACTIVE + _SPATIAL):
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


def _operator(step: Step) -> str:
    """What `+`, `*` and the like became in a model, as `"add"` or `"multiply"`; else `""`."""
    symbol = getattr(step.layer, "symbol", None)
    if isinstance(symbol, str):  # the legacy Keras, `__operators__.add` or `math.multiply`
        return symbol.split(".")[-1]
    return "" if isinstance(step.layer, _layers.Layer) else type(step.layer).__name__.lower()


def _is_sum(step: Step) -> bool:
    operator = _operator(step) in ("add", "subtract") and len(step.inputs) > 1
    return operator or isinstance(step.layer, _SUMS)


def _is_product(step: Step) -> bool:
    operator = _operator(step) == "multiply" and len(step.inputs) > 1
    return operator or isinstance(step.layer, _PRODUCTS)


def _may_revive(step: Step) -> bool:
    """Whether a step treats channels apart, and could make something else of one that is 0."""
    constant = _operator(step) in ("add", "subtract", "multiply") and len(step.inputs) == 1
    return constant or isinstance(step.layer, _REVIVING)


def _normalises_positions(layer: Any, last: int) -> bool:
    """Whether the layer is a batch normalisation along another axis than the last."""
    axes = layer.axis if isinstance(layer, _layers.BatchNormalization) else last
    return [axis % (last + 1) for axis in np.ravel(axes)] != [last]


def _softmax(layer: Any) -> bool:
    """Whether the layer ends in an activation that mixes channels, as a softmax does."""
    function = getattr(layer, "activation", None)
    return function is not None and _mixes(function)


@lru_cache(maxsize=256)
def _mixes(function: Any) -> bool:
    with tf.init_scope():
        one, other = (function(tf.constant([[0.0, value]])) for value in (0.0, 1.0))
        return bool(one[0, 0] != other[0, 0])
