"""A Keras model as a flat list of layer calls, which can be run again with changes.

Keras runs a model as a whole. This library has to stop in the middle (to read an activation),
start in the middle (to reuse the Student's pass) and change tensors on the way (to mask them), in
models nested in models. `ModelGraph` unrolls a Functional or Sequential model for that.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from keras_tl_defense._keras import LEGACY, keras


@dataclass(frozen=True)
class Ref:
    """A place in `ModelGraph` arguments where the tensor with this number goes."""

    tensor: int


@dataclass(frozen=True)
class Step:
    """One call of one layer: `outputs = layer(*args, **kwargs)`, tensors given by number."""

    name: str
    layer: Any
    frozen: bool
    args: Any
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def __call__(self, values: dict[int, tf.Tensor]) -> list[tf.Tensor]:
        """Run the layer, in inference mode, on the tensors of `values`."""

        def fill(leaf: Any) -> Any:
            return values[leaf.tensor] if isinstance(leaf, Ref) else leaf

        args, kwargs = tf.nest.map_structure(fill, (self.args, self.kwargs))
        return tf.nest.flatten(self.layer(*args, **kwargs))


class ModelGraph:
    """The layer calls of a Functional or Sequential model, nested models unrolled.

    Tensors are numbered; `input` and `output` are the numbers of the model's own. A step is named
    after its layer, or `model/layer` where two nested models use the same layer name, or `layer@1`,
    `layer@2` where a layer is called more than once.

    Args:
        model: A built Functional or Sequential Keras model with one input and one output. Models
            nested in it are unrolled when they are Functional or Sequential, too; anything else
            counts as one layer.
        role: What the model is called in error messages, such as `"student"`.

    Raises:
        ValueError: The model is subclassed, not built, or has several inputs or outputs.
    """

    def __init__(self, model: Any, role: str = "model") -> None:
        self.role = role
        self.steps: list[Step] = []
        self.shapes: list[tuple[int | None, ...]] = []
        _check_unrollable(model, role)
        self.input = self._new_tensor(model.inputs[0].shape)
        self.input_shape: tuple[int | None, ...] = self.shapes[self.input][1:]
        self.input_dtype = tf.as_dtype(model.inputs[0].dtype)
        self._nested: dict[str, int] = {}
        raw: list[tuple[str, Step]] = []
        (self.output,) = self._unroll(model, [self.input], "", model.trainable, raw)
        self.steps = _named(raw)
        needed = set(self.ancestors(self.output))
        self.steps = [step for index, step in enumerate(self.steps) if index in needed]
        self.producer = {t: i for i, step in enumerate(self.steps) for t in step.outputs}
        self.consumers: dict[int, list[int]] = {t: [] for t in range(len(self.shapes))}
        for i, step in enumerate(self.steps):
            for t in step.inputs:
                self.consumers[t].append(i)

    def _new_tensor(self, shape: Iterable[int | None]) -> int:
        self.shapes.append(tuple(shape))
        return len(self.shapes) - 1

    def _unroll(
        self,
        model: Any,
        inputs: Sequence[int],
        path: str,
        trainable: bool,
        raw: list[tuple[str, Step]],
    ) -> list[int]:
        """Append the steps of `model`, called on the tensors `inputs`; return its outputs."""

        def call(layer: Any, args: Any, kwargs: dict[str, Any], outputs: Any) -> list[int]:
            refs = [leaf.tensor for leaf in tf.nest.flatten((args, kwargs)) if _is_ref(leaf)]
            learns = trainable and getattr(layer, "trainable", False)
            if _is_unrollable(layer):
                inner = self._unroll(layer, refs, f"{path}{layer.name}/", learns, raw)
                self._nested[layer.name] = inner[0]
                return inner
            produced = [self._new_tensor(t.shape) for t in tf.nest.flatten(outputs)]
            kwargs = {k: v for k, v in kwargs.items() if k != "training"}
            if _takes_training(layer):
                kwargs["training"] = False
            frozen = not (learns and getattr(layer, "trainable_weights", ()))
            step = Step(layer.name, layer, frozen, args, kwargs, tuple(refs), tuple(produced))
            raw.append((path, step))
            return produced

        model = _functional(model)
        known = {id(t): number for t, number in zip(model.inputs, inputs, strict=True)}

        def number(leaf: Any) -> Any:
            return Ref(known[id(leaf)]) if id(leaf) in known else leaf

        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                layer, args, kwargs, outputs = _node_call(node)
                args, kwargs = tf.nest.map_structure(number, (args, kwargs))
                produced = call(layer, args, kwargs, outputs)
                for tensor, ref in zip(tf.nest.flatten(outputs), produced, strict=True):
                    known[id(tensor)] = ref
        return [known[id(t)] for t in model.outputs]

    def ancestors(self, *tensors: int) -> list[int]:
        """Numbers of the steps that `tensors` depend on, in the order in which they run."""
        wanted = set(tensors)
        found = []
        for index in range(len(self.steps) - 1, -1, -1):
            step = self.steps[index]
            if wanted.intersection(step.outputs):
                wanted.update(step.inputs)
                found.append(index)
        return found[::-1]

    def step(self, name: str) -> Step:
        """The step of the layer called `name`.

        Raises:
            ValueError: There is no such layer.
        """
        for step in self.steps:
            if step.name == name:
                return step
        names = [step.name for step in self.steps]
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(
            f"The {self.role} has no layer called {name!r}. {hint}Its layers are: "
            f"{', '.join(names)}. Received: layer={name!r}"
        )

    def layer_output(self, name: str) -> int:
        """Number of the tensor that the layer, or nested model, called `name` returns.

        Raises:
            ValueError: There is no such layer.
        """
        if not isinstance(name, str):
            raise ValueError(f"A layer is given by its name. Received: {name!r}")
        if name in self._nested and all(step.name != name for step in self.steps):
            return self._nested[name]
        return self.step(name).outputs[0]

    def size(self, tensor: int) -> int:
        """Numbers in a tensor, of one example; sizes that are not known count as 1."""
        return math.prod(size or 1 for size in self.shapes[tensor][1:])

    def run(self, inputs: tf.Tensor, wanted: Sequence[int]) -> dict[int, tf.Tensor]:
        """Compute the tensors `wanted` and all they depend on.

        Args:
            inputs: Tensor of shape `(batch, …)`, what the model takes.
            wanted: Tensor numbers.

        Returns:
            Every computed tensor by its number.
        """
        values = {self.input: tf.cast(inputs, self.input_dtype)}
        for index in self.ancestors(*wanted):
            step = self.steps[index]
            values.update(zip(step.outputs, step(values), strict=True))
        return values

    def bottlenecks(self, tensor: int) -> list[int]:
        """Numbers of the tensors that everything passes through on its way to `tensor`."""
        numbers = self.ancestors(tensor)
        last = {t: number for number in numbers for t in self.steps[number].inputs}
        live = {self.input}
        found: list[int] = []
        for number in numbers:
            live.update(self.steps[number].outputs)
            live = {t for t in live if t == tensor or last.get(t, -1) > number}
            if len(live) == 1:
                found.extend(live)
        return found

    def find_cut(self) -> int:
        """Number of the last tensor all of whose weighted ancestors are frozen.

        Only tensors that everything passes through are candidates, so that a model can be cut
        there into a frozen body and a rest.

        Raises:
            ValueError: No layer is frozen, or every layer is.
        """
        cut = None
        bottlenecks = set(self.bottlenecks(self.output))
        weighted = False
        for step in self.steps:
            if not step.frozen:
                break
            weighted = weighted or bool(getattr(step.layer, "weights", ()))
            if weighted and step.outputs[0] in bottlenecks:
                cut = step.outputs[0]
        else:
            raise ValueError(
                f"Every layer of the {self.role} is frozen, so it cannot be seen which part comes "
                "from the Teacher. Leave `trainable=True` on the layers that were retrained, or "
                f"name the last frozen layer with `cut=`. Received: {self.role} of "
                f"{len(self.steps)} layers"
            )
        if cut is None:
            raise ValueError(
                f"No layer of the {self.role} is frozen before the first trainable one, "
                f"{step.name!r}. Set `trainable=False` on the layers that carry the Teacher's "
                f"weights, or name the last of them with `cut=`. Received: {self.role} of "
                f"{len(self.steps)} layers"
            )
        return cut


def _named(raw: list[tuple[str, Step]]) -> list[Step]:
    """The steps, each with a name of its own: `layer`, `model/layer`, or `layer@call`."""
    steps = [step for _, step in raw]
    names = Counter(step.name for step in steps)
    for index, (path, step) in enumerate(raw):
        if names[step.name] > 1:
            steps[index] = replace(step, name=path + step.name)
    names = Counter(step.name for step in steps)
    calls: Counter[str] = Counter()
    for index, step in enumerate(steps):
        if names[step.name] > 1:
            calls[step.name] += 1
            steps[index] = replace(step, name=f"{step.name}@{calls[step.name]}")
    return steps


def _is_ref(leaf: Any) -> bool:
    return isinstance(leaf, Ref)


def _functional(model: Any) -> Any:
    """The Functional model behind a Sequential one of Keras 3, else the model itself."""
    return getattr(model, "_functional", None) or model


def _is_unrollable(layer: Any) -> bool:
    """Whether `layer` is a Functional or Sequential model that runs as Keras built it."""
    if not isinstance(layer, keras.Model):
        return False
    own_call = not type(layer).call.__module__.startswith(("keras.", "tf_keras."))
    return hasattr(_functional(layer), "_nodes_by_depth") and not own_call


def _check_unrollable(model: Any, role: str) -> None:
    received = f"Received: {role}={type(model).__name__}"
    if not isinstance(model, keras.Model):
        kind = "the legacy tf_keras" if LEGACY else "Keras 3"
        raise ValueError(
            f"The {role} must be a Keras model of the Keras in use, which is {kind}. {received} "
            f"from {type(model).__module__}"
        )
    if isinstance(model, keras.Sequential) and not getattr(model, "inputs", None):
        raise ValueError(
            f"The {role} is a Sequential model without an input shape. Begin it with "
            f"`keras.Input(shape)` or call `build`. {received}"
        )
    if not _is_unrollable(model):
        raise ValueError(
            f"The {role} must be a Functional or Sequential model, because its layers are pruned "
            "one by one and a subclassed model does not say how they follow each other. Write it "
            f"as `keras.Model(inputs, outputs)`. {received}"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"The {role} must have one input and one output. {received} with "
            f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
        )


def _takes_training(layer: Any) -> bool:
    return "training" in inspect.signature(layer.call).parameters


def _node_call(node: Any) -> tuple[Any, Any, dict[str, Any], Any]:
    """Layer, arguments and outputs of a Functional model's node, in either Keras generation."""
    if hasattr(node, "arguments"):
        return node.operation, node.arguments.args, node.arguments.kwargs, node.outputs
    return node.layer, node.call_args, node.call_kwargs, node.outputs
