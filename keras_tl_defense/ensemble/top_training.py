"""Prune and fine-tune the tops of differentiators, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tl_defense._keras import keras, to_numpy
from keras_tl_defense.ensemble.tops import Arrays, OwnTop
from keras_tl_defense.ensemble.training import ClassImages, HeadKind, MemberFeatures, choose_rows
from keras_tl_defense.pruning.masks import Ratio
from keras_tl_defense.pruning.ratios import rising_ratio

_RIDGE = 0.1  # of the mean squared length of a centred row


def tune_tops(
    cut_values: MemberFeatures,
    sample: ClassImages,
    members: np.ndarray,
    class_sets: np.ndarray,
    head: HeadKind,
    trainer: TopTrainer,
    unit_scores: Arrays,
    rngs: Sequence[np.random.Generator],
) -> tuple[Arrays, Arrays]:
    """Prune and fine-tune the tops of differentiators on the images of their classes.

    Args:
        cut_values: Computes the values at the cut under the masks of a differentiator, flattened.
        sample: Training images.
        members: Int array of shape `(bodies,)`: numbers of the differentiators.
        class_sets: Int array of shape `(bodies, size)`: their classes.
        head: `"pair"` or `"one_vs_rest"`.
        trainer: Trains one after the other.
        unit_scores: Scores of the units of each pruned layer, `(bodies, units)`; the lowest go.
        rngs: Each differentiator's own, which chooses its images of other classes, and shuffles.

    Returns:
        Compact weights and kept filters, stacked: the differentiators as first dimension.
    """
    tops = []
    for number, (member, rng) in enumerate(zip(members, rngs, strict=True)):
        rows = choose_rows(sample.counts, class_sets[number : number + 1], head, [rng])
        used = rows.weight[0] > 0
        unique, index = np.unique(rows.numbers[0, used], return_inverse=True)
        values = cut_values(sample.images[unique], int(member))[index]
        positive = rows.positive[0, used].astype(np.float32)
        weight = rows.weight[0, used] / rows.weight[0, used].mean()
        tops.append(
            trainer.fit(
                values.reshape(-1, *trainer.cut_shape),
                positive,
                np.broadcast_to(weight[:, None], positive.shape).astype(np.float32),
                {name: scores[number] for name, scores in unit_scores.items()},
                rng,
            )
        )
    weights = {name: np.stack([top.weights[name] for top in tops]) for name in tops[0].weights}
    return weights, {name: np.stack([top.kept[name] for top in tops]) for name in tops[0].kept}


class TrainedTop(NamedTuple):
    """What `TopTrainer.fit` returns.

    Attributes:
        weights: Compact weights of the final ratios.
        kept: Kept filters.
        loss: Weighted cross-entropy in each epoch, summed over the outputs, array of shape
            `(iterations * epochs,)`.
        accuracy: Weighted share of right answers in each epoch, array of the same shape.
    """

    weights: Arrays
    kept: Arrays
    loss: np.ndarray
    accuracy: np.ndarray


class TopTrainer:
    """Prunes and trains one differentiator's top after the other.

    Each starts from the Student's weights. In every round the units with the lowest scores go, as
    many as the ratios of the round say, those of `ActivationPruningSchedule`; and what stays is
    trained together with a linear head, which starts at a ridge regression. That head only guides
    the training and is dropped. Shapes depend on the round alone, so the graph and variables of a
    round serve every differentiator.

    Args:
        top: The layers.
        optimizer: Configuration of a Keras optimizer, as `keras.optimizers.serialize` gives it.
        outputs: Number of logits of the head.
        iterations: Rounds of pruning and training.
        epochs: Passes over the rows in each round.
        batch_size: Rows in a step.

    Attributes:
        cut_shape: Shape of what comes from the cut, without the batch.
    """

    def __init__(
        self,
        top: OwnTop,
        optimizer: Any,
        *,
        outputs: int,
        iterations: int,
        epochs: int,
        batch_size: int,
    ) -> None:
        self._top = top
        self.cut_shape = top.cut_shape
        self._epochs = epochs
        self._batch_size = batch_size
        self._rounds = [
            _Round(
                top,
                {name: rising_ratio(r, number, iterations) for name, r in top.ratios.items()},
                optimizer,
                outputs,
            )
            for number in range(1, iterations + 1)
        ]

    def fit(
        self,
        cut_values: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        scores: Arrays,
        rng: np.random.Generator,
    ) -> TrainedTop:
        """Prune and train one differentiator.

        Args:
            cut_values: Float32 array of shape `(rows, *cut shape)`: training images at the cut.
            targets: Float32 array of shape `(rows, outputs)`, 0 or 1.
            weights: Float32 array of shape `(rows, outputs)`: how much each counts in the loss.
            scores: Score of each unit of each pruned layer, `(units,)`.
            rng: Shuffles the rows.
        """
        top = self._top
        own, kept = top.start()
        history = []
        for current in self._rounds:
            own, kept = top.prune(current.ratios, scores, own, kept)
            current.start(own, kept)
            features = [
                current.features(cut_values[start : start + self._batch_size])
                for start in range(0, len(cut_values), self._batch_size)
            ]
            current.start_head(*_ridge(np.concatenate(features), targets, weights))
            for _ in range(self._epochs):
                order = rng.permutation(len(cut_values))
                sums = [
                    current.step(cut_values[batch], targets[batch], weights[batch])
                    for batch in np.array_split(order, -(-len(order) // self._batch_size))
                ]
                loss, right = np.sum(sums, axis=0)
                history.append((loss / len(order), right / weights.sum()))
            own = current.weights()
        loss, accuracy = np.array(history, np.float32).T
        return TrainedTop(own, kept, loss, accuracy)


class _Round:
    """The variables of one round's compact top and its head, and the graphs that train them."""

    def __init__(
        self, top: OwnTop, ratios: Mapping[str, Ratio], optimizer: Any, outputs: int
    ) -> None:
        self.ratios = ratios
        self._top = top
        holder = keras.layers.Layer()

        def add(name: str, shape: tuple[int, ...]) -> Any:
            name = name.replace("/", "_")
            return holder.add_weight(name=name, shape=shape, initializer="zeros")

        shapes = top.weight_shapes(ratios)
        self._own = {name: add(name, shape) for name, shape in shapes.items()}
        self._kernel = add("head_kernel", (top.features, outputs))
        self._bias = add("head_bias", (outputs,))
        self._masks = {name: tf.Variable(tf.zeros(shapes[name])) for name in top.pruned_kernels}
        counts = top.kept_counts(ratios)
        self._kept = {
            name: tf.Variable(tf.zeros(count, tf.int32)) for name, count in counts.items()
        }
        self._trained = [*self._own.values(), self._kernel, self._bias]
        self._optimizer = keras.optimizers.deserialize(optimizer)
        self._optimizer.build(self._trained)
        self._fresh_state = [to_numpy(variable) for variable in self._optimizer.variables]
        rows = tf.TensorSpec((None, *top.cut_shape), tf.float32)
        logits = tf.TensorSpec((None, outputs), tf.float32)
        self.features = tf.function(self._features, input_signature=[rows])
        self.step = tf.function(self._train_step, input_signature=[rows, logits, logits])

    def start(self, weights: Arrays, kept: Arrays) -> None:
        """Begin with these weights; zeros in pruned kernels stay. The optimizer starts afresh."""
        for name, variable in self._own.items():
            variable.assign(weights[name])
        for name, variable in self._kept.items():
            variable.assign(kept[name])
        for name, variable in self._masks.items():
            variable.assign((weights[name] != 0).astype(np.float32))
        for variable, value in zip(self._optimizer.variables, self._fresh_state, strict=True):
            variable.assign(value)

    def start_head(self, kernel: np.ndarray, bias: np.ndarray) -> None:
        """Begin with this head."""
        self._kernel.assign(kernel)
        self._bias.assign(bias)

    def weights(self) -> Arrays:
        """The compact weights, pruned connections exactly 0."""
        return {name: tensor.numpy() for name, tensor in self._masked().items()}

    def _masked(self) -> dict[str, tf.Tensor]:
        tensors = {name: tf.convert_to_tensor(variable) for name, variable in self._own.items()}
        tensors.update({name: tensors[name] * mask for name, mask in self._masks.items()})
        return tensors

    def _features(self, rows: tf.Tensor) -> tf.Tensor:
        return self._top.run(rows, self._masked(), self._kept)

    def _train_step(
        self, rows: tf.Tensor, targets: tf.Tensor, weights: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            features = self._features(rows)
            logits = tf.linalg.matmul(features, self._kernel) + self._bias
            loss = weights * tf.nn.sigmoid_cross_entropy_with_logits(targets, logits)
            total = tf.reduce_sum(tf.reduce_mean(loss, axis=0))
        gradients = tape.gradient(total, self._trained)
        self._optimizer.apply_gradients(zip(gradients, self._trained, strict=True))
        right = tf.cast(tf.equal(logits > 0, targets > 0.5), tf.float32)
        return tf.reduce_sum(loss), tf.reduce_sum(weights * right)


def _ridge(
    features: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted ridge regression of targets -1 and 1 on centred features, for each output.

    Returns:
        Kernel of shape `(features, outputs)` and bias of shape `(outputs,)`.
    """
    kernels, biases = [], []
    for target, weight in zip(2.0 * targets.T - 1, weights.T.astype(float), strict=True):
        share = weight / weight.sum()
        mean = share @ features
        root = np.sqrt(share)
        centred = root[:, None] * (features - mean)
        rows, width = centred.shape
        penalty = max(_RIDGE * np.sum(centred**2) / rows, 1e-12)
        if rows < width:
            dual = np.linalg.solve(centred @ centred.T + penalty * np.eye(rows), root * target)
            kernel = centred.T @ dual
        else:
            gram = centred.T @ centred + penalty * np.eye(width)
            kernel = np.linalg.solve(gram, centred.T @ (root * target))
        kernels.append(kernel)
        biases.append(share @ target - mean @ kernel)
    return np.stack(kernels, axis=1).astype(np.float32), np.array(biases, np.float32)
