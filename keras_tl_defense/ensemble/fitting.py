"""Fit the differentiators of a bank: their own layers where they have them, then their heads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble.bank import DifferentiatorBank
from keras_tl_defense.ensemble.mask_bank import LEVELS
from keras_tl_defense.ensemble.top_training import TopTrainer, tune_tops
from keras_tl_defense.ensemble.tops import Arrays
from keras_tl_defense.ensemble.training import (
    ClassImages,
    HeadKind,
    members_at_once,
    train_heads,
    train_reference,
)

_FLOOR = 0.7  # held-out accuracy below which a differentiator takes gentler ratios
_TOPS_AT_ONCE = 8  # differentiators with layers of their own, which take seconds each

Result = dict[str, np.ndarray]


class FitSettings(NamedTuple):
    """What `DifferentiatorEnsemble.fit` was asked for.

    Attributes:
        seed: Decides, with its number, which images a differentiator sees, and their order.
        images_per_class: At most this many of each class for a differentiator.
        chunk_memory: Bytes for the heads that are fitted at once, about.
        optimizer: Configuration of a Keras optimizer, for layers of their own.
        iterations: As for `TopTrainer`.
        epochs: As for `TopTrainer`.
        batch_size: As for `TopTrainer`.
    """

    seed: int
    images_per_class: int
    chunk_memory: int
    optimizer: Any
    iterations: int
    epochs: int
    batch_size: int

    def identity(self) -> dict[str, Any]:
        """What must be the same for a fit to go on: all but the seed and Keras's own names."""
        optimizer = {**self.optimizer["config"], "name": self.optimizer["class_name"]}
        named = self._replace(optimizer=sorted(optimizer.items()))._asdict()
        del named["seed"]
        return named


class Task(NamedTuple):
    """Some bodies to be fitted.

    Attributes:
        level: Position in `LEVELS` of the differentiators; `None` for references.
        bodies: Int array of shape `(n,)`: their numbers.
    """

    level: int | None
    bodies: np.ndarray


RunTasks = Callable[[Sequence[Task]], Iterator[tuple[Task, Result]]]
"""Runs tasks, in any order, and gives each with its result."""


class Fitter:
    """Fits bodies of a bank. What it returns depends on nothing but the task.

    Args:
        bank: The differentiators, with their masks.
        sample: Training images; references take more of them than a differentiator.
        head: `"pair"` or `"one_vs_rest"`.
        preprocessing: Callable from the images to what the Student takes, or `None`.
        settings: What was asked for.

    Attributes:
        bank: As given.
        at_once: Differentiators of a task.
    """

    def __init__(
        self,
        bank: DifferentiatorBank,
        sample: ClassImages,
        head: HeadKind,
        preprocessing: Any,
        settings: FitSettings,
    ) -> None:
        self.bank, self._head, self._seed = bank, head, settings.seed
        self._body = bank.compact_body(preprocessing)
        self._sample = sample._replace(images=self._body.load(sample.images))
        self._own = self._sample.first(settings.images_per_class)
        size = bank.member_classes.shape[1]
        self.at_once = members_at_once(self._own, size, bank.features, settings.chunk_memory)
        self._trainer = None
        if bank.top is not None:
            self.at_once = min(self.at_once, _TOPS_AT_ONCE)
            self._trainer = TopTrainer(
                bank.top,
                settings.optimizer,
                outputs=bank.heads.count,
                iterations=settings.iterations,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
            )
            self._top = tf.function(self._top_features, reduce_retracing=True)

    def __call__(self, task: Task) -> Result:
        """Fit the bodies of a task.

        Returns:
            Arrays with the bodies as first dimension: `kernel` and `bias`; of differentiators also
            `accuracy` and `loss`, as in `FittedHeads`, and, where they have layers of their own,
            `weights …` and `kept …` by the names that `tune_tops` gives.
        """
        if task.level is None:
            width = self.bank.reference_heads.features
            found = [
                train_reference(self._body_values, self._sample, int(number), width)
                for number in task.bodies
            ]
            kernel, bias = (np.stack(arrays) for arrays in zip(*found, strict=True))
            return {"kernel": kernel, "bias": bias}
        self.bank.masks.set_level(task.bodies, task.level)
        class_sets = self.bank.member_classes[task.bodies]
        given = (self._own, task.bodies, class_sets)
        features, result = self._body_values, {}
        if self._trainer is not None:
            scores = self.bank.masks.own_scores(task.bodies)
            weights, kept = tune_tops(
                self._body_values, *given, self._head, self._trainer, scores, self._rngs(task)
            )
            features = partial(self._own_features, task.bodies, weights, kept)
            result = {f"weights {name}": array for name, array in weights.items()}
            result |= {f"kept {name}": array for name, array in kept.items()}
        heads = train_heads(features, *given, self.bank.features, self._head, self._rngs(task))
        return result | heads._asdict()

    def gives(self, task: Task, result: Result) -> bool:
        """Whether a result could be what this task gives: its arrays, their shapes, finite."""
        bank, count = self.bank, len(task.bodies)
        heads = bank.reference_heads if task.level is None else bank.heads
        shapes: dict[str, tuple[int, ...]] = {
            "kernel": (count, heads.count, heads.features),
            "bias": (count, heads.count),
        }
        if task.level is not None:
            shapes |= {"accuracy": (count,), "loss": (count,)}
            if bank.top is not None:
                for name, shape in bank.top.weight_shapes().items():
                    shapes[f"weights {name}"] = (count, *shape)
                for name, kept in bank.top.kept_counts().items():
                    shapes[f"kept {name}"] = (count, kept)
        found = {name: array.shape for name, array in result.items()}
        numbers = all(array.dtype.kind in "fi" for array in result.values())
        return found == shapes and numbers and all(np.isfinite(a).all() for a in result.values())

    def _rngs(self, task: Task) -> list[np.random.Generator]:
        return [np.random.default_rng([self._seed, int(number)]) for number in task.bodies]

    def _body_values(self, images: np.ndarray, number: int) -> np.ndarray:
        return self._body(images, self.bank.masks.filter_masks([number])[0].numpy(), number)

    def _own_features(
        self, bodies: np.ndarray, weights: Arrays, kept: Arrays, images: np.ndarray, number: int
    ) -> np.ndarray:
        """What the heads of one of these bodies read, under its own layers."""
        (place,) = np.flatnonzero(bodies == number)
        own = tf.nest.map_structure(lambda stack: tf.constant(stack[place]), (weights, kept))
        return np.asarray(self._top(tf.constant(self._body_values(images, number)), *own))

    def _top_features(self, values: tf.Tensor, weights: Any, kept: Any) -> tf.Tensor:
        top = self.bank.top
        assert top is not None
        return top.run(tf.reshape(values, (-1, *top.cut_shape)), weights, kept)


def fit_differentiators(
    fitter: Fitter, run: RunTasks, verbose: int | str, least_tasks: int = 1
) -> dict[str, list[float]]:
    """Fit every differentiator, those again that the ratios left too little, and the references.

    Args:
        fitter: Fits them; its bank takes what is found.
        run: Runs tasks as `fitter` does, here or elsewhere.
        verbose: 0 shows no progress bar.
        least_tasks: Into how many tasks to divide the differentiators at least.

    Returns:
        `loss` and `accuracy` after each level of pruning that was needed: means over all
        differentiators.
    """
    bank = fitter.bank
    members, known = np.arange(bank.count), bank.member_classes
    loss, accuracy = np.zeros((2, len(members)))
    history: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for level in range(len(LEVELS)):
        size = min(fitter.at_once, -(-len(members) // least_tasks))
        starts = range(0, len(members), size)
        tasks = [Task(level, members[start : start + size]) for start in starts]
        bank.masks.set_level(members, level)
        progress = _progress(len(members), "differentiator", verbose)
        for task, found in run(tasks):
            bank.heads.set(task.bodies, found["kernel"], found["bias"])
            weights, kept = (
                {name.removeprefix(kind): a for name, a in found.items() if name.startswith(kind)}
                for kind in ("weights ", "kept ")
            )
            bank.set_tops(task.bodies, weights, kept)
            loss[task.bodies], accuracy[task.bodies] = found["loss"], found["accuracy"]
            progress(len(task.bodies))
        history["loss"].append(float(loss.mean()))
        history["accuracy"].append(float(accuracy.mean()))
        members = np.flatnonzero(accuracy < _FLOOR)
        if not len(members) or not bank.masks.blocks:
            break
    if len(members):
        # Which classes a differentiator knows may be a secret.
        classes = ", ".join(map(str, np.unique(known[members])))
        of = f"of their classes: {classes}" if bank.all_pairs else "of classes with few"
        warnings.warn(
            f"{len(members)} of {bank.count} differentiators tell fewer than {_FLOOR:.0%} of "
            "held-out images rightly and will reject honest ones. Give more images "
            f"{of}.",
            stacklevel=3,
        )
    tasks = [Task(None, bank.references[i : i + 1]) for i in range(len(bank.references))]
    progress = _progress(len(tasks), "reference", verbose)
    for task, found in run(tasks):
        bank.reference_heads.set(task.bodies - bank.count, found["kernel"], found["bias"])
        progress(1)
    return history


def _progress(count: int, unit: str, verbose: int | str) -> Callable[[int], None]:
    shown = 0 if verbose == 0 else 1
    add: Callable[[int], None] = keras.utils.Progbar(count, verbose=shown, unit_name=unit).add
    return add
