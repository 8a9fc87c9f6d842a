"""What defences are evaluated on: labelled images and the results of attacks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.attacks.defended import is_defence
from keras_tl_defense.data import Batches, check_labels, check_pixels
from keras_tl_defense.graph import ModelGraph


def explain_labelled(
    defence: Any, x: Any, y: Any, batch_size: int, verbose: int | str, **options: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What `explain` says of each image, and its label, from one pass: datasets may shuffle.

    Args:
        defence: A fitted `DifferentiatorEnsemble`.
        x: Images: array, tensor, or batched dataset of images and labels.
        y: Their labels.
        batch_size: Images per batch, for arrays.
        verbose: 0 shows no progress bar.
        **options: Passed to `explain`.

    Raises:
        ValueError: There are no images, or they do not fit the Student.
    """
    batches = Batches(
        x,
        y,
        shape=_image_shape(defence),
        classes=defence.classes,
        batch_size=batch_size,
        pixels=True,
    )
    bar = keras.utils.Progbar(batches.count, verbose=0 if verbose == 0 else 1)
    parts, labels = [], []
    for images, label in batches:
        parts.append(defence.explain(images, batch_size=len(images), verbose=0, **options))
        labels.append(label)
        bar.add(1)
    if not parts:
        raise ValueError("At least one image is needed. Received: an empty dataset")
    details = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return details, np.concatenate(labels)


def check_attacks(attacks: Any, defence: Any) -> Mapping[str, AttackResult]:
    """Attacks by name, as they came.

    Raises:
        TypeError: They are something else.
        ValueError: Their images or labels do not fit the defence.
    """
    if not isinstance(attacks, Mapping) or not all(
        isinstance(result, AttackResult) for result in attacks.values()
    ):
        received: Any = type(attacks).__name__
        if isinstance(attacks, Mapping):
            received = {name: type(result).__name__ for name, result in attacks.items()}
        raise TypeError(
            'Attacks are given by name, as `attacks={"mimicry": result}` with what the attack '
            f"returned, an `AttackResult`. Received: attacks={received!r}"
        )
    shape = _image_shape(defence)
    for name, result in attacks.items():
        if name == "clean":
            raise ValueError(
                'An attack cannot be called "clean", as the clean images are. Rename it. '
                'Received: attacks["clean"]'
            )
        if result.adversarial.shape[1:] != shape:
            raise ValueError(
                "An attack's images do not fit the defended Student, so its Teacher takes another "
                "input than the Student. Attack the Teacher that the Student's layers come from. "
                f"Received: attacks[{name!r}] with images of shape {result.adversarial.shape[1:]}, "
                f"a Student that takes {shape}"
            )
        for field, labels in (("y_source", result.y_source), ("y_target", result.y_target)):
            if labels is not None:
                where = f"attacks[{name!r}].{field}"
                check_labels(labels, defence.classes, len(result.adversarial), where)
        check_pixels(result.adversarial, f"attacks[{name!r}].adversarial")
        try:
            result.reached(np.zeros(len(result.adversarial), int))
        except ValueError as error:
            raise ValueError(f"attacks[{name!r}]: {error}") from error
        if result.layer is not None and not _before_cut(defence, result.layer):
            warnings.warn(
                f"The attack {name!r} imitates the layer {result.layer!r}, and none of that name "
                "is among the layers that the Student has from its Teacher, so it may be weaker "
                "than it could be. Attack the Teacher's layer that the Student calls "
                f"{defence.cut!r}, its cut, or see `best_layer`.",
                stacklevel=3,
            )
    return attacks


def _before_cut(defence: Any, layer: str) -> bool:
    """Whether a layer of the Student, or a model within it, ends at the cut or before."""
    graph = ModelGraph(defence.student, "student")
    last = graph.producer[graph.layer_output(defence.cut)]
    before = graph.steps[: last + 1]
    if layer in {step.name.split("/")[-1] for step in before}:
        return True
    counted = re.compile(r"_\d+$")  # Keras numbers its own names: the Teacher's may be another
    names = {counted.sub("", step.layer.name) for step in before if not step.layer.weights}
    if counted.sub("", layer) in names:
        return True
    try:
        return graph.producer[graph.layer_output(layer)] <= last
    except ValueError:
        return False


def _image_shape(defence: Any) -> tuple[int, ...]:
    if not is_defence(defence):
        raise TypeError(
            "What is evaluated must be a `DifferentiatorEnsemble`. "
            f"Received: defence={type(defence).__name__}"
        )
    return tuple(defence.student.inputs[0].shape)[1:]
