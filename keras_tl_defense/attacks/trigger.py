"""The trigger of a backdoor: what is put on inputs to excite some neurons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense.attacks.box import Box, check_in_range, is_grey
from keras_tl_defense.attacks.descent import Descent, adam
from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.data import check_images, check_pixels

_STEPS_AT_ONCE = 10  # on the same inputs
_RATE = 0.1
_FAINT = 0.01  # of the usual excitation: a neuron that does not stir has a gradient, too


class Patch(NamedTuple):
    """Where a trigger goes and how.

    Attributes:
        mask: Boolean array of the shape of one input, `True` where the trigger is.
        amplitude: Largest change of any number by a trigger that is added, `None` for one that
            replaces what is under the mask.
        value_range: Lowest and highest value of inputs.
    """

    mask: np.ndarray
    amplitude: float | None
    value_range: tuple[float, float]

    @classmethod
    def at_the_end(
        cls,
        shape: tuple[int, ...],
        size: float,
        amplitude: float | None,
        value_range: tuple[float, float],
    ) -> Patch:
        """A corner of images or the end of signals, a share `size` of each side."""
        mask = np.zeros(shape, bool)
        sides = [max(1, math.ceil(size * side - 1e-9)) for side in shape[:-1]]
        mask[tuple(slice(-side, None) for side in sides)] = True
        return cls(mask, amplitude, value_range)

    @property
    def box(self) -> Box:
        """What values a trigger may have."""
        if self.amplitude is None:
            return Box(*self.value_range)
        largest = math.floor(self.amplitude) if self.whole else self.amplitude
        return Box(-largest, largest)

    @property
    def whole(self) -> bool:
        """Whether inputs are images of whole grey levels."""
        return is_grey(self.mask.shape, self.value_range)

    def put(self, x: tf.Tensor, trigger: Any) -> tf.Tensor:
        """Inputs with the trigger, in the value range, with a gradient."""
        stamped = tf.where(self.mask, trigger if self.amplitude is None else x + trigger, x)
        return tf.clip_by_value(stamped, *self.value_range)

    def check(self, x: Any) -> np.ndarray:
        """Inputs as float32.

        Raises:
            ValueError: They have another shape than the mask, or leave the range.
        """
        x = check_in_range(check_images(x, self.mask.shape), self.value_range)
        return (check_pixels(x) if self.whole else x).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Goal:
    """Which neurons a trigger is to excite.

    Attributes:
        neurons: Their numbers.
        usual: The largest excitation of each without the trigger.
        autoencoder: Inputs that passed through it count as well; `None` for none.
    """

    neurons: np.ndarray
    usual: np.ndarray
    autoencoder: Any = None

    def excitation(self, teacher: Neurons, stamped: tf.Tensor, masks: Any = None) -> tf.Tensor:
        """How much stamped inputs excite the neurons of a Teacher, in units of the usual."""
        if self.autoencoder is not None:
            passed = self.autoencoder(stamped, training=False)
            stamped = tf.concat([stamped, passed], axis=0)
        return tf.gather(teacher.excitation(stamped, masks), self.neurons, axis=1) / self.usual


def optimise_trigger(
    teacher: Neurons,
    goal: Goal,
    patch: Patch,
    inputs: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
    bar: Any,
) -> np.ndarray:
    """The trigger that excites the neurons most, by the mean logarithm over inputs.

    Args:
        teacher: The clean Teacher's layer.
        goal: The neurons.
        patch: Where the trigger goes.
        inputs: Float32 array of shape `(n, …)` to put it on.
        steps: Of Adam.
        batch_size: Inputs in a step.
        rng: Decides the start and the order of inputs.
        bar: Progress bar.

    Returns:
        Float32 array of the shape of one input, 0 outside the mask.

    Raises:
        FloatingPointError: A gradient became NaN or infinite.
    """
    box = patch.box

    def loss(w: tf.Tensor, some: tf.Tensor) -> tf.Tensor:
        excited = goal.excitation(teacher, patch.put(some[0], box.read(w)[0]))
        return -tf.reduce_mean(tf.math.log(tf.nn.relu(excited) + _FAINT))[None]

    descent = Descent(
        loss, adam(_RATE), f"Or choose other neurons. Received: layer={teacher.layer!r}"
    )
    start = box.low + (box.high - box.low) * rng.uniform(0.05, 0.95, (1, *patch.mask.shape))
    state = descent.start(box.write(tf.constant(start, tf.float32)))
    for done in range(0, steps, _STEPS_AT_ONCE):
        count = min(_STEPS_AT_ONCE, steps - done)
        some = inputs[draw(len(inputs), batch_size, rng)]
        state = descent(state, (tf.constant(some[None]),), done, count)
        bar.add(count)
    trigger = box.clip(box.read(state[0])[0].numpy()) * patch.mask
    return np.rint(trigger) if patch.whole else trigger


def draw(inputs: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of some inputs, each once where there are enough."""
    return rng.choice(inputs, count, replace=inputs < count)
