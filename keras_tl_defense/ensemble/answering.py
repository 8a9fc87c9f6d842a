"""How a defence answers a batch of images, as one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense.data import HIGHEST_PIXEL, LOWEST_PIXEL
from keras_tl_defense.ensemble.bank import DifferentiatorBank
from keras_tl_defense.ensemble.score import input_score
from keras_tl_defense.ensemble.selection import fingerprint, fresh_numbers
from keras_tl_defense.graph import ModelGraph

_LOWEST = float(np.finfo(np.float32).min)


class Rules(NamedTuple):
    """What decides an answer.

    Attributes:
        key: Secret of the draw, int64 of shape `(2,)`.
        fresh: Whether members are drawn afresh for every answer.
        reject_threshold: Disagreements that reject an image.
        by_score: Whether the score decides instead, a boolean scalar.
        least_score: What it must reach, a float scalar.
        vote: Whether all pairs vote for a class of their own.
    """

    key: tf.Tensor
    fresh: bool
    reject_threshold: int
    by_score: tf.Tensor
    least_score: tf.Tensor
    vote: bool


def answer_images(
    inputs: tf.Tensor,
    graph: ModelGraph,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    bank: DifferentiatorBank,
    rules: Rules,
    size: int,
) -> dict[str, tf.Tensor]:
    """Answer images, of any content and any number.

    Args:
        inputs: Images of shape `(batch, H, W, C)` in 0..255; others are rejected.
        graph: The Student.
        preprocess: Maps images in 0..255 to what the Student takes.
        bank: The differentiators.
        rules: What decides.
        size: How many differentiators check an image.

    Returns:
        Tensors with the batch first: `answer`, `accepted`, `student_class`, `disagreements`,
        `score`, `members` and `margins`, as `DifferentiatorEnsemble.explain` describes them.
    """
    images = tf.ensure_shape(tf.cast(inputs, tf.float32), (None, *graph.input_shape))
    count = tf.shape(images)[0]
    # oneDNN gives convolutions of no images a wrong shape, so there is always one.
    more = tf.concat([[tf.cast(tf.equal(count, 0), tf.int32)], tf.shape(images)[1:]], axis=0)
    images = tf.concat([images, tf.zeros(more)], axis=0)
    usable = (images >= LOWEST_PIXEL) & (images <= HIGHEST_PIXEL)
    finite = tf.reduce_all(usable, axis=tuple(range(1, images.shape.rank)))
    safe = tf.clip_by_value(tf.where(usable, images, 0), 0, 255)
    safe += tf.stop_gradient(tf.round(safe) - safe)  # exact, and attackers get a gradient
    values = graph.run(preprocess(safe), [graph.output])
    logits = values[graph.output]
    finite &= tf.reduce_all(tf.math.is_finite(logits), axis=1)
    student_class = tf.argmax(logits, axis=1, output_type=tf.int32)

    numbers = fingerprint(safe)
    if rules.fresh:
        numbers = tf.bitwise.bitwise_xor(numbers, fresh_numbers(tf.shape(images)[0]))
    members = bank.draw(numbers, rules.key, student_class, size)
    rows = tf.repeat(tf.range(tf.shape(images)[0]), size)[:, None]
    features = bank.body_features(values, rows, tf.reshape(members, [-1]))
    margins = bank.margins(features, members, student_class)
    finite &= tf.reduce_all(tf.math.is_finite(margins), axis=1)
    rivals = bank.reference_margins(bank.reference_features(values))
    score = input_score(margins, rivals, student_class)
    finite &= tf.math.is_finite(score)
    score = tf.where(finite, score, _LOWEST)
    margins = tf.where(finite[:, None], margins, _LOWEST)
    disagreements = tf.reduce_sum(tf.cast(margins <= 0, tf.int32), axis=1)
    accepted = tf.where(
        rules.by_score & (not rules.vote),
        finite & (score >= rules.least_score),
        disagreements < rules.reject_threshold,
    )
    answer = tf.where(accepted, student_class + 1, 0)
    if rules.vote:
        open_rows = tf.where(~accepted & finite)
        winner = bank.winner(values, tf.cast(open_rows[:, 0], tf.int32))
        answer = tf.tensor_scatter_nd_update(answer, open_rows, winner + 1)
    answers = {
        "answer": answer,
        "accepted": answer > 0,
        "student_class": student_class,
        "disagreements": disagreements,
        "score": score,
        "members": members,
        "margins": margins,
    }
    return {name: values[:count] for name, values in answers.items()}


def white_box_answer(
    images: tf.Tensor,
    graph: ModelGraph,
    preprocess: Callable[[tf.Tensor], tf.Tensor],
    bank: DifferentiatorBank,
    members: tf.Tensor,
    classes: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """What `DifferentiatorEnsemble.white_box` returns, of images in 0..255."""
    members, classes = tf.cast(members, tf.int32), tf.cast(classes, tf.int32)
    values = graph.run(preprocess(images), [graph.output])
    count, size = tf.shape(images)[0], tf.shape(members)[1]
    rows = tf.repeat(tf.range(count), size)[:, None]
    features = bank.body_features(values, rows, tf.reshape(members, [-1]))
    margins, references = bank.margins(features, members, classes), bank.reference_features(values)
    return {
        "logits": values[graph.output],
        "features": tf.reshape(features, (count, size, bank.features)),
        "reference_features": tf.transpose(references, (1, 0, 2)),
        "margins": margins,
        "score": input_score(margins, bank.reference_margins(references), classes),
    }
