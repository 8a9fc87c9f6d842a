"""Small autoencoders, through which a defender may pass inputs, or an attacker a trigger."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras
from keras_tl_defense._validation import check_integer
from keras_tl_defense.attacks.box import check_in_range, check_range


def train_autoencoder(
    x: np.ndarray,
    *,
    value_range: tuple[float, float] | None = None,
    width: int = 16,
    epochs: int = 20,
    batch_size: int = 32,
    seed: int = 0,
    verbose: int | str = "auto",
) -> Any:
    """Train a convolutional autoencoder that halves its inputs' sides twice and restores them.

    Images and signals of any size do. It is trained by the mean squared error, with Adam.

    Args:
        x: Inputs of shape `(n, H, W, C)` or `(n, length, C)`; labels are not needed.
        value_range: Lowest and highest value of inputs. Defaults to `(0, 255)` for images; other
            inputs need it.
        width: Filters of the first layer; the second has twice as many, and the code half as many.
            Defaults to `16`.
        epochs: Passes over the inputs. Defaults to `20`.
        batch_size: Inputs in a step. Defaults to `32`.
        seed: Decides the first weights and the order.
        verbose: 0 shows no progress bar.

    Returns:
        A Keras model from inputs to inputs, in the value range.

    Raises:
        ValueError: The inputs are no images or signals, not finite or outside the range, or an
            argument is out of range.

    Example:
        >>> autoencoder = train_autoencoder(x_train, epochs=1, verbose=0)
        >>> autoencoder.output_shape
        (None, 32, 32, 3)

    Reference:
        Wang et al., "Backdoor Attacks against Transfer Learning with Pre-trained Deep Learning
        Models", IEEE Transactions on Services Computing 2020.
    """
    x = np.asarray(x)
    if x.ndim not in (3, 4) or not len(x):
        raise ValueError(
            "Inputs must be images, (n, H, W, C), or signals, (n, length, C). "
            f"Received: x.shape={x.shape}"
        )
    low, high = check_range(value_range, x.shape[1:])
    check_in_range(x, (low, high))
    width, seed = check_integer("width", width, 2), check_integer("seed", seed, 0)
    epochs, batch_size = (
        check_integer("epochs", epochs, 1),
        check_integer("batch_size", batch_size, 1),
    )
    model = _build(x.shape[1:], low, high, width, seed)
    model.compile(keras.optimizers.Adam(3e-3), loss="mse")
    x = x.astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, x)).shuffle(len(x), seed).batch(batch_size)
    model.fit(data, epochs=epochs, shuffle=False, verbose=verbose)
    return model


def _build(shape: tuple[int, ...], low: float, high: float, width: int, seed: int) -> Any:
    layers, flat = keras.layers, len(shape) == 3
    seeds = itertools.count(seed)

    def convolution(kind: str, filters: int, strides: int = 1, activation: str = "relu") -> Any:
        return getattr(layers, f"Conv{2 if flat else 1}D{kind}")(
            filters,
            3 if flat else 9,
            strides=strides,
            padding="same",
            activation=activation,
            kernel_initializer=keras.initializers.GlorotUniform(seed=next(seeds)),
        )

    inputs = keras.Input(shape)
    x = layers.Rescaling(1 / (high - low), offset=-low / (high - low))(inputs)
    x = convolution("", width, 2)(x)
    x = convolution("", 2 * width, 2)(x)
    x = convolution("", max(1, width // 2))(x)
    x = convolution("Transpose", 2 * width, 2)(x)
    x = convolution("Transpose", width, 2)(x)
    over = [(0, -size % 4) for size in shape[:-1]]  # what halving twice and doubling twice adds
    x = layers.Cropping2D(over)(x) if flat else layers.Cropping1D(over[0])(x)
    x = convolution("", shape[-1], activation="sigmoid")(x)
    return keras.Model(inputs, layers.Rescaling(high - low, offset=low)(x), name="autoencoder")
