"""TFMOT's pruning wrapper, with masks by activation. Importing this loads TFMOT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import (
    PruneLowMagnitude,
)

from keras_tl_defense._keras import register
from keras_tl_defense.pruning.removal import Removal
from keras_tl_defense.pruning.schedule import ActivationPruningSchedule


@register
class PruneLowActivation(PruneLowMagnitude):
    """A layer that TensorFlow Model Optimization prunes by activation.

    `prune_low_activation` makes these.

    Args:
        layer: The layer.
        removal: What becomes 0 in it.
        pruning_schedule: A `PruningSchedule` of TFMOT.
        **kwargs: Passed to TFMOT's wrapper.
    """

    def __init__(self, layer: Any, removal: Removal, pruning_schedule: Any, **kwargs: Any) -> None:
        self._removal = removal
        with self._prunable(layer):
            super().__init__(layer, pruning_schedule=pruning_schedule, **kwargs)

    @contextmanager
    def _prunable(self, layer: Any) -> Iterator[None]:
        """What makes TFMOT take the layer; gone afterwards, so that the layer stays as it was."""
        before = vars(layer).get("get_prunable_weights")
        layer.get_prunable_weights = lambda: [getattr(layer, n) for n in self._removal.weights]
        yield
        del layer.get_prunable_weights
        if before is not None:
            layer.get_prunable_weights = before

    def add_weight(self, name: str, **kwargs: Any) -> Any:
        """Add a weight; TFMOT calls the masks of all weights alike, and HDF5 files refuse that."""
        taken = [w.name.split("/")[-1].split(":")[0] for w in self._non_trainable_weights]
        number = sum(other.rstrip("_0123456789") == name for other in taken)
        if name in ("mask", "threshold"):  # under mixed precision, as the weight itself
            kwargs["experimental_autocast"] = hasattr(self.prunable_weights[number], "true_dtype")
        return super().add_weight(f"{name}_{number}" if number else name, **kwargs)

    def build(self, input_shape: Any) -> None:
        """Build the layer and its masks."""
        with self._prunable(self.layer):
            super().build(input_shape)
        channels = len(self._removal.sources)
        for weight in self.prunable_weights:
            found = weight.shape[-1] if channels else weight.shape[0]
            expected = channels or len(self._removal.scores)
            if found != expected:
                raise ValueError(
                    f"The activations are those of another model: the layer {self.layer.name!r} "
                    f"has {expected} units there. Compute those of the model that you prune. "
                    f"Received: a layer with {found}"
                )
        self.pruning_obj = _ActivationMasks(
            self._removal,
            training_step_fn=lambda: self.pruning_step,
            pruning_vars=self.pruning_vars,
            pruning_schedule=self.pruning_schedule,
            block_size=self.block_size,
            block_pooling_type=self.block_pooling_type,
        )

    @property
    def non_trainable_weights(self) -> list[Any]:
        """Those of the layer and the masks, each once: TFMOT lists a pruned moving mean twice."""
        inner = {id(weight) for weight in self.layer.weights}
        own = [weight for weight in self._non_trainable_weights if id(weight) not in inner]
        return [*self.layer.non_trainable_weights, *own]

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        removal = {**asdict(self._removal), "scores": self._removal.scores.tolist()}
        return {**super().get_config(), "removal": removal}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PruneLowActivation:
        """A wrapper from its configuration."""
        parts = dict(config["removal"])
        removal = Removal(
            tuple(parts["weights"]),
            np.array(parts["scores"], np.float32),
            tuple(parts["sizes"]),
            tuple(parts["sources"]),
        )
        return super().from_config({**config, "removal": removal})


class _ActivationMasks(Pruning):
    """TFMOT's masks, by the scores of a `Removal` instead of by magnitude."""

    def __init__(self, removal: Removal, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._removal = removal

    def _update_mask(self, weights: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """The threshold, which says nothing here, and the mask of a weight."""
        step, schedule = self._step_fn(), self._pruning_schedule

        def pruned(units: int) -> tf.Tensor:
            if isinstance(schedule, ActivationPruningSchedule):
                return schedule.pruned_count(step, units)
            ratio = tf.cast(schedule(step)[1], tf.float64)
            return tf.minimum(tf.cast(ratio * units, tf.int32), units - 1)

        values = tf.convert_to_tensor(weights)
        mask = self._removal.mask(values, pruned)
        return tf.zeros((), weights.dtype), tf.cast(mask, weights.dtype)
