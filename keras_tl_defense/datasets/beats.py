"""The drawings behind the synthetic heartbeats: waves that are sums of bells.

A beat is some bells in time, of an electrocardiogram's P wave, QRS complex and T wave. Its kinds
differ in the bells, and premature ones in when they come.
"""

from __future__ import annotations

import numpy as np

Bell = tuple[float, float, float]  # height in mV, centre and width in s, from the R wave

RATE = 128.0  # samples a second
_P, _Q, _R, _S, _T = (
    (0.15, -0.17, 0.022),
    (-0.12, -0.035, 0.010),
    (1.0, 0.0, 0.012),
    (-0.22, 0.035, 0.011),
    (0.30, 0.25, 0.042),
)
_WIDE: list[Bell] = [(1.2, 0.0, 0.045), (-0.35, 0.11, 0.035), (-0.45, 0.28, 0.06)]

BEATS: dict[str, list[Bell]] = {
    "normal": [_P, _Q, _R, _S, _T],
    "left_bundle_branch_block": [_P, (0.7, -0.015, 0.022), (0.75, 0.05, 0.025), (-0.3, 0.27, 0.05)],
    "right_bundle_branch_block": [
        _P,
        _Q,
        (0.7, 0, 0.012),
        (-0.3, 0.035, 0.012),
        (0.55, 0.075, 0.017),
        (0.2, 0.28, 0.045),
    ],
    "st_elevation": [_P, _Q, _R, (0.28, 0.10, 0.04), (0.4, 0.22, 0.055)],
    "st_depression": [_P, _Q, _R, _S, (-0.22, 0.10, 0.04), (0.22, 0.26, 0.04)],
    "atrial_premature": [(-0.13, -0.13, 0.016), _Q, _R, _S, _T],
    "ventricular_premature": _WIDE,
    "pre_excitation": [(0.15, -0.12, 0.022), (0.3, -0.035, 0.018), _R, _S, (-0.18, 0.25, 0.042)],
    "inverted_t": [_P, _Q, _R, _S, (-0.3, 0.25, 0.042)],
    "tall_t": [(0.06, -0.18, 0.03), _Q, (0.8, 0, 0.015), _S, (0.85, 0.23, 0.028)],
    "long_qt": [_P, _Q, _R, _S, (0.28, 0.38, 0.06)],
    "paced": [(1.3, -0.07, 0.004), *_WIDE],
}
"""What a beat of each kind is made of."""

_PREMATURE = ("atrial_premature", "ventricular_premature")


def draw_heartbeat(name: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """Record a beat in the middle, and what comes before and after it.

    Args:
        name: One of `BEATS`. The other beats in sight are of the same kind, but for a premature one
            they are normal.
        length: Samples.
        rng: Decides the heart's rate, the shape of its waves, the electrode and the noise.

    Returns:
        Float array of shape `(length,)`, in units of 2 mV, not clipped.
    """
    time = (np.arange(length) - length / 2) / RATE + rng.normal(0, 0.06)
    interval = 60 / rng.uniform(55, 105)
    premature = name in _PREMATURE
    before = interval * (rng.uniform(0.55, 0.72) if premature else rng.normal(1, 0.03))
    after = interval * (rng.uniform(1.2, 1.4) if premature else rng.normal(1, 0.03))
    count = 1 + int(length / RATE / 2 / interval)
    heights = rng.lognormal(0, 0.12, 8)
    stretch, shear = rng.lognormal(0, 0.08), rng.lognormal(0, 0.06)
    starts = [
        0.0,
        *(-before - interval * k for k in range(count)),
        *(after + interval * k for k in range(count)),
    ]
    wave = np.zeros(length)
    for beat, start in enumerate(starts):
        bells = BEATS["normal" if premature and beat else name]
        for (height, centre, width), factor in zip(bells, heights, strict=False):
            height *= factor * rng.lognormal(0, 0.04)
            wave += height * np.exp(
                -(((time - start - centre * shear) / (width * stretch)) ** 2) / 2
            )
    wave *= rng.lognormal(0, 0.2)
    drift, hum = rng.uniform(0, 0.15), rng.uniform(0, 0.03)
    wave += drift * np.sin(2 * np.pi * (rng.uniform(0.15, 0.5) * time + rng.random()))
    wave += hum * np.sin(2 * np.pi * (50 * time + rng.random()))
    return (wave + rng.normal(0, rng.uniform(0.02, 0.08), length)) / 2
