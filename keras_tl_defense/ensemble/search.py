"""Search the ratios of a Student's layers, and the layer that the heads read.

The search attacks the Student itself: it crafts mimicry examples on some of the training images,
fits heads on the others under the masks of a candidate, and asks how many of the examples would be
accepted at the retention asked for.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble.training import sample_classes
from keras_tl_defense.ensemble.trial import Measured, Trial
from keras_tl_defense.graph import ModelGraph

_IMAGES = 1500  # about as many are searched on; at least eight of each class
_FEATURE_BYTES = 512 << 20  # of all of them at the cut, where it is large
_PROBES = (0.5, 0.85)  # for the first prunable layer, to compare the layers that heads may read
_ALONE = 0.7  # for each layer alone
_GRID = (0.0, 0.5, 0.7, 0.85, 0.92)
_GOAL = 0.1  # of crafted images accepted; more is a warning


class Found(NamedTuple):
    """What a search found.

    Attributes:
        ratios: The ratio of each pruned layer.
        head_layer: Name of the layer that the heads read.
        history: DataFrame with a row for each candidate: `step`, `head_layer`, `ratios`,
            `acceptance_at_0.95` and so on (crafted images that mislead the Student and are
            accepted at this retention, in all crafted ones; of the attack that does best), `auroc`,
            `accuracy` (of the heads on clean images), `passes` (images passed through the Student
            so far, for each training image), and `chosen`.
    """

    ratios: dict[str, float]
    head_layer: str
    history: pd.DataFrame


def search_ratios(
    student: Any,
    cut: str,
    batches: Batches,
    preprocessing: Any,
    *,
    head_layer: str | None,
    retention: float,
    jitter: float,
    most_features: int,
    budget: int,
    seed: int | None,
    verbose: int | str,
) -> Found:
    """Find the ratios under which the fewest crafted images are accepted.

    First each layer that the heads may read, with two ratios of the first prunable one; then, at
    the best of these, each prunable layer alone; then one layer's ratio after the other, the most
    telling first; last, that nothing is pruned, for comparison. All as long as the budget lasts.
    "Fewest" is an average of the shares accepted at the retention asked for, and where twice and
    half as many honest images are lost, as each comes from few images.

    Args:
        student: The Student.
        cut: Name of its last frozen layer.
        batches: Training images with labels.
        preprocessing: Callable from the images to what the Student takes, or `None`.
        head_layer: Name of the layer that the heads read; `None` searches it, too.
        retention: Share of honest images to keep.
        jitter: As for `DifferentiatorEnsemble`.
        most_features: A differentiator's heads may read so many.
        budget: Images that may be passed through the Student to measure candidates, for each
            training image.
        seed: Decides samples, attacks and noise.
        verbose: 0 shows no progress bar.

    Raises:
        ValueError: A class has too few images, the Student takes no images or answers too few
            rightly, no layer can be pruned, or all have too many features.
    """
    rng = np.random.default_rng(seed)
    graph = ModelGraph(student, "student")
    if len(graph.input_shape) != 3:
        raise ValueError(
            "Ratios are searched with attacks on images of shape (H, W, C). Give `ratios` "
            f"yourself, as {{'conv1*': 0.5}}. Received: a Student of inputs {graph.input_shape}"
        )
    classes = batches.classes or 0
    width = tf.TensorShape(graph.shapes[graph.layer_output(cut)][1:]).num_elements() or 1
    images = min(_IMAGES, _FEATURE_BYTES // (4 * width))
    sample = sample_classes(batches, max(8, images // classes), rng)
    trial = Trial(student, cut, sample, preprocessing, retention, jitter, rng)
    given = None if head_layer is None else graph.layer_output(head_layer)
    layers = trial.head_tensors(most_features) if given is None else [given]
    if not layers:
        raise ValueError(
            f"All frozen layers have more than {most_features} features, which the heads of "
            f"{classes} classes can read in 8 GiB. Give `cut` or `head_layer`, a layer with fewer, "
            f'or `head="pair"`. Received: cut={cut!r}'
        )
    if not any(trial.names(tensor) for tensor in layers):
        raise ValueError(
            "No convolution before the layer that the heads read can be pruned, so nothing "
            "can be searched. Give `ratios` yourself, for example for Dense layers. "
            f"Received: ratios='auto', head_layer={trial.layer_name(layers[-1])!r}"
        )
    trial.craft(layers, rng, verbose)
    bar = keras.utils.Progbar(budget, verbose=0 if verbose == 0 else 1, unit_name="pass")
    search = _Search(trial, budget, bar)
    for tensor in layers:
        for ratio in _PROBES:
            search.measure("head layer", tensor, {trial.names(tensor)[0]: ratio})
    tensor = search.best().tensor
    names = trial.names(tensor)
    alone = {name: search.measure("sensitivity", tensor, {name: _ALONE}).loss for name in names}
    for name in sorted(names, key=lambda name: (alone[name], names.index(name))):
        for ratio in _GRID:
            start = search.best(tensor).ratios
            changed = {k: v for k, v in {**start, name: ratio}.items() if v}
            if changed:
                search.measure("step", tensor, changed)
    search.measure("nothing pruned", tensor, {})
    best = search.best(tensor)
    _warn(best, trial, retention)
    bar.update(budget, finalize=True)
    return Found(best.ratios, trial.layer_name(tensor), search.history(best))


class _Candidate(NamedTuple):
    step: str
    tensor: int
    ratios: dict[str, float]
    measured: Measured
    passes: float

    @property
    def loss(self) -> tuple[float, float]:
        """What is made small: acceptance, averaged as it comes from few images; overlap."""
        return (float(np.mean(self.measured.acceptance)), -self.measured.auroc)


class _Search:
    """The candidates measured so far, within a budget of passes."""

    def __init__(self, trial: Trial, budget: int, bar: Any) -> None:
        self._trial, self._budget, self._bar = trial, budget, bar
        self._found: dict[tuple[Any, ...], _Candidate] = {}

    def measure(self, step: str, tensor: int, ratios: dict[str, float]) -> _Candidate:
        """Measure a candidate, unless it was measured before or the budget is used up."""
        key = (tensor, *sorted(ratios.items()))
        if key not in self._found:
            spent = max((c.passes for c in self._found.values()), default=0.0)
            cost = self._trial.cost
            if self._found and spent + cost > self._budget:
                return _Candidate(step, tensor, ratios, Measured((np.inf,), 0.0, 0.0), spent)
            measured = self._trial.measure(tensor, ratios)
            self._found[key] = _Candidate(step, tensor, ratios, measured, spent + cost)
            self._bar.update(min(self._budget, round(spent + cost)))
        return self._found[key]

    def best(self, tensor: int | None = None) -> _Candidate:
        """The candidate with the lowest loss; some layer must be pruned if any can be."""
        chosen = [c for c in self._found.values() if tensor in (None, c.tensor)]
        return min(chosen, key=lambda c: (not c.ratios, *c.loss))

    def history(self, best: _Candidate) -> pd.DataFrame:
        """A row for each candidate, in the order in which they were measured."""
        rows = [
            {
                "step": c.step,
                "head_layer": self._trial.layer_name(c.tensor),
                "ratios": dict(c.ratios),
                **{
                    f"acceptance_at_{r:g}": a
                    for r, a in zip(self._trial.retentions, c.measured.acceptance, strict=True)
                },
                "auroc": c.measured.auroc,
                "accuracy": c.measured.accuracy,
                "passes": c.passes,
                "chosen": c is best,
            }
            for c in self._found.values()
        ]
        return pd.DataFrame(rows)


def _warn(best: _Candidate, trial: Trial, retention: float) -> None:
    successes = trial.attack_success
    if successes < 0.1:
        warnings.warn(
            "The search's own attacks hardly succeed, so its ratios stand on little: "
            f"{successes:.0%} of them mislead the Student. Check the cut, or give `ratios` "
            "yourself.",
            stacklevel=4,
        )
    passed = best.measured.acceptance[trial.retentions.index(retention)]
    if passed > _GOAL:
        warnings.warn(
            f"No ratios were found that keep {retention:.0%} of the honest images and let no more "
            f"than {_GOAL:.0%} of the crafted ones pass. The best found let {passed:.0%} pass. "
            "Ask for a lower `retention`, or give more training images.",
            stacklevel=4,
        )
