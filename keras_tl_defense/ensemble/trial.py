"""Measure what ratios are worth: attacks on the Student, and heads that shall reject them.

A candidate is measured on the bodies of a few differentiators, each under heads for all classes, so
that one pass over the images tells about every class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.attacks import MimicryAttack, plan_attacks
from keras_tl_defense.blocks import Block, find_blocks
from keras_tl_defense.channels import channel_sources
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.heads import fit_heads
from keras_tl_defense.ensemble.score import input_score
from keras_tl_defense.ensemble.training import ClassImages
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.metrics import Auroc
from keras_tl_defense.pruning.masks import filter_masks

_ATTACKS = 128  # images that are crafted at each layer
_HELD_OUT = 0.12
_STEPS, _BUDGET = 150, 0.02
_BODIES = 4
_MOST_FEATURES = 16384
_MOST_LAYERS = 4  # that are tried for the heads


class Measured(NamedTuple):
    """What a candidate is worth.

    Attributes:
        acceptance: Crafted images that mislead the Student and are accepted, in all crafted ones;
            of the attack that does best; at each of `Trial.retentions`.
        auroc: Of the attack that is told from honest images worst.
        accuracy: Of the heads, on clean held-out images.
    """

    acceptance: tuple[float, ...]
    auroc: float
    accuracy: float


class Trial:
    """The images and attacks on which candidates are measured, and how that is done.

    Args:
        student: The Student.
        cut: Name of its last frozen layer.
        sample: Training images.
        preprocessing: Callable from the images to what the Student takes, or `None`.
        retention: Share of honest images to keep.
        jitter: As for `DifferentiatorEnsemble`.
        rng: Decides what is held out, attacked and pruned.

    Attributes:
        retentions: The one asked for, and those where twice and half as many honest images are
            lost, in ascending order.
        cost: Images that measuring a candidate passes through the Student, for each training image;
            0 before `craft`.
    """

    def __init__(
        self,
        student: Any,
        cut: str,
        sample: ClassImages,
        preprocessing: Any,
        retention: float,
        jitter: float,
        rng: np.random.Generator,
    ) -> None:
        self._student, self._preprocessing = student, preprocessing
        self._graph = graph = ModelGraph(student, "student")
        self._cut = graph.layer_output(cut)
        self._jitter = jitter
        lost = 1 - retention
        self.retentions = (1 - min(2 * lost, (1 + lost) / 2), retention, 1 - lost / 2)
        self._images, self._seen = sample.images, sample.seen
        self._labels = np.repeat(np.arange(len(sample.counts)), sample.counts)
        self._held_out = _hold_out(sample.counts, rng)
        pairs = np.stack(np.triu_indices(len(sample.counts), 1), axis=1)
        self._pairs = rng.permutation(pairs)[:_BODIES]
        self._noise_seed = int(rng.integers(2**63))
        self._blocks = {block.name: block for block in _prunable(graph, self._cut)}
        self._attacks: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._answerable = self._answered_held_out()
        self._activations = ClassActivations(student, list(self._blocks), cut=cut)
        batches = Batches(
            self._images,
            self._labels,
            shape=graph.input_shape,
            classes=len(sample.counts),
            batch_size=32,
            pixels=True,
        )
        self._activations.adapt_batches(batches, preprocessing=preprocessing, verbose=0)
        self.cost = 0.0

    def layer_name(self, tensor: int) -> str:
        """Name of the layer that returns a tensor."""
        return self._graph.steps[self._graph.producer[tensor]].name

    def names(self, tensor: int) -> list[str]:
        """The prunable layers before a tensor."""
        before = {b.name for b in find_blocks(self._graph, before=tensor)}
        return [name for name in self._blocks if name in before]

    def head_tensors(self, most_features: int) -> list[int]:
        """The tensors that the heads may read: the cut and some before it.

        Args:
            most_features: Larger tensors are left out.
        """
        smallest: dict[Any, int] = {}
        for tensor in self._graph.bottlenecks(self._cut):
            size = self.size(tensor)
            if size > min(_MOST_FEATURES, most_features) or not self.names(tensor):
                continue
            place = self._graph.shapes[tensor][1:-1] or size
            if place not in smallest or size <= self.size(smallest[place]):
                smallest[place] = tensor
        chosen = [t for t in sorted(smallest.values()) if not self._only_reshaped(t)]
        cut = [self._cut] if self.size(self._cut) <= most_features else []
        return [*chosen[: _MOST_LAYERS - 1], *cut]

    def size(self, tensor: int) -> int:
        """Numbers in a tensor, of one image."""
        return int(tf.TensorShape(self._graph.shapes[tensor][1:]).num_elements() or 0)

    def _only_reshaped(self, tensor: int) -> bool:
        """Whether the cut is this tensor, or holds the same numbers in another shape."""
        between = set(self._graph.ancestors(self._cut)) - set(self._graph.ancestors(tensor))
        kinds = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Dropout)
        return all(isinstance(self._graph.steps[i].layer, kinds) for i in between)

    def craft(self, tensors: list[int], rng: np.random.Generator, verbose: int | str) -> None:
        """Craft mimicry examples at the cut and wherever the heads may read."""
        right = self._student_class(self._images) == self._labels
        numbers = np.flatnonzero(self._held_out & self._answerable & right)
        if len(np.unique(self._labels[numbers])) < 2:
            raise ValueError(
                "The search needs training images of at least two classes that the Student answers "
                "rightly. Train the Student first, or check `preprocessing`. "
                f"Received: {len(numbers)} such images"
            )
        labels = self._labels[numbers]
        plan = plan_attacks(labels, labels, _ATTACKS, seed=int(rng.integers(2**31)))
        source, target = numbers[plan.sources], numbers[plan.targets]
        for tensor in dict.fromkeys([*tensors, self._cut]):
            attack = MimicryAttack(
                self._student,
                self.layer_name(tensor),
                budget=_BUDGET,
                steps=_STEPS,
                preprocessing=self._preprocessing,
            )
            result = attack(self._images[source], self._images[target], verbose=verbose)
            classes = self._student_class(result.adversarial)
            misled = result.within_budget & (classes != self._labels[source])
            self._attacks.append((result.adversarial[misled], classes[misled], len(misled)))
        crafted = sum(len(images) for images, _, _ in self._attacks)
        self.cost = len(self._pairs) * (len(self._images) + crafted) / self._seen

    @property
    def attack_success(self) -> float:
        """Share of the crafted images that mislead the Student, of the attack that does best."""
        return max(len(images) / count for images, _, count in self._attacks)

    def measure(self, tensor: int, ratios: dict[str, float]) -> Measured:
        """Fit heads under the masks of these ratios and see which crafted images they accept."""
        blocks = [self._blocks[name] for name in self.names(tensor) if ratios.get(name)]
        body = CompactBody(self._graph, tensor, blocks, self._preprocessing)
        loaded = body.load(self._images)
        loaded_attacks = [body.load(images) for images, _, _ in self._attacks]
        classes = np.arange(self._labels.max() + 1)
        fit = ~self._held_out
        weight = 1 / np.bincount(self._labels[fit])[self._labels[fit]]
        positive = self._labels[fit][:, None] == classes
        right = self._held_out & self._answerable
        known, honest = self._labels[fit], self._labels[right]
        accuracy = 0.0
        # Of each body, the margins of the images that heads are fitted on, held out, and crafted.
        left_out: list[np.ndarray] = []
        held_out: list[np.ndarray] = []
        crafted: list[list[np.ndarray]] = [[] for _ in self._attacks]
        for number, pair in enumerate(self._pairs):
            mask = self._masks(blocks, ratios, pair, number)
            features = body(loaded, mask)
            heads = fit_heads(features[None, fit], positive[None], weight[None])
            kernel, bias = heads.kernel[0].T, heads.bias[0]
            left_out.append(heads.margins[0])
            held_out.append(features[right] @ kernel + bias)
            accuracy += float(np.mean(held_out[-1].argmax(axis=1) == honest))
            for margins, images in zip(crafted, loaded_attacks, strict=True):
                if len(images):
                    margins.append(body(images, mask) @ kernel + bias)
        scores = np.concatenate(
            [_scores(left_out, known)[self._answerable[fit]], _scores(held_out, honest)]
        )
        crafted_scores = [
            _scores(margins, answered) if margins else np.zeros(0, np.float32)
            for margins, (_, answered, _) in zip(crafted, self._attacks, strict=True)
        ]

        def accepted(retention: float) -> float:
            threshold = np.quantile(scores, 1 - retention, method="lower")
            return max(
                float(np.sum(values >= threshold)) / count
                for values, (_, _, count) in zip(crafted_scores, self._attacks, strict=True)
            )

        separation = [Auroc.of(scores, v).auroc for v in crafted_scores if len(v)]
        return Measured(
            tuple(accepted(retention) for retention in self.retentions),
            min(separation, default=1.0),
            accuracy / len(self._pairs),
        )

    def _answered_held_out(self) -> np.ndarray:
        """Which images a Student that was not trained on them would answer rightly.

        The Student itself knows its training images by heart, the hard ones too. So these answers
        are those of linear heads at the cut, each image left out in turn. Of images that come in
        nearly equal ones, as the frames of a film, that is too good.
        """
        features = self._unpruned(self._cut, self._images)
        positive = self._labels[:, None] == np.arange(self._labels.max() + 1)
        weight = 1 / positive.sum(axis=0)[self._labels]
        margins = fit_heads(features[None], positive[None], weight[None]).margins[0]
        return np.asarray(margins.argmax(axis=1) == self._labels)

    def _masks(
        self, blocks: list[Block], ratios: dict[str, float], pair: np.ndarray, number: int
    ) -> np.ndarray:
        masks = []
        for block in blocks:
            position = list(self._blocks).index(block.name)
            rng = np.random.default_rng([self._noise_seed, number, position])
            scores = self._activations[block.name][pair].max(axis=0)
            noisy = scores * np.exp(self._jitter * rng.normal(size=len(scores)))
            masks.append(filter_masks(noisy[None], ratios[block.name])[0])
        return np.concatenate(masks) if masks else np.zeros(0, bool)

    def _student_class(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self._unpruned(self._graph.output, images).argmax(axis=1))

    def _unpruned(self, tensor: int, images: np.ndarray) -> np.ndarray:
        body = CompactBody(self._graph, tensor, [], self._preprocessing)
        return body(body.load(images), np.zeros(0, bool))


def _scores(margins: list[np.ndarray], answered: np.ndarray) -> np.ndarray:
    """The score of images, each body taken for a member and for a reference, too.

    Args:
        margins: Of each body, a float array of shape `(n, classes)`.
        answered: Int array of shape `(n,)`: the classes answered.
    """
    own = [np.take_along_axis(m, answered[:, None], axis=1)[:, 0] for m in margins]
    return np.asarray(input_score(np.stack(own, axis=1), np.mean(margins, axis=0), answered))


def _prunable(graph: ModelGraph, cut: int) -> list[Block]:
    """The convolutions before the cut that can be pruned; others are left alone."""
    found: list[Block] = []
    for block in find_blocks(graph, before=cut):
        if block.kind != "filters" or block.problem is not None:
            continue
        try:
            channel_sources(graph, [*found, block], cut)
        except ValueError:
            continue
        found.append(block)
    return found


def _hold_out(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Which images heads are not fitted on: an eighth of each class, at least one."""
    if counts.min() < 3:
        few = np.flatnonzero(counts < 3)
        raise ValueError(
            "To search ratios, at least 3 images of every class are needed: some to fit heads on, "
            "some to attack. Give more, or give `ratios` yourself, as {'conv1*': 0.85}. "
            f"Received: fewer than 3 images of class {', '.join(map(str, few))}"
        )
    held_out = np.zeros(counts.sum(), bool)
    for start, count in zip(np.cumsum(counts) - counts, counts, strict=True):
        chosen = rng.permutation(count)[: max(1, round(_HELD_OUT * count))]
        held_out[start + chosen] = True
    return held_out
