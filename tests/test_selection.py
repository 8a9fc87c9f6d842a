"""The keyed draw of members."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from keras_tl_defense.ensemble import selection
from keras_tl_defense.ensemble.selection import (
    _siphash,
    draw,
    fingerprint,
    fresh_numbers,
    new_key,
)

MASK = 2**64 - 1


def siphash_in_python(key: bytes, message: bytes) -> int:
    """SipHash-2-4 as its paper describes it."""
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261]
    v.append(k1 ^ 0x7465646279746573)

    def turn(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) & MASK

    def one_round() -> None:
        v[0] = (v[0] + v[1]) & MASK
        v[1] = turn(v[1], 13) ^ v[0]
        v[0] = turn(v[0], 32)
        v[2] = (v[2] + v[3]) & MASK
        v[3] = turn(v[3], 16) ^ v[2]
        v[0] = (v[0] + v[3]) & MASK
        v[3] = turn(v[3], 21) ^ v[0]
        v[2] = (v[2] + v[1]) & MASK
        v[1] = turn(v[1], 17) ^ v[2]
        v[2] = turn(v[2], 32)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v[3] ^= word
        one_round()
        one_round()
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(4):
        one_round()
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def test_the_oracle_gives_the_value_of_the_paper() -> None:
    assert siphash_in_python(bytes(range(16)), bytes(range(15))) == 0xA129CA6149BE45E5


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16))
@settings(max_examples=25, deadline=None)
def test_siphash(key: bytes, message: bytes) -> None:
    words = tuple(tf.constant(w, tf.uint64) for w in np.frombuffer(message, np.uint64))
    got = _siphash(words, tf.constant(np.frombuffer(key, np.uint64)))
    assert int(got) == siphash_in_python(key, message)


def images(count: int) -> tf.Tensor:
    rng = np.random.default_rng(0)
    return tf.constant(rng.integers(0, 256, (count, 6, 6, 3)), tf.float32)


def draw_of(x: tf.Tensor, key: tf.Tensor, candidates: int, count: int) -> tf.Tensor:
    """A draw from as many candidates for every image."""
    there = tf.fill([len(x)], candidates)
    return draw(fingerprint(x), key, there, candidates, count)


def test_the_draw_is_uniform_and_without_replacement() -> None:
    drawn = draw_of(images(6000), tf.constant(new_key()), 9, 4).numpy()
    assert all(len(set(row)) == 4 for row in drawn)
    for position in range(4):
        assert chisquare(np.bincount(drawn[:, position], minlength=9)).pvalue > 1e-4
    pairs = np.bincount(drawn[:, 0] * 9 + drawn[:, 1], minlength=81)
    assert chisquare(pairs[pairs > 0]).pvalue > 1e-4
    assert (pairs > 0).sum() == 72


def test_the_draw_depends_on_the_image_and_the_key_alone() -> None:
    x = images(40)
    key = tf.constant(new_key())
    drawn = draw_of(x, key, 20, 5).numpy()
    order = np.random.default_rng(1).permutation(40)
    shuffled = draw_of(tf.gather(x, order), key, 20, 5).numpy()
    np.testing.assert_array_equal(shuffled, drawn[order])
    for index in (0, 17):
        alone = draw_of(x[index : index + 1], key, 20, 5).numpy()
        np.testing.assert_array_equal(alone[0], drawn[index])
    other = draw_of(x, tf.constant(new_key()), 20, 5).numpy()
    assert (other != drawn).any(axis=1).mean() > 0.9


def test_examples_draw_from_as_many_as_they_have() -> None:
    x, key = images(4000), tf.constant(new_key())
    there = np.where(np.arange(4000) % 2, 6, 9).astype(np.int32)
    drawn = draw(fingerprint(x), key, tf.constant(there), 11, 6).numpy()
    assert all(sorted(row) == list(range(6)) for row in drawn[1::2])
    assert chisquare(np.bincount(drawn[::2].ravel(), minlength=9)).pvalue > 1e-4
    assert drawn.max() == 8
    fewer = draw(fingerprint(x), key, tf.constant(there), 11, 2).numpy()
    np.testing.assert_array_equal(fewer, drawn[:, :2])


def test_fresh_numbers_heed_no_seed() -> None:
    @tf.function
    def fresh() -> tf.Tensor:
        return fresh_numbers(tf.constant(50))

    tf.random.set_seed(0)
    first = fresh().numpy()
    tf.random.set_seed(0)
    assert len(set(first) | set(fresh().numpy())) == 100


def test_one_grey_level_makes_another_fingerprint() -> None:
    x = images(50)
    before = fingerprint(x).numpy()
    np.testing.assert_array_equal(fingerprint(-0.0 * x).numpy(), fingerprint(0.0 * x).numpy())
    one_pixel = np.zeros(x.shape, np.float32)
    one_pixel[:, 3, 3, 1] = 1
    assert (fingerprint(x + one_pixel).numpy() != before).all()


def test_keys_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(0)
    tf.random.set_seed(0)
    first = new_key()
    np.random.seed(0)
    tf.random.set_seed(0)
    assert (new_key() != first).any()
    monkeypatch.setattr(selection.os, "urandom", lambda size: os.path.sep.encode() * size)
    assert new_key().tobytes() == os.path.sep.encode() * 16
