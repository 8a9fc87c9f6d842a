"""The perceptual distance that bounds an attack."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

WINDOW = 11
_SIGMA, _K1, _K2 = 1.5, 0.01, 0.03
_POWERS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_LEAST = 1e-6  # a power of a negative contrast is no number, and that of 0 has no gradient


def scale_count(height: int, width: int) -> int:
    """5 where the window fits into an image of a sixteenth of the size, else 1."""
    return len(_POWERS) if min(height, width) >= WINDOW * 2 ** (len(_POWERS) - 1) else 1


def dssim(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Structural dissimilarity of two images, `(1 - SSIM) / 2`.

    Gaussian window of 11 pixels (or what fits into a smaller image) with σ 1.5, K1 0.01, K2 0.03,
    population covariance, mean over the channels and over the positions at which the whole window
    lies inside the image. Images of 176 pixels and more along both sides are compared at five
    scales (MS-SSIM, `tf.image.ssim_multiscale`), smaller ones at one, as
    `skimage.metrics.structural_similarity` does with `gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False`.

    Args:
        a: Float tensor of shape `(batch, H, W, C)` in 0..255.
        b: Float tensor of the same shape.

    Returns:
        Float tensor of shape `(batch,)` in 0..1: 0 for equal images.

    Example:
        >>> image = tf.random.uniform((1, 32, 32, 3), maxval=255.0)
        >>> float(dssim(image, image)[0])
        0.0

    Reference:
        Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE TIP 2004; Wang et al., "Multiscale Structural Similarity for Image Quality
        Assessment", Asilomar 2003.
    """
    x, y = (tf.transpose(tf.cast(image, tf.float32), (0, 3, 1, 2)) for image in (a, b))
    scales = scale_count(*x.shape[2:])
    if scales == 1:
        luminance, contrast = _compare(x, y)
        similarity = tf.reduce_mean(luminance * contrast, axis=(2, 3))
        return (1 - tf.reduce_mean(similarity, axis=1)) / 2
    similarity = 1.0
    for scale, power in enumerate(_POWERS):
        if scale:
            x, y = _halve(x), _halve(y)
        luminance, contrast = _compare(x, y)
        likeness = luminance * contrast if scale == scales - 1 else contrast
        mean = tf.reduce_mean(likeness, axis=(2, 3))
        similarity *= tf.maximum(mean, _LEAST) ** power
    return (1 - tf.reduce_mean(similarity, axis=1)) / 2


def _compare(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Likeness of luminance, and of contrast and structure, at every position of the window."""
    mean_x, mean_y, squares, product = tf.unstack(_blur(tf.stack([x, y, x * x + y * y, x * y])))
    means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    c1, c2 = (_K1 * 255) ** 2, (_K2 * 255) ** 2
    luminance = (2 * means + c1) / (mean_squares + c1)
    return luminance, (2 * (product - means) + c2) / (squares - mean_squares + c2)


def _halve(x: tf.Tensor) -> tf.Tensor:
    """Means of two by two pixels; the last row or column of an odd number counts twice."""
    height, width = x.shape[2:]
    x = tf.pad(x, [[0, 0], [0, 0], [0, height % 2], [0, width % 2]], "SYMMETRIC")
    x = tf.reshape(x, (-1, x.shape[1], -(-height // 2), 2, -(-width // 2), 2))
    return tf.reduce_mean(x, axis=(3, 5))


def _blur(x: tf.Tensor) -> tf.Tensor:
    """Gaussian means over windows inside `(…, H, W)`, as two products of matrices.

    A convolution with the window takes four times as long with its gradient.
    """
    height, width = x.shape[-2:]
    window = min(WINDOW, height, width)
    means = tf.matmul(tf.reshape(x, (-1, width)), _gaussians(width, window))
    means = tf.reshape(means, tf.concat([tf.shape(x)[:-1], [width - window + 1]], axis=0))
    return tf.matmul(_gaussians(height, window), means, transpose_a=True)


def _gaussians(size: int, window: int) -> np.ndarray:
    """A column for each position of a window in a row of pixels, `(size, positions)`."""
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    columns = np.zeros((size, size - window + 1), np.float32)
    for position in range(columns.shape[1]):
        columns[position : position + window, position] = weights / weights.sum()
    return columns
