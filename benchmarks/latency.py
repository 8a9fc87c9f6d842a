"""What an answer costs beside the Student's own, on one machine in one run.

    python benchmarks/latency.py OUTPUT [--networks VGG16 …] [--batches 1 32] [--times 5]

Networks have random weights, since only their shapes matter, and heads that tell nothing; ten
classes, pairs of them, five members for an image. "defended" is all that `predict` computes: the
Student, five members, four references, the draw and the score; "votes" the Student and the members
alone, which is what the paper measures. Times are medians, each divided by that of the Student's
own pass, measured in turn with it. "masked" is "votes" without compact execution. "compact" is the
share of the frozen layers' multiplications that runs compact. Writes `latency.csv` and
`latency.json` to `OUTPUT`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.ensemble.plan import multiply_adds, plan_execution
from keras_tl_defense.graph import ModelGraph

CLASSES, PER_CLASS = 10, 2
NETWORKS = {
    "six convolutions": 32,
    "VGG16": 224,
    "MobileNet": 224,
    "ResNet50": 224,
    "MobileNetV2": 224,
    "EfficientNetB0": 224,
}
EARLY = {"six convolutions": "pool1", "VGG16": "block1_pool", "MobileNet": "conv_dw_4_relu"}
"""Where the heads read in "first 0.7", which is what the search tends to find."""


def build(name: str) -> Any:
    """A Student with frozen layers of random weights."""
    size = NETWORKS[name]
    keras.utils.set_random_seed(0)
    if name == "six convolutions":
        body = ktd.teachers.build_teacher((size, size, 3), 10)
        base = keras.Model(body.inputs, body.get_layer("flatten").output, name="base")
    else:
        shape = (size, size, 3)
        make = getattr(keras.applications, name)
        base = make(weights=None, include_top=False, input_shape=shape, pooling="avg")
    base.trainable = False
    return keras.Sequential([keras.Input((size, size, 3)), base, keras.layers.Dense(CLASSES)])


def medians(functions: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median seconds of each, run in turn; first runs are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(times + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            tf.nest.map_structure(np.asarray, function())
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def measure(name: str, label: str, batches: list[int], times: int) -> list[dict[str, Any]]:
    """A row for each batch size."""
    student = build(name)
    size = NETWORKS[name]
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), PER_CLASS)
    x = rng.integers(0, 256, (len(y), size, size, 3), dtype=np.uint8)
    ratio = float(label.split()[-1])
    options: dict[str, Any] = {"ratios": {"*conv*": ratio}}
    graph = ModelGraph(student)
    if label.startswith("first"):
        first = next(s.name for s in graph.steps if isinstance(s.layer, keras.layers.Conv2D))
        options = {"ratios": {first: ratio}, "head_layer": EARLY[name]}
    defence = ktd.DifferentiatorEnsemble(student, seed=0, **options)
    defence.adapt(x, y, verbose=0)
    defence._set_stage(2)  # heads of zeros serve; fitted ones would ask for gentler ratios
    bank = defence.get_layer("differentiators")
    graph = defence._graph
    blocks = bank.masks.blocks
    masked = MaskedBody(graph, bank.tensor, blocks)
    steps = [graph.steps[number] for number in graph.ancestors(bank.tensor)]
    split = plan_execution(graph, bank.tensor, blocks, defence.ratios).split
    ran = [] if split is None else [graph.steps[number] for number in graph.ancestors(split)]
    share = sum(multiply_adds(graph, s) for s in ran) / sum(multiply_adds(graph, s) for s in steps)
    k = defence.ensemble_size

    def members(images: Any, body: Callable[..., Any]) -> Any:
        values = graph.run(images, [graph.output])
        rows = tf.repeat(tf.range(tf.shape(images)[0]), k)[:, None]
        drawn = tf.random.uniform((tf.shape(images)[0] * k,), 0, bank.count, tf.int32)
        return values[graph.output], body(values, rows, drawn)

    def run_masked(values: Any, rows: Any, drawn: Any) -> Any:
        given = (bank.masks.filter_masks(drawn), bank.masks.connection_mask)
        return masked(values, rows, drawn, *given)

    def own(images: Any) -> Any:
        return graph.run(images, [graph.output])[graph.output]

    spec = [tf.TensorSpec((None, size, size, 3), tf.float32)]
    plain = tf.function(own, input_signature=spec)
    votes = tf.function(partial(members, body=bank.body_features), input_signature=spec)
    all_masked = tf.function(partial(members, body=run_masked), input_signature=spec)
    defended = tf.function(defence.call, input_signature=spec)
    rows = []
    for batch in batches:
        images = tf.constant(rng.integers(0, 256, (batch, size, size, 3)), tf.float32)
        taken = medians(
            {
                "student": partial(plain, images),
                "votes": partial(votes, images),
                "defended": partial(defended, images),
                "masked": partial(all_masked, images),
            },
            times,
        )
        alone = taken.pop("student")
        rows.append(
            {
                "network": name,
                "pixels": size,
                "ratios": label,
                "batch": batch,
                "Student, ms an image": 1000 * alone / batch,
                **{key: value / alone for key, value in taken.items()},
                "compact": share,
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every network and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        for label in ("all 0.5", "all 0.7", *(["first 0.7"] if name in EARLY else [])):
            rows += measure(name, label, arguments.batches, arguments.times)
            table = pd.DataFrame(rows)
            table.to_csv(arguments.output / "latency.csv", index=False)
            table.to_json(arguments.output / "latency.json", orient="records")
    print(table.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
