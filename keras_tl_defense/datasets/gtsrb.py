"""The German Traffic Sign Recognition Benchmark: photographs of 43 kinds of traffic signs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from skimage.io import imread

from keras_tl_defense._validation import check_integer
from keras_tl_defense.datasets.base import (
    ImageDataset,
    check_folder,
    read_pack,
    resize_images,
)

PACK = "gtsrb32.npz"
_ARRAYS = ("x_train", "y_train", "track_train", "x_test", "y_test")
_TRAINING = Path("Final_Training", "Images")
_TEST = Path("Final_Test", "Images")
_LABELS = "GT-final_test.csv"
_UNLABELLED = "GT-final_test.test.csv"

CLASS_NAMES = (
    *(f"speed limit {speed} km/h" for speed in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no passing",
    "no passing for vehicles over 3.5 t",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no vehicles over 3.5 t",
    "no entry",
    "general danger",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "straight ahead or right",
    "straight ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for vehicles over 3.5 t",
)


def load(root: str | Path, size: int = 32, frames_per_track: int | None = 10) -> ImageDataset:
    """Read the benchmark from a folder, as one packed file or in its official layout.

    The packed file is `gtsrb32.npz`, with the arrays `x_train`, `y_train`, `track_train`,
    `x_test` and `y_test`. The official layout is that of the benchmark's archives, unpacked into
    one folder, with or without their outer folder `GTSRB`: training images in
    `Final_Training/Images/000NN/TTTTT_FFFFF.ppm` (class, track, frame) and test images in
    `Final_Test/Images/`, their classes in `GT-final_test.csv` next to them, one folder up, or in
    `root`. Where both stand in the folder, the packed file is read.

    Whole frames are resized to squares; the boxes around the signs are not used. A track is a
    series of frames of one physical sign, so a part that is split off must hold whole tracks:
    `track_train` numbers them, each track of each class once.

    Args:
        root: String or path. The folder that holds the data.
        size: Integer. The height and width that the frames are resized to. Defaults to `32`.
        frames_per_track: Integer or `None`. How many frames, evenly spaced, are kept of each
            training track; a track with fewer keeps them all, and so does `None`. Defaults to
            `10`.

    Returns:
        `ImageDataset`, its images of shape `(size, size, 3)`, with 43 classes. Training images
        are ordered by class, track and frame; test images as they stand in the file.

    Raises:
        FileNotFoundError: There is no such folder, neither layout is in it, or a part of the
            official layout is missing.
        ValueError: An argument is out of range, an image cannot be read, the file of the test
            classes has none in it, or the packed file is damaged.

    Reference:
        Stallkamp et al., "Man vs. computer", Neural Networks 32, 2012.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> from keras_tl_defense.datasets import synthetic
    >>> drawn = synthetic.load_signs(train_per_class=4, test_per_class=1)
    >>> arrays = {name: getattr(drawn, name) for name in ("x_train", "y_train", "x_test", "y_test")}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/gtsrb32.npz", track_train=np.arange(64) // 2, **arrays)
    ...     load(folder, frames_per_track=1)
    ImageDataset(classes=43, image_shape=(32, 32, 3), train=32, test=16)
    """
    size = check_integer("size", size, 8)
    if frames_per_track is not None:
        frames_per_track = check_integer("frames_per_track", frames_per_track, 1)
    folder = check_folder(root)
    if (folder / PACK).is_file():
        return _load_pack(folder / PACK, size, frames_per_track)
    for base in (folder, folder / "GTSRB"):
        if (base / _TRAINING).is_dir():
            return _load_official(folder, base, size, frames_per_track)
    raise FileNotFoundError(
        f"The folder does not hold the benchmark. Expected the file {PACK}, or the folder "
        f"{_TRAINING} or {Path('GTSRB') / _TRAINING}; unpack the official archives there. "
        f"Received: root={str(root)!r}"
    )


def _load_pack(path: Path, size: int, frames_per_track: int | None) -> ImageDataset:
    arrays = read_pack(path, _ARRAYS)
    labels, tracks = arrays["y_train"].astype(np.int64), arrays["track_train"].astype(np.int64)
    # A track's number may start anew in each class, so a track is a pair of numbers.
    tracks = np.unique(np.stack([labels, tracks], axis=1), axis=0, return_inverse=True)[1].ravel()
    kept = _spaced(tracks, frames_per_track)
    return ImageDataset(
        x_train=resize_images(arrays["x_train"][kept], size),
        y_train=labels[kept],
        x_test=resize_images(arrays["x_test"], size),
        y_test=arrays["y_test"].astype(np.int64),
        class_names=CLASS_NAMES,
        track_train=tracks[kept].astype(np.int64),
    )


def _load_official(root: Path, base: Path, size: int, frames_per_track: int | None) -> ImageDataset:
    paths = sorted((base / _TRAINING).glob("[0-9][0-9][0-9][0-9][0-9]/*_*.ppm"))
    if not paths:
        raise FileNotFoundError(
            "The folder of training images holds none. Expected images like "
            f"00000/00000_00000.ppm in {base / _TRAINING}; unpack the official archive there. "
            f"Received: root={str(root)!r}"
        )
    names, tracks = np.unique(
        [f"{path.parent.name}/{path.name.split('_')[0]}" for path in paths], return_inverse=True
    )
    kept = _spaced(tracks, frames_per_track)
    test_paths, test_labels = _test_images(root, base)
    return ImageDataset(
        x_train=_read_images([paths[index] for index in kept], size),
        y_train=np.array([int(names[track][:5]) for track in tracks[kept]], np.int64),
        x_test=_read_images(test_paths, size),
        y_test=test_labels,
        class_names=CLASS_NAMES,
        track_train=tracks[kept].astype(np.int64),
    )


def _test_images(root: Path, base: Path) -> tuple[list[Path], np.ndarray]:
    """Find the test images and their classes, in the order of the file of the classes."""
    places = [base / _TEST, base / _TEST.parent, base, root]
    tables = [place / _LABELS for place in places if (place / _LABELS).is_file()]
    for path in tables:
        table = pd.read_csv(path, sep=";")
        if {"Filename", "ClassId"} <= set(table.columns):
            images = [base / _TEST / str(name) for name in table["Filename"]]
            return images, table["ClassId"].to_numpy(np.int64)
    if tables:
        raise ValueError(
            f"The file {tables[0]} does not tell the classes of the test images. Expected the "
            "columns Filename and ClassId, separated by semicolons; take the file from the archive "
            f"GTSRB_Final_Test_GT.zip, as {_UNLABELLED} is the one without classes. Received: "
            f"columns={list(pd.read_csv(tables[0], sep=';').columns)}"
        )
    raise FileNotFoundError(
        f"The classes of the test images are missing. Expected {_LABELS} in {places[0]}, in "
        f"{places[1]} or in {root}; take it from the archive GTSRB_Final_Test_GT.zip "
        f"({_UNLABELLED} has no classes). Received: root={str(root)!r}"
    )


def _spaced(tracks: np.ndarray, count: int | None) -> np.ndarray:
    """Return the sorted indices of `count` evenly spaced frames of every track."""
    frames = [np.flatnonzero(tracks == track) for track in np.unique(tracks)]
    if count is not None:
        frames = [
            track[(np.arange(count) * 2 + 1) * len(track) // (2 * count)]
            if len(track) > count
            else track
            for track in frames
        ]
    return np.sort(np.concatenate(frames))


def _read_images(paths: list[Path], size: int) -> np.ndarray:
    images = np.empty((len(paths), size, size, 3), np.uint8)
    for index, path in enumerate(paths):
        try:
            images[index] = resize_images(imread(path)[np.newaxis], size)[0]
        except (OSError, SyntaxError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"The image {path} cannot be read ({reason}). Expected an RGB image of whole "
                f"bytes; unpack the archive again. Received: path={str(path)!r}"
            ) from error
    return images
