"""Vote mode: the class that wins against every other, found without asking every pair."""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

Beats = Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]
"""Maps numbers of images, `(n,)`, and two int tensors of classes, `(n, m)`, to whether the
differentiator of each two says the first: boolean, `(n, m)`."""


def find_winner(beats: Beats, rows: tf.Tensor, classes: int) -> tf.Tensor:
    """The class that the differentiators of all its K-1 pairs say, if there is one.

    A knock-out tournament leaves one class after K-1 questions. A class that wins against every
    other wins the tournament, so only the one that is left can be it; K-1 more questions tell
    whether it is. Asking all K(K-1)/2 pairs gives the same answer.

    Args:
        beats: Asks differentiators.
        rows: Int tensor of shape `(n,)`: numbers of the images.
        classes: Number of classes K.

    Returns:
        Int32 tensor of shape `(n,)`, -1 where no class wins.
    """
    left = tf.ensure_shape(tf.zeros_like(rows)[:, None] + tf.range(classes), (None, classes))
    while left.shape[1] > 1:
        playing = left.shape[1] // 2 * 2
        first, second = left[:, :playing:2], left[:, 1:playing:2]
        won = tf.where(beats(rows, first, second), first, second)
        left = tf.concat([won, left[:, playing:]], axis=1)
    others = tf.range(classes - 1)[None]
    others += tf.cast(others >= left, tf.int32)
    beats_all = tf.reduce_all(beats(rows, left + tf.zeros_like(others), others), axis=1)
    return tf.where(beats_all, left[:, 0], -1)
