"""The Students of real images that the benchmarks defend, and the attacks on them, made once.

What is made is kept in a folder: Students as Keras files, crafted images as `.npz`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.datasets import faces, gtsrb

_VALIDATION_TRACKS = 0.2
_VALIDATION_FACES = 4


@dataclass(frozen=True)
class Case:
    """A Student, what it was made from, and the images it was not trained on.

    Attributes:
        name: One of `CASES`.
        teacher: The public model.
        student: The Student, trained on `x_train` alone.
        cut: Name of its last frozen layer, where the Teacher is attacked.
        budget: DSSIM budget of the attacks.
        preprocessing: What the Teacher and the Student need before them, or `None`.
        x_train, y_train: Training images.
        x_val, y_val: Held out of training; of GTSRB, other tracks.
        x_test, y_test: The test set.
    """

    name: str
    teacher: Any
    student: Any
    cut: str
    budget: float
    preprocessing: Any
    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def student_class(self, x: np.ndarray) -> np.ndarray:
        """The Student's classes of images."""
        return np.asarray(self.student.predict(self.prepared(x), verbose=0).argmax(axis=1))

    def augmented(self) -> tuple[np.ndarray, np.ndarray]:
        """The training images and labels; faces are mirrored, too, as the Student saw them."""
        if self.name == "gtsrb-mid":
            return self.x_train, self.y_train
        return np.concatenate([self.x_train, self.x_train[:, :, ::-1]]), np.tile(self.y_train, 2)

    def prepared(self, x: np.ndarray) -> np.ndarray:
        """Images as the Student takes them."""
        x = x.astype(np.float32)
        return x if self.preprocessing is None else np.asarray(self.preprocessing(x))


CASES = {
    "gtsrb-mid": ("vgg32_tiny_imagenet.h5", "pool2", 0.02),
    "lfw-flatten": ("vgg32_faces.h5", "flatten", 0.01),
    "lfw-fc2": ("vgg32_faces.h5", "fc2", 0.01),
    "lfw-mobilenet": ("mobilenet_025_imagenet_notop.h5", "conv_pw_11_relu", 0.01),
}
"""Teacher, cut and budget of each Student."""


def load_case(name: str, folder: Path, cache: Path) -> Case:
    """Read or make the Student called `name`.

    Args:
        name: One of `CASES`.
        folder: Holds gtsrb32.npz, lfw64.npz and the Teachers.
        cache: Where Students are kept.
    """
    file, cut, budget = CASES[name]
    keras.utils.set_random_seed(0)
    mobile = name == "lfw-mobilenet"
    size = 96 if mobile else 32
    data = (gtsrb if name == "gtsrb-mid" else faces).load(folder, size=size)
    held_out = _held_out(data.y_train, data.track_train)
    x, y = data.x_train[~held_out], data.y_train[~held_out]
    if mobile:
        teacher = keras.applications.MobileNet(
            input_shape=(96, 96, 3), alpha=0.25, include_top=False, weights=str(folder / file)
        )
    else:
        teacher = ktd.teachers.load_teacher(folder / file)
    preprocessing = keras.layers.Rescaling(1 / 127.5, offset=-1) if mobile else None
    path = cache / f"{name}.keras"
    if path.exists():
        student = keras.models.load_model(path)
    else:
        if name == "gtsrb-mid":
            student = _mid_layer_student(teacher, cut, x, y, data.classes)
        else:
            faces_twice = np.concatenate([x, x[:, :, ::-1]]).astype(np.float32)
            if preprocessing is not None:
                faces_twice = np.asarray(preprocessing(faces_twice))
            student = ktd.teachers.make_student(
                teacher, cut, faces_twice, np.tile(y, 2), data.classes, epochs=40, verbose=0
            )
        cache.mkdir(parents=True, exist_ok=True)
        student.save(path)
    return Case(
        name,
        teacher,
        student,
        cut,
        budget,
        preprocessing,
        x,
        y,
        data.x_train[held_out],
        data.y_train[held_out],
        data.x_test,
        data.y_test,
    )


def load_attacks(
    case: Case,
    cache: Path,
    count: int,
    *,
    part: str = "test",
    budget: float | None = None,
    steps: int = 600,
    layer: str | None = None,
    likest: bool = False,
    verbose: int | str = 0,
) -> dict[str, AttackResult]:
    """Read or craft targeted and non-targeted mimicry.

    Args:
        case: The Student.
        cache: Where crafted images are kept.
        count: Attacks of each kind, on images that the Student answers rightly.
        part: Whose images are attacked, `"test"` or `"val"`.
        budget: DSSIM budget; the case's by default.
        steps: Steps of each attack.
        layer: Name of the Teacher's layer that is imitated; the cut by default.
        likest: Takes targets that are like their sources, of the images of the part that the
            Student answers rightly, in place of random ones. A targeted attack then aims at the
            likest class.
        verbose: 0 shows no progress bar.
    """
    budget = case.budget if budget is None else budget
    layer = layer or case.cut
    x, y = (case.x_test, case.y_test) if part == "test" else (case.x_val, case.y_val)
    attack = ktd.attacks.MimicryAttack(
        case.teacher, layer, budget=budget, steps=steps, preprocessing=case.preprocessing
    )
    results = {}
    plan = None
    for kind in ("targeted", "non-targeted"):
        place = ("" if layer == case.cut else f"-{layer}") + "-likest" * likest
        path = cache / f"{case.name}-{part}-{kind}-{count}-{budget:g}-{steps}{place}.npz"
        if not path.exists():
            plan = plan or ktd.attacks.plan_attacks(y, case.student_class(x), count, seed=1)
            source, y_source = x[plan.sources], y[plan.sources]
            targets, candidates = plan.targets, plan.candidates
            if likest:
                right = np.flatnonzero(case.student_class(x) == y)
                candidates = right[attack.likest(source, y_source, x[right], y[right])]
                targets = candidates[:, 0]
            if kind == "targeted":
                result = attack(source, x[targets], y_source, y[targets], verbose=verbose)
            else:
                result = attack.untargeted(source, x[candidates], y_source, verbose=verbose)
            values = {f.name: getattr(result, f.name) for f in fields(AttackResult)}
            np.savez(path, **{k: v for k, v in values.items() if v is not None})
        with np.load(path) as file:
            stored = {name: file[name] for name in file.files}
        results[kind] = AttackResult(**stored)
    return results


def _held_out(y: np.ndarray, tracks: np.ndarray | None) -> np.ndarray:
    """Which training images are kept for validation: whole tracks, or a few of each class."""
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(y), bool)
    for label in np.unique(y):
        own = np.flatnonzero(y == label)
        if tracks is None:
            held_out[rng.permutation(own)[:_VALIDATION_FACES]] = True
        else:
            names = rng.permutation(np.unique(tracks[own]))
            chosen = names[: max(1, round(_VALIDATION_TRACKS * len(names)))]
            held_out[own[np.isin(tracks[own], chosen)]] = True
    return held_out


def _mid_layer_student(teacher: Any, cut: str, x: np.ndarray, y: np.ndarray, classes: int) -> Any:
    """The Teacher's layers up to `cut`, frozen, its third block retrained, and two Dense layers."""
    layers = keras.layers
    base = keras.Model(teacher.inputs[0], teacher.get_layer(cut).output, name="base")
    base.trainable = False
    inputs = keras.Input(teacher.inputs[0].shape[1:])
    out = base(inputs, training=False)
    for name in ("conv3_1", "conv3_2"):
        out = layers.Conv2D(192, 3, padding="same", activation="relu", name=name)(out)
    out = layers.MaxPooling2D(name="pool3")(out)
    out = layers.Flatten(name="flatten")(out)
    out = layers.Dropout(0.4, name="dropout1")(out)
    out = layers.Dense(256, activation="relu", name="fc")(out)
    out = layers.Dropout(0.4, name="dropout2")(out)
    student = keras.Model(inputs, layers.Dense(classes, name="logits")(out), name="student")
    for name in ("conv3_1", "conv3_2"):
        student.get_layer(name).set_weights(teacher.get_layer(name).get_weights())
    rng = np.random.default_rng(0)
    share = (1 / np.sqrt(np.bincount(y)))[y]  # between the classes' own frequencies and equal ones
    epochs = 20
    steps = epochs * -(-len(x) // 64)
    student.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for _ in range(epochs):
        chosen = rng.choice(len(x), len(x), p=share / share.sum())
        student.fit(_augmented(x[chosen], rng), y[chosen], batch_size=64, epochs=1, verbose=0)
    return student


def _augmented(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images shifted by up to two pixels and made darker or brighter, at random."""
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    out = np.empty(x.shape, np.float32)
    height, width = x.shape[1:3]
    shifts = rng.integers(0, 5, (len(x), 2))
    for down in range(5):
        for right in range(5):
            own = (shifts == (down, right)).all(axis=1)
            out[own] = padded[own, down : down + height, right : right + width]
    contrast, shift = rng.uniform(0.6, 1.4, (2, len(x), 1, 1, 1)).astype(np.float32)
    mean = out.mean(axis=(1, 2, 3), keepdims=True)
    return np.asarray(np.clip((out - mean) * contrast + mean * shift, 0, 255))


def percent(hits: np.ndarray) -> str:
    """A count with its Wilson interval in percent."""
    rate = ktd.Rate.of(hits)
    return f"{rate.count}/{rate.n} ({100 * rate.low:.0f}–{100 * rate.high:.0f})"


def parser(
    module: str | None, students: Iterable[str] | None = None, attacks: int = 300
) -> argparse.ArgumentParser:
    """The arguments that the benchmarks share.

    Args:
        module: Docstring of the benchmark, whose first line becomes the help.
        students: Names of Students that are measured by default. Defaults to all.
        attacks: How many of each kind are made by default.
    """
    made = argparse.ArgumentParser(description=(module or "").split("\n")[0])
    made.add_argument("data", type=Path, help="folder with gtsrb32.npz, lfw64.npz and the Teachers")
    made.add_argument("cache", type=Path, help="folder for Students, crafted images and results")
    made.add_argument("--students", nargs="+", choices=CASES, default=list(students or CASES))
    made.add_argument("--attacks", type=int, default=attacks, help="of each kind")
    return made
