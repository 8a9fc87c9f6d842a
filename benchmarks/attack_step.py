"""What a step of the mimicry attack costs beside the least that it can, and beside ART's.

    python benchmarks/attack_step.py OUTPUT [--networks VGG16 …] [--steps 20] [--times 5]

"mimicry" is the whole call of `MimicryAttack`, its checks of images within budget every ten steps
among it, divided by its steps. "gradient" is the least that any such attack does: one compiled pass
forward and backward from the distance of the layer's features to the image. "ART" is
`FeatureAdversariesTensorFlowV2` of adversarial-robustness-toolbox, by the gradient's sign, which
takes Sequential models only and measures no structural dissimilarity. Medians, measured in turn;
random weights. Needs `pip install adversarial-robustness-toolbox`. Writes `attack_step.csv` and
`attack_step.json` to `OUTPUT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf
from art.attacks.evasion import FeatureAdversariesTensorFlowV2
from art.estimators.classification import TensorFlowV2Classifier
from latency import medians

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras

NETWORKS = {
    "six convolutions": (32, 64, "flatten"),
    "VGG16": (224, 1, "block5_pool"),
    "MobileNet": (224, 8, "conv_dw_6_relu"),
}
"""Pixels, images at once, and the layer that is imitated."""


def make_teacher(name: str) -> Any:
    """A Teacher of random weights that ends at the layer, Sequential where it can be."""
    size, _, layer = NETWORKS[name]
    keras.utils.set_random_seed(0)
    shape = (size, size, 3)
    if name == "six convolutions":
        whole = ktd.teachers.build_teacher(shape, 10)
    else:
        make = getattr(keras.applications, name)
        whole = make(weights=None, include_top=False, input_shape=shape)
    names = [each.name for each in whole.layers]
    return keras.Sequential([keras.Input(shape), *whole.layers[1 : names.index(layer) + 1]])


def gradient_step(teacher: Any, wanted: tf.Tensor) -> Callable[[tf.Tensor], tf.Tensor]:
    """One pass forward and backward."""

    @tf.function
    def step(images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(images)
            features = tf.reshape(teacher(images, training=False), (len(images), -1))
            distance = tf.norm(features - wanted, axis=1)
        return tape.gradient(distance, images)

    return step


def measure(name: str, steps: int, times: int) -> dict[str, Any]:
    """A row of the table."""
    size, count, layer = NETWORKS[name]
    teacher = make_teacher(name)
    rng = np.random.default_rng(0)
    source, target = rng.integers(0, 256, (2, count, size, size, 3)).astype(np.float32)
    mimicry = ktd.attacks.MimicryAttack(teacher, layer, steps=steps, batch_size=count)
    estimator = TensorFlowV2Classifier(
        teacher, nb_classes=2, input_shape=source.shape[1:], clip_values=(0, 255)
    )
    art = FeatureAdversariesTensorFlowV2(
        estimator, delta=8.0, step_size=1.0, layer=layer, max_iter=steps, batch_size=count,
        verbose=False,
    )  # fmt: skip
    wanted = tf.reshape(teacher(target, training=False), (count, -1))
    step, images = gradient_step(teacher, wanted), tf.constant(source)

    def gradients() -> tf.Tensor:
        return [step(images) for _ in range(steps)][-1]

    taken = medians(
        {
            "gradient": gradients,
            "mimicry": lambda: mimicry(source, target, verbose=0).adversarial,
            "ART": lambda: art.generate(source, target),
        },
        times,
    )
    return {
        "network": name,
        "pixels": size,
        "images": count,
        "gradient, ms a step": 1000 * taken["gradient"] / steps,
        "mimicry / gradient": taken["mimicry"] / taken["gradient"],
        "ART / gradient": taken["ART"] / taken["gradient"],
    }


def main() -> None:
    """Measure every network and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.networks:
        rows.append(measure(name, arguments.steps, arguments.times))
        table = pd.DataFrame(rows)
        table.to_csv(arguments.output / "attack_step.csv", index=False)
        table.to_json(arguments.output / "attack_step.json", orient="records")
        print(table.to_string(float_format="{:.2f}".format), flush=True)


if __name__ == "__main__":
    main()
