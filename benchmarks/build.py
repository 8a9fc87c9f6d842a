"""What it takes to build all pairs' differentiators, beside the Student's training and TFMOT.

    python benchmarks/build.py DATA OUTPUT [--ratio 0.7] [--epochs 10] [--pairs 5]

A Student of GTSRB (43 classes) on the frozen layers of a Teacher of six convolutions, cut at
`flatten`, trained by Keras as a user would. Then `adapt` and `fit`, all 903 pairs, for pair heads
and one-vs-rest heads; and, in a process with the legacy Keras, what a user would otherwise write
for a pair: the Student wrapped by TensorFlow Model Optimization, trained on 100 images of each of
the two classes for five epochs, and stripped. `DATA` holds gtsrb32.npz and the Teacher.
Writes `build.csv` and `build.json` to `OUTPUT`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import keras_tl_defense as ktd
from keras_tl_defense._keras import LEGACY, keras
from keras_tl_defense.datasets import gtsrb

TEACHER, CUT = "vgg32_tiny_imagenet.h5", "flatten"
PER_CLASS, PAIR_EPOCHS = 100, 5


def make_student(teacher: Any, classes: int) -> Any:
    """The Teacher's layers up to the cut, frozen, and a Dense layer."""
    base = keras.Model(teacher.inputs[0], teacher.get_layer(CUT).output, name="base")
    base.trainable = False
    inputs = keras.Input(teacher.inputs[0].shape[1:])
    student = keras.Model(inputs, keras.layers.Dense(classes)(base(inputs)), name="student")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    student.compile(keras.optimizers.Adam(1e-4), loss)
    return student


def with_tfmot(teacher: Any, data: Any, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each of some pairs, pruned and trained by TFMOT."""
    import tensorflow_model_optimization as tfmot

    student = make_student(teacher, data.classes)
    convolutions = [layer.name for layer in teacher.layers if "conv" in layer.name]
    activations = ktd.ClassActivations(student, convolutions)
    activations.adapt(data.x_train, data.y_train, verbose=0)
    weights = student.get_weights()
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    seconds = []
    rng = np.random.default_rng(0)
    for _ in range(arguments.pairs + 1):
        pair = rng.permutation(data.classes)[:2]
        chosen = [np.flatnonzero(data.y_train == label)[:PER_CLASS] for label in pair]
        x = data.x_train[np.concatenate(chosen)].astype(np.float32)
        y = np.repeat([0.0, 1.0], [len(own) for own in chosen])[:, None]
        start = time.perf_counter()
        copy = keras.models.clone_model(student)
        copy.set_weights(weights)
        body = copy.get_layer("base")
        model = keras.Sequential([body, keras.layers.Dense(1)])
        model.build((None, *x.shape[1:]))
        batches = -(-len(x) // 32)
        schedule = ktd.ActivationPruningSchedule(arguments.ratio, 1, batches)
        pruned = ktd.prune_low_activation(model, activations, tuple(pair), schedule)
        pruned.compile("adam", loss)
        update = [tfmot.sparsity.keras.UpdatePruningStep()]
        pruned.fit(x, y, epochs=PAIR_EPOCHS, callbacks=update, verbose=0)
        tfmot.sparsity.keras.strip_pruning(pruned)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]  # the first loads libraries


def main() -> None:
    """Measure, print a table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=5, help="that TFMOT makes")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    data = gtsrb.load(arguments.data, size=32)
    teacher = ktd.teachers.load_teacher(arguments.data / TEACHER)
    tfmot_file = arguments.output / "tfmot.json"
    if LEGACY:
        tfmot_file.write_text(json.dumps(with_tfmot(teacher, data, arguments)), encoding="utf-8")
        return
    student = make_student(teacher, data.classes)
    start = time.perf_counter()
    student.fit(data.x_train.astype(np.float32), data.y_train, epochs=arguments.epochs, verbose=0)
    training = time.perf_counter() - start
    rows: list[dict[str, Any]] = [{"what": "the Student's training", "seconds": training}]
    for head in ("pair", "one_vs_rest"):
        defence = ktd.DifferentiatorEnsemble(
            student, {"*conv*": arguments.ratio}, head=head, head_layer="base", seed=0
        )
        start = time.perf_counter()
        defence.adapt(data.x_train, data.y_train, verbose=0)
        defence.fit(data.x_train, data.y_train, images_per_class=PER_CLASS, verbose=0)
        seconds = time.perf_counter() - start
        count = len(defence.member_classes)
        row = {"what": f"all {count} pairs, {head}", "seconds": seconds}
        rows.append({**row, "for a pair": seconds / count})
    subprocess.run(
        [sys.executable, *sys.argv], env={**os.environ, "TF_USE_LEGACY_KERAS": "1"}, check=True
    )
    each = float(np.median(json.loads(tfmot_file.read_text(encoding="utf-8"))))
    rows.append({"what": "TFMOT, one model for a pair", "for a pair": each})
    table = pd.DataFrame(rows)
    table["of the training"] = table["seconds"] / training
    table["times faster than TFMOT"] = each / table["for a pair"]
    table.to_csv(arguments.output / "build.csv", index=False)
    table.to_json(arguments.output / "build.json", orient="records")
    print(table.to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
