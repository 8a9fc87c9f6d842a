"""How sure a defence is of an answer, in one number."""

from __future__ import annotations

import tensorflow as tf

# How much the references' margin of the Student's class counts, and their largest of another.
_OWN, _OTHER = 2.0, 2.25


def input_score(margins: tf.Tensor, rivals: tf.Tensor, student_class: tf.Tensor) -> tf.Tensor:
    """How sure the differentiators are that an image is what the Student says.

    The members' mean margin, plus 2 times the references' margin of the Student's class, less 2.25
    times their largest margin of another class. An honest image of the class has about 4.

    Args:
        margins: Float tensor of shape `(batch, k)`, of the members.
        rivals: Float tensor of shape `(batch, classes)`, of the references, averaged.
        student_class: Int tensor of shape `(batch,)`.

    Returns:
        Float tensor of shape `(batch,)`.
    """
    own = tf.one_hot(student_class, rivals.shape[1], on_value=True, off_value=False)
    other = tf.reduce_max(tf.where(own, tf.float32.min, rivals), axis=1)
    own_margin = tf.gather(rivals, student_class, batch_dims=1)
    return tf.reduce_mean(margins, axis=1) + _OWN * own_margin - _OTHER * other
