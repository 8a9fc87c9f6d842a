"""Inputs that a Teacher takes for its classes, made from noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer, check_positive
from keras_tl_defense.attacks.box import Box, check_range
from keras_tl_defense.attacks.defended import as_logits
from keras_tl_defense.attacks.descent import Descent, adam
from keras_tl_defense.attacks.features import LayerFeatures

_CELLS = 8  # of the coarsest noise that inputs begin as


def reverse_engineer(
    teacher: Any,
    per_class: int = 20,
    *,
    steps: int = 150,
    learning_rate: float = 0.05,
    smoothness: float = 1.0,
    value_range: tuple[float, float] | None = None,
    batch_size: int = 64,
    preprocessing: Any = None,
    seed: int = 0,
    verbose: int | str = "auto",
) -> np.ndarray:
    """Make inputs that stand for a Teacher's training data, which nobody need have.

    Each begins as noise of random coarseness and contrast and minimises the cross-entropy of the
    Teacher's answer to a class, plus `smoothness` times the mean squared difference of neighbours
    (in units of the range of values), by Adam over `w`, with `input = (tanh(w) / c + 1/2)` times
    the range.

    Args:
        teacher: A built Functional or Sequential Keras model that returns logits or probabilities
            of its classes.
        per_class: Inputs for each class. Defaults to `20`.
        steps: Steps of Adam. Defaults to `150`.
        learning_rate: Of Adam, for `w`. Defaults to `0.05`.
        smoothness: Weight of neighbours' differences, 0 or more. Defaults to `1.0`.
        value_range: Lowest and highest value of inputs. Defaults to `(0, 255)` for images; other
            inputs need it.
        batch_size: Inputs that are made at once. Defaults to `64`.
        preprocessing: Callable from inputs to what the Teacher takes.
        seed: Decides the noise.
        verbose: 0 shows no progress bar.

    Returns:
        Float32 array of shape `(classes * per_class, …)`, ordered by class.

    Raises:
        ValueError: An argument is out of range, the Teacher's input has no fixed shape, or it does
            not end in classes.
        FloatingPointError: A gradient became NaN or infinite.

    Example:
        >>> reverse_engineer(teacher, per_class=2, steps=10, verbose=0).shape
        (56, 32, 32, 3)

    Reference:
        Wang et al., "Backdoor Attacks against Transfer Learning with Pre-trained Deep Learning
        Models", IEEE Transactions on Services Computing 2020.
    """
    outputs = LayerFeatures(teacher, teacher.layers[-1].name, preprocessing)
    low, high = check_range(value_range, outputs.input_shape)
    count, steps = check_integer("per_class", per_class, 1), check_integer("steps", steps, 1)
    batch_size = check_integer("batch_size", batch_size, 1)
    if not 0 <= smoothness < np.inf:
        raise ValueError(f"`smoothness` must be 0 or more. Received: smoothness={smoothness!r}")
    if len(teacher.outputs[0].shape) != 2:
        raise ValueError(
            "Inputs are made for each class, so the Teacher must end in classes. Give inputs of "
            f"your own as `x`. Received: outputs of shape {tuple(teacher.outputs[0].shape)}"
        )
    classes = int(teacher.outputs[0].shape[-1])
    box = Box(low, high)

    def loss(w: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        x = box.read(w)
        entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, as_logits(outputs(x)))
        rough = tf.zeros(tf.shape(labels))
        for axis in range(1, x.shape.rank - 1):
            near = tf.experimental.numpy.diff(x, axis=axis) / (high - low)
            rough += tf.reduce_mean(tf.square(near), axis=list(range(1, x.shape.rank)))
        return entropy + smoothness * rough

    rule = adam(check_positive("learning_rate", learning_rate))
    descent = Descent(loss, rule, f"Or lower `learning_rate`. Received: {learning_rate=}")
    labels = np.repeat(np.arange(classes), count)
    rng = np.random.default_rng(check_integer("seed", seed, 0))
    start = np.stack([_noise(outputs.fixed_shape, rng) for _ in labels])
    bar = keras.utils.Progbar(len(labels), verbose=0 if verbose == 0 else 1)
    made = []
    for first in range(0, len(labels), batch_size):
        part = slice(first, first + batch_size)
        source = tf.constant(low + (high - low) * start[part], tf.float32)
        w = descent.run(box.write(source), (tf.constant(labels[part]),), steps)
        made.append(box.clip(box.read(w).numpy()))
        bar.add(len(made[-1]))
    return np.concatenate(made)


def _noise(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Noise in 0.02..0.98, a mixture of some grains, from coarse to fine."""
    noise = np.zeros(shape)
    cells = _CELLS // 2
    while cells < max(shape[:-1]):
        cells *= 2
        grid = rng.normal(size=(*(min(cells, n) for n in shape[:-1]), shape[-1]))
        for axis, size in enumerate(shape[:-1]):
            where = np.linspace(0, grid.shape[axis] - 1, size)
            below = np.minimum(where.astype(int), max(grid.shape[axis] - 2, 0))
            above = np.minimum(below + 1, grid.shape[axis] - 1)
            share = (where - below).reshape([-1 if a == axis else 1 for a in range(grid.ndim)])
            grid = np.take(grid, below, axis) * (1 - share) + np.take(grid, above, axis) * share
        noise += grid * rng.uniform(0, 1)
    contrast = rng.uniform(0.05, 0.3)
    return np.clip(rng.uniform(0.2, 0.8) + contrast * noise / noise.std(), 0.02, 0.98)
