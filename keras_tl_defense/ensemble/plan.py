"""Decide how far the frozen layers run compact, by what that costs and saves.

Compact execution gathers every kernel to the filters that a differentiator keeps, and pays where a
layer has many positions; masked execution computes all filters of all differentiators in one pass,
and pays where there are few positions, or few weights, unless a differentiator has many images at
once, which share its kernels. What each costs is estimated for one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keras_tl_defense.blocks import Block
from keras_tl_defense.channels import follow_channels, number_filters
from keras_tl_defense.ensemble.compact import can_gather, layer_weights
from keras_tl_defense.graph import ModelGraph, Step
from keras_tl_defense.layer_kinds import is_product, is_sum, treats_channels_alike

# Nanoseconds on two cores of a server, fitted to passes of five members of VGG16, ResNet50,
# MobileNet and MobileNetV2 at 96 and 224 pixels; only how they compare to each other matters.
_MULTIPLY_ADD = 0.012
_NUMBER = 0.2  # per number of a layer's output
_ROW_GATHERED = 0.3  # per number of a kernel, by its inputs
_COLUMN_GATHERED = 0.8  # per number of a kernel, or of an image's tensor, by its last axis
_CALL = 30_000  # per layer that runs compact
_LOOP = 200_000  # for a member, where anything runs compact
_WORTH = 0.8  # of the time, below which a second plan is worth its place in a graph


class Plan(NamedTuple):
    """How the frozen layers run.

    Attributes:
        split: Number of the tensor up to which they run compact; `None` where nothing does.
        late: Names of layers whose kernels are gathered by inputs only; their outputs are gathered
            in their place.
        masked: Names of pruned convolutions that keep all channels, those that are removed as 0.
    """

    split: int | None
    late: frozenset[str] = frozenset()
    masked: frozenset[str] = frozenset()


class _Cost(NamedTuple):
    compact: float
    masked: float
    late: bool


def plan_execution(
    graph: ModelGraph,
    end: int,
    blocks: Sequence[Block],
    ratios: Mapping[str, float],
    images: int = 1,
    instead_of: Plan | None = None,
) -> Plan:
    """Choose the cheapest way to run the layers before a tensor under the masks of members.

    Args:
        graph: The Student.
        end: Number of the tensor.
        blocks: The layers that are pruned.
        ratios: Their ratios, by name.
        images: How many a member has at once.
        instead_of: Another plan, which is the answer unless this one runs more compact and takes
            less than 0.8 of the time.
    """
    filters = [block for block in blocks if block.kind == "filters"]
    inside = set(graph.ancestors(end))
    masked = _summed(graph, inside, filters, _shares(graph, end, filters, ratios), images)
    share = _shares(graph, end, [b for b in filters if b.name not in masked], ratios)
    costs = {
        index: _first_cost(graph, step, share) if first else _cost(graph, step, share, images)
        for index, first in _changed(graph, end, blocks).items()
        for step in [graph.steps[index]]
    }
    totals: dict[int | None, float] = {None: sum(cost.masked for cost in costs.values())}
    for tensor in graph.bottlenecks(end):
        before = set(graph.ancestors(tensor))
        if not before.isdisjoint(costs):
            ways = (c.compact if index in before else c.masked for index, c in costs.items())
            totals[tensor] = _LOOP / images + sum(ways)
    split = min(totals, key=lambda tensor: totals[tensor])
    if instead_of is not None and totals[split] > _WORTH * totals[instead_of.split]:
        return instead_of
    late = frozenset(graph.steps[index].name for index, cost in costs.items() if cost.late)
    return Plan(split, late, masked)


def multiply_adds(graph: ModelGraph, step: Step) -> int:
    """Multiplications of a layer's kernels with the positions of one image."""
    kernels = [w.shape for w in getattr(step.layer, "weights", ()) if len(w.shape) > 1]
    positions = math.prod(size or 1 for size in graph.shapes[step.outputs[0]][1:-1])
    return sum(positions * math.prod(shape) for shape in kernels)


def _shares(
    graph: ModelGraph, end: int, filters: Sequence[Block], ratios: Mapping[str, float]
) -> dict[int, float]:
    """Share of each tensor's channels that stays, where some are removed."""
    numbers = number_filters(list(filters))
    starts = {b.step.outputs[0]: n for b, n in zip(filters, numbers, strict=True)}
    kept = np.concatenate([[1 - ratios[b.name]] * b.units for b in filters] + [np.ones(1)])
    return {
        tensor: float(kept[sources].mean())  # -1, a channel of no filter, is the last
        for tensor, sources in follow_channels(graph, starts, end).items()
    }


def _summed(
    graph: ModelGraph,
    inside: set[int],
    filters: Sequence[Block],
    share: Mapping[int, float],
    images: int,
) -> frozenset[str]:
    """Convolutions that only sums follow, where to gather outputs costs more than it saves."""
    found = []
    for block in filters:
        followers = [graph.steps[i] for i in graph.consumers[block.tensor] if i in inside]
        if not followers or not all(is_sum(step) for step in followers):
            continue
        numbers = graph.size(block.tensor)
        whole = _cost(graph, block.step, {**share, block.step.outputs[0]: 1.0}, images).compact
        narrow = _cost(graph, block.step, share, images).compact + numbers * _COLUMN_GATHERED
        if whole + numbers * _NUMBER < narrow:
            found.append(block.name)
    return frozenset(found)


def _changed(graph: ModelGraph, end: int, blocks: Sequence[Block]) -> dict[int, bool]:
    """Numbers of the steps that are not the Student's own: the pruned ones and what follows.

    The value tells where only the outputs differ from the Student's, whose pass is taken for them.
    """
    kinds = {block.name: block.kind for block in blocks}
    changed: set[int] = set()
    found = {}
    for index in graph.ancestors(end):
        step = graph.steps[index]
        follows = not changed.isdisjoint(step.inputs)
        if step.name in kinds or follows:
            changed.update(step.outputs)
            found[index] = not follows and kinds[step.name] == "filters"
    return found


def _first_cost(graph: ModelGraph, step: Step, share: Mapping[int, float]) -> _Cost:
    """Nanoseconds of taking a layer's outputs from the Student's pass, for one image."""
    numbers = graph.size(step.outputs[0])
    narrowed = numbers * _COLUMN_GATHERED if step.outputs[0] in share else 0.0
    return _Cost(narrowed, numbers * _NUMBER, late=False)


def _cost(graph: ModelGraph, step: Step, share: Mapping[int, float], images: int) -> _Cost:
    """Nanoseconds of a layer, for one image of so many that a member has at once."""
    output = step.outputs[0]
    inside, outside = share.get(step.inputs[0], 1.0), share.get(output, 1.0)
    numbers = graph.size(output)
    work = multiply_adds(graph, step) * _MULTIPLY_ADD
    masked = work + numbers * _NUMBER
    compact = _CALL / images + numbers * outside * _NUMBER
    if treats_channels_alike(step.layer) or is_product(step):
        return _Cost(compact, masked, late=False)
    if not can_gather(graph, step):
        widened = sum(graph.size(tensor) for tensor in step.inputs if tensor in share)
        return _Cost(_CALL / images + masked + widened * _COLUMN_GATHERED, masked, late=False)
    kernel = layer_weights(step).get(f"{step.name}/kernel")
    weights = 0 if kernel is None else inside * math.prod(kernel.variable.shape) / images
    compact += weights * _ROW_GATHERED
    if kernel is None or -1 not in kernel.channels or outside == 1:
        return _Cost(compact + work * inside, masked, late=False)
    early = work * inside * outside + weights * _COLUMN_GATHERED
    late = work * inside + numbers * _COLUMN_GATHERED
    return _Cost(compact + min(early, late), masked, late < early)
