"""Pruning as a defender might do it, simulated by an attacker who has not seen it."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from keras_tl_defense.attacks.neurons import Neurons
from keras_tl_defense.blocks import find_blocks
from keras_tl_defense.pruning.masks import filter_masks

_JITTER = 1.0  # of the logarithms of activations: the defender's data are others


class MockPruning:
    """Draws masks of the filters of a Teacher up to a layer, by their activations.

    A mask removes the same random share of the filters of every convolution, those of least mean
    activation after each was multiplied by a random number. Half of the draws remove nothing.

    Args:
        teacher: The clean Teacher's layer.
        inputs: Float32 array of shape `(n, …)`, for the activations.
        chosen: Numbers of the layer's neurons that are never removed: without them, there is
            nothing to excite.
        largest: Largest share that is removed, in `[0, 1)`; 0 removes nothing.
    """

    def __init__(
        self,
        teacher: Neurons,
        inputs: np.ndarray,
        chosen: np.ndarray,
        largest: float,
    ) -> None:
        blocks = find_blocks(teacher.graph, teacher.tensor) if largest else []
        tensors = [b.tensor for b in blocks if b.kind == "filters" and b.problem is None]
        self._largest, self._chosen, self._last = largest, chosen, teacher.tensor
        self._scores = dict(zip(tensors, teacher.mean_activations(inputs, tensors), strict=True))

    def __call__(self, rng: np.random.Generator) -> dict[int, tf.Tensor]:
        """Masks by the numbers of the tensors that they multiply, of shape `(filters,)`."""
        ratio = self._largest * rng.random() * (rng.random() < 0.5)
        masks = {}
        for tensor, scores in self._scores.items():
            jitter = np.exp(_JITTER * rng.normal(size=len(scores)))
            mask = filter_masks((scores * jitter)[None], ratio)[0]
            if tensor == self._last:
                mask[self._chosen] = True
            masks[tensor] = tf.constant(mask, tf.float32)
        return masks
