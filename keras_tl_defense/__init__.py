"""Defend Keras classifiers made by transfer learning against inputs crafted on their Teacher."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keras_tl_defense import attacks, datasets, evaluation, teachers
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.ensemble.model import DifferentiatorEnsemble
from keras_tl_defense.evaluation import DefenceReport, evaluate_defence
from keras_tl_defense.metrics import Rate
from keras_tl_defense.pruning.channel_mask import ChannelMask
from keras_tl_defense.version import __version__

if TYPE_CHECKING:
    from keras_tl_defense.pruning.callback import ActivationPruning
    from keras_tl_defense.pruning.schedule import ActivationPruningSchedule
    from keras_tl_defense.pruning.tfmot import activation_prune_scope, prune_low_activation

__all__ = [
    "ActivationPruning",
    "ActivationPruningSchedule",
    "ChannelMask",
    "ClassActivations",
    "DefenceReport",
    "DifferentiatorEnsemble",
    "Rate",
    "__version__",
    "activation_prune_scope",
    "attacks",
    "datasets",
    "evaluate_defence",
    "evaluation",
    "prune_low_activation",
    "teachers",
]

# With the legacy Keras these load TensorFlow Model Optimization, so they are loaded when used.
_LAZY = {
    "ActivationPruning": "callback",
    "ActivationPruningSchedule": "schedule",
    "activation_prune_scope": "tfmot",
    "prune_low_activation": "tfmot",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.pruning.{_LAZY[name]}"), name)
