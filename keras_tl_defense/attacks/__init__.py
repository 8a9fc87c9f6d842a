"""Attacks on classifiers made by transfer learning."""

from keras_tl_defense.attacks.adaptive import AdaptiveAttack
from keras_tl_defense.attacks.art import as_art_estimator
from keras_tl_defense.attacks.autoencoder import train_autoencoder
from keras_tl_defense.attacks.backdoor import Backdoor, BackdoorAttack
from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.best_layer import LayerChoice, best_layer
from keras_tl_defense.attacks.dssim import dssim
from keras_tl_defense.attacks.fingerprint import fingerprint_teacher, gini
from keras_tl_defense.attacks.general import GeneralAttack
from keras_tl_defense.attacks.masked_mimicry import MaskedMimicryAttack
from keras_tl_defense.attacks.mimicry import MimicryAttack
from keras_tl_defense.attacks.reverse_engineering import reverse_engineer
from keras_tl_defense.attacks.target_agnostic import TargetAgnosticAttack, effectiveness
from keras_tl_defense.attacks.targets import AttackPlan, plan_attacks

__all__ = [
    "AdaptiveAttack",
    "AttackPlan",
    "AttackResult",
    "Backdoor",
    "BackdoorAttack",
    "GeneralAttack",
    "LayerChoice",
    "MaskedMimicryAttack",
    "MimicryAttack",
    "TargetAgnosticAttack",
    "as_art_estimator",
    "best_layer",
    "dssim",
    "effectiveness",
    "fingerprint_teacher",
    "gini",
    "plan_attacks",
    "reverse_engineer",
    "train_autoencoder",
]
