"""The defence as plain networks, from which units were really taken out."""

from __future__ import annotations

from typing import Any

import numpy as np
from conftest import CLASSES, SIZE, Images, weights_of

from keras_tl_defense._keras import keras


class PlainDefence:
    """Algorithm 1 with every differentiator a network from which units were really taken out.

    Only the fitted heads, and the level of pruning that each differentiator got, come from the
    defence.
    """

    def __init__(self, defence: Any, images: Images, ratios: dict[str, float]) -> None:
        self.base = defence.student.get_layer("base")
        self.heads = weights_of(defence)
        self.known = [tuple(classes) for classes in defence.member_classes]
        self.apart = defence.head == "pair"
        self.ratios = ratios
        self.means = {
            name: self.class_means(read_at, images)
            for name, read_at in {"conv1": "conv1", "conv2": "relu2", "fc1": "flatten"}.items()
        }

    def class_means(self, layer: str, images: Images) -> np.ndarray:
        probe = keras.Model(self.base.inputs[0], self.base.get_layer(layer).output)
        out = np.abs(probe(images.x_train.astype(np.float32), training=False).numpy())
        out = out.reshape(len(out), -1, out.shape[-1]).mean(axis=1)
        return np.stack([out[images.y_train == c].mean(axis=0) for c in range(CLASSES)])

    def kept(self, layer: str, scores: np.ndarray, level: float = 1.0) -> np.ndarray:
        order = sorted(range(scores.size), key=lambda unit: (scores.flat[unit], unit))
        mask = np.ones(scores.size, bool)
        mask[order[: int(level * self.ratios.get(layer, 0) * scores.size + 1e-9)]] = False
        return mask.reshape(scores.shape)

    def masks(self, classes: Any, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        score = {name: means[list(classes)].max(axis=0) for name, means in self.means.items()}
        kernel = self.base.get_layer("fc1").get_weights()[0]
        return (
            self.kept("conv1", score["conv1"], level),
            self.kept("conv2", score["conv2"], level),
            self.kept("fc1", np.abs(kernel) * score["fc1"][:, None], level),
        )

    def features(self, classes: Any, x: np.ndarray, level: float = 1.0) -> np.ndarray:
        weights = {layer.name: layer.get_weights() for layer in self.base.layers}
        keep1, keep2, connections = self.masks(classes, level)
        kernel, bias = weights["fc1"]
        layers = keras.layers
        network = keras.Sequential(
            [
                keras.Input((SIZE, SIZE, 3)),
                layers.Rescaling(1 / 127.5, offset=-1),
                layers.Conv2D(int(keep1.sum()), 3, padding="same", activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(int(keep2.sum()), 3, use_bias=False),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(20, activation="relu"),
            ]
        )
        convolution1, convolution2, norm, dense = (network.layers[index] for index in (1, 3, 4, 7))
        convolution1.set_weights([weights["conv1"][0][..., keep1], weights["conv1"][1][keep1]])
        convolution2.set_weights([weights["conv2"][0][:, :, keep1][..., keep2]])
        norm.set_weights([w[keep2] for w in weights["norm2"]])
        positions = len(kernel) // len(keep2)
        dense.set_weights([(kernel * connections)[np.tile(keep2, positions)], bias])
        return network(x.astype(np.float32), training=False).numpy()

    def references(self, x: np.ndarray) -> list[np.ndarray]:
        """Margins for all classes; without jitter there is one reference."""
        (kernel,), (bias,) = self.heads["reference_kernel"], self.heads["reference_bias"]
        return [self.features(range(CLASSES), x) @ kernel.T + bias]

    def answer(
        self, x: np.ndarray, student_class: np.ndarray, members: np.ndarray, threshold: int
    ) -> dict[str, np.ndarray]:
        answers, disagreements, scores, all_margins = [], [], [], []
        levels = np.array([1.0, 0.75, 0.5])[self.heads["levels"]]
        features = {p: self.features(self.known[p], x, levels[p]) for p in np.unique(members)}
        references = self.references(x)
        kernel, bias = self.heads["kernel"], self.heads["bias"]
        for index, (own, drawn) in enumerate(zip(student_class, members, strict=True)):
            margins = []
            for member in drawn:
                place = self.known[member].index(own)
                logits = kernel[member] @ features[member][index] + bias[member]
                if len(logits) == 1:  # the first class against the second
                    margins.append(-logits[0] if place else logits[0])
                elif self.apart:
                    margins.append((logits[place] - max(np.delete(logits, place))) / 2)
                else:
                    margins.append(logits[place])
            rivals = np.mean([margins[index] for margins in references], axis=0)
            all_margins.append(margins)
            against = sum(margin <= 0 for margin in margins)
            answers.append(0 if against >= threshold else own + 1)
            disagreements.append(against)
            scores.append(np.mean(margins) + 2 * rivals[own] - 2.25 * max(np.delete(rivals, own)))
        return {
            "answer": np.array(answers),
            "disagreements": np.array(disagreements),
            "score": np.array(scores),
            "margins": np.array(all_margins),
        }


def mixed(images: Images) -> np.ndarray:
    """Images of every class, and some of none, so that answers of both kinds come out."""
    noise = np.random.default_rng(5).integers(0, 256, (30, SIZE, SIZE, 3)).astype(np.uint8)
    blend = (images.x_test[::-1] // 2 + images.x_test // 2).astype(np.uint8)
    return np.concatenate([images.x_test, noise, blend])
