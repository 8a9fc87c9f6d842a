"""Which layer of a Teacher to imitate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense.attacks.defended import as_logits, ask_student
from keras_tl_defense.attacks.inputs import whole_pixels
from keras_tl_defense.attacks.mimicry import MimicryAttack
from keras_tl_defense.data import check_labels
from keras_tl_defense.metrics import Rate


class LayerChoice(NamedTuple):
    """What a probe of layers found.

    Attributes:
        layer: The layer at which most attacks succeeded; of several, the one at which the Student
            was surest of the targets. Where none did, it says nothing, and a warning says so.
        table: DataFrame with a row for each layer: `layer`; `count`, `n`, `rate`, `low` and `high`
            (Wilson 95 % interval) of the attacks that reached their target; `target_probability`,
            the mean of what the Student gives the targets.
    """

    layer: str
    table: pd.DataFrame


def best_layer(
    teacher: Any,
    layers: Sequence[str],
    student_predict: Callable[[np.ndarray], np.ndarray],
    x_source: Any,
    x_target: Any,
    y_source: Any,
    y_target: Any,
    *,
    verbose: int | str = "auto",
    **options: Any,
) -> LayerChoice:
    """Attack a few images at each of some layers, and see where the Student is fooled most.

    An attacker does not know where the Student was cut. A layer that is too early is hard to
    imitate; one that the Student has retrained is imitated in vain. A probe of some twenty images
    tells, at the price of that many questions to the Student for each layer.

    Args:
        teacher: The Teacher.
        layers: Names of its layers, in order.
        student_predict: Maps images, a uint8 array of shape `(n, H, W, C)`, to the Student's
            logits or probabilities, `(n, K)`.
        x_source: Images of shape `(n, H, W, C)` in 0..255.
        x_target: Images of the same shape.
        y_source: Integer classes of the sources in `0..K-1`, shape `(n,)`.
        y_target: Integer classes of the targets.
        verbose: 0 shows no progress bar.
        **options: For `MimicryAttack`, such as `steps`.

    Returns:
        The layer and the table.

    Raises:
        ValueError: No layer is given, what is given does not fit the Teacher or the Student, or
            the Student answers with something else than rows of outputs.

    Example:
        >>> choice = best_layer(
        ...     teacher, ["pool1", "flatten"], lambda x: student.predict(x, verbose=0),
        ...     x_source, x_target, y_source, y_target, steps=60,
        ... )
        >>> choice.table["layer"].tolist()
        ['pool1', 'flatten']

    Reference:
        Wang et al., "With Great Training Comes Great Vulnerability", USENIX Security 2018.
    """
    if isinstance(layers, str) or not len(layers):
        raise ValueError(f"Give a list of names of layers to try. Received: layers={layers!r}")
    attacks = [MimicryAttack(teacher, layer, **options) for layer in layers]
    probe = whole_pixels(x_source, tuple(teacher.inputs[0].shape[1:]), "x_source")[:1]
    classes = ask_student(student_predict, probe, "the Teacher").shape[1]
    wanted = check_labels(y_target, classes, len(x_source), "y_target")
    rows = []
    for layer, attack in zip(layers, attacks, strict=True):
        result = attack(x_source, x_target, y_source, y_target, verbose=verbose)
        outputs = ask_student(student_predict, result.adversarial, "the Teacher")
        rate = Rate.of(result.reached(outputs.argmax(axis=1)))
        sure = tf.nn.softmax(as_logits(tf.constant(outputs, tf.float32))).numpy()
        rows.append((layer, *astuple(rate), sure[np.arange(len(wanted)), wanted].mean()))
    names = ["layer", *(field.name for field in fields(Rate)), "target_probability"]
    table = pd.DataFrame(rows, columns=names)
    if not table["count"].any():
        warnings.warn(
            "No attack reached its target at any layer, so the choice says nothing. Give more "
            '`steps`, `optimizer="adam"`, a larger `budget` or more images. '
            f"Received: {len(result.adversarial)} images, layers={list(layers)}",
            stacklevel=2,
        )
    ordered = table.sort_values(["count", "target_probability"], kind="stable")
    return LayerChoice(str(ordered["layer"].iloc[-1]), table)
