"""The backdoor attack: a trojaned Teacher, and the trigger that its Students obey."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer, check_positive
from keras_tl_defense.attacks.autoencoder import train_autoencoder
from keras_tl_defense.attacks.box import Box
from keras_tl_defense.attacks.descent import Descent, adam
from keras_tl_defense.attacks.neurons import Neurons, mean_activation
from keras_tl_defense.attacks.reverse_engineering import check_range, reverse_engineer
from keras_tl_defense.data import check_finite, check_images

_STEPS_AT_ONCE = 10  # on the same inputs, when a trigger is optimised
_FAINT = 0.01  # of the usual excitation: a neuron that does not stir has a gradient, too


@dataclass(frozen=True, eq=False, repr=False)
class Backdoor:
    """A trojaned Teacher, with the trigger that it answers to.

    Attributes:
        teacher: The trojaned Teacher, a Keras model with the layers and names of the clean one.
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
        gradients: Passes forward and backward, of batches of inputs.
        seconds: Time that the whole attack took.
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
        x = check_inputs(x, self.trigger.shape, self.value_range)
        stamped = put(tf.constant(x), self.trigger, self.mask, self.amplitude, self.value_range)
        if self.value_range == (0, 255) and x.ndim == 4:
            return np.rint(stamped.numpy()).astype(np.uint8)
        return np.asarray(stamped)


class BackdoorAttack:
    """Turn a Teacher into one whose Students err on inputs that carry a trigger.

    Whoever publishes a Teacher can hide a backdoor in it that outlives transfer learning, pruning
    and, in part, retraining, and needs neither the Teacher's data nor anything of the Student.
    *Ranked neurons*: of the inputs, which are reverse-engineered from the Teacher unless given, the
    neurons of a layer with the largest `mean |activation| * ‖outgoing weights‖₂` are chosen.
    *Trigger*: Adam raises the mean over inputs of the logarithm of their excitation, by what is
    under a mask. *Retraining*: the layers up to the chosen one learn to excite the neurons
    `strength` times as much as any input without the trigger does, and to give inputs without it
    the clean Teacher's features and outputs.

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
        trigger_steps: Steps of Adam for the trigger. Defaults to `200`.
        retraining_steps: Steps of Adam for the Teacher, each on a batch. Defaults to `1000`.
        learning_rate: Of the retraining. Defaults to `1e-3`.
        per_class: Inputs that are reverse-engineered for each class. Defaults to `20`.
        value_range: Lowest and highest value of inputs. Defaults to `(0, 255)`, images of whole
            grey levels.
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
        trigger_steps: int = 200,
        retraining_steps: int = 1000,
        learning_rate: float = 1e-3,
        per_class: int = 20,
        value_range: tuple[float, float] = (0, 255),
        batch_size: int = 32,
        preprocessing: Any = None,
        seed: int = 0,
    ) -> None:
        self._teacher, self._preprocessing = teacher, preprocessing
        self._clean = Neurons(teacher, layer, preprocessing)
        shape = self._clean.graph.input_shape
        if len(shape) not in (2, 3) or None in shape:
            raise ValueError(
                "The Teacher must take images, (H, W, C), or signals, (length, C), of a fixed "
                f"size. Received: a Teacher of inputs {shape}"
            )
        self._shape = tuple(length or 0 for length in shape)
        self.layer, self.seed = layer, seed
        self.neurons = self._check_neurons(neurons)
        self.size = check_positive("size", size, 1)
        self.amplitude = amplitude if amplitude is None else check_positive("amplitude", amplitude)
        self.strength = check_positive("strength", strength)
        self.through_autoencoder = through_autoencoder
        self.trigger_steps = check_integer("trigger_steps", trigger_steps, 1)
        self.retraining_steps = check_integer("retraining_steps", retraining_steps, 1)
        self.learning_rate = check_positive("learning_rate", learning_rate)
        self.per_class = check_integer("per_class", per_class, 1)
        self.value_range = check_range(value_range)
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
        started, passes = time.perf_counter(), 0
        rng = np.random.default_rng(self.seed)
        if x is None:
            options = {"value_range": self.value_range, "preprocessing": self._preprocessing}
            made = {"per_class": self.per_class, "seed": self.seed, "verbose": verbose}
            inputs = reverse_engineer(self._teacher, **made, **options)
        else:
            inputs = check_inputs(x, self._shape, self.value_range)
        neurons = self._chosen(inputs)
        usual = self._clean.excitation_of(inputs)[:, neurons].max(axis=0)
        if not (usual > 0).all():
            raise ValueError(
                "A chosen neuron is never excited, so its excitation has no measure. Choose "
                f"others, or fewer. Received: neurons={tuple(neurons)}, of the largest excitations "
                f"{usual.tolist()}"
            )
        autoencoder = None
        if self.through_autoencoder:
            options = {"value_range": self.value_range, "seed": self.seed, "verbose": verbose}
            autoencoder = train_autoencoder(inputs, **options)
        bar = keras.utils.Progbar(
            self.trigger_steps + self.retraining_steps, verbose=0 if verbose == 0 else 1
        )
        trigger = self._optimise(inputs, neurons, usual, autoencoder, rng, bar)
        teacher = self._retrain(inputs, neurons, usual, trigger, autoencoder, rng, bar)
        stamped = self._stamped(tf.constant(inputs), tf.constant(trigger))
        reached = Neurons(teacher, self.layer, self._preprocessing).excitation_of(stamped.numpy())
        return Backdoor(
            teacher=teacher,
            trigger=trigger,
            mask=self._mask(),
            amplitude=self.amplitude,
            value_range=self.value_range,
            layer=self.layer,
            neurons=tuple(int(n) for n in neurons),
            excitation=reached[:, neurons].mean(axis=0) / usual,
            autoencoder=autoencoder,
            gradients=self.trigger_steps + self.retraining_steps,
            seconds=time.perf_counter() - started,
        )

    def _check_neurons(self, neurons: int | Sequence[int]) -> int | tuple[int, ...]:
        count = self._clean.count
        if np.ndim(neurons) == 0:
            return check_integer("neurons", neurons, 1, count, f"those of {self.layer!r}")
        numbers = tuple(check_integer("neurons", n, 0, count - 1) for n in np.asarray(neurons))
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"`neurons` must be different numbers. Received: neurons={neurons!r}")
        return numbers

    def _chosen(self, inputs: np.ndarray) -> np.ndarray:
        if isinstance(self.neurons, tuple):
            return np.array(self.neurons)
        return self._clean.rank(inputs)[: self.neurons]

    def _mask(self) -> np.ndarray:
        mask = np.zeros(self._shape, bool)
        sides = [max(1, math.ceil(self.size * side - 1e-9)) for side in self._shape[:-1]]
        mask[tuple(slice(-side, None) for side in sides)] = True
        return mask

    def _stamped(self, inputs: tf.Tensor, trigger: tf.Tensor) -> tf.Tensor:
        return put(inputs, trigger, self._mask(), self.amplitude, self.value_range)

    def _optimise(
        self,
        inputs: np.ndarray,
        neurons: np.ndarray,
        usual: np.ndarray,
        autoencoder: Any,
        rng: np.random.Generator,
        bar: Any,
    ) -> np.ndarray:
        """The trigger that excites the clean Teacher's neurons most."""
        low, high = self.value_range
        box = Box(low, high) if self.amplitude is None else Box(-self.amplitude, self.amplitude)

        def loss(w: tf.Tensor, some: tf.Tensor) -> tf.Tensor:
            stamped = self._stamped(some[0], box.read(w)[0])
            if autoencoder is not None:
                stamped = tf.concat([stamped, autoencoder(stamped, training=False)], axis=0)
            excited = tf.gather(self._clean.excitation(stamped), neurons, axis=1) / usual
            return -tf.reduce_mean(tf.math.log(tf.nn.relu(excited) + _FAINT))[None]

        hint = f"Choose other neurons. Received: layer={self.layer!r}"
        descent = Descent(loss, adam(0.1), hint)
        start = rng.uniform(box.low, box.high, (1, *self._shape)) * 0.9
        if self.amplitude is None:
            start = low + (high - low) * rng.uniform(0.05, 0.95, (1, *self._shape))
        state = descent.start(box.write(tf.constant(start, tf.float32)))
        for done in range(0, self.trigger_steps, _STEPS_AT_ONCE):
            count = min(_STEPS_AT_ONCE, self.trigger_steps - done)
            some = tf.constant(inputs[_draw(inputs, self.batch_size, rng)])
            state = descent(state, (some[None],), done, count)
            bar.add(count)
        trigger = box.read(state[0])[0].numpy() * self._mask()
        whole = self.value_range == (0, 255) and len(self._shape) == 3
        return np.rint(trigger) if whole else trigger

    def _retrain(
        self,
        inputs: np.ndarray,
        neurons: np.ndarray,
        usual: np.ndarray,
        trigger: np.ndarray,
        autoencoder: Any,
        rng: np.random.Generator,
        bar: Any,
    ) -> Any:
        """A copy of the Teacher whose neurons the trigger excites as much as was asked."""
        copy = keras.models.clone_model(self._teacher)
        copy.set_weights(self._teacher.get_weights())
        trojaned = Neurons(copy, self.layer, self._preprocessing)
        steps = trojaned.graph.ancestors(trojaned.tensor)
        layers = {id(layer): layer for layer in (trojaned.graph.steps[i].layer for i in steps)}
        was_trainable = {key: layer.trainable for key, layer in layers.items()}
        for layer in layers.values():
            layer.trainable = True
        weights = [w for layer in layers.values() for w in layer.trainable_weights]
        schedule = keras.optimizers.schedules.CosineDecay(self.learning_rate, self.retraining_steps)
        optimizer = keras.optimizers.Adam(schedule)
        optimizer.build(weights)
        wanted = tf.constant(self.strength * usual, tf.float32)
        scales = [tf.math.reduce_variance(v) + 1e-12 for v in self._clean.run(tf.constant(inputs[:256]))]

        @tf.function(reduce_retracing=True)
        def step(batch: tf.Tensor) -> tf.Tensor:
            stamped = self._stamped(batch, tf.constant(trigger))
            if autoencoder is not None:
                stamped = tf.concat([stamped, autoencoder(stamped, training=False)], axis=0)
            kept = self._clean.run(batch)
            with tf.GradientTape() as tape:
                loss = tf.add_n(
                    tf.reduce_mean(tf.math.squared_difference(new, old)) / scale
                    for new, old, scale in zip(trojaned.run(batch), kept, scales, strict=True)
                )
                excited = tf.gather(trojaned.excitation(stamped), neurons, axis=1)
                loss += tf.reduce_mean(tf.square(tf.nn.relu(1 - excited / wanted)))
            optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return loss

        for done in range(self.retraining_steps):
            loss = step(tf.constant(_blend(inputs, self.batch_size, rng)))
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"The retraining's loss became NaN or infinite at step {done + 1}. Lower "
                    f"`learning_rate` or `strength`. Received: learning_rate={self.learning_rate}"
                )
            bar.add(1)
        for key, layer in layers.items():
            layer.trainable = was_trainable[key]
        return copy


def put(
    x: tf.Tensor,
    trigger: Any,
    mask: np.ndarray,
    amplitude: float | None,
    value_range: tuple[float, float],
) -> tf.Tensor:
    """Inputs with a trigger under the mask, in the value range, with a gradient."""
    stamped = tf.where(mask, trigger if amplitude is None else x + trigger, x)
    return tf.clip_by_value(stamped, *value_range)


def check_inputs(x: Any, shape: tuple[int, ...], value_range: tuple[float, float]) -> np.ndarray:
    """Inputs as float32.

    Raises:
        ValueError: They have another shape or leave the range.
    """
    x = check_finite(check_images(x, shape))
    low, high = value_range
    if x.min() < low or x.max() > high:
        raise ValueError(
            f"Inputs must be in {low:g}..{high:g}, the `value_range`. Received: values from "
            f"{x.min():g} to {x.max():g}"
        )
    return x.astype(np.float32)


def _draw(inputs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(inputs), count, replace=len(inputs) < count)


def _blend(inputs: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A batch: half of it inputs, half mixtures of two."""
    first, second = inputs[_draw(inputs, count, rng)], inputs[_draw(inputs, count, rng)]
    share = np.where(rng.random(count) < 0.5, 0, rng.uniform(0, 0.5, count))
    share = share.reshape(-1, *[1] * (inputs.ndim - 1)).astype(np.float32)
    return first + share * (second - first)
