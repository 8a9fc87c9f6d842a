"""Attacks on classifiers made by transfer learning."""

from keras_tl_defense.attacks.base import AttackResult
from keras_tl_defense.attacks.dssim import dssim
from keras_tl_defense.attacks.mimicry import MimicryAttack
from keras_tl_defense.attacks.targets import AttackPlan, plan_attacks

__all__ = ["AttackPlan", "AttackResult", "MimicryAttack", "dssim", "plan_attacks"]
