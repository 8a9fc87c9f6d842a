"""Measure and show what a defence does."""

from keras_tl_defense.evaluation.plots import plot_attacks
from keras_tl_defense.evaluation.report import DefenceReport, evaluate_defence

__all__ = ["DefenceReport", "evaluate_defence", "plot_attacks"]
