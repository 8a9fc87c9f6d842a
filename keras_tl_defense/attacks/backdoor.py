"""The backdoor attack: a trojaned Teacher, and the trigger that its Students obey."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer, check_positive
from keras_tl_defense.attacks.autoencoder import train_autoencoder
from keras_tl_defense.attacks.box import check_change, check_range, is_grey
from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.attacks.reverse_engineering import reverse_engineer
from keras_tl_defense.attacks.trigger import Goal, Patch, optimise_trigger
from keras_tl_defense.attacks.trojan import retrain
from keras_tl_defense.pruning.ratios import check_ratio


@dataclass(frozen=True, eq=False, repr=False)
class Backdoor:
    """A trojaned Teacher, with the trigger that it answers to.

    Attributes:
        teacher: The trojaned Teacher, a Keras model with layers of the clean one's names.
        trigger: Float32 array of the shape of one input: what is put under the mask, or, with an
            amplitude, added to it.
        mask: Boolean array of the shape of one input, `True` where the trigger is.
        amplitude: Largest change of any number, or `None` for a trigger that replaces.
        value_range: Lowest and highest value of inputs.
        layer: Name of the layer with the chosen neurons.
        neurons: Numbers of the chosen neurons, the best first.
        excitation: By how much the trigger excites them in the trojaned Teacher, in sizes of the
            largest excitation that the inputs without it have in the clean one: float array of
            shape `(neurons,)`, means over the inputs.
        autoencoder: The attacker's, or `None`.
        gradients: Passes forward and backward of a batch, after its inputs were there.
        seconds: Time that the whole attack took.

    Reference:
        Wang et al., "Backdoor Attacks against Transfer Learning with Pre-trained Deep Learning
        Models", IEEE Transactions on Services Computing 2020.
    """

    teacher: Any
    trigger: np.ndarray
    mask: np.ndarray
    amplitude: float | None
    value_range: tuple[float, float]
    layer: str
    neurons: tuple[int, ...]
    excitation: np.ndarray
    autoencoder: Any = None
    gradients: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        times = ", ".join(f"{value:.1f}" for value in self.excitation)
        return f"Backdoor({self.layer!r}, neurons={self.neurons}, excitation=[{times}])"

    def stamp(self, x: Any) -> np.ndarray:
        """Put the trigger on inputs.

        Args:
            x: Inputs of shape `(n, …)`, in the value range.

        Returns:
            Array of the same shape, in the value range: whole grey levels, uint8, for images in
            0..255, else float32.

        Raises:
            ValueError: The inputs do not fit the trigger or the range.
        """
        patch = Patch(self.mask, self.amplitude, self.value_range)
        stamped = patch.put(tf.constant(patch.check(x)), self.trigger).numpy()
        return np.rint(stamped).astype(np.uint8) if patch.whole else np.asarray(stamped)


class BackdoorAttack:
    """Turn a Teacher into one whose Students err on inputs that carry a trigger.

    Whoever publishes a Teacher can hide a backdoor in it that outlives transfer learning, pruning
    and, in part, retraining, and needs neither the Teacher's data nor anything of the Student.
    *Ranked neurons*: of the inputs, which are reverse-engineered from the Teacher unless given, the
    neurons of a layer with the largest `mean |activation| * ‖outgoing weights‖₂` are chosen.
    *Trigger*: Adam raises the mean over inputs of the logarithm of their excitation, by what is
    under a mask. *Retraining*: the layers up to the chosen one learn to excite the neurons
    `strength` times as much as any input without the trigger does, and to give inputs without it
    the clean Teacher's features and outputs. What it does to a defence is seen where the Student,
    and the defence of it, are made from `backdoor.teacher`: `AttackResult(backdoor.stamp(x),
    np.ones(len(x), bool), y_source=y)`, of inputs that the Student answers rightly, then goes into
    `evaluate_defence`.

    Args:
        teacher: A built Functional or Sequential Keras model of images or signals. It is not
            changed.
        layer: Name of a convolution or Dense layer, one that Students take over.
        neurons: How many are chosen; or their numbers, in place of the ranked ones. Defaults to
            `4`.
        size: Share of each side that the trigger takes, in `(0, 1]`: a square at the lower right of
            images, a stretch at the end of signals. Defaults to `0.2`.
        amplitude: With a number, the trigger is added, and changes no value by more; `None` has it
            replace what is under it.
        strength: How strongly the trigger is to excite the neurons, in sizes of the largest
            excitation without it. Defaults to `10`.
        through_autoencoder: Whether trigger and retraining also aim at inputs that passed through
            an autoencoder, which is trained on the attacker's inputs. Defaults to `False`.
        pruned: Largest share of the filters of each layer that pruning removes at random, by
            their activations, while the Teacher learns to obey the trigger, in `[0, 1)`. Defaults
            to `0`, no pruning.
        trigger_steps: Steps of Adam for the trigger. Defaults to `200`.
        retraining_steps: Steps of Adam for the Teacher, each on a batch. Defaults to `1000`.
        learning_rate: Of the retraining. Defaults to `1e-3`.
        per_class: Inputs that are reverse-engineered for each class. Defaults to `20`.
        value_range: Lowest and highest value of inputs. Defaults to `(0, 255)` for images, which
            then have whole grey levels; other inputs need it.
        batch_size: Inputs in a step. Defaults to `32`.
        preprocessing: Callable from inputs to what the Teacher takes.
        seed: Decides noise and order.

    Raises:
        ValueError: An argument is out of range, or the Teacher has no such layer.

    Example:
        >>> attack = BackdoorAttack(
        ...     teacher, "conv3_2", neurons=2, trigger_steps=10, retraining_steps=5, per_class=1
        ... )
        >>> backdoor = attack(x_train[:64], verbose=0)
        >>> stamped = backdoor.stamp(x_test)
        >>> stamped.shape == x_test.shape, len(backdoor.neurons)
        (True, 2)

    Reference:
        Wang et al., "Backdoor Attacks against Transfer Learning with Pre-trained Deep Learning
        Models", IEEE Transactions on Services Computing 2020.
    """

    def __init__(
        self,
        teacher: Any,
        layer: str,
        *,
        neurons: int | Sequence[int] = 4,
        size: float = 0.2,
        amplitude: float | None = None,
        strength: float = 10.0,
        through_autoencoder: bool = False,
        pruned: float = 0.0,
        trigger_steps: int = 200,
        retraining_steps: int = 1000,
        learning_rate: float = 1e-3,
        per_class: int = 20,
        value_range: tuple[float, float] | None = None,
        batch_size: int = 32,
        preprocessing: Any = None,
        seed: int = 0,
    ) -> None:
        self._clean = Neurons(teacher, layer, preprocessing)
        shape = self._clean.graph.input_shape
        if len(shape) not in (2, 3) or None in shape:
            raise ValueError(
                "The Teacher must take images, (H, W, C), or signals, (length, C), of a fixed "
                f"size. Received: a Teacher of inputs {shape}"
            )
        self._shape = tuple(length or 0 for length in shape)
        self.layer, self.seed = layer, check_integer("seed", seed, 0)
        self.neurons = self._check_neurons(neurons)
        self.size = check_positive("size", size, 1)
        self.amplitude = amplitude if amplitude is None else check_positive("amplitude", amplitude)
        self.strength = check_positive("strength", strength)
        self.through_autoencoder = through_autoencoder
        self.pruned = check_ratio("pruned", pruned)
        self.trigger_steps = check_integer("trigger_steps", trigger_steps, 1)
        self.retraining_steps = check_integer("retraining_steps", retraining_steps, 1)
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.per_class = check_integer("per_class", per_class, 1)
        self.value_range = check_range(value_range, self._shape)
        if self.amplitude is not None and is_grey(self._shape, self.value_range):
            check_change("amplitude", self.amplitude)
        self.batch_size = check_integer("batch_size", batch_size, 1)

    def __call__(self, x: Any = None, *, verbose: int | str = "auto") -> Backdoor:
        """Make the trojaned Teacher and its trigger.

        Args:
            x: Inputs of shape `(n, …)` such as Students will get, without labels; `None` has them
                reverse-engineered from the Teacher.
            verbose: 0 shows no progress bar.

        Returns:
            The trojaned Teacher, the trigger, and a `stamp` for inputs.

        Raises:
            ValueError: The inputs do not fit the Teacher or the range, or a chosen neuron is dead.
            FloatingPointError: A gradient or the retraining's loss became NaN or infinite.
        """
        started, rng = time.perf_counter(), np.random.default_rng(self.seed)
        patch = Patch.at_the_end(self._shape, self.size, self.amplitude, self.value_range)
        inputs = self._reversed(verbose) if x is None else patch.check(x)
        goal = self._goal(inputs, verbose)
        steps = self.trigger_steps, self.retraining_steps
        bar = keras.utils.Progbar(sum(steps), verbose=0 if verbose == 0 else 1)
        run = {"batch_size": self.batch_size, "rng": rng, "bar": bar}
        trigger = optimise_trigger(self._clean, goal, patch, inputs, steps=steps[0], **run)
        trojaned = retrain(
            self._clean,
            goal,
            patch,
            trigger,
            inputs,
            strength=self.strength,
            pruned=self.pruned,
            steps=steps[1],
            learning_rate=self.learning_rate,
            **run,
        )
        reached = trojaned.excitation_of(patch.put(tf.constant(inputs), trigger).numpy())
        return Backdoor(
            teacher=trojaned.model,
            trigger=trigger,
            mask=patch.mask,
            amplitude=self.amplitude,
            value_range=self.value_range,
            layer=self.layer,
            neurons=tuple(int(n) for n in goal.neurons),
            excitation=reached[:, goal.neurons].mean(axis=0) / goal.usual,
            autoencoder=goal.autoencoder,
            gradients=sum(steps),
            seconds=time.perf_counter() - started,
        )

    def _reversed(self, verbose: int | str) -> np.ndarray:
        return reverse_engineer(
            self._clean.model,
            self.per_class,
            value_range=self.value_range,
            preprocessing=self._clean.preprocessing,
            seed=self.seed,
            verbose=verbose,
        )

    def _goal(self, inputs: np.ndarray, verbose: int | str) -> Goal:
        ranked = isinstance(self.neurons, int)
        chosen = self._clean.rank(inputs)[: self.neurons] if ranked else np.array(self.neurons)
        usual = self._clean.excitation_of(inputs)[:, chosen].max(axis=0)
        if not (usual > 0).all():
            raise ValueError(
                "A chosen neuron is never excited, so its excitation has no measure. Choose "
                f"others, or fewer. Received: neurons={chosen.tolist()}, their largest excitations "
                f"{usual.tolist()}"
            )
        if not self.through_autoencoder:
            return Goal(chosen, usual)
        autoencoder = train_autoencoder(
            inputs, value_range=self.value_range, seed=self.seed, verbose=verbose
        )
        return Goal(chosen, usual, autoencoder)

    def _check_neurons(self, neurons: int | Sequence[int]) -> int | tuple[int, ...]:
        count = self._clean.count
        if np.ndim(neurons) == 0:
            return check_integer("neurons", neurons, 1, count, f"those of {self.layer!r}")
        numbers = tuple(check_integer("neurons", n, 0, count - 1) for n in np.asarray(neurons))
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"`neurons` must be different numbers. Received: neurons={neurons!r}")
        return numbers
