"""Images to train and to test with: drawn by code, or read from a folder of the user's.

`synthetic` draws every image and needs no file. `gtsrb` and `faces` read folders that the user
has; nothing is downloaded. Every loader returns an `ImageDataset`.
"""

from keras_tl_defense.datasets import faces, gtsrb, synthetic
from keras_tl_defense.datasets.base import ImageDataset

__all__ = ["ImageDataset", "faces", "gtsrb", "synthetic"]
