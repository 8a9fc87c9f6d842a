"""`prune_low_activation`: prune by activation with TensorFlow Model Optimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras_tl_defense._keras import keras
from keras_tl_defense._tfmot import import_tfmot
from keras_tl_defense.activations import ClassActivations, check_activations
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.removal import find_removals


def prune_low_activation(
    to_prune: Any,
    activations: ClassActivations,
    classes: Sequence[int],
    pruning_schedule: Any,
) -> Any:
    """Wrap layers so that TensorFlow Model Optimization prunes them by activation.

    What TFMOT's `prune_low_magnitude` does by the size of weights, this does by what fires for some
    classes. Filters go whole, as for `ActivationPruning`, and Dense layers lose single connections.
    Train the result with the callback `tfmot.sparsity.keras.UpdatePruningStep`, watch it with
    `PruningSummaries`, and finish with `tfmot.sparsity.keras.strip_pruning`. As with TFMOT, the
    layers are not copied: the weights of what you pass change when the result is trained.

    Args:
        to_prune: A Functional or Sequential model of the legacy Keras (nested models, too), one
            of its layers, or a list of its layers. Of single layers, give the batch normalisations
            after a convolution, too, lest their offsets stay.
        activations: The classes' mean activations, of the model or of one with the same layers; its
            `layers` are those that are pruned.
        classes: Integers in `0..K-1`, at least one: the classes whose activations count. A unit's
            score is the largest of its mean activations.
        pruning_schedule: An `ActivationPruningSchedule`, or another `PruningSchedule` of TFMOT,
            whose ratios are exact to single precision.

    Returns:
        A model, a layer or a list like `to_prune`, with the layers that change wrapped. A model is
        not compiled.

    Raises:
        RuntimeError: Keras 3 is in use; or the activations were not computed.
        TypeError: `to_prune` is something else.
        ValueError: There are no such classes, the activations are those of another model, nothing
            is pruned, or a nested model is called with `training=False`.

    Example:
        Under the legacy Keras, with a model and its activations:

        ```python
        schedule = ActivationPruningSchedule(ratio=0.8, iterations=5, steps_per_iteration=100)
        pruned = prune_low_activation(model, activations, (3, 7), schedule)
        pruned.compile("adam", "sparse_categorical_crossentropy")
        pruned.fit(x_train, y_train, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
        small = tfmot.sparsity.keras.strip_pruning(pruned)
        ```

    Reference:
        Zhu and Gupta, "To prune, or not to prune", arXiv:1710.01878, for TFMOT's way of pruning;
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022.
    """
    tfmot = import_tfmot()
    from keras_tl_defense.pruning.wrapper import PruneLowActivation

    if not isinstance(pruning_schedule, tfmot.sparsity.keras.PruningSchedule):
        raise TypeError(
            "`pruning_schedule` must be an `ActivationPruningSchedule` or another PruningSchedule "
            f"of TFMOT. Received: pruning_schedule={pruning_schedule!r}"
        )
    check_activations(activations)
    whole = isinstance(to_prune, keras.Model)
    graph = ModelGraph(to_prune) if whole else activations.graph
    removals: dict[Any, Any] = {}
    for name, removal in find_removals(graph, activations, classes).items():
        key = _layer_key(graph.step(name).layer, whole)
        if key in removals:
            raise ValueError(
                f"Two layers of the activations' model are called {key!r}. Give the whole model. "
                f"Received: {type(to_prune).__name__}"
            )
        removals[key] = removal

    def wrap(layer: Any) -> Any:
        if isinstance(layer, keras.Model):
            _check_trains(layer)
            return keras.models.clone_model(layer, clone_function=wrap)
        removal = removals.get(_layer_key(layer, whole))
        return layer if removal is None else PruneLowActivation(layer, removal, pruning_schedule)

    if whole:
        return wrap(to_prune)
    layers = to_prune if isinstance(to_prune, list) else [to_prune]
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(
                "`to_prune` must be a Functional or Sequential model of the legacy Keras, a layer, "
                f"or a list of layers. Received: {type(layer).__module__}.{type(layer).__name__}"
            )
    wrapped = [wrap(layer) for layer in layers]
    if all(new is old for new, old in zip(wrapped, layers, strict=True)):
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(
            f"These activations prune nothing of {names}. They are of "
            f"{', '.join(activations.layers)}. Received: to_prune={names}"
        )
    return wrapped if isinstance(to_prune, list) else wrapped[0]


def _check_trains(model: Any) -> None:
    """Refuse models that call a nested one with `training=False`, where TFMOT prunes nothing."""
    for layer in model.layers:
        nodes = layer._inbound_nodes if isinstance(layer, keras.Model) else []
        if any(node.call_kwargs.get("training") is False for node in nodes):
            raise ValueError(
                f"The model calls the nested model {layer.name!r} with `training=False`, and TFMOT "
                "prunes only what it sees training. Use the callback `ActivationPruning`, or "
                "build the model without `training=False` (frozen batch normalisations keep to "
                f"their statistics anyway). Received: to_prune={model.name!r}"
            )


def _layer_key(layer: Any, whole: bool) -> Any:
    """A layer of a model is found as itself, one that comes alone by its name."""
    return id(layer) if whole else layer.name


def activation_prune_scope() -> Any:
    """A scope in which models wrapped by `prune_low_activation` can be loaded, like TFMOT's.

    Example:
        ```python
        pruned.save("pruned.keras")
        with keras_tl_defense.activation_prune_scope():
            pruned = keras.models.load_model("pruned.keras")
        ```

    Raises:
        RuntimeError: Keras 3 is in use.
    """
    import_tfmot()
    from keras_tl_defense.pruning.schedule import ActivationPruningSchedule
    from keras_tl_defense.pruning.wrapper import PruneLowActivation

    objects = (PruneLowActivation, ActivationPruningSchedule)
    return keras.utils.custom_object_scope({kind.__name__: kind for kind in objects})
