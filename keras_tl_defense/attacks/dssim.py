"""The perceptual distance that bounds an attack."""

from __future__ import annotations

import tensorflow as tf

WINDOW = 11


def dssim(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Structural dissimilarity of two images, `(1 - SSIM) / 2`.

    Single scale, Gaussian window of 11 pixels (or what fits into a smaller image) with σ 1.5, K1
    0.01, K2 0.03, population covariance, mean over the channels and over the positions at which the
    whole window lies inside the image. `skimage.metrics.structural_similarity` computes the same
    with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.

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
        IEEE TIP 2004.
    """
    window = min(WINDOW, int(a.shape[1]), int(a.shape[2]))
    similarity = tf.image.ssim(
        a, b, max_val=255.0, filter_size=window, filter_sigma=1.5, k1=0.01, k2=0.03
    )
    return (1 - similarity) / 2
