"""What each idea behind the score is worth, on validation images and attacks on them.

    python benchmarks/ideas.py DATA CACHE [--students lfw-flatten …] [--attacks 100]

One idea is changed at a time, from the ratios given for each Student below. Six bodies are pruned,
five for a pair of classes each and one for all of them, the reference; each gets heads for all
classes, so that few bodies tell about every image. `DATA` and `CACHE` are as for `protection.py`.
Prints, for each idea, the AUROC and the crafted images accepted at a retention of 95 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from students import Case, load_attacks, load_case, parser

import keras_tl_defense as ktd
from keras_tl_defense._keras import keras
from keras_tl_defense.attacks import AttackResult
from keras_tl_defense.blocks import Block, find_blocks
from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.heads import fit_heads
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.metrics import Auroc
from keras_tl_defense.pruning.masks import filter_masks

_PAIRS = 5
_ROWS = 8000  # training images that heads are fitted on at most

Table = list[tuple[str, str]]


class Setting(NamedTuple):
    """What is varied.

    Attributes:
        ratios: Ratio of each pruned layer.
        head_layer: Name of the layer that the heads read.
        jitter: Standard deviation of the noise on the logarithms of the activations.
        class_score: Joins the mean activations of a body's classes.
        restated: Whether statistics of batch normalisations are estimated again under the masks.
    """

    ratios: dict[str, float]
    head_layer: str
    jitter: float = 1.0
    class_score: Callable[..., np.ndarray] = np.max
    restated: bool = False


SETTINGS = {
    "gtsrb-mid": Setting({"conv1_1": 0.85}, "pool1"),
    "lfw-flatten": Setting({"conv1_1": 0.92, "conv1_2": 0.5}, "pool1"),
    "lfw-fc2": Setting({"conv1_1": 0.7, "conv1_2": 0.5}, "pool1"),
    "lfw-mobilenet": Setting({"conv1": 0.5}, "conv_pw_3_relu"),
}


class Margins(NamedTuple):
    """Margins of some images: `(images, bodies, classes)`, the last body being the reference."""

    all: np.ndarray
    answered: np.ndarray

    def own(self) -> np.ndarray:
        """Margins of the Student's class, `(images, bodies)`."""
        return np.take_along_axis(self.all, self.answered[:, None, None], axis=2)[..., 0]

    def other(self) -> np.ndarray:
        """The largest margins of another class, `(images, bodies)`."""
        rest = self.all.copy()
        np.put_along_axis(rest, self.answered[:, None, None], -np.inf, axis=2)
        return np.asarray(rest.max(axis=2))


def score(margins: Margins) -> np.ndarray:
    """The score of `DifferentiatorEnsemble`."""
    own = margins.own()
    return np.asarray(own[:, :-1].mean(axis=1) + 2 * own[:, -1] - 2.25 * margins.other()[:, -1])


SCORES: dict[str, Callable[[Margins], np.ndarray]] = {
    "members: minimum": lambda m: m.own()[:, :-1].min(axis=1),
    "members: mean": lambda m: m.own()[:, :-1].mean(axis=1),
    "members: mean by deviation": lambda m: (
        m.own()[:, :-1].mean(axis=1) / (m.own()[:, :-1].std(axis=1) + 0.1)
    ),
    "mean less half of the reference's other": lambda m: (
        m.own()[:, :-1].mean(axis=1) - 0.5 * m.other()[:, -1]
    ),
    "reference alone: own less other": lambda m: m.own()[:, -1] - m.other()[:, -1],
    "mean + own less 1.5 other": lambda m: (
        m.own()[:, :-1].mean(axis=1) + m.own()[:, -1] - 1.5 * m.other()[:, -1]
    ),
    "mean + 2 own less 2.25 other (kept)": score,
    "every body: own less other": lambda m: (m.own() - m.other()).mean(axis=1),
}


class Lab:
    """A Student, its images and the attacks on it."""

    def __init__(self, case: Case, attacks: dict[str, AttackResult]) -> None:
        self.case, self.attacks = case, attacks
        self.graph = ModelGraph(case.student, "student")
        self.blocks = {block.name: block for block in find_blocks(self.graph)}
        self.activations = ktd.ClassActivations(case.student, cut=case.cut)
        x = case.x_train.astype(np.float32)
        self.activations.adapt(case.prepared(x), case.y_train, verbose=0)
        rng = np.random.default_rng(0)
        x, y = case.augmented()
        chosen = np.sort(rng.permutation(len(x))[:_ROWS])
        self.x, self.y = x[chosen], y[chosen]
        self.classes = int(y.max()) + 1
        self.pairs = [rng.permutation(self.classes)[:2] for _ in range(_PAIRS)]
        self.images = {"clean": case.x_val} | {k: a.adversarial for k, a in attacks.items()}
        self.answers = {name: case.student_class(x) for name, x in self.images.items()}

    def margins(self, setting: Setting) -> dict[str, Margins]:
        """The margins of clean and crafted images under six bodies."""
        tensor = self.graph.layer_output(setting.head_layer)
        blocks = [self.blocks[name] for name in setting.ratios]
        body: Any = CompactBody(self.graph, tensor, blocks, self.case.preprocessing)
        positive = self.y[:, None] == np.arange(self.classes)
        weight = 1 / np.bincount(self.y)[self.y]
        found: dict[str, list[np.ndarray]] = {name: [] for name in self.images}
        for number, classes in enumerate([*self.pairs, np.arange(self.classes)]):
            mask = np.concatenate(
                [self._mask(setting, block, classes, number) for block in blocks]
                or [np.zeros(0, bool)]
            )
            if setting.restated:
                body = self._restated(setting, blocks, mask)
            features = body(body.load(self.x), mask)
            heads = fit_heads(features[None], positive[None], weight[None])
            for name, images in self.images.items():
                values = body(body.load(images), mask) @ heads.kernel[0].T + heads.bias[0]
                found[name].append(values)
        return {n: Margins(np.stack(m, axis=1), self.answers[n]) for n, m in found.items()}

    def _mask(self, setting: Setting, block: Block, classes: np.ndarray, number: int) -> np.ndarray:
        rng = np.random.default_rng([number, list(setting.ratios).index(block.name)])
        scores = setting.class_score(self.activations[block.name][classes], axis=0)
        noise = np.exp(setting.jitter * rng.normal(size=len(scores)))
        return filter_masks((scores * noise)[None], setting.ratios[block.name])[0]

    def _restated(self, setting: Setting, blocks: list[Block], mask: np.ndarray) -> CompactBody:
        """The body of a copy whose normalisations know the masks.

        Normalisations of channels that the masks leave keep their scale and offset and take the
        mean and variance that these channels have now; `CompactBody` drops the others.
        """
        copy = keras.models.clone_model(self.case.student)
        copy.set_weights(self.case.student.get_weights())
        graph = ModelGraph(copy, "student")
        own = {block.name: block for block in find_blocks(graph)}
        pruned = [own[block.name] for block in blocks]
        x = self.x[np.random.default_rng(0).permutation(len(self.x))[:512]]
        end = graph.layer_output(setting.head_layer)
        for number in graph.ancestors(end):
            step = graph.steps[number]
            if isinstance(step.layer, keras.layers.BatchNormalization):
                before = {
                    t
                    for index in graph.ancestors(step.inputs[0])
                    for t in graph.steps[index].outputs
                }
                inside = [b for b in pruned if b.step.outputs[0] in before]
                size = sum(block.units for block in inside)
                body = CompactBody(graph, step.inputs[0], inside, self.case.preprocessing)
                values = body(body.load(x), mask[:size])
                values = values.reshape(-1, graph.shapes[step.inputs[0]][-1] or 1)
                gamma, beta, mean, variance = step.layer.get_weights()
                seen = values.std(axis=0) > 0
                mean, variance = (
                    np.where(seen, new, old)
                    for new, old in ((values.mean(axis=0), mean), (values.var(axis=0), variance))
                )
                step.layer.set_weights([gamma, beta, mean, variance])
        return CompactBody(graph, end, pruned, self.case.preprocessing)

    def row(self, margins: dict[str, Margins], function: Callable[[Margins], np.ndarray]) -> str:
        """AUROC, and crafted images accepted at a retention of 95 %, of each kind of attack."""
        right = self.answers["clean"] == self.case.y_val
        clean = function(margins["clean"])[right]
        threshold = np.quantile(clean, 0.05, method="lower")
        cells = []
        for kind, result in self.attacks.items():
            reached = result.reached(self.answers[kind])
            crafted = function(margins[kind])[reached]
            auroc = Auroc.of(clean, crafted).auroc
            cells.append(f"{auroc:.3f}, {np.sum(crafted >= threshold)}/{len(reached)}")
        return " | ".join(cells)


def ideas(name: str) -> dict[str, Setting]:
    """What is compared, by name."""
    base = SETTINGS[name]
    found = {f"jitter {j:g}": base._replace(jitter=j) for j in (0, 0.5, 1, 2)}
    found["filters at random"] = base._replace(jitter=100)
    found["mean activation of the two classes"] = base._replace(class_score=np.mean)
    found["nothing pruned"] = base._replace(ratios={})
    if name == "lfw-mobilenet":
        found["statistics estimated again"] = base._replace(restated=True)
        return found
    for layer in ("pool1", "pool2"):
        found[f"heads at {layer}"] = base._replace(head_layer=layer)
    return found


def main() -> None:
    """Print a table for each Student."""
    arguments = parser(__doc__, SETTINGS, attacks=100).parse_args()
    for name in arguments.students:
        case = load_case(name, arguments.data, arguments.cache)
        attacks = load_attacks(case, arguments.cache, arguments.attacks, part="val")
        lab = Lab(case, attacks)
        print(f"\n| {name}: idea | {' | '.join(attacks)} |\n|---|---|---|", flush=True)
        margins = lab.margins(SETTINGS[name])
        for label, function in SCORES.items():
            print(f"| {label} | {lab.row(margins, function)} |", flush=True)
        for label, setting in ideas(name).items():
            print(f"| {label} | {lab.row(lab.margins(setting), score)} |", flush=True)


if __name__ == "__main__":
    main()
