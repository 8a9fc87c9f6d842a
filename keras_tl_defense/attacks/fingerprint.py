"""Which public model a Student was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks.box import Box
from keras_tl_defense.attacks.defended import ask_student, sum_to_one
from keras_tl_defense.attacks.descent import Descent, adam
from keras_tl_defense.attacks.features import LayerFeatures, distance

_RATE = 0.05
_ALIKE = 1e-6  # a spread that is rounding alone


def fingerprint_teacher(
    student_predict: Callable[[np.ndarray], np.ndarray],
    teachers: Mapping[str, Any],
    *,
    layers: Mapping[str, str] | None = None,
    images: int = 10,
    steps: int = 500,
    preprocessing: Mapping[str, Any] | None = None,
    seed: int = 0,
    verbose: int | str = "auto",
) -> pd.DataFrame:
    """Rank candidate Teachers by how little the Student says of images that tell them nothing.

    For each candidate, images are crafted from noise whose features at its bottleneck are all zero.
    A Student that has this bottleneck sees nothing but its own biases, and answers all of them
    alike; of another Teacher's images it has opinions. The paper takes the Gini coefficient of the
    probabilities, which is near 0 where the biases are small. Ours need not be: features that are
    scaled before they are learned from leave large ones. So candidates are ranked by how much the
    answers differ from each other, in relation to how much they differ where the same pixels stand
    in another order: images that became alike, all black for one, get the same answers from every
    Student and tell nothing. The Gini coefficient is given besides.

    Args:
        student_predict: Maps images, a uint8 array of shape `(n, H, W, C)`, to the Student's
            probabilities, `(n, K)`; all that is needed of it.
        teachers: Candidates by name: built Functional or Sequential Keras models of images in
            0..255.
        layers: Name of the bottleneck of a candidate; defaults to the last layer before its output.
        images: Images for each candidate. Defaults to `10`.
        steps: Steps of Adam. Defaults to `500`.
        preprocessing: Callable from images in 0..255 to what a candidate takes, by name.
        seed: Decides the noise.
        verbose: 0 shows no progress bar.

    Returns:
        A row for each candidate, the likeliest first: `teacher`; `relative`, its `spread` divided
        by that of its images shuffled, below 1 where the order of pixels matters; `spread`, the
        mean total variation distance of the answers to its images from their mean, in 0..1; `gini`,
        the mean of its images, in 0..1; `features`, the length of the crafted images' features in
        relation to that of the noise they began as, which is near 0 where the candidate could be
        imitated at all.

    Raises:
        ValueError: There is no candidate, a candidate has no such layer, the Student does not take
            its images, or the Student's answers are no probabilities.
        TypeError: Candidates, layers or preprocessing are no dictionary.
        FloatingPointError: A gradient became NaN or infinite.

    Example:
        >>> table = fingerprint_teacher(
        ...     lambda x: tf.nn.softmax(student.predict(x, verbose=0)).numpy(),
        ...     {"ours": teacher}, layers={"ours": "flatten"}, images=2, steps=50,
        ... )
        >>> table["teacher"].tolist()
        ['ours']

    Reference:
        Wang et al., "With Great Training Comes Great Vulnerability", USENIX Security 2018,
        section 5.
    """
    images, steps = check_integer("images", images, 2), check_integer("steps", steps, 1)
    seed = check_integer("seed", seed, 0)
    for what, given in (
        ("teachers", teachers),
        ("layers", layers),
        ("preprocessing", preprocessing),
    ):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(
                f"`{what}` must be a dictionary by the names of candidates. "
                f"Received: {what}={given!r}"
            )
    if not teachers:
        raise ValueError("Give at least one candidate. Received: teachers={}")
    unknown = sorted({*(layers or {}), *(preprocessing or {})} - set(teachers))
    if unknown:
        raise ValueError(
            "`layers` and `preprocessing` are by the names of candidates. "
            f"Received: {unknown}, where the candidates are {list(teachers)}"
        )
    rows = []
    bar = keras.utils.Progbar(len(teachers) * steps, verbose=0 if verbose == 0 else 1)
    for name, teacher in teachers.items():
        layer, scaling = (layers or {}).get(name), (preprocessing or {}).get(name)
        features = LayerFeatures(teacher, layer, scaling)
        shape = (images, *features.fixed_shape)
        noise = np.random.default_rng(seed).uniform(0, 255, shape).astype(np.float32)
        crafted = _silence(features, noise, steps, bar)
        order = np.random.default_rng(seed).permutation(crafted[0, ..., 0].size)
        shuffled = crafted.reshape(images, -1, shape[-1])[:, order].reshape(shape)
        answers = [
            ask_student(student_predict, x, f"the candidate {name!r}") for x in (crafted, shuffled)
        ]
        answered = answers[0]
        if not sum_to_one(answered):
            raise ValueError(
                "`student_predict` must return probabilities, rows that sum to 1. Apply "
                f"`tf.nn.softmax` to logits. Received: shape {answered.shape}"
            )
        before, after = (float(np.linalg.norm(features.of(x, images))) for x in (noise, crafted))
        spread, usual = (
            np.abs(given - given.mean(axis=0)).sum(axis=1).mean() / 2 for given in answers
        )
        relative = spread / usual if usual > _ALIKE else 1.0
        rows.append((name, relative, spread, gini(answered).mean(), after / max(before, 1e-12)))
    table = pd.DataFrame(rows, columns=["teacher", "relative", "spread", "gini", "features"])
    return table.sort_values("relative", kind="stable", ignore_index=True)


def gini(probabilities: np.ndarray) -> np.ndarray:
    """Gini coefficient of each row: 0 where all are equal, near 1 where one has all.

    A Student whose bottleneck is silent answers with what its biases say, much the same for all
    classes.

    Args:
        probabilities: Float array of shape `(n, K)`, none negative.

    Returns:
        Float array of shape `(n,)`, in 0..1.

    Example:
        >>> gini(np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]])).tolist()
        [0.0, 0.75]

    Reference:
        Gini, "Variabilità e mutabilità", 1912.
    """
    ordered = np.sort(probabilities, axis=1)
    count = ordered.shape[1]
    weights = 2 * np.arange(1, count + 1) - count - 1
    return (ordered * weights).sum(axis=1) / (count * ordered.sum(axis=1))


def _silence(features: LayerFeatures, noise: np.ndarray, steps: int, bar: Any) -> np.ndarray:
    """Images with features near 0, made from noise."""

    box = Box(0, 255)

    def loss(w: tf.Tensor) -> tf.Tensor:
        found = features(box.read(w))
        return distance(found, tf.zeros_like(found))

    descent = Descent(loss, adam(_RATE), "They are noise.")
    w = descent.run(box.write(tf.constant(noise)), (), steps, bar)
    return np.rint(box.clip(box.read(w).numpy())).astype(np.uint8)
