"""Linear heads on the features of pruned bodies: ridge regressions, solved in closed form.

A head has thousands of features and some tens or hundreds of images, so the regression is solved in
the span of its images, for many bodies at once. Its strength is chosen on held-out images: for a
ridge regression the answer to each image by the head trained on all others is known in closed form.

Reference:
    Rifkin and Lippert, "Notes on Regularized Least Squares", MIT CSAIL technical report 2007-025.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from scipy.linalg.lapack import spotrf, spotri

_STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean squared length of an image
_LEAST_APART = 0.05  # of held-out margins, in which targets are 2 apart; less says nothing
_EIGEN_ROWS = 800  # of more images, some choose the strength and one system is solved for all


class Heads(NamedTuple):
    """What `fit_heads` returns.

    Attributes:
        kernel: Float32 array of shape `(bodies, heads, features)`.
        bias: Float32 array of shape `(bodies, heads)`.
        margins: Float32 array of shape `(bodies, rows, heads)`: the margin of each image under a
            head that was trained on all others.
        strength: Float array of shape `(bodies,)`: the regularisation chosen.
        mean: Float32 array of shape `(bodies, features)`: of the images, by their weights.
    """

    kernel: np.ndarray
    bias: np.ndarray
    margins: np.ndarray
    strength: np.ndarray
    mean: np.ndarray

    def rounded(self) -> Heads:
        """The heads in half precision, each with a scale, and offsets that suit the rounded."""
        scale = np.abs(self.kernel).max(axis=2, keepdims=True)
        half = (self.kernel / np.where(scale > 0, scale, 1)).astype(np.float16)
        kernel = half.astype(np.float32) * scale
        moved = np.einsum("bhf,bf->bh", (self.kernel - kernel).astype(float), self.mean)
        return self._replace(kernel=kernel, bias=(self.bias + moved).astype(np.float32))


def fit_heads(features: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> Heads:
    """Fit linear heads on the features of each body.

    Each head is scaled by its held-out margins: those of its class lie at +1 on average, those of
    other images at -1, so that the margins of different heads can be compared and averaged, and a
    head says "not my class" below the middle. A head that does not tell them apart, such as one of
    a single image, says -1 to everything.

    Args:
        features: Float32 array of shape `(bodies, rows, features)`.
        positive: Boolean array of shape `(bodies, rows, heads)`: which images are of the head's
            class.
        weight: Float array of shape `(bodies, rows)`: how much each image counts; 0 for rows that
            only fill up the array.

    Returns:
        The heads with their held-out margins.

    Example:
        >>> x = np.array([[[0.0, 0], [0, 1], [5, 0], [5, 1]]], np.float32)
        >>> own = np.array([[[False], [False], [True], [True]]])
        >>> heads = fit_heads(x, own, np.ones((1, 4)))
        >>> (x[0] @ heads.kernel[0, 0] + heads.bias[0, 0] > 0).tolist()
        [False, False, True, True]
    """
    weight = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
    root = np.sqrt(weight)[..., None]
    target = np.where(positive, 1, -1).astype(np.float32)
    mean = tf.linalg.matmul(weight[:, None], features)
    level = np.einsum("bn,bnh->bh", weight, target)[:, None]
    centred = (features - mean) * root
    gram = tf.linalg.matmul(centred, centred, transpose_b=True).numpy()
    images = 1 / np.sum(weight**2, axis=1)
    scale = np.maximum(np.trace(gram, axis1=1, axis2=2), 1e-12) / images
    if features.shape[1] > _EIGEN_ROWS:
        some = np.linspace(0, features.shape[1] - 1, _EIGEN_ROWS).astype(int)
        strength = fit_heads(features[:, some], positive[:, some], weight[:, some]).strength
        dual, held_out = _solve(gram, strength * scale, (target - level) * root, weight)
    else:
        strength, dual, held_out = _choose(gram, scale, (target - level) * root, weight)
    margins = target - held_out / np.maximum(root, 1e-12)
    kernel = tf.linalg.matmul(dual.astype(np.float32), centred, transpose_a=True).numpy()
    bias = level[:, 0] - tf.linalg.matmul(kernel, mean, transpose_b=True).numpy()[..., 0]
    high, low = (_mean(margins, weight[..., None] * group) for group in (positive, ~positive))
    tells = high - low > _LEAST_APART
    half, middle = np.where(tells, (high - low) / 2, 1), (high + low) / 2
    return Heads(
        np.where(tells[..., None], kernel / half[..., None], 0).astype(np.float32),
        np.where(tells, (bias - middle) / half, -1).astype(np.float32),
        np.where(tells[:, None], (margins - middle[:, None]) / half[:, None], -1).astype("float32"),
        strength,
        mean.numpy()[:, 0],
    )


def _choose(
    gram: np.ndarray, scale: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strength with the least held-out error, for each body, and what `_solve` gives for it."""
    energy, basis = np.linalg.eigh(gram)
    energy = np.maximum(energy, 0)
    share = np.einsum("bnr,bnh->brh", basis, target)
    best: tuple[np.ndarray, ...] = ()
    for strength in _STRENGTHS:
        penalty = strength * scale[:, None]
        shrink = energy / (energy + penalty)
        leverage = np.einsum("bnr,br->bn", basis**2, shrink) + weight
        residual = np.einsum("bnr,brh->bnh", basis, (1 - shrink)[..., None] * share)
        held_out = residual / np.maximum(1 - leverage, 1e-4)[..., None]
        error = np.sum(held_out**2, axis=(1, 2))
        dual = np.einsum("bnr,brh->bnh", basis, share / (energy + penalty)[..., None])
        found = (error, np.full(len(error), strength), dual, held_out)
        if best:
            better = error < best[0]
            choose = [better.reshape(-1, *[1] * (array.ndim - 1)) for array in found]
            best = tuple(
                np.where(c, new, old) for c, new, old in zip(choose, found, best, strict=True)
            )
        else:
            best = found
    return best[1], best[2], best[3]


def _solve(
    gram: np.ndarray, penalty: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Dual coefficients, and what is left of the targets when an image is held out, both weighted.

    Args:
        gram: Array of shape `(bodies, rows, rows)`: products of the weighted, centred images.
        penalty: Array of shape `(bodies,)`.
        target: Array of shape `(bodies, rows, heads)`, centred and weighted.
        weight: Array of shape `(bodies, rows)`.
    """
    penalty = penalty[:, None, None].astype(np.float32)
    inverse = np.stack([_inverse(one) for one in gram + penalty * np.eye(gram.shape[1], dtype="f")])
    dual = inverse @ target.astype(np.float32)
    free = penalty[..., 0] * np.diagonal(inverse, axis1=1, axis2=2) - weight
    return dual, penalty * dual / np.maximum(free, 1e-4)[..., None]


def _inverse(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric positive definite matrix, by its Cholesky factor."""
    factor, failed = spotrf(matrix, lower=True)
    if failed:  # too near to singular for single precision
        return np.linalg.inv(matrix.astype(np.float64)).astype(np.float32)
    lower, _ = spotri(factor, lower=True)
    return np.tril(lower) + np.tril(lower, -1).T


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted means over the rows."""
    return np.sum(values * weight, axis=1) / np.maximum(weight.sum(axis=1), 1e-12)
