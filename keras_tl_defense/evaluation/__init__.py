"""Measure and show what a defence does."""

from keras_tl_defense.evaluation.plots import plot_attacks, plot_search
from keras_tl_defense.evaluation.report import DefenceReport, evaluate_defence
from keras_tl_defense.evaluation.roc import RocReport

__all__ = ["DefenceReport", "RocReport", "evaluate_defence", "plot_attacks", "plot_search"]
