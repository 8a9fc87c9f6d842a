"""What an answer costs beside the Student's own, on one machine in one run.

    python benchmarks/latency.py OUTPUT [--networks VGG16 …] [--ratios "all 0.7" …]
        [--batches 1 256] [--times 5]

Networks have random weights, since only their shapes matter, and heads that tell nothing; ten
classes, which the Student's answers to noise spread over, pairs of them, five members for an image.
"defended" is all that one call of the model computes: the Student, five members, four references,
the draw and the score; "votes" the Student, the draw and the members' votes alone, as in the paper.
Times are medians, each divided by that of the Student's own pass, measured in turn with it.
"masked" is "votes" without compact execution, of up to 32 images, since more do not fit into
memory. A call has the whole batch; `predict` cuts batches of large images into several calls.

Random weights cannot be searched. "first 0.7" is what a search tends to find: the first convolution
alone, and for the six convolutions heads that read `pool1`; of the other networks at this size only
the cut has few enough features for the search. "early 0.7" reads an early layer of those, too, as a
user may set it by hand.

"compact" is the share of the members' multiplications that runs with gathered kernels, "computed"
how many of the Student's multiplications in the same layers a member is left with. Writes
`latency.csv` and `latency.json` to `OUTPUT`.
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
from keras_tl_defense.ensemble import plan as plan_module
from keras_tl_defense.ensemble.compact import can_gather
from keras_tl_defense.ensemble.masked import MaskedBody
from keras_tl_defense.ensemble.member_bodies import MANY
from keras_tl_defense.ensemble.plan import multiply_adds, plan_execution
from keras_tl_defense.ensemble.selection import fingerprint
from keras_tl_defense.graph import ModelGraph

CLASSES, PER_CLASS, MOST_MASKED = 10, 2, 32
NETWORKS = {
    "six convolutions": 32,
    "VGG16": 224,
    "MobileNet": 224,
    "ResNet50": 224,
    "MobileNetV2": 224,
    "EfficientNetB0": 224,
}
EARLY = {"VGG16": "block1_pool", "MobileNet": "conv_dw_4_relu"}
LABELS = ["all 0.5", "all 0.7", "first 0.7", "early 0.7"]


def build(name: str, classes: int = CLASSES) -> Any:
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
    return keras.Sequential([keras.Input((size, size, 3)), base, keras.layers.Dense(classes)])


def spread_answers(student: Any, x: np.ndarray) -> None:
    """Let the answers to such images be of all classes."""
    logits = student.predict(x.astype(np.float32), verbose=0)
    kernel, bias = student.layers[-1].get_weights()
    scale = logits.std(axis=0) + 1e-12
    student.layers[-1].set_weights([kernel / scale, (bias - logits.mean(axis=0)) / scale])


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


def arithmetic(defence: Any, batch: int) -> dict[str, float]:
    """The columns "compact" and "computed", where members are drawn evenly."""
    graph, bank = defence._graph, defence.get_layer("differentiators")
    blocks = bank.masks.blocks
    given = (graph, bank.tensor, blocks, defence.ratios)
    plan = plan_execution(*given)
    drawn = batch * defence.ensemble_size
    if drawn / min(drawn, bank.count) >= MANY:
        plan = plan_execution(*given, images=MANY, instead_of=plan)
    compact = set() if plan.split is None else set(graph.ancestors(plan.split))
    share = plan_module._shares(
        graph, bank.tensor, [b for b in blocks if b.name not in plan.masked], defence.ratios
    )
    total = gathered = computed = 0.0
    for index, first in plan_module._changed(graph, bank.tensor, blocks).items():
        step = graph.steps[index]
        work = 0 if first else multiply_adds(graph, step)  # the first is the Student's own
        total += work
        if index not in compact or not can_gather(graph, step):
            computed += work
            continue
        gathered += work
        kept = share.get(step.inputs[0], 1.0)
        if step.name not in plan.late and not isinstance(step.layer, keras.layers.DepthwiseConv2D):
            kept *= share.get(step.outputs[0], 1.0)
        computed += work * kept
    return {"compact": gathered / max(total, 1), "computed": computed / max(total, 1)}


def measure(name: str, label: str, batches: list[int], times: int) -> list[dict[str, Any]]:
    """A row for each batch size."""
    student = build(name)
    size = NETWORKS[name]
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(CLASSES), PER_CLASS)
    x = rng.integers(0, 256, (len(y), size, size, 3), dtype=np.uint8)
    spread_answers(student, x)
    ratio = float(label.split()[-1])
    options: dict[str, Any] = {"ratios": {"*conv*": ratio}}
    graph = ModelGraph(student)
    if not label.startswith("all"):
        first = next(s.name for s in graph.steps if isinstance(s.layer, keras.layers.Conv2D))
        options = {"ratios": {first: ratio}}
        if label.startswith("early"):
            options["head_layer"] = EARLY[name]
        elif name == "six convolutions":
            options["head_layer"] = "pool1"
    defence = ktd.DifferentiatorEnsemble(student, seed=0, **options)
    defence.adapt(x, y, verbose=0)
    defence._set_stage(2)  # heads of zeros serve; fitted ones would ask for gentler ratios
    bank = defence.get_layer("differentiators")
    graph = defence._graph
    blocks = bank.masks.blocks
    masked = MaskedBody(graph, bank.tensor, blocks)
    k = defence.ensemble_size

    def members(images: Any, body: Callable[..., Any]) -> Any:
        values = graph.run(images, [graph.output])
        logits = values[graph.output]
        classes = tf.argmax(logits, axis=1, output_type=tf.int32)
        drawn = bank.draw(fingerprint(images), defence._key, classes, k)
        rows = tf.repeat(tf.range(tf.shape(images)[0]), k)[:, None]
        features = body(values, rows, tf.reshape(drawn, [-1]))
        return logits, bank.margins(features, drawn, classes)

    def run_masked(values: Any, rows: Any, drawn: Any) -> Any:
        given = (bank.masks.filter_masks(drawn), bank.masks.connection_mask)
        return tf.reshape(masked(values, rows, drawn, *given), (-1, bank.features))

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
        passes: dict[str, Callable[[], Any]] = {
            "student": partial(plain, images),
            "votes": partial(votes, images),
            "defended": partial(defended, images),
        }
        if batch <= MOST_MASKED:
            passes["masked"] = partial(all_masked, images)
        taken = medians(passes, times)
        alone = taken.pop("student")
        rows.append(
            {
                "network": name,
                "pixels": size,
                "ratios": label,
                "batch": batch,
                "Student, ms an image": 1000 * alone / batch,
                **{key: value / alone for key, value in taken.items()},
                **arithmetic(defence, batch),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every network and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ratios", nargs="+", choices=LABELS, default=LABELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        for label in arguments.ratios:
            if label == "early 0.7" and name not in EARLY:
                continue
            rows += measure(name, label, arguments.batches, arguments.times)
            table = pd.DataFrame(rows)
            table.to_csv(arguments.output / "latency.csv", index=False)
            table.to_json(arguments.output / "latency.json", orient="records")
    print(table.to_string(float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
