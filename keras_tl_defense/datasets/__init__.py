"""Images and signals to train and to test with: drawn by code, or read from a user's folder.

`synthetic`, `scans` and `signals` draw everything and need no file. `gtsrb` and `faces` read
folders that the user has; nothing is downloaded. Loaders of images return an `ImageDataset`, those
of signals a `SignalDataset`.
"""

from keras_tl_defense.datasets import faces, gtsrb, scans, signals, synthetic
from keras_tl_defense.datasets.base import ImageDataset
from keras_tl_defense.datasets.signals import SignalDataset

__all__ = ["ImageDataset", "SignalDataset", "faces", "gtsrb", "scans", "signals", "synthetic"]
