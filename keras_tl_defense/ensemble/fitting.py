"""Fit the differentiators of a bank: their own layers where they have them, then their heads."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble.bank import DifferentiatorBank
from keras_tl_defense.ensemble.mask_bank import LEVELS
from keras_tl_defense.ensemble.top_training import TopTrainer, tune_tops
from keras_tl_defense.ensemble.training import ClassImages, HeadKind, train_heads, train_reference

_FLOOR = 0.7  # held-out accuracy below which a differentiator takes gentler ratios


class Tuning(NamedTuple):
    """How the differentiators' own layers are trained; see `TopTrainer`."""

    optimizer: Any
    iterations: int
    epochs: int
    batch_size: int


def fit_differentiators(
    bank: DifferentiatorBank,
    sample: ClassImages,
    head: HeadKind,
    preprocessing: Any,
    tuning: Tuning,
    *,
    images_per_class: int,
    rng: np.random.Generator,
    verbose: int | str,
) -> dict[str, list[float]]:
    """Fit every differentiator, those again that the ratios left too little.

    Args:
        bank: The differentiators, with their masks; takes the heads.
        sample: Training images; references take more of them than a differentiator.
        head: `"pair"` or `"one_vs_rest"`.
        preprocessing: Callable from the images to what the Student takes, or `None`.
        tuning: For differentiators with layers of their own.
        images_per_class: At most this many of each class for a differentiator.
        rng: Chooses images, and shuffles.
        verbose: 0 shows no progress bar.

    Returns:
        `loss` and `accuracy` after each level of pruning that was needed: means over all
        differentiators.
    """
    body = bank.compact_body(preprocessing)
    sample = sample._replace(images=body.load(sample.images))
    own = sample.first(images_per_class)
    trainer = top = None
    if bank.top is not None:
        trainer = TopTrainer(bank.top, outputs=bank.kernel.shape[1], **tuning._asdict())
        top = tf.function(
            bank.own_features,
            input_signature=[tf.TensorSpec((None, None)), tf.TensorSpec((), "int32")],
        )

    def body_values(images: np.ndarray, member: int) -> np.ndarray:
        return body(images, bank.masks.filter_mask(member), member)

    def features(images: np.ndarray, member: int) -> np.ndarray:
        values = body_values(images, member)
        return values if top is None else top(values, member).numpy()

    members, known = np.arange(bank.count), bank.member_classes
    loss, accuracy = np.zeros((2, len(members)))
    history: dict[str, list[float]] = {"loss": [], "accuracy": []}
    for level in range(len(LEVELS)):
        bank.masks.set_level(members, level)
        bar = keras.utils.Progbar(
            len(members) * (2 if trainer else 1),
            verbose=0 if verbose == 0 else 1,
            unit_name="differentiator",
        )
        options: dict[str, Any] = {"rng": rng, "progress": bar.add}
        class_sets = known[members]
        if trainer is not None:
            scores = bank.masks.own_scores(members)
            tops = tune_tops(
                body_values, own, members, class_sets, head, trainer, scores, **options
            )
            bank.set_tops(members, *tops)
        heads = train_heads(features, own, members, class_sets, bank.features, head, **options)
        bank.set_heads(members, heads.kernel, heads.bias)
        loss[members], accuracy[members] = heads.loss, heads.accuracy
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
    width = bank.reference_kernel.shape[1]
    rivals = [
        train_reference(body_values, sample, int(reference), width) for reference in bank.references
    ]
    bank.set_references(*(np.stack(arrays) for arrays in zip(*rivals, strict=True)))
    return history
