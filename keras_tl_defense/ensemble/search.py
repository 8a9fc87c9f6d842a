"""Search the ratios of a Student's layers, and the layer that the heads read.

The search attacks the Student itself: it crafts mimicry examples on some of the training images,
fits heads on the others under the masks of a candidate, and asks how many of the examples would be
accepted at the retention asked for. A candidate is measured on the bodies of a few differentiators,
each under heads for all classes, so that one pass over the images tells about every class.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.attacks import MimicryAttack, plan_attacks
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble.bank import input_score
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.heads import fit_heads
from keras_tl_defense.ensemble.training import ClassImages, sample_classes
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.metrics import Auroc
from keras_tl_defense.pruning.blocks import Block, channel_sources, find_blocks
from keras_tl_defense.pruning.masks import filter_masks

_IMAGES = 1500  # about as many are searched on; at least eight of each class
_HELD_OUT = 0.12
_ATTACKS, _STEPS, _BUDGET = 128, 150, 0.02
_BODIES = 4
_FIRST = 0.85
_GRID = (0.0, 0.5, 0.7, 0.85, 0.92)
_RETENTIONS = (0.9, 0.95, 0.99)
_MOST_FEATURES = 16384
_MOST_LAYERS = 4  # that are tried for the heads
_GOAL = 0.1  # of crafted images accepted; more is a warning


class Found(NamedTuple):
    """What a search found.

    Attributes:
        ratios: The ratio of each pruned layer.
        head_layer: Name of the layer that the heads read.
        history: DataFrame with a row for each candidate: `step`, `head_layer`, `ratios`,
            `acceptance` (of crafted images that mislead the Student, in all crafted ones, at the
            retention asked for; of the attack that does best), `auroc`, `accuracy` (of the heads
            on clean images), `acceptance_at_0.9` and so on, `passes` (images passed through the
            Student so far, for each training image), and `chosen`.
    """

    ratios: dict[str, float]
    head_layer: str
    history: pd.DataFrame


def search_ratios(
    student: Any,
    cut: str,
    batches: Batches,
    preprocessing: Any,
    *,
    head_layer: str | None,
    retention: float,
    jitter: float,
    budget: int,
    seed: int | None,
    verbose: int | str,
) -> Found:
    """Find the ratios under which the fewest crafted images are accepted.

    First each layer alone that the heads may read, and each prunable layer on the way to it; then
    one layer's ratio after the other, the most telling first, as long as the budget lasts.

    Args:
        student: The Student.
        cut: Name of its last frozen layer.
        batches: Training images with labels.
        preprocessing: Callable from the images to what the Student takes, or `None`.
        head_layer: Name of the layer that the heads read; `None` searches it, too.
        retention: Share of honest images to keep.
        jitter: As for `DifferentiatorEnsemble`.
        budget: Images that may be passed through the Student to measure candidates, for each
            training image.
        seed: Decides samples, attacks and noise.
        verbose: 0 shows no progress bar.

    Raises:
        ValueError: A class has too few images, the Student answers too few rightly, or no layer
            can be pruned.
    """
    rng = np.random.default_rng(seed)
    classes = batches.classes or 0
    sample = sample_classes(batches, max(8, _IMAGES // classes), rng)
    trial = _Trial(student, cut, sample, preprocessing, retention, jitter, rng)
    layers = trial.head_tensors(head_layer)
    if not any(trial.names(tensor) for tensor in layers):
        raise ValueError(
            "No convolution before the layer that the heads read can be pruned, so nothing "
            "can be searched. Give `ratios` yourself, for example for Dense layers. "
            f"Received: ratios='auto', head_layer={trial.layer_name(layers[-1])!r}"
        )
    trial.craft(layers, rng, verbose)
    bar = keras.utils.Progbar(budget, verbose=0 if verbose == 0 else 1, unit_name="pass")
    search = _Search(trial, budget, bar)
    for tensor in layers:
        names = trial.names(tensor)
        if names:
            search.measure("head layer", tensor, {names[0]: _FIRST})
        search.measure("head layer", tensor, {})
    tensor = search.best().tensor
    names = trial.names(tensor)
    alone = {name: search.measure("sensitivity", tensor, {name: _FIRST}).loss for name in names}
    for name in sorted(names, key=lambda name: (alone[name], names.index(name))):
        for ratio in _GRID:
            start = search.best(tensor).ratios
            changed = {**start, name: ratio}
            search.measure("step", tensor, {k: v for k, v in changed.items() if v})
    best = search.best(tensor)
    _warn(best, trial, retention)
    bar.update(budget, finalize=True)
    return Found(best.ratios, trial.layer_name(tensor), search.history(best))


class _Candidate(NamedTuple):
    step: str
    tensor: int
    ratios: dict[str, float]
    acceptance: float
    auroc: float
    accuracy: float
    at: tuple[float, ...]
    passes: float

    @property
    def loss(self) -> tuple[float, float]:
        """What is made small: acceptance, averaged as it comes from few images; overlap."""
        return (float(np.mean([self.acceptance, *self.at[:2]])), -self.auroc)


class _Search:
    """The candidates measured so far, within a budget of passes."""

    def __init__(self, trial: _Trial, budget: int, bar: Any) -> None:
        self._trial, self._budget, self._bar = trial, budget, bar
        self._found: dict[tuple[Any, ...], _Candidate] = {}

    def measure(self, step: str, tensor: int, ratios: dict[str, float]) -> _Candidate:
        """Measure a candidate, unless it was measured before or the budget is used up."""
        key = (tensor, *sorted(ratios.items()))
        if key not in self._found:
            spent = max((c.passes for c in self._found.values()), default=0.0)
            cost = self._trial.cost
            if self._found and spent + cost > self._budget:
                return _Candidate(step, tensor, ratios, np.inf, 0.0, 0.0, (np.inf,) * 3, spent)
            acceptance, auroc, accuracy, at = self._trial.measure(tensor, ratios)
            self._found[key] = _Candidate(
                step, tensor, ratios, acceptance, auroc, accuracy, at, spent + cost
            )
            self._bar.update(min(self._budget, round(spent + cost)))
        return self._found[key]

    def best(self, tensor: int | None = None) -> _Candidate:
        """The candidate with the lowest loss; some layer must be pruned if any can be."""
        chosen = [c for c in self._found.values() if tensor in (None, c.tensor)]
        return min(chosen, key=lambda c: (not c.ratios, *c.loss))

    def history(self, best: _Candidate) -> pd.DataFrame:
        """A row for each candidate, in the order in which they were measured."""
        rows = [
            {
                "step": c.step,
                "head_layer": self._trial.layer_name(c.tensor),
                "ratios": dict(c.ratios),
                "acceptance": c.acceptance,
                "auroc": c.auroc,
                "accuracy": c.accuracy,
                **{f"acceptance_at_{r:g}": a for r, a in zip(_RETENTIONS, c.at, strict=True)},
                "passes": c.passes,
                "chosen": c is best,
            }
            for c in self._found.values()
        ]
        return pd.DataFrame(rows)


class _Trial:
    """The images and attacks on which candidates are measured, and how that is done."""

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
        self._retention, self._jitter = retention, jitter
        self._images, self._seen = sample.images, sample.seen
        self._labels = np.repeat(np.arange(len(sample.counts)), sample.counts)
        self._held_out = _hold_out(sample.counts, rng)
        pairs = np.stack(np.triu_indices(len(sample.counts), 1), axis=1)
        self._pairs = rng.permutation(pairs)[:_BODIES]
        self._noise_seed = int(rng.integers(2**63))
        self._blocks = {block.name: block for block in _prunable(graph, self._cut)}
        self._attacks: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._honest = self._answered_held_out()
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

    def head_tensors(self, head_layer: str | None) -> list[int]:
        """The tensors that the heads may read: the one named, or the cut and some before it."""
        if head_layer is not None:
            return [self._graph.layer_output(head_layer)]
        shapes = self._graph.shapes
        smallest: dict[Any, int] = {}
        for tensor in self._graph.bottlenecks(self._cut):
            size = tf.TensorShape(shapes[tensor][1:]).num_elements()
            if size is None or size > _MOST_FEATURES or not self.names(tensor):
                continue
            place = shapes[tensor][1:-1] or size
            known = smallest.get(place)
            if known is None or size <= (tf.TensorShape(shapes[known][1:]).num_elements() or 0):
                smallest[place] = tensor
        chosen = [t for t in sorted(smallest.values()) if not self._only_reshaped(t)]
        return [*chosen[: _MOST_LAYERS - 1], self._cut]

    def _only_reshaped(self, tensor: int) -> bool:
        """Whether the cut is this tensor, or holds the same numbers in another shape."""
        between = set(self._graph.ancestors(self._cut)) - set(self._graph.ancestors(tensor))
        kinds = (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Dropout)
        return all(isinstance(self._graph.steps[i].layer, kinds) for i in between)

    def craft(self, tensors: list[int], rng: np.random.Generator, verbose: int | str) -> None:
        """Craft mimicry examples at the cut and wherever the heads may read."""
        right = self._student_class(self._images) == self._labels
        numbers = np.flatnonzero(self._held_out & self._honest & right)
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

    def measure(
        self, tensor: int, ratios: dict[str, float]
    ) -> tuple[float, float, float, tuple[float, ...]]:
        """Acceptance, AUROC, accuracy of the heads, and acceptance at `_RETENTIONS`."""
        blocks = [self._blocks[name] for name in self.names(tensor) if ratios.get(name)]
        body = CompactBody(self._graph, tensor, blocks, self._preprocessing)
        loaded = body.load(self._images)
        loaded_attacks = [body.load(images) for images, _, _ in self._attacks]
        classes = np.arange(self._labels.max() + 1)
        fit = ~self._held_out
        weight = 1 / np.bincount(self._labels[fit])[self._labels[fit]]
        positive = self._labels[fit][:, None] == classes
        right = self._held_out & self._honest
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
            [_scores(left_out, known)[self._honest[fit]], _scores(held_out, honest)]
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

        at = tuple(accepted(retention) for retention in _RETENTIONS)
        separation = [Auroc.of(scores, v).auroc for v in crafted_scores if len(v)]
        acceptance = accepted(self._retention)
        return acceptance, min(separation, default=1.0), accuracy / len(self._pairs), at

    def _answered_held_out(self) -> np.ndarray:
        """Which images a Student that was not trained on them would answer rightly.

        The Student itself knows its training images by heart, the hard ones too. So these answers
        are those of linear heads at the cut, each image left out in turn.
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
    """The score of images, each body taken for a member and the first for the reference, too.

    Args:
        margins: Of each body, a float array of shape `(n, classes)`.
        answered: Int array of shape `(n,)`: the classes answered.
    """
    own = [np.take_along_axis(m, answered[:, None], axis=1)[:, 0] for m in margins]
    return np.asarray(input_score(np.stack(own, axis=1), margins[0], answered))


def _prunable(graph: ModelGraph, cut: int) -> list[Block]:
    """The convolutions before the cut that can be pruned; others are left alone."""
    found = []
    for block in find_blocks(graph, before=cut):
        if block.kind != "filters" or block.problem is not None:
            continue
        try:
            channel_sources(graph, [block], cut)
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


def _warn(best: _Candidate, trial: _Trial, retention: float) -> None:
    successes = trial.attack_success
    if successes < 0.1:
        warnings.warn(
            "The search's own attacks hardly succeed, so its ratios stand on little: "
            f"{successes:.0%} of {_ATTACKS} mislead the Student. Check the cut, or give `ratios` "
            "yourself.",
            stacklevel=4,
        )
    if best.acceptance > _GOAL:
        warnings.warn(
            f"No ratios were found that keep {retention:.0%} of the honest images and let no more "
            f"than {_GOAL:.0%} of the crafted ones pass. The best found let {best.acceptance:.0%} "
            "pass. Ask for a lower `retention`, or give more training images.",
            stacklevel=4,
        )
