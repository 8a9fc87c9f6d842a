"""The mean activation of every prunable unit for every class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.blocks import Block, find_blocks
from keras_tl_defense.data import Batches, check_every_class
from keras_tl_defense.graph import ModelGraph


class ClassActivations:
    """Mean absolute activation of each unit of each prunable layer, for each class.

    For a convolution, the activation of a filter is read at the end of its block (after the batch
    normalisation and the activation layers that follow it) and averaged over its positions. For a
    Dense layer, it is that of each input unit, which scores the connections that leave it. The
    data is read once, batch by batch; memory grows with classes times units only.

    Args:
        model: A built Functional or Sequential Keras model whose last dimension of output is the
            number of classes.
        layers: Names of the layers to look at. Defaults to every prunable one.
        cut: Name of a layer; only what comes before it, and it, is looked at. Defaults to the last.

    Attributes:
        layers: Names of the layers looked at.
        filters: Those of them that are convolutions.
        classes: Number of classes.
        graph: The model's layer calls, a `ModelGraph`.
        counts: After `adapt`, int array of shape `(classes,)`: images seen of each class.

    Raises:
        TypeError: `layers` is one name.
        ValueError: The model is subclassed or not built, or a layer cannot be pruned.

    Example:
        >>> activations = ClassActivations(model)
        >>> activations.adapt(x_train, y_train)
        >>> activations["conv1_1"].shape
        (16, 24)

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022.
    """

    def __init__(
        self, model: Any, layers: Sequence[str] | None = None, *, cut: str | None = None
    ) -> None:
        self.graph = ModelGraph(model)
        blocks = find_blocks(self.graph, None if cut is None else self.graph.layer_output(cut))
        if isinstance(layers, str):
            raise TypeError(f"`layers` must be a sequence of names. Received: layers={layers!r}")
        unknown = set(layers or ()) - {block.name for block in blocks}
        if unknown:
            raise ValueError(
                f"No prunable layer is called {', '.join(sorted(map(repr, unknown)))}. Those are: "
                f"{', '.join(block.name for block in blocks)}. Received: layers={layers!r}"
            )
        self._blocks = [b.checked() for b in blocks if layers is None or b.name in layers]
        self.layers = [block.name for block in self._blocks]
        self.filters = [block.name for block in self._blocks if block.kind == "filters"]
        self.classes = int(self.graph.shapes[self.graph.output][-1] or 0)
        self.counts = np.zeros(self.classes, np.int64)
        self._means: dict[str, np.ndarray] = {}

    def adapt(
        self, x: Any, y: Any = None, *, batch_size: int = 32, verbose: int | str = "auto"
    ) -> None:
        """Compute the class means, afresh.

        Args:
            x: Images of shape `(n, H, W, C)`, as the model takes them: array, tensor, or batched
                `tf.data.Dataset` of `(images, labels)`.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.

        Raises:
            ValueError: A class has no image, or the data does not fit the model.
        """
        shape = self.graph.input_shape
        batches = Batches(x, y, shape=shape, classes=self.classes, batch_size=batch_size)
        self.adapt_batches(batches, verbose=verbose)

    def adapt_batches(
        self, batches: Batches, *, preprocessing: Any = None, verbose: int | str = "auto"
    ) -> None:
        """Compute the class means, afresh, of images that were checked.

        Args:
            batches: Images with labels.
            preprocessing: Callable from the images to what the model takes.
            verbose: 0 shows no progress bar.

        Raises:
            ValueError: A class has no image.
        """
        wanted = {block.tensor: block.units for block in self._blocks}

        @tf.function(input_signature=[tf.TensorSpec((None, *self.graph.input_shape), tf.float32)])
        def unit_means(images: tf.Tensor) -> list[tf.Tensor]:
            images = preprocessing(images) if preprocessing else images
            values = self.graph.run(images, list(wanted))
            return [
                tf.reduce_mean(tf.abs(values[t]), axis=list(range(1, values[t].shape.rank - 1)))
                for t in wanted
            ]

        sums = {t: np.zeros((self.classes, units)) for t, units in wanted.items()}
        counts = np.zeros(self.classes, np.int64)
        bar = keras.utils.Progbar(batches.count, verbose=0 if verbose == 0 else 1)
        for images, labels in batches:
            means = unit_means(images.astype(np.float32))
            for tensor, mean in zip(wanted, means, strict=True):
                np.add.at(sums[tensor], labels, mean.numpy())
            counts += np.bincount(labels, minlength=self.classes)
            bar.add(1)
        check_every_class(counts)
        self.counts = counts
        self._means = {
            block.name: (sums[block.tensor] / counts[:, None]).astype(np.float32)
            for block in self._blocks
        }

    def blocks_of(self, graph: ModelGraph) -> list[Block]:
        """The same layers of another model, such as a copy with the same weights.

        Args:
            graph: The other model.

        Raises:
            ValueError: A layer is missing there, or has another number of units.
        """
        others = {block.name: block for block in find_blocks(graph)}
        for block in self._blocks:
            other = others.get(block.name)
            units = None if other is None else other.units
            if other is None or (other.kind, units) != (block.kind, block.units):
                raise ValueError(
                    f"The activations are those of another model: there, the layer {block.name!r} "
                    f"has {block.units} units, and in this model "
                    f"{'there is none' if units is None else units}. Compute the activations of "
                    "the model itself, or of one with the same layers and names. "
                    f"Received: layer={block.name!r}"
                )
        return [others[block.name].checked() for block in self._blocks]

    def require_adapted(self) -> None:
        """Raise a `RuntimeError` unless `adapt` was called."""
        if not self.counts.any():
            raise RuntimeError(
                "There are no activations yet. Call `adapt(x_train, y_train)` first."
            )

    def check_classes(self, classes: Sequence[int]) -> tuple[int, ...]:
        """Some of the classes, as integers.

        Raises:
            RuntimeError: `adapt` was not called.
            ValueError: They are no classes of the model, or there are none.
        """
        self.require_adapted()
        numbers = list(classes) if np.ndim(classes) == 1 else []
        if not numbers:
            raise ValueError(
                f"Give a sequence of at least one class, as (3, 7). Received: classes={classes!r}"
            )
        why = "the classes of the activations"
        return tuple(check_integer("classes", n, 0, self.classes - 1, why) for n in numbers)

    def __getitem__(self, layer: str) -> np.ndarray:
        """Float32 array of shape `(classes, units)` of the layer called `layer`.

        Raises:
            KeyError: There is no such prunable layer.
            RuntimeError: `adapt` was not called.
        """
        self.require_adapted()
        if layer not in self._means:
            raise KeyError(
                f"{layer!r} is not a prunable layer. Those are: {', '.join(self.layers)}"
            )
        return self._means[layer]


def check_activations(activations: Any) -> ClassActivations:
    """Activations, as they came.

    Raises:
        TypeError: They are something else.
    """
    if not isinstance(activations, ClassActivations):
        raise TypeError(
            "`activations` must be a `ClassActivations`. Make one of the model and call its "
            f"`adapt`. Received: activations={type(activations).__name__}"
        )
    return activations
