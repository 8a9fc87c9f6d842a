"""Defend Keras classifiers made by transfer learning against inputs crafted on their Teacher."""

from keras_tl_defense import attacks, datasets, evaluation, teachers
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.ensemble.model import DifferentiatorEnsemble
from keras_tl_defense.evaluation import DefenceReport, evaluate_defence
from keras_tl_defense.metrics import Rate
from keras_tl_defense.version import __version__

__all__ = [
    "ClassActivations",
    "DefenceReport",
    "DifferentiatorEnsemble",
    "Rate",
    "__version__",
    "attacks",
    "datasets",
    "evaluate_defence",
    "evaluation",
    "teachers",
]
