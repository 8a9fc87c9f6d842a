"""The drawings behind the synthetic sounds: waveforms, each kind a formula with random pitch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RATE = 8000.0  # samples a second
Rng = np.random.Generator


def _sine(frequency: np.ndarray | float, time: np.ndarray, rng: Rng) -> np.ndarray:
    """A tone whose frequency in Hz may change in time."""
    phase = np.cumsum(np.broadcast_to(frequency, time.shape)) / RATE
    return np.sin(2 * np.pi * (phase + rng.random()))


def _notes(frequencies: Sequence[float], time: np.ndarray, rng: Rng) -> np.ndarray:
    """Notes with some overtones each."""
    loudness = rng.uniform(0.4, 1) ** np.arange(4)
    return sum(
        loud * _sine(f * (k + 1), time, rng) for f in frequencies for k, loud in enumerate(loudness)
    ) + np.zeros(len(time))


def _pitch(rng: Rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _sweep(time: np.ndarray, rng: Rng, down: bool) -> np.ndarray:
    low = _pitch(rng, 200, 600)
    course = low * _pitch(rng, 2, 5) ** (time / time[-1])
    return _sine(course[::-1] if down else course, time, rng)


def _chord(time: np.ndarray, rng: Rng, semitones: Sequence[float]) -> np.ndarray:
    root = _pitch(rng, 180, 420)
    return _notes([root * 2 ** (s / 12) for s in semitones], time, rng)


def _bell(time: np.ndarray, rng: Rng) -> np.ndarray:
    root, fall = _pitch(rng, 250, 500), rng.uniform(8, 16)
    partials = (1, 2.76, 5.4)
    return sum(
        np.exp(-fall * (k + 1) * time) * _sine(root * p, time, rng) for k, p in enumerate(partials)
    ) + np.zeros(len(time))


def _pluck(time: np.ndarray, rng: Rng) -> np.ndarray:
    root, fall = _pitch(rng, 150, 450), rng.uniform(8, 16)
    return sum(
        np.exp(-fall * k * time) / k * _sine(root * k, time, rng) for k in range(1, 7)
    ) + np.zeros(len(time))


def _vowel(time: np.ndarray, rng: Rng, formants: Sequence[float]) -> np.ndarray:
    root, size = _pitch(rng, 100, 240), rng.lognormal(0, 0.06)
    wave = np.zeros(len(time))
    for k in range(1, int(3600 / root)):
        near = sum(np.exp(-(((root * k / (f * size) - 1) / 0.13) ** 2)) for f in formants)
        wave += (near + 0.02) / np.sqrt(k) * _sine(root * k, time, rng)
    return wave


def _drum(time: np.ndarray, rng: Rng) -> np.ndarray:
    course = _pitch(rng, 60, 120) * (1 + 3 * np.exp(-40 * time))
    skin = _sine(course, time, rng) * np.exp(-rng.uniform(10, 20) * time)
    return skin + 0.3 * rng.normal(size=len(time)) * np.exp(-80 * time)


def _hiss(time: np.ndarray, rng: Rng) -> np.ndarray:
    spectrum = np.fft.rfft(rng.normal(size=len(time)))
    hertz = np.fft.rfftfreq(len(time), 1 / RATE)
    centre = _pitch(rng, 700, 2500)
    return np.fft.irfft(spectrum * np.exp(-(((hertz - centre) / 350) ** 2)), len(time))


def _clicks(time: np.ndarray, rng: Rng) -> np.ndarray:
    pace = _pitch(rng, 25, 60)
    since = np.mod(time * pace + rng.random(), 1) / pace
    return np.exp(-since * 900) * np.sin(2 * np.pi * _pitch(rng, 800, 2000) * since)


def _vibrato(time: np.ndarray, rng: Rng) -> np.ndarray:
    root, pace = _pitch(rng, 300, 900), rng.uniform(12, 30)
    return _sine(root * (1 + 0.2 * _sine(pace, time, rng)), time, rng)


def _tremolo(time: np.ndarray, rng: Rng) -> np.ndarray:
    tone, pace = _sine(_pitch(rng, 300, 900), time, rng), rng.uniform(12, 30)
    return tone * (1 + 0.9 * _sine(pace, time, rng))


TONES: dict[str, Callable[[np.ndarray, Rng], np.ndarray]] = {
    "sweep_up": lambda time, rng: _sweep(time, rng, down=False),
    "tremolo": _tremolo,
    "drum": _drum,
    "vowel_a": lambda time, rng: _vowel(time, rng, (750, 1200, 2500)),
    "octave": lambda time, rng: _chord(time, rng, (0, 12)),
    "hiss": _hiss,
    "sweep_down": lambda time, rng: _sweep(time, rng, down=True),
    "vibrato": _vibrato,
    "bell": _bell,
    "vowel_i": lambda time, rng: _vowel(time, rng, (300, 2200, 3000)),
    "triad": lambda time, rng: _chord(time, rng, (0, 4, 7)),
    "clicks": _clicks,
    "pluck": _pluck,
}
"""How each kind of sound is made, of times in s and random draws."""


def draw_sound(name: str, length: int, rng: Rng) -> np.ndarray:
    """Record a sound.

    Args:
        name: One of `TONES`.
        length: Samples.
        rng: Decides pitch, onset, loudness and noise.

    Returns:
        Float array of shape `(length,)`, not clipped.
    """
    wave = TONES[name](np.arange(length) / RATE, rng)
    wave = wave / np.abs(wave).max() * rng.uniform(0.3, 0.95)
    late = int(rng.uniform(0, 0.15) * length)
    wave = np.concatenate([np.zeros(late), wave[: length - late]])
    return wave + rng.normal(0, np.exp(rng.uniform(np.log(0.005), np.log(0.08))), length)
