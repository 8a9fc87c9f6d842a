"""`ChannelMask`: a layer that sets channels to 0, to prune inside a script of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras, register
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.pruning.masks import class_set_scores, filter_masks
from keras_tl_defense.pruning.ratios import check_ratio


@register
class ChannelMask(keras.layers.Layer):
    """Sets some channels, the last axis of its input, to 0.

    Put it after a convolution's block (after the batch normalisation and the activation that follow
    it) to see what is left without some filters. The mask is part of the layer's configuration.

    Args:
        mask: Sequence of booleans of shape `(channels,)`, `True` where a channel stays.
        **kwargs: Passed to `keras.layers.Layer`.

    Attributes:
        mask: The mask, boolean array of shape `(channels,)`.

    Raises:
        ValueError: `mask` is not a row of booleans; when called: the input has another number of
            channels.

    Example:
        >>> layer = ChannelMask([True, False, True])
        >>> layer(np.ones((1, 2, 3), np.float32)).numpy().tolist()
        [[[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]]
    """

    keeps_channels_apart = True  # so that channels are followed through it

    def __init__(self, mask: Sequence[bool] | np.ndarray, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask = np.asarray(mask)
        if self.mask.dtype != bool or self.mask.ndim != 1 or not self.mask.size:
            raise ValueError(
                "`mask` must be booleans of shape (channels,). Received: "
                f"{self.mask.dtype} of shape {self.mask.shape}"
            )

    @classmethod
    def from_activations(
        cls, activations: ClassActivations, layer: str, classes: Sequence[int], ratio: float
    ) -> ChannelMask:
        """A mask of the filters of a convolution that are least active for some classes.

        Args:
            activations: The classes' mean activations.
            layer: Name of the convolution.
            classes: Integers in `0..K-1`, at least one.
            ratio: Fraction of the filters that is removed, in `[0, 1)`.

        Raises:
            ValueError: `layer` is no convolution of the activations, or there are no such classes.

        Example:
            >>> activations = ClassActivations(model)
            >>> activations.adapt(x_train, y_train)
            >>> mask = ChannelMask.from_activations(activations, "conv1_1", (0, 1), 0.75)
            >>> int(mask.mask.sum())  # of 24 filters
            6
        """
        chosen = np.array(activations.check_classes(classes))
        if layer not in activations.filters:
            raise ValueError(
                f"{layer!r} is not a convolution of these activations. Those are: "
                f"{', '.join(activations.filters)}. Received: layer={layer!r}"
            )
        scores = class_set_scores(activations[layer], chosen[None])
        return cls(filter_masks(scores, check_ratio("ratio", ratio))[0])

    def build(self, input_shape: Any) -> None:
        """Check the number of channels."""
        if input_shape[-1] != len(self.mask):
            raise ValueError(
                f"The mask is one of {len(self.mask)} channels. Put it after the layer that it was "
                f"made for. Received: an input of shape {tuple(input_shape)}"
            )
        self.built = True

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """The input with 0 in the channels that do not stay."""
        return tf.where(self.mask, inputs, tf.zeros((), inputs.dtype))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {**super().get_config(), "mask": self.mask.tolist()}
