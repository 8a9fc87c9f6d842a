"""How time and size grow with the number of classes, ten differentiators (or all) for each.

    python benchmarks/growth.py OUTPUT [--classes 10 43 100 300 1000]

Images are drawn: a pattern for each class, 20 noisy copies of it to learn from. The Student has the
six convolutions of an untrained Teacher, frozen, and a Dense layer of its own; half of the first
two convolutions' filters are pruned, and the heads read `pool2` (3136 features of 28×28 images).
Every size runs in a process of its own. Writes `growth.csv` and `growth.json` to `OUTPUT`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

SIDE, TRAIN, TEST = 28, 20, 2
BATCH, TIMES = 32, 5


def draw(classes: int, per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images, each class a pattern of its own."""
    patterns = np.random.default_rng(7).uniform(0, 255, (classes, SIDE, SIDE, 3))
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), per_class)
    noisy = patterns[y] * 0.7 + rng.normal(40, 40, (len(y), SIDE, SIDE, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8), y


def latency(answer: Callable[[], Any]) -> float:
    """Milliseconds for an image of a batch, the median of several; the first is not counted."""
    times = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        answer()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times[1:])) / BATCH


def measure(classes: int) -> dict[str, Any]:
    """Build, save, export and answer; sizes in MiB, times in seconds."""
    keras.utils.set_random_seed(0)
    x, y = draw(classes, TRAIN, seed=0)
    x_test, y_test = draw(classes, TEST, seed=1)
    teacher = ktd.teachers.build_teacher((SIDE, SIDE, 3), 28, widths=(16, 64, 128))
    student = ktd.teachers.make_student(teacher, "flatten", x, y, classes, epochs=8, verbose=0)
    row: dict[str, Any] = {"classes": classes, "all pairs would be": classes * (classes - 1) // 2}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = action()
        row[name] = time.perf_counter() - start
        return result

    defence = ktd.DifferentiatorEnsemble(
        student,
        {"conv1*": 0.5},
        head_layer="pool2",
        members_per_class=min(10, classes - 1),
        seed=0,
        key=bytes(16),
    )
    timed("adapt s", lambda: defence.adapt(x, y, verbose=0))
    timed("fit s", lambda: defence.fit(x, y, verbose=0))
    row["differentiators"] = len(defence.member_classes)
    rates = defence.evaluate(x_test, y_test, verbose=0)
    row["student accuracy"], row["retention"] = (
        rates[name].rate for name in ("student_accuracy", "retention")
    )
    with tempfile.TemporaryDirectory() as folder:
        timed("save s", lambda: defence.save(Path(folder) / "defence.keras"))
        row["saved MiB"] = (Path(folder) / "defence.keras").stat().st_size / 2**20
        exported = timed("export s", lambda: defence.export(Path(folder) / "serving"))
        row["exported MiB"] = (
            sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) / 2**20
        )
        serve = tf.saved_model.load(str(exported)).signatures["serving_default"]
        batch = tf.constant(x_test[:BATCH].astype(np.float32))
        own = defence.explain(x_test[:BATCH], verbose=0)["answer"]
        assert (serve(batch)["answer"].numpy() == own).all()
        row["served, ms an image"] = latency(lambda: serve(batch)["answer"].numpy())
        plain = tf.function(lambda images: student(images, training=False))
        row["Student alone, ms an image"] = latency(lambda: plain(batch).numpy())
    row["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def main() -> None:
    """Measure each number of classes in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 43, 100, 300, 1000])
    parser.add_argument("--one", action="store_true", help="measure here, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        arguments.output.write_text(json.dumps(measure(arguments.classes[0])), encoding="utf-8")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for classes in arguments.classes:
        found = arguments.output / f"growth-{classes}.json"
        command = [sys.executable, __file__, str(found), "--one", "--classes", str(classes)]
        subprocess.run(command, check=True)
        rows.append(json.loads(found.read_text(encoding="utf-8")))
        table = pd.DataFrame(rows)
        table.to_csv(arguments.output / "growth.csv", index=False)
        table.to_json(arguments.output / "growth.json", orient="records")
        print(table.T.to_string(float_format="{:.2f}".format), flush=True)


if __name__ == "__main__":
    main()
