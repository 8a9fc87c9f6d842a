"""Which differentiators check an input: a keyed or a fresh draw, one for each example.

The draw is a pseudo-random function (SipHash-2-4) of a 64-bit fingerprint of the input under a
secret 128-bit key. The fingerprint has no key, so images that share one can be sought. The same
input gets the same members in every batch, replica and process, so that trying again does not help,
and without the key nobody can tell which. A fresh draw takes a random number instead of the
fingerprint.

Reference:
    Aumasson and Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012.
"""

from __future__ import annotations

import os

import numpy as np
import tensorflow as tf


def new_key() -> np.ndarray:
    """A fresh key from the operating system's randomness, two int64."""
    return np.frombuffer(os.urandom(16), np.int64).copy()


def fingerprint(images: tf.Tensor) -> tf.Tensor:
    """A 64-bit fingerprint of each image.

    Args:
        images: Float32 tensor of shape `(batch, …)`, rounded to whole grey levels by the caller, so
            that invisible noise buys no new draw.

    Returns:
        Tensor of shape `(batch,)`, uint64.
    """
    whole = images + 0.0  # -0.0 and 0.0 have different bits
    size = 4 * int(tf.TensorShape(images.shape[1:]).num_elements() or 0)
    data = tf.reshape(tf.bitcast(whole, tf.uint8), (tf.shape(images)[0], size))
    return tf.bitcast(tf.fingerprint(data), tf.uint64)


def fresh_numbers(batch: tf.Tensor) -> tf.Tensor:
    """Random numbers in the place of fingerprints, other ones at every call.

    They come from a generator that TensorFlow seeds from the operating system, whatever
    seed it was given. XLA would make a constant of them, so callers mix in a `fingerprint`,
    which XLA refuses.

    Args:
        batch: How many, an int32 scalar.

    Returns:
        Tensor of shape `(batch,)`, uint64.
    """
    numbers = tf.raw_ops.RandomUniformInt(
        shape=[batch], minval=tf.int64.min, maxval=tf.int64.max, seed=0, seed2=0
    )
    return tf.bitcast(numbers, tf.uint64)


def draw(
    fingerprints: tf.Tensor, key: tf.Tensor, candidates: tf.Tensor, most: int, count: int
) -> tf.Tensor:
    """Draw `count` of its candidates for each example, without replacement, uniformly.

    A smaller `count` draws the first of those that a larger one draws.

    Args:
        fingerprints: Tensor of shape `(batch,)`, uint64.
        key: The secret, int64 tensor of shape `(2,)`.
        candidates: Int32 tensor of shape `(batch,)`: how many there are to choose from, `count` at
            least.
        most: How many there are at most.
        count: How many to choose.

    Returns:
        Int32 tensor of shape `(batch, count)`, values in `0..candidates-1`.
    """
    slots = tf.range(most)
    words = tf.cast(tf.cast(slots, tf.int64), tf.uint64)
    priority = _siphash((fingerprints[:, None], words[None]), tf.bitcast(key, tf.uint64))
    there = slots[None] < candidates[:, None]
    priority = tf.where(there, tf.bitcast(priority, tf.int64), tf.int64.min)
    return tf.math.top_k(priority, k=count).indices


def _siphash(words: tuple[tf.Tensor, ...], key: tf.Tensor) -> tf.Tensor:
    """SipHash-2-4 of messages of whole 64-bit words; the words broadcast against each other."""

    def constant(value: int) -> tf.Tensor:
        return tf.constant(value, tf.uint64)

    def rotate(x: tf.Tensor, bits: int) -> tf.Tensor:
        left = tf.bitwise.left_shift(x, constant(bits))
        return tf.bitwise.bitwise_or(left, tf.bitwise.right_shift(x, constant(64 - bits)))

    def rounds(state: tuple[tf.Tensor, ...], count: int) -> tuple[tf.Tensor, ...]:
        a, b, c, d = state
        for _ in range(count):
            a, c = a + b, c + d
            b, d = xor(rotate(b, 13), a), xor(rotate(d, 16), c)
            a, c = rotate(a, 32) + d, c + b
            d, b = xor(rotate(d, 21), a), xor(rotate(b, 17), c)
            c = rotate(c, 32)
        return a, b, c, d

    xor = tf.bitwise.bitwise_xor
    state = (
        xor(key[0], constant(0x736F6D6570736575)),
        xor(key[1], constant(0x646F72616E646F6D)),
        xor(key[0], constant(0x6C7967656E657261)),
        xor(key[1], constant(0x7465646279746573)),
    )
    length = constant((8 * len(words) % 256) << 56)
    for word in (*words, length):
        a, b, c, d = state
        a, b, c, d = rounds((a, b, c, xor(d, word)), 2)
        state = (xor(a, word), b, c, d)
    a, b, c, d = state
    a, b, c, d = rounds((a, b, xor(c, constant(0xFF)), d), 4)
    return xor(xor(a, b), xor(c, d))
