"""The mean activation of every prunable unit for every class."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.data import Batches
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.pruning.blocks import find_blocks


class ClassActivations:
    """Mean absolute activation of each unit of each prunable layer, for each class.

    For a convolution, the activation of a filter is read at the end of its block (after the batch
    normalisation and the activation layers that follow it) and averaged over its positions. For a
    Dense layer, it is that of each input unit, which scores the connections that leave it. The
    data is read once, batch by batch; memory grows with classes times units only.

    Args:
        model: A built Functional or Sequential Keras model whose last dimension of output is the
            number of classes.

    Attributes:
        layers: Names of the prunable layers.
        classes: Number of classes.
        counts: After `adapt`, int array of shape `(classes,)`: images seen of each class.
        value_range: After `adapt`, the smallest and the largest value seen in an image.

    Raises:
        ValueError: The model is subclassed, not built, or uses a prunable layer twice.

    Example:
        >>> activations = ClassActivations(model)
        >>> activations.adapt(x_train, y_train)
        >>> activations["conv1_1"].shape
        (16, 24)

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022.
    """

    def __init__(self, model: Any) -> None:
        self._graph = model if isinstance(model, ModelGraph) else ModelGraph(model)
        self._blocks = find_blocks(self._graph)
        self.layers = [block.name for block in self._blocks]
        self.classes = int(self._graph.shapes[self._graph.output][-1] or 0)
        self.counts = np.zeros(self.classes, np.int64)
        self.value_range = (math.inf, -math.inf)
        self._means: dict[str, np.ndarray] = {}

    def adapt(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int = 32,
        verbose: int | str = "auto",
        preprocessing: Any = None,
    ) -> None:
        """Compute the class means, afresh.

        Args:
            x: Images of shape `(n, H, W, C)` in 0..255 (or what the model takes), array, tensor or
                a batched `tf.data.Dataset` of `(images, labels)`.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.
            preprocessing: Callable applied to each batch of images before the model.

        Raises:
            ValueError: A class has no image, or the data does not fit the model.
        """
        batches = Batches(
            x, y, shape=self._graph.input_shape, classes=self.classes, batch_size=batch_size
        )
        wanted = {block.tensor: block.units for block in self._blocks}

        @tf.function(input_signature=[tf.TensorSpec((None, *self._graph.input_shape), tf.float32)])
        def unit_means(images: tf.Tensor) -> list[tf.Tensor]:
            images = preprocessing(images) if preprocessing else images
            values = self._graph.run(images, list(wanted))
            return [
                tf.reduce_mean(tf.abs(values[t]), axis=list(range(1, values[t].shape.rank - 1)))
                for t in wanted
            ]

        sums = {t: np.zeros((self.classes, units)) for t, units in wanted.items()}
        counts = np.zeros(self.classes, np.int64)
        low, high = math.inf, -math.inf
        bar = keras.utils.Progbar(batches.count, verbose=0 if verbose == 0 else 1)
        for images, labels in batches:
            means = unit_means(images.astype(np.float32))
            for tensor, mean in zip(wanted, means, strict=True):
                np.add.at(sums[tensor], labels, mean.numpy())
            low, high = min(low, float(images.min())), max(high, float(images.max()))
            counts += np.bincount(labels, minlength=self.classes)
            bar.add(1)
        if not counts.all():
            missing = np.flatnonzero(counts == 0)
            raise ValueError(
                "Every class needs at least one image, because a differentiator is pruned by its "
                f"classes' activations. Add images of class {', '.join(map(str, missing))}. "
                f"Received: no image of {len(missing)} of {self.classes} classes"
            )
        self.counts = counts
        self.value_range = (low, high)
        self._means = {
            block.name: (sums[block.tensor] / counts[:, None]).astype(np.float32)
            for block in self._blocks
        }

    def __getitem__(self, layer: str) -> np.ndarray:
        """Float32 array of shape `(classes, units)` of the layer called `layer`.

        Raises:
            KeyError: There is no such prunable layer.
            RuntimeError: `adapt` was not called.
        """
        if not self._means:
            raise RuntimeError(
                "There are no activations yet. Call `adapt(x_train, y_train)` first."
            )
        if layer not in self._means:
            raise KeyError(
                f"{layer!r} is not a prunable layer. Those are: {', '.join(self.layers)}"
            )
        return self._means[layer]
