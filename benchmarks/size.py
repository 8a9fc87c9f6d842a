"""Bytes on disk and memory of a served defence, beside those of the Student alone.

    python benchmarks/size.py OUTPUT [--networks VGG16 …] [--classes 43] [--ratio 0.7]
        [--batch 1]

Networks of random weights, since only shapes matter, and all pairs of classes, with heads that are
not fitted. Sizes are of the exported SavedModel and of the `.keras` file, each against the
Student's (not as Keras's `export` writes it, which may hold every weight twice). Peaks of memory
are of fresh processes that load the SavedModel and answer, Linux's `VmHWM`; "idle" is that of one
that has only imported TensorFlow. Also prints `defence.memory()`. Writes `size.csv`, `size.json`
and `memory.csv` to `OUTPUT`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tensorflow as tf
from latency import NETWORKS, build

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

ANSWER = """
import sys
import numpy as np
import tensorflow as tf
folder, batch, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if folder:
    serve = tf.saved_model.load(folder).signatures["serving_default"]
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3))
    for _ in range(3):
        tf.nest.map_structure(np.asarray, serve(tf.constant(images, tf.float32)))
status = open("/proc/self/status").read()
print("KiB", next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


def on_disk(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def peak(folder: Path | str, batch: int, size: int) -> float:
    """MiB that a fresh process has needed at most to load the SavedModel and answer."""
    command = [sys.executable, "-c", ANSWER, str(folder), str(batch), str(size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split("KiB")[-1]) / 1024


def measure(
    name: str, head: Literal["one_vs_rest", "pair"], arguments: argparse.Namespace
) -> tuple[dict[str, Any], pd.DataFrame]:
    """A row of the table, and the parts of the defence."""
    student = build(name, arguments.classes)
    size, classes = NETWORKS[name], arguments.classes
    y = np.repeat(np.arange(classes), 2)
    x = np.random.default_rng(0).integers(0, 256, (len(y), size, size, 3), dtype=np.uint8)
    defence = ktd.DifferentiatorEnsemble(
        student, {"*conv*": arguments.ratio}, head=head, seed=0, key=bytes(16)
    )
    defence.adapt(x, y, verbose=0)
    defence._set_stage(2)  # heads of zeros are as large as fitted ones
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        exported = defence.export(folder / "defended")
        defence.save(folder / "defended.keras")
        student.save(folder / "student.keras")
        archive = keras.export.ExportArchive()
        spec = [tf.TensorSpec((None, size, size, 3), tf.float32)]
        archive.add_endpoint("serving_default", lambda x: student(x), input_signature=spec)
        with contextlib.redirect_stdout(io.StringIO()):
            archive.write_out(str(folder / "student"))
        sizes = {
            "SavedModel, MiB": on_disk(exported) / 2**20,
            "SavedModel / Student's": on_disk(exported) / on_disk(folder / "student"),
            ".keras / Student's": on_disk(folder / "defended.keras")
            / on_disk(folder / "student.keras"),
        }
        places: dict[str, Path | str] = {"idle": "", "Student": folder / "student"}
        places["defended"] = exported
        peaks = {
            f"peak {what}, MiB": peak(place, arguments.batch, size)
            for what, place in places.items()
        }
    row = {
        "network": name,
        "head": head,
        "differentiators": len(defence.member_classes),
        **sizes,
        **peaks,
    }
    return row, defence.memory().assign(network=name, head=head)


def main() -> None:
    """Measure every network and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["VGG16", "MobileNet"])
    parser.add_argument("--classes", type=int, default=43)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows, parts = [], []
    for name in arguments.networks:
        heads: list[Literal["one_vs_rest", "pair"]] = ["one_vs_rest", "pair"]
        for head in heads:
            row, memory = measure(name, head, arguments)
            rows.append(row)
            parts.append(memory)
            table, memories = pd.DataFrame(rows), pd.concat(parts)
            table.to_csv(arguments.output / "size.csv", index=False)
            table.to_json(arguments.output / "size.json", orient="records")
            memories.to_csv(arguments.output / "memory.csv", index=False)
            print(memory.to_string(float_format="{:.3g}".format), flush=True)
    print(table.to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
