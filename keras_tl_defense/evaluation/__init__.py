"""Measure and show what a defence does."""

from keras_tl_defense.evaluation.plots import plot_attacks, plot_search
from keras_tl_defense.evaluation.report import DefenceReport, evaluate_defence
from keras_tl_defense.evaluation.roc import RocReport
from keras_tl_defense.evaluation.sizes import SizesReport, evaluate_ensemble_sizes

__all__ = [
    "DefenceReport",
    "RocReport",
    "SizesReport",
    "evaluate_defence",
    "evaluate_ensemble_sizes",
    "plot_attacks",
    "plot_search",
]
