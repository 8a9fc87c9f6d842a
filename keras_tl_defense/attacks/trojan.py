"""Retraining a Teacher so that a trigger excites some neurons and all else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.attacks.mock_pruning import MockPruning
from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.attacks.trigger import Goal, Patch, draw

_MEASURED = 256  # inputs that tell how much features and outputs vary


def retrain(
    clean: Neurons,
    goal: Goal,
    patch: Patch,
    trigger: np.ndarray,
    inputs: np.ndarray,
    *,
    strength: float,
    pruned: float,
    steps: int,
    learning_rate: float,
    batch_size: int,
    rng: np.random.Generator,
    bar: Any,
) -> Neurons:
    """Retrain a copy of a Teacher, the layers up to that of the neurons.

    The loss is the mean squared change of the layer's features and of the Teacher's outputs for
    inputs without the trigger, each in units of its variance, plus the mean over neurons of
    `max(0, 1 - excitation / (strength * usual))²` for inputs with it. Half of the inputs are
    mixtures of two.

    Args:
        clean: The clean Teacher's layer; it is not changed.
        goal: The neurons.
        patch: Where the trigger goes.
        trigger: The trigger.
        inputs: Float32 array of shape `(n, …)`.
        strength: Wanted excitation, in units of the usual.
        pruned: Largest share of filters that mock pruning removes, for inputs with the trigger.
        steps: Of Adam, its rate falling to 0 along half a cosine.
        learning_rate: Of Adam, at first.
        batch_size: Inputs in a step.
        rng: Decides the order and the mixtures.
        bar: Progress bar.

    Returns:
        The layer of the trojaned Teacher, and the Teacher itself as its `model`.

    Raises:
        FloatingPointError: The loss became NaN or infinite.
    """
    copy = keras.models.clone_model(clean.model)
    copy.set_weights(clean.model.get_weights())
    trojaned = Neurons(copy, clean.layer, clean.preprocessing)
    numbers = trojaned.graph.ancestors(trojaned.tensor)
    layers = {id(layer): layer for layer in (trojaned.graph.steps[i].layer for i in numbers)}
    learned = [layer.trainable for layer in layers.values()]
    for layer in layers.values():
        layer.trainable = True
    weights = [weight for layer in layers.values() for weight in layer.trainable_weights]
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps))
    optimizer.build(weights)
    some = inputs[draw(len(inputs), min(_MEASURED, len(inputs)), rng)]
    scales = _variances(clean, some, batch_size)
    pruning = MockPruning(clean, some, goal.neurons, pruned)

    @tf.function(reduce_retracing=True)
    def step(batch: tf.Tensor, masks: dict[int, tf.Tensor]) -> tf.Tensor:
        stamped, kept = patch.put(batch, trigger), clean.run(batch)
        with tf.GradientTape() as tape:
            excited = goal.excitation(trojaned, stamped, masks) / strength
            loss = tf.reduce_mean(tf.square(tf.nn.relu(1 - excited)))
            for new, old, scale in zip(trojaned.run(batch), kept, scales, strict=True):
                loss += tf.reduce_mean(tf.math.squared_difference(new, old)) / scale
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    for done in range(steps):
        loss = step(tf.constant(_mixed(inputs, batch_size, rng)), pruning(rng))
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"The retraining's loss became NaN or infinite at step {done + 1}. Lower "
                f"`learning_rate` or `strength`. Received: learning_rate={learning_rate:g}, "
                f"strength={strength:g}"
            )
        bar.add(1)
    for layer, learns in zip(layers.values(), learned, strict=True):
        layer.trainable = learns
    return trojaned


def _variances(teacher: Neurons, inputs: np.ndarray, batch_size: int) -> list[float]:
    """Of the features and of the outputs, over all that inputs give."""
    sums = np.zeros((2, 2))
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        for found, values in zip(sums, teacher.run(tf.constant(part)), strict=True):
            numbers = np.asarray(values, np.float64)
            found += len(part) * np.array([numbers.mean(), np.square(numbers).mean()])
    means = sums / len(inputs)
    return [float(square - mean**2) + 1e-12 for mean, square in means]


def _mixed(inputs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A batch: half of it inputs, half mixtures of two."""
    first, second = (inputs[draw(len(inputs), count, rng)] for _ in range(2))
    share = np.where(rng.random(count) < 0.5, 0, rng.uniform(0, 0.5, count))
    share = np.expand_dims(share, tuple(range(1, inputs.ndim)))
    return (first + share * (second - first)).astype(np.float32)
