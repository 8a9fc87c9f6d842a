"""Steps of gradient descent on a batch of inputs at once, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf

_AT_ONCE = 50
State = tuple[tf.Tensor, ...]
Rule = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]]
NO_GRADIENT = (
    "No gradient comes from the model to its inputs, so an attack would change nothing, and prove "
    "nothing. Attack a model, and with a `preprocessing`, that take floats and do not round them."
)


def adadelta(rate: float, decay: float = 0.95, epsilon: float = 1e-7) -> Rule:
    """Zeiler's rule: `(gradient, moments, moments, step) -> (change, moments, moments)`."""

    def rule(gradient: tf.Tensor, squares: tf.Tensor, changes: tf.Tensor, _: Any) -> State:
        squares = decay * squares + (1 - decay) * tf.square(gradient)
        change = gradient * tf.sqrt((changes + epsilon) / (squares + epsilon))
        return -rate * change, squares, decay * changes + (1 - decay) * tf.square(change)

    return rule


def adam(rate: float, first: float = 0.9, second: float = 0.999, epsilon: float = 1e-7) -> Rule:
    """Kingma's and Ba's rule, as `adadelta` is one; steps count from 1."""

    def rule(gradient: tf.Tensor, means: tf.Tensor, squares: tf.Tensor, step: tf.Tensor) -> State:
        step = tf.cast(step, tf.float32)
        means = first * means + (1 - first) * gradient
        squares = second * squares + (1 - second) * tf.square(gradient)
        mean, square = means / (1 - first**step), squares / (1 - second**step)
        return -rate * mean / (tf.sqrt(square) + epsilon), means, squares

    return rule


class Descent:
    """Minimise a loss for each input of a batch, some steps at a time.

    Inputs do not influence each other. A graph is traced for each shape of what it is given, with
    batches of any size.

    Args:
        loss: Maps the variable, of shape `(batch, …)`, and the context to losses of shape
            `(batch,)`.
        rule: Maps gradients to changes.
        hint: What to do where a gradient is no number, for the error.
    """

    def __init__(self, loss: Callable[..., tf.Tensor], rule: Rule, hint: str) -> None:
        self._loss, self._rule, self._hint = loss, rule, hint
        self._compiled: dict[Any, Any] = {}

    def start(self, variable: tf.Tensor) -> State:
        """The state before the first step."""
        return variable, tf.zeros_like(variable), tf.zeros_like(variable)

    def __call__(self, state: State, context: State, done: int, count: int) -> State:
        """Take steps.

        Args:
            state: From `start`, or what the last call returned; the first of it is the variable.
            context: Tensors of shape `(batch, …)` that the loss needs.
            done: Steps taken before.
            count: Steps to take.

        Raises:
            FloatingPointError: A gradient became NaN or infinite.
            ValueError: There is no gradient.
        """
        key = tuple((t.shape[1:], t.dtype) for t in (*state, *context))
        if key not in self._compiled:
            specs = [
                tuple(tf.TensorSpec((None, *t.shape[1:]), t.dtype) for t in part)
                for part in (state, context)
            ]
            numbers = [tf.TensorSpec((), tf.int32)] * 2
            self._compiled[key] = tf.function(
                partial(self._steps), input_signature=[*specs, *numbers]
            )
        steps = (tf.constant(done), tf.constant(count))
        new, broken = self._compiled[key](state, context, *steps)
        if broken > 0:
            raise FloatingPointError(
                f"The attack's gradient became NaN or infinite at step {int(broken)}. Check the "
                f"model on these inputs. {self._hint}"
            )
        return tuple(new)

    def run(self, variable: tf.Tensor, context: State, steps: int, bar: Any = None) -> tf.Tensor:
        """The variable after all steps, which a progress bar counts."""
        state = self.start(variable)
        for done in range(0, steps, _AT_ONCE):
            count = min(_AT_ONCE, steps - done)
            state = self(state, context, done, count)
            if bar is not None:
                bar.add(count)
        return state[0]

    def _steps(
        self, state: State, context: State, done: tf.Tensor, count: tf.Tensor
    ) -> tuple[State, tf.Tensor]:
        variable, first, second = state
        broken = tf.constant(0)
        for step in tf.range(done + 1, done + count + 1):
            with tf.GradientTape() as tape:
                tape.watch(variable)
                loss = self._loss(variable, *context)
            gradient = tape.gradient(loss, variable)
            if gradient is None:
                raise ValueError(NO_GRADIENT)
            finite = tf.reduce_all(tf.math.is_finite(gradient))
            broken = tf.where(finite | (broken > 0), broken, step)
            change, first, second = self._rule(gradient, first, second, step)
            variable += change
        return (variable, first, second), broken
