"""Signals drawn by code: heartbeats of an electrocardiogram, and sounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keras_tl_defense._validation import check_integer
from keras_tl_defense.datasets.base import check_classes, check_numbers, choose_names, draw_parts
from keras_tl_defense.datasets.beats import BEATS, draw_heartbeat
from keras_tl_defense.datasets.tones import TONES, draw_sound

HEARTBEATS = tuple(BEATS)
"""Names of all classes of `load_heartbeats`."""
SOUNDS = tuple(TONES)
"""Names of all classes of `load_sounds`."""


@dataclass(frozen=True, eq=False, repr=False)
class SignalDataset:
    """Labelled signals, split into a training and a test part.

    The signals of a loader are ordered by class, so shuffle them before a part is split off. Two
    data sets are equal only when they are the same object: compare their arrays.

    Args:
        x_train: Array `(n, length, channels)`, `float32`. The training signals.
        y_train: Array `(n,)`, `int64`, in `0..classes - 1`. Their classes.
        x_test: Array `(m, length, channels)`, `float32`. The test signals.
        y_test: Array `(m,)`, `int64`, in `0..classes - 1`. Their classes.
        class_names: Tuple of strings. The name of each class, in the order of the labels.

    Raises:
        ValueError: An array has another type or shape, or a label has no name.

    Example:

    >>> import numpy as np
    >>> signals, labels = np.zeros((2, 64, 1), "float32"), np.array([0, 1])
    >>> SignalDataset(signals, labels, signals, labels, ("low", "high"))
    SignalDataset(classes=2, signal_shape=(64, 1), train=2, test=2)
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            signals, labels = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if signals.dtype != np.float32 or signals.ndim != 3:
                raise ValueError(
                    f"`x_{part}` is not a batch of signals. Expected float32 values of shape "
                    f"(n, length, channels); convert it first. Received: x_{part}.dtype="
                    f"{signals.dtype}, x_{part}.shape={signals.shape}"
                )
            check_numbers(f"y_{part}", labels, len(signals))
            check_classes(f"y_{part}", labels, self.classes)
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                "The training and test signals differ in shape. Cut them to one length first. "
                f"Received: x_train.shape={self.x_train.shape}, x_test.shape={self.x_test.shape}"
            )

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def signal_shape(self) -> tuple[int, int]:
        """The shape `(length, channels)` of one signal, as a model's input wants it."""
        length, channels = self.x_train.shape[1:]
        return length, channels

    def __repr__(self) -> str:
        return (
            f"SignalDataset(classes={self.classes}, signal_shape={self.signal_shape}, "
            f"train={len(self.x_train)}, test={len(self.x_test)})"
        )


def load_heartbeats(
    train_per_class: int = 100,
    test_per_class: int = 50,
    length: int = 256,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> SignalDataset:
    """Draw electrocardiograms, with a beat of one of 12 kinds in the middle of each.

    Waves are sums of bells with a random rate, shape and size, under noise, hum and a wandering
    baseline, at 128 samples a second. The drawings resemble what textbooks show; they are no
    patients' and fit for no diagnosis. A Teacher may have some of the classes and its Student the
    others. A signal depends on the seed, its class, its part and its place in the class, and not
    on how many are drawn.

    Args:
        train_per_class: Integer. Training signals of each class. Defaults to `100`.
        test_per_class: Integer. Test signals of each class. Defaults to `50`.
        length: Integer, at least 64. Samples of a signal. Defaults to `256`, which is 2 s.
        seed: Integer, at least 0. Other seeds draw other signals. Defaults to `0`.
        classes: Names from `HEARTBEATS`, in the order of the labels. Defaults to all.

    Returns:
        `SignalDataset`, ordered by class, in -1..1 (units of 2 mV), of shape `(length, 1)`.

    Raises:
        ValueError: An argument is no integer or too small, or there is no such class.

    Example:

    >>> load_heartbeats(train_per_class=3, test_per_class=1, classes=HEARTBEATS[:5])
    SignalDataset(classes=5, signal_shape=(256, 1), train=15, test=5)
    """
    length = check_integer("length", length, 64)
    return _load(
        0, HEARTBEATS, classes, draw_heartbeat, train_per_class, test_per_class, length, seed
    )


def load_sounds(
    train_per_class: int = 100,
    test_per_class: int = 50,
    length: int = 2048,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> SignalDataset:
    """Draw sounds of 13 kinds: sweeps, chords, vowels, bells, drums and others.

    Their pitch, loudness, onset and noise are random, at 8000 samples a second. A Teacher may have
    some of the classes and its Student the others. A sound depends on the seed, its class, its
    part and its place in the class, and not on how many are drawn.

    Args:
        train_per_class: Integer. Training sounds of each class. Defaults to `100`.
        test_per_class: Integer. Test sounds of each class. Defaults to `50`.
        length: Integer, at least 256. Samples of a sound. Defaults to `2048`, which is a quarter
            of a second.
        seed: Integer, at least 0. Other seeds draw other sounds. Defaults to `0`.
        classes: Names from `SOUNDS`, in the order of the labels. Defaults to all.

    Returns:
        `SignalDataset`, ordered by class, waveforms in -1..1 of shape `(length, 1)`.

    Raises:
        ValueError: An argument is no integer or too small, or there is no such class.

    Example:

    >>> load_sounds(train_per_class=3, test_per_class=1, classes=["drum", "bell"])
    SignalDataset(classes=2, signal_shape=(2048, 1), train=6, test=2)
    """
    length = check_integer("length", length, 256)
    return _load(1, SOUNDS, classes, draw_sound, train_per_class, test_per_class, length, seed)


def _load(
    family: int,
    known: tuple[str, ...],
    classes: Sequence[str] | None,
    draw: Callable[[str, int, np.random.Generator], np.ndarray],
    train: int,
    test: int,
    length: int,
    seed: int,
) -> SignalDataset:
    names = choose_names(classes, known)

    def one(label: int, rng: np.random.Generator) -> np.ndarray:
        signal = np.clip(draw(names[label], length, rng), -1, 1)
        return signal.astype(np.float32)[:, np.newaxis]

    kinds = [known.index(name) for name in names]
    return SignalDataset(**draw_parts(family, kinds, one, train, test, seed), class_names=names)
