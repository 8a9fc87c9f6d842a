"""What kinds of layers do to the channels that they take."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense.graph import Step

_layers = keras.layers

CONVOLUTIONS = (
    _layers.Conv1D,
    _layers.Conv2D,
    _layers.SeparableConv1D,
    _layers.SeparableConv2D,
)
DEPTHWISE = (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
TRANSPOSED = (_layers.Conv1DTranspose, _layers.Conv2DTranspose)
_ACTIVATIONS = (
    _layers.Activation,
    _layers.ReLU,
    _layers.LeakyReLU,
    _layers.PReLU,
    _layers.ELU,
)
INACTIVE = (
    _layers.Dropout,
    _layers.SpatialDropout1D,
    _layers.SpatialDropout2D,
    _layers.GaussianDropout,
    _layers.GaussianNoise,
    _layers.AlphaDropout,
    _layers.ActivityRegularization,
    _layers.Identity,
)
SPATIAL = (
    _layers.MaxPooling1D,
    _layers.MaxPooling2D,
    _layers.AveragePooling1D,
    _layers.AveragePooling2D,
    _layers.GlobalMaxPooling1D,
    _layers.GlobalMaxPooling2D,
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.ZeroPadding1D,
    _layers.ZeroPadding2D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
)
_REVIVING = (
    _layers.BatchNormalization,
    _layers.Rescaling,
    _layers.Normalization,
    *_ACTIVATIONS,
    *DEPTHWISE,
)
NEW_CHANNELS = (*CONVOLUTIONS, *TRANSPOSED, _layers.Dense)
_SUMS = (_layers.Add, _layers.Subtract, _layers.Average)
_PRODUCTS = (_layers.Multiply,)
CHAIN = (_layers.BatchNormalization, *_ACTIVATIONS, *INACTIVE)


def treats_channels_alike(layer: Any) -> bool:
    """Whether the layer does to some of a tensor's channels what it does to all of them."""
    alike = (*_ACTIVATIONS, *INACTIVE, *SPATIAL, _layers.Flatten, _layers.Concatenate)
    return isinstance(layer, alike) and not layer.weights


def treats_positions_alone(layer: Any) -> bool:
    """Whether a layer leaves a channel that is the same everywhere as it is."""
    return isinstance(layer, (*INACTIVE, *SPATIAL, _layers.Flatten, _layers.Reshape))


def _operator(step: Step) -> str:
    """What `+`, `*` and the like became in a model, as `"add"` or `"multiply"`; else `""`."""
    symbol = getattr(step.layer, "symbol", None)
    if isinstance(symbol, str):  # the legacy Keras, `__operators__.add` or `math.multiply`
        return symbol.split(".")[-1]
    return "" if isinstance(step.layer, _layers.Layer) else type(step.layer).__name__.lower()


def is_sum(step: Step) -> bool:
    """Whether a step adds or subtracts tensors."""
    operator = _operator(step) in ("add", "subtract") and len(step.inputs) > 1
    return operator or isinstance(step.layer, _SUMS)


def is_product(step: Step) -> bool:
    """Whether a step multiplies tensors."""
    operator = _operator(step) == "multiply" and len(step.inputs) > 1
    return operator or isinstance(step.layer, _PRODUCTS)


def may_revive(step: Step) -> bool:
    """Whether a step treats channels apart, and could make something else of one that is 0."""
    constant = _operator(step) in ("add", "subtract", "multiply") and len(step.inputs) == 1
    return constant or isinstance(step.layer, _REVIVING)


def normalises_positions(layer: Any, last: int) -> bool:
    """Whether the layer is a batch normalisation along another axis than the last."""
    axes = layer.axis if isinstance(layer, _layers.BatchNormalization) else last
    return [axis % (last + 1) for axis in np.ravel(axes)] != [last]


def is_softmax(layer: Any) -> bool:
    """Whether the layer ends in an activation that mixes channels, as a softmax does."""
    function = getattr(layer, "activation", None)
    return function is not None and _mixes(function)


@lru_cache(maxsize=256)
def _mixes(function: Any) -> bool:
    with tf.init_scope():
        before = np.linspace(-2, 3, 12).reshape(3, 4).astype(np.float32)
        after = before.copy()
        after[:, -1] += (1, -1, 5)
        one, other = (np.asarray(function(tf.constant(values))) for values in (before, after))
        return bool(np.any(one[:, :-1] != other[:, :-1]))
