"""`ActivationPruning`: prune any Keras model by activation while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.removal import Removal, check_classes, find_removals
from keras_tl_defense.pruning.schedule import ActivationPruningSchedule


class ActivationPruning(keras.callbacks.Callback):
    """Prune the layers of a model by the activations of some classes while it trains.

    Filters go whole: kernel and bias, the scale, offset and moving mean of batch normalisations
    that follow, and biases of depthwise convolutions after them, so that nothing revives a channel.
    Dense layers lose single connections, those with the smallest product of |weight| and their
    input's activation. The weights are set to 0 when a round of the schedule begins and again after
    every training step. What was pruned stays 0 when training ends. Every call of `fit` begins the
    schedule anew.

    It works in both Keras generations. Keep a copy of a model that you still need unpruned.

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
        TypeError: `schedule` is something else.
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
        self.activations = activations
        self.classes = check_classes(classes, activations)
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
        self._step, self._round = 0, 0
        self.masks = {}

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prune further when a round begins."""
        self._first = batch
        current = int(self.schedule.round(self._step + 1))
        if current > self._round:
            self._round = current
            self._prune()
            self._restore()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Set to 0 again what the optimizer has changed."""
        self._step += batch - self._first + 1  # several, with `steps_per_execution`
        if self._round:
            self._restore()

    def _prune(self) -> None:
        for (name, weight, removal, variable), keep in zip(self._weights, self._keep, strict=True):
            mask = self._mask(removal, variable)
            keep.assign(tf.cast(mask, keep.dtype))
            self.masks.setdefault(name, {})[weight] = mask.numpy()

    def _mask(self, removal: Removal, variable: Any) -> tf.Tensor:
        step = self._step + 1
        return removal.mask(
            tf.convert_to_tensor(variable),
            tf.constant(removal.scores, tf.float32),
            lambda units: self.schedule.pruned_count(step, units),
        )

    def _set_pruned_to_zero(self) -> None:
        for (*_, variable), keep in zip(self._weights, self._keep, strict=True):
            variable.assign(tf.convert_to_tensor(variable) * keep)
