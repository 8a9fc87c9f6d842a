"""What a classifier is worth that reads an early layer itself, instead of a defence of the Student.

    python benchmarks/early_head.py DATA CACHE [--students lfw-flatten …]

One linear head for each class, a ridge regression on up to 8000 training images at random, at the
layer that the search finds for the defence; nothing is pruned and nothing secret. It answers by its
largest margin, and rejects where the next one is near, with a threshold calibrated on validation
images. `DATA` and `CACHE` are as for `protection.py`. Prints a table.
"""

from __future__ import annotations

import numpy as np
from members import searched
from students import Case, load_attacks, load_case, parser, percent

from keras_tl_defense.ensemble.body import CompactBody
from keras_tl_defense.ensemble.calibration import score_threshold
from keras_tl_defense.ensemble.heads import fit_heads
from keras_tl_defense.graph import ModelGraph

_ROWS = 8000


class EarlyHead:
    """Linear heads on a layer of a Student.

    Args:
        case: The Student and its images.
        layer: Name of the layer.
    """

    def __init__(self, case: Case, layer: str) -> None:
        graph = ModelGraph(case.student, "student")
        self._body = CompactBody(graph, graph.layer_output(layer), [], case.preprocessing)
        x, y = case.augmented()
        chosen = np.sort(np.random.default_rng(0).permutation(len(x))[:_ROWS])
        x, y = x[chosen], y[chosen]
        positive = y[:, None] == np.arange(y.max() + 1)
        weight = 1 / positive.sum(axis=0)[y]
        heads = fit_heads(self._features(x)[None], positive[None], weight[None])
        self._kernel, self._bias = heads.kernel[0].T, heads.bias[0]

    def _features(self, x: np.ndarray) -> np.ndarray:
        return self._body(self._body.load(x), np.zeros(0, bool))

    def answer(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Classes, and how far the next one is."""
        margins = self._features(x) @ self._kernel + self._bias
        ordered = np.sort(margins, axis=1)
        return margins.argmax(axis=1), ordered[:, -1] - ordered[:, -2]


def main() -> None:
    """Print a row for each Student."""
    arguments = parser(__doc__).parse_args()
    print(
        "| Student | layer | right | retention | clean acceptance | clean accuracy | "
        "targeted: reached, accepted | non-targeted: misled, accepted |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.students:
        case = load_case(name, arguments.data, arguments.cache)
        layer = searched(case, arguments.cache)["head_layer"]
        head = EarlyHead(case, layer)
        answered, margin = head.answer(case.x_val)
        threshold = score_threshold(margin[answered == case.y_val], 0.95)
        answered, margin = head.answer(case.x_test)
        right, accepted = answered == case.y_test, margin >= threshold
        cells = [right, accepted[right], accepted, right & accepted]
        row = [name, layer, *map(percent, cells)]
        for result in load_attacks(case, arguments.cache, arguments.attacks).values():
            answered, margin = head.answer(result.adversarial)
            reached = result.reached(answered)
            row.append(f"{percent(reached)}, {percent(reached & (margin >= threshold))}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
