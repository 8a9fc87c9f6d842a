"""The prunable layers of a model, and where their units' activations are read.

A filter's *block* is its convolution and the chain of batch normalisation, activation and dropout
layers that follow it with a single consumer. Its activation is read at the end of the block, and
there a pruned filter becomes exactly 0.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import (
    CHAIN,
    CONVOLUTIONS,
    DEPTHWISE,
    NEW_CHANNELS,
    TRANSPOSED,
    is_product,
    is_softmax,
)

_layers = keras.layers


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
        convolution = isinstance(step.layer, CONVOLUTIONS + DEPTHWISE) and not isinstance(
            step.layer, TRANSPOSED
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
        elif not dense and is_softmax(step.layer):
            problem = (
                f"The convolution {step.name!r} ends in a softmax, in which every filter changes "
                f"the others. Leave it unpruned. Received: layer={step.name!r}"
            )
        if dense:
            blocks.append(_block(graph, step, "connections", step.inputs[0], problem))
        elif not isinstance(step.layer, DEPTHWISE):
            blocks.append(
                _block(graph, step, "filters", block_end(graph, step, set(numbers)), problem)
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
        if not is_product(product):
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
                if isinstance(step.layer, (*NEW_CHANNELS, *DEPTHWISE)):
                    gates[step.name] = product.name
                waiting.extend(step.inputs)
    return gates


def left_alone(graph: ModelGraph, before: int, pruned: Collection[str]) -> dict[str, str]:
    """Why convolutions, Dense layers and others with kernels are not pruned.

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
        kernels = any(len(weight.shape) > 1 for weight in getattr(step.layer, "weights", ()))
        if step.name in pruned or not kernels or isinstance(step.layer, CHAIN):
            continue
        if step.name in gates:
            found[step.name] = f"a gate of {gates[step.name]!r}"
        elif isinstance(step.layer, DEPTHWISE):
            found[step.name] = "depthwise: loses the channels that are pruned before it"
        elif isinstance(step.layer, TRANSPOSED):
            found[step.name] = "a transposed convolution"
        elif step.name in problems:
            found[step.name] = problems[step.name] or "no ratio"
        else:
            found[step.name] = f"not prunable: {type(step.layer).__name__}"
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


def block_end(graph: ModelGraph, step: Step, inside: set[int] | None = None) -> int:
    """Number of the last tensor of a step's block.

    Args:
        graph: The model.
        step: A convolution or a Dense layer.
        inside: Numbers of the steps that count; `None` for all.
    """
    tensor = step.outputs[0]
    while len(graph.consumers[tensor]) == 1:
        if inside is not None and graph.consumers[tensor][0] not in inside:
            break
        follower = graph.steps[graph.consumers[tensor][0]]
        if not isinstance(follower.layer, CHAIN) or is_softmax(follower.layer):
            break
        tensor = follower.outputs[0]
    return tensor
