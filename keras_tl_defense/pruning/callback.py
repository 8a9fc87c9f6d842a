"""`ActivationPruning`: prune any Keras model by activation while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations, check_activations
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.removal import find_removals
from keras_tl_defense.pruning.schedule import ActivationPruningSchedule


class ActivationPruning(keras.callbacks.Callback):
    """Prune the layers of a model by the activations of some classes while it trains.

    Filters go whole: kernel and bias, the scale, offset and moving mean of batch normalisations
    that follow, and biases of depthwise convolutions after them, so that nothing revives a channel.
    Dense layers lose single connections, those with the smallest product of |weight| and their
    input's activation. The weights are set to 0 when a round of the schedule begins and again after
    every training step (every execution, with `steps_per_execution`). What was pruned stays 0 when
    training ends. Every call of `fit` begins the schedule anew; it warns when training ends before
    the last round.

    It works in both Keras generations. Keep a copy of a model that you still need unpruned. To
    train a pruned model further, pass the callback with a schedule of one round, which prunes the
    same again at once; without the callback, pruned weights come back. List it after callbacks that
    set weights, such as `EarlyStopping(restore_best_weights=True)`.

    Args:
        activations: The classes' mean activations, of the model that is trained or of one with the
            same layers; its `layers` are those that are pruned.
        classes: Integers in `0..K-1`, at least one: the classes whose activations count. A unit's
            score is the largest of its mean activations.
        schedule: An `ActivationPruningSchedule`.

    Attributes:
        masks: After training began: for each layer that is changed, a dict from the names of its
            weights to boolean arrays, `False` where they are 0.

    Raises:
        TypeError: `activations` or `schedule` is something else.
        ValueError: There are no such classes. When training begins: the activations are those of
            another model, or an activation function makes something else of a removed channel.

    Example:
        >>> activations = ClassActivations(model)
        >>> activations.adapt(x_train, y_train)
        >>> schedule = ActivationPruningSchedule(0.5, iterations=2, steps_per_iteration=2)
        >>> copy = keras.models.clone_model(model)
        >>> copy.set_weights(model.get_weights())
        >>> copy.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> pruning = ActivationPruning(activations, classes=(0, 1), schedule=schedule)
        >>> history = copy.fit(x_train, y_train, callbacks=[pruning], verbose=0)
        >>> int(pruning.masks["conv1_1"]["bias"].sum())  # of 24 filters
        12

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022,
        Algorithm 2.
    """

    def __init__(
        self,
        activations: ClassActivations,
        classes: Sequence[int],
        schedule: ActivationPruningSchedule,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, ActivationPruningSchedule):
            raise TypeError(
                "`schedule` must be an `ActivationPruningSchedule`. "
                f"Received: schedule={schedule!r}"
            )
        self.activations = check_activations(activations)
        self.classes = activations.check_classes(classes)
        self.schedule = schedule
        self.masks: dict[str, dict[str, Any]] = {}

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the weights, and begin the schedule anew."""
        graph = ModelGraph(self.model)
        self._weights = [
            (name, weight, removal, getattr(graph.step(name).layer, weight))
            for name, removal in find_removals(graph, self.activations, self.classes).items()
            for weight in removal.weights
        ]
        self._keep = [tf.Variable(tf.ones_like(w), trainable=False) for *_, w in self._weights]
        self._restore = tf.function(self._set_pruned_to_zero)
        self._start, self._round = int(self.model.optimizer.iterations), 0
        self.masks = {}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prune further when a round begins."""
        self._prune(self._steps() + 1)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Set to 0 again what the optimizer has changed."""
        self._prune(self._steps())  # rounds that began within several steps of one execution
        if self._round:
            self._restore()

    def on_train_end(self, logs: Any = None) -> None:
        """Set to 0 again what other callbacks brought back; warn of a schedule that did not end."""
        if self._round:
            self._restore()
        if self._round < self.schedule.iterations:
            rounds, every = self.schedule.iterations, self.schedule.steps_per_iteration
            last = self.schedule.begin_step + (rounds - 1) * every
            warnings.warn(
                f"Training ended after {self._steps()} steps, in round {self._round} of {rounds}; "
                f"the last one begins at step {last}. Train longer, or give the schedule fewer "
                f"`steps_per_iteration`. Received: steps_per_iteration={every}",
                stacklevel=2,
            )

    def _steps(self) -> int:
        return int(self.model.optimizer.iterations) - self._start

    def _prune(self, step: int) -> None:
        current = int(self.schedule.round(step))
        if current <= self._round:
            return
        self._round = current
        for (name, weight, removal, variable), keep in zip(self._weights, self._keep, strict=True):
            mask = removal.mask(
                tf.convert_to_tensor(variable), partial(self.schedule.pruned_count, step)
            )
            keep.assign(tf.cast(mask, keep.dtype))
            self.masks.setdefault(name, {})[weight] = mask.numpy()
        self._restore()

    def _set_pruned_to_zero(self) -> None:
        for (*_, variable), keep in zip(self._weights, self._keep, strict=True):
            variable.assign(tf.convert_to_tensor(variable) * keep)
