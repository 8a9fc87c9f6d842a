"""Which layer of a Teacher to imitate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from keras_tl_defense.attacks.mimicry import MimicryAttack
from keras_tl_defense.metrics import Rate


class LayerChoice(NamedTuple):
    """What a probe of layers found.

    Attributes:
        layer: The layer at which most attacks succeeded; of several, the last. Where none did, it
            says nothing, and a warning says so.
        table: DataFrame with a row for each layer: `layer`, and `count`, `n`, `rate`, `low` and
            `high` (Wilson 95 % interval) of the attacks that reached their target.
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
        ValueError: No layer is given, what is given does not fit the Teacher, or the Student
            answers with something else than rows of outputs.

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
    if not len(layers):
        raise ValueError(f"Give the names of layers to try. Received: layers={layers!r}")
    rows = []
    for layer in layers:
        attack = MimicryAttack(teacher, layer, **options)
        result = attack(x_source, x_target, y_source, y_target, verbose=verbose)
        outputs = np.asarray(student_predict(result.adversarial))
        if outputs.ndim != 2 or len(outputs) != len(result.adversarial):
            raise ValueError(
                "`student_predict` must return the Student's logits or probabilities, a row for "
                f"each image. Received: shape {outputs.shape} for {len(result.adversarial)} images"
            )
        rows.append((layer, *astuple(Rate.of(result.reached(outputs.argmax(axis=1))))))
    table = pd.DataFrame(rows, columns=["layer", *(field.name for field in fields(Rate))])
    if not table["count"].any():
        warnings.warn(
            "No attack reached its target at any layer, so the choice says nothing. Give more "
            '`steps`, `optimizer="adam"`, a larger `budget` or more images. '
            f"Received: {len(result.adversarial)} images, layers={list(layers)}",
            stacklevel=2,
        )
    last_best = table["count"].to_numpy()[::-1].argmax()
    return LayerChoice(str(table["layer"].iloc[len(table) - 1 - last_best]), table)
