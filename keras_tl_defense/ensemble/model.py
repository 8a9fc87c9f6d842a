"""`DifferentiatorEnsemble`: a Student that rejects inputs crafted on its Teacher."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import tensorflow as tf

from keras_tl_defense._keras import keras, register, to_numpy
from keras_tl_defense._validation import check_callable, check_choice, check_integer, check_positive
from keras_tl_defense.activations import ClassActivations
from keras_tl_defense.blocks import find_blocks, left_alone
from keras_tl_defense.data import Batches
from keras_tl_defense.ensemble.answering import Rules, answer_images, white_box_answer
from keras_tl_defense.ensemble.arguments import (
    check_ensemble_size,
    check_retention,
    check_vote,
    class_count,
    head_tensor,
    key_words,
    make_roster,
    penultimate,
)
from keras_tl_defense.ensemble.backup import Backup, Start, fingerprint
from keras_tl_defense.ensemble.bank import DifferentiatorBank, most_features
from keras_tl_defense.ensemble.calibration import Calibration, score_threshold
from keras_tl_defense.ensemble.fitting import FitSettings, Fitter, fit_differentiators
from keras_tl_defense.ensemble.search import search_ratios
from keras_tl_defense.ensemble.selection import new_key
from keras_tl_defense.ensemble.summary import describe, memory_table, summarise
from keras_tl_defense.ensemble.tasks import Payload, check_executor, forget, task_runner
from keras_tl_defense.ensemble.tops import OwnTop, own_blocks
from keras_tl_defense.ensemble.training import ClassImages, HeadKind, sample_classes
from keras_tl_defense.graph import ModelGraph
from keras_tl_defense.metrics import Rate, clean_rates
from keras_tl_defense.pruning.ratios import resolve_ratios
from keras_tl_defense.saving import check_loadable, save_whole, serialize_preprocessing
from keras_tl_defense.serving import export_saved_model

_ADAPTED, _FITTED = 1, 2
_DECISIONS = ("count", "score")
_UNFROZEN_RATIO = 0.5  # of unfrozen layers, which the search leaves aside
_NOT_PRUNED = (
    "The differentiators are not pruned yet. Call `adapt(x_train, y_train)`, then "
    "`fit(x_train, y_train)`."
)
_MANY = 10_000  # differentiators, above which a warning names the way to fewer
_SHARED_TASKS = 32  # at least, where workers or a backup get them
_ANSWER_BYTES = 256 << 20  # for one tensor of the rows that are computed at once


@register
class DifferentiatorEnsemble(keras.Model):
    """A Student that rejects inputs on which a few differentiators disagree with it.

    A differentiator is a copy of the Student for two classes (or a few): its frozen layers, pruned
    by the activations of these classes, under heads of its own that tell each of them from all
    other classes, or, as in the paper, from each other. An input crafted on the public Teacher
    imitates the activations of another class in the *unpruned* layers, and loses the imitation
    where these are missing. For each input the Student answers a class, and `ensemble_size`
    differentiators that know this class are drawn by a keyed hash of the input. When
    `reject_threshold` of them disagree, the answer is 0, rejected; else it is the Student's class
    plus one. After `calibrate` a score decides instead: how sure they are, and how sure four
    *references* are (one without `jitter`), more pruned bodies with a head for every class.

    Images are in 0..255. The Student's layers are shared, not copied: train it before, not after.

    Args:
        student: A trained Functional or Sequential Keras model with K >= 2 outputs (logits or
            softmax). The layers that carry the Teacher's weights have `trainable=False`.
        ratios: Fraction of each layer's filters, or of a Dense layer's connections, that is pruned:
            one number in `[0, 1)` or a mapping from `fnmatch` patterns of layer names to numbers;
            the first that matches counts, a layer that none matches is not pruned. `"auto"`, the
            default, has `adapt` search the filters' ratios, and `head_layer` with them.
        retention: Share of the honest inputs, of those that the Student answers rightly, that the
            search and `calibrate` aim to keep. Defaults to `0.95`.
        head: `"one_vs_rest"`, two heads for each differentiator, each of its classes against all
            other classes; or `"pair"`, one head, the one class against the other, as in the paper.
        head_layer: Name of the frozen layer that the heads read, the cut or one before it. Earlier
            layers are harder to imitate and know less. Defaults to the cut, as in the paper, or to
            what the search finds.
        tune: `"head"`: the differentiators are the frozen layers and heads. `"unfrozen"`, as in
            the paper, for Students with retrained layers between the cut and the last one: each
            differentiator has its own copy of these, started from the Student's, pruned and
            fine-tuned. It takes far more time and memory; see the README. Defaults to `"head"`.
        iterations: Rounds of pruning and fine-tuning, the ratios rising in equal steps, for
            `tune="unfrozen"`. Defaults to `5`.
        jitter: Standard deviation of normal noise on the logarithms of the filters' activations,
            before they are ranked: differentiators that resemble each other less. Defaults to `1`;
            `0` prunes exactly the least active filters, as in the paper.
        ensemble_size: Differentiators that check an input, at most as many as know a class.
            Defaults to 5, or what there are where that is less.
        reject_threshold: Number of disagreeing differentiators that rejects an input. Defaults to
            `1`. Counts until `calibrate` was called.
        mode: `"validate"`: the differentiators accept or reject what the Student says. `"vote"`:
            those of all pairs vote, without the Student, and a class that wins against each of the
            others is the answer, else 0: this also answers crafted inputs, often with their true
            class. It needs `head="pair"` and all pairs, and asks up to 3(K-1) of them for an input.
        selection: `"keyed"`: drawn by a keyed hash of the input, so that the same input meets the
            same differentiators every time and sending it again does not help. `"random"`: drawn
            afresh for every answer, which TensorFlow's op determinism does not allow.
        members_per_class: Differentiators that know a class, at least, whose partners are drawn at
            random by the secret key. Defaults to K-1, all pairs; with fewer, their number grows
            with K, not with K². For groups the default is 10, or fewer where groups would repeat.
        classes_per_member: Classes that a differentiator knows. More than 2 make groups that
            overlap, each class in `members_per_class` of them or more. Defaults to `2`.
        grouping: `"likeness"` gathers classes with similar activations in a group, in other ways
            for each time that a class is in one; `"random"` does not, nor does `"likeness"` where
            no layer is pruned. Defaults to `"likeness"`.
        cut: Name of the last frozen layer. Defaults to what `layer.trainable` says.
        preprocessing: Callable from images in 0..255 to what the Student takes, when it does not
            take images in 0..255. A Keras layer, such as `keras.layers.Rescaling(1 / 255)`, or a
            registered function can be saved with the model.
        search_budget: Images that the search may pass through the Student's first layers to measure
            candidates, for each training image; one candidate is always measured. It crafts its
            attacks before: 128 images, 150 steps, at each of up to five layers. Defaults to `60`.
        seed: Integer of at least 0 that makes the search, the jitter and training reproducible. Who
            knows it, and which classes a differentiator knows, can recompute its masks; the key
            never comes from it.
        key: Secret of the draw, 16 bytes. For tests; defaults to the operating system's randomness.
        **kwargs: Passed to `keras.Model`.

    Attributes:
        member_classes: Int array of shape `(differentiators, classes_per_member)`: the classes
            that each one knows.
        ratios: Ratio of each layer that is pruned, or `"auto"` before `adapt`.
        head_layer: Name of the layer that the heads read; with `tune="unfrozen"` the cut, behind
            which they read the differentiator's own layers.
        cut: Name of the last frozen layer.
        search_history: DataFrame, what the search measured; `None` where nothing was searched, and
            after loading.

    Raises:
        TypeError: An argument has a wrong type.
        ValueError: An argument is out of range, the Student is subclassed, or no layer is frozen.

    Example:
        >>> defence = DifferentiatorEnsemble(student, {"conv1*": 0.85}, seed=0)
        >>> defence.adapt(x_train, y_train)
        >>> history = defence.fit(x_train, y_train)
        >>> retention = defence.calibrate(x_val, y_val, retention=0.9)
        >>> answers = defence.predict(x_test)  # 0 is "rejected", 1..K the Student's classes
        >>> bool(((answers >= 0) & (answers <= defence.classes)).all())
        True

    Reference:
        Wu et al., "Defeating Misclassification Attacks Against Transfer Learning", IEEE TDSC 2022.
    """

    def __init__(
        self,
        student: Any,
        ratios: float | Mapping[str, float] | Literal["auto"] = "auto",
        *,
        retention: float = 0.95,
        head: HeadKind = "one_vs_rest",
        head_layer: str | None = None,
        tune: Literal["head", "unfrozen"] = "head",
        iterations: int = 5,
        jitter: float = 1.0,
        ensemble_size: int | None = None,
        reject_threshold: int = 1,
        mode: Literal["validate", "vote"] = "validate",
        selection: Literal["keyed", "random"] = "keyed",
        members_per_class: int | None = None,
        classes_per_member: int = 2,
        grouping: Literal["likeness", "random"] = "likeness",
        cut: str | None = None,
        preprocessing: Any = None,
        search_budget: int = 60,
        seed: int | None = None,
        key: bytes | None = None,
        **kwargs: Any,
    ) -> None:
        graph = ModelGraph(student, "student")
        super().__init__(**kwargs)
        self.student = student
        self._graph = graph
        self.classes = class_count(graph)
        self._cut = graph.find_cut() if cut is None else graph.layer_output(cut)
        if self._cut == graph.output:
            raise ValueError(
                "The cut must come before the student's output, where layers of its own follow. "
                f"Received: cut={cut!r}, the output"
            )
        self.cut = graph.steps[graph.producer[self._cut]].name
        self.retention = check_retention(retention)
        self._head = check_choice("head", head, ("pair", "one_vs_rest"))
        self.tune = check_choice("tune", tune, ("head", "unfrozen"))
        self.iterations = check_integer("iterations", iterations, 1)
        head_tensor(graph, self._cut, head_layer)
        if tune == "unfrozen" and head_layer not in (None, self.cut):
            raise ValueError(
                'With `tune="unfrozen"` the heads read the differentiator\'s own layers after the '
                f"cut. Leave `head_layer` out. Received: head_layer={head_layer!r}"
            )
        self.head_layer = self.cut if tune == "unfrozen" else head_layer
        if tune == "unfrozen":  # what cannot be owned is refused now, not after the search
            OwnTop(graph, self._cut, penultimate(graph), {})
        self.jitter = 0.0 if jitter == 0 else check_positive("jitter", jitter)
        self.preprocessing = check_callable("preprocessing", preprocessing)
        self._mode = check_choice("mode", mode, ("validate", "vote"))
        self._selection = check_choice("selection", selection, ("keyed", "random"))
        self._roster = make_roster(self.classes, classes_per_member, members_per_class, grouping)
        if self._roster.count > _MANY:
            warnings.warn(
                f"{self._roster.count} differentiators take long to fit. Have fewer with "
                f"`members_per_class=10`. Received: {self.classes} classes",
                stacklevel=2,
            )
        if mode == "vote":
            check_vote(head, self._roster, ensemble_size, reject_threshold)
            ensemble_size = self.classes - 1
        self._ensemble_size = check_ensemble_size(ensemble_size, self._roster)
        self._reject_threshold = check_integer(
            "reject_threshold",
            reject_threshold,
            1,
            self.ensemble_size,
            "the number of differentiators that check an input",
        )
        self.search_budget = check_integer("search_budget", search_budget, 1)
        self.seed = None if seed is None else check_integer("seed", seed, 0)
        self.ratios: Any = "auto"
        self.search_history: pd.DataFrame | None = None
        self._key = self._add_state("key", "int64", (2,))
        self._key.assign(new_key() if key is None else key_words(key))
        self._stage = self._add_state("stage", "int32")
        self._decision = self._add_state("decision", "int32")
        self._calibration = self._add_state("calibration", "float32", (4,))
        self._bank: Any = None
        if not isinstance(ratios, str) or ratios != "auto":
            self._make_bank(ratios, self.head_layer)
        self._optimizer_config: Any = None
        self._answer_graph = cache(self._trace)  # not a dict, which a SavedModel would take along

    def _add_state(self, name: str, dtype: str, shape: tuple[int, ...] = ()) -> Any:
        return self.add_weight(
            name=name, shape=shape, dtype=dtype, initializer="zeros", trainable=False
        )

    def _make_bank(self, ratios: float | Mapping[str, float], head_layer: str | None) -> None:
        tensor = head_tensor(self._graph, self._cut, head_layer)
        frozen = [block.name for block in find_blocks(self._graph, before=tensor)]
        own: list[str] = []
        if self.tune == "unfrozen":
            end = penultimate(self._graph)
            own = [block.name for block in own_blocks(self._graph, tensor, end)]
        resolved = resolve_ratios(ratios, [*frozen, *own])
        top = None
        if self.tune == "unfrozen":
            top_ratios = {name: r for name, r in resolved.items() if name in own}
            top = OwnTop(self._graph, tensor, end, top_ratios)
        if not resolved:
            warnings.warn(
                "No layer is pruned, so nothing about the differentiators is secret but the draw, "
                f"and at the cut they protect hardly at all. Received: ratios={ratios!r}",
                stacklevel=3,
            )
        self._bank = DifferentiatorBank(
            self._graph,
            tensor,
            {name: r for name, r in resolved.items() if name not in own},
            self._roster,
            head=self.head,
            jitter=self.jitter,
            top=top,
            name="differentiators",
        )
        self.ratios = resolved
        self.head_layer = self._graph.steps[self._graph.producer[tensor]].name
        self.built = True

    def __repr__(self) -> str:
        # In a graph, where TensorFlow may want the name for a message, no weight can be read.
        known = hasattr(self, "_calibration") and tf.executing_eagerly()
        return describe(self) if known else super().__repr__()

    def summary(self, print_fn: Callable[[str], Any] | None = None, **options: Any) -> None:
        """Say what the defence is made of: Student, members, heads, ratios, decision.

        Args:
            print_fn: Takes the text. Defaults to `print`.
            **options: Others of Keras's `summary`, which change nothing here.
        """
        (print_fn or print)(summarise(self))

    @property
    def adapted(self) -> bool:
        """Whether the differentiators are drawn and pruned."""
        return int(to_numpy(self._stage)) >= _ADAPTED

    @property
    def fitted(self) -> bool:
        """Whether they are trained since."""
        return int(to_numpy(self._stage)) >= _FITTED

    @property
    def mode(self) -> str:
        """`"validate"` or `"vote"`; fixed when the defence is made, as all of these are."""
        return self._mode

    @property
    def head(self) -> HeadKind:
        """`"pair"` or `"one_vs_rest"`."""
        return self._head

    @property
    def selection(self) -> str:
        """`"keyed"` or `"random"`."""
        return self._selection

    @property
    def grouping(self) -> str:
        """`"likeness"` or `"random"`."""
        return "likeness" if self._roster.alike else "random"

    @property
    def ensemble_size(self) -> int:
        """Differentiators that check an input."""
        return self._ensemble_size

    @property
    def reject_threshold(self) -> int:
        """Disagreements that reject an input."""
        return self._reject_threshold

    @property
    def members_per_class(self) -> int:
        """How many differentiators know a class, at least."""
        return self._roster.each

    @property
    def classes_per_member(self) -> int:
        """How many classes a differentiator knows."""
        return self._roster.size

    @property
    def member_classes(self) -> np.ndarray:
        """The classes that each differentiator knows, `(differentiators, classes_per_member)`.

        Raises:
            RuntimeError: They are drawn by `adapt`, which was not called.
        """
        self._require(_ADAPTED)
        return np.array(self._bank.member_classes)

    @property
    def decision(self) -> str:
        """What rejects an input: `"count"`, as many disagreements as `reject_threshold`, as in the
        paper; or `"score"`, a score below the threshold of `calibrate`, which sets this.
        """
        return _DECISIONS[int(to_numpy(self._decision))]

    @decision.setter
    def decision(self, value: str) -> None:
        check_choice("decision", value, _DECISIONS)
        if value == "score":
            self._check_score_decides()
        if value == "score" and self.calibration is None:
            raise RuntimeError(
                "There is no threshold to decide by. Call `calibrate(x_val, y_val)` first. "
                "Received: decision='score'"
            )
        self._decision.assign(_DECISIONS.index(value))

    @property
    def calibration(self) -> Calibration | None:
        """The score's threshold and what it keeps, or `None` before `calibrate`."""
        asked, threshold, count, n = to_numpy(self._calibration).tolist()
        if n == 0:
            return None
        return Calibration(round(asked, 6), Rate.of_counts(int(count), int(n)), threshold)

    def adapt(
        self, x: Any, y: Any = None, *, batch_size: int = 32, verbose: int | str = "auto"
    ) -> None:
        """Prune the differentiators by the activations of their classes, afresh.

        Which classes they know is drawn by the key, where they are not all pairs.

        With `ratios="auto"` the first call searches the ratios, too; later calls keep them.

        Args:
            x: Training images of shape `(n, H, W, C)` in 0..255: array, tensor, or batched
                `tf.data.Dataset` of `(images, labels)`.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.

        Raises:
            ValueError: A class has no image, or too few to search; or the images are not in 0..255.
        """
        batches = self._batches(x, y, batch_size, labelled=True)
        if self._bank is None:
            found = search_ratios(
                self.student,
                self.cut,
                batches,
                self.preprocessing,
                head_layer=self.head_layer,
                retention=self.retention,
                jitter=self.jitter,
                most_features=most_features(self._roster, self.head),
                budget=self.search_budget,
                seed=self.seed,
                verbose=verbose,
            )
            own = {"*": _UNFROZEN_RATIO} if self.tune == "unfrozen" else {}
            frozen = {b.name: 0.0 for b in find_blocks(self._graph, before=self._cut)}
            ratios = {**frozen, **found.ratios, **own} if own else found.ratios
            self._make_bank(ratios, found.head_layer)
            self.search_history = found.history
        activations: dict[str, np.ndarray] = {}
        parts = [(self._bank.masks.blocks, self.head_layer)]
        if self._bank.top is not None:
            parts.append((self._bank.top.blocks, None))
        for blocks, end in parts:
            means = ClassActivations(self.student, [block.name for block in blocks], cut=end)
            means.adapt_batches(batches, preprocessing=self.preprocessing, verbose=verbose)
            activations |= {name: means[name] for name in means.layers}
        seed = np.random.SeedSequence(self.seed).generate_state(2, np.uint64)
        secret = to_numpy(self._key).view(np.uint64).tolist()
        self._bank.prune(activations, seed.view(np.int64), np.random.default_rng(secret))
        self._set_stage(_ADAPTED)

    def _set_stage(self, stage: int) -> None:
        self._stage.assign(stage)
        self._decision.assign(0)
        self._calibration.assign(np.zeros(4, np.float32))

    def compile(self, optimizer: Any = "adam") -> None:
        """Choose the optimizer of `tune="unfrozen"`; heads have a closed form and need none.

        Args:
            optimizer: Name or instance of a Keras optimizer. Every round of every differentiator
                starts with a fresh one of the same configuration.
        """
        self._optimizer_config = keras.optimizers.serialize(keras.optimizers.get(optimizer))

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        epochs: int = 5,
        batch_size: int = 32,
        images_per_class: int = 100,
        chunk_memory: int = 1 << 30,
        executor: Executor | None = None,
        backup_dir: str | Path | None = None,
        verbose: int | str = "auto",
    ) -> Any:
        """Fit the heads of every differentiator.

        A head is a ridge regression in closed form on the images of its classes and, with
        `head="one_vs_rest"`, 128 of other classes; it is chosen and scaled by held-out images, each
        answered by the head that was fitted without it. A differentiator that tells held-out images
        rightly in less than 70 % is pruned more gently, by three quarters or half of the ratios.
        The references, four more bodies, get a head for each class, fitted on up to 8000 images.
        Where images have near twins, frames of a film or mirrored copies, held-out figures are too
        good.

        Args:
            x: Training images, as for `adapt`. Keep them as secret as the model: heads that others
                fit to them are much like these, under whatever masks and key.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            epochs: Passes over a differentiator's images in each round of `tune="unfrozen"`; heads
                have a closed form. Defaults to `5`.
            batch_size: Images in a step of fine-tuning, and per batch of arrays.
            images_per_class: At most this many images of each class are used for a
                differentiator, chosen at random. More take longer and reject fewer honest inputs.
                Defaults to `100`.
            chunk_memory: Bytes for the heads that are fitted at once, about, of one differentiator
                at least; the training images, the references' heads and what is kept come on top.
                What is fitted at once is also what a worker gets, and what is lost when the process
                is killed: with an executor or a backup a 32nd of the differentiators at most.
                Defaults to 1 GiB.
            executor: A `concurrent.futures.Executor` whose processes share the work, such as Dask's
                `Client(…).get_executor()`. They get the Student, the masks and training images, not
                the secret key, and keep them until their next fit or their end; `preprocessing`
                must be a layer or registered function that they can import. What comes out is what
                one process finds, to rounding. Defaults to this one.
            backup_dir: Folder that keeps what is done, readable by its owner; remove it when the
                defence is saved. When the process was killed, the same lines with the same data, in
                the same order, go on there; the masks and the classes of differentiators that the
                folder holds replace those that `adapt` drew. Searched ratios are not kept: with
                `ratios="auto"` give a `seed`, or `ratios` and `head_layer` as found.
            verbose: 0 shows no progress bar.

        Returns:
            A Keras `History` with the mean held-out squared error (`loss`) and `accuracy` of the
            heads, one entry for each level of pruning that was needed.

        Raises:
            RuntimeError: `adapt` was not called.
            TypeError: `executor` is none.
            ValueError: A class has no image, the data does not fit the Student, `executor` forks
                processes, or `backup_dir` is damaged or of another fit.
        """
        self._require(_ADAPTED)
        check_executor(executor)
        chunk_memory = check_integer("chunk_memory", chunk_memory, 1)
        epochs = check_integer("epochs", epochs, 1)
        batch_size = check_integer("batch_size", batch_size, 1)
        images_per_class = check_integer("images_per_class", images_per_class, 1)
        optimizer = self._optimizer_config or keras.optimizers.serialize(
            keras.optimizers.get("adam")
        )
        seed = int(np.random.default_rng(self.seed).integers(2**63))
        settings = FitSettings(
            seed, images_per_class, chunk_memory, optimizer, self.iterations, epochs, batch_size
        )
        if backup_dir is not None and self.seed is None and self.search_history is not None:
            warnings.warn(
                "The ratios were searched without a `seed`, so that another process would find "
                "others, and the backup would not be of its fit. Give a `seed`, or the "
                f"`ratios={self.ratios}` and `head_layer={self.head_layer!r}` that were found.",
                stacklevel=2,
            )
        identity = self._identity() | settings.identity()
        with nullcontext() if backup_dir is None else Backup(backup_dir, identity) as backup:
            if backup is not None and backup.start is not None:
                settings = settings._replace(seed=backup.start.seed)
            sample = sample_classes(
                self._batches(x, y, batch_size, labelled=True),
                images_per_class,
                np.random.default_rng(settings.seed),
                for_reference=True,
            )
            if backup is not None:
                self._begin(backup, settings.seed, sample)
            self._set_stage(_ADAPTED)
            fitter = Fitter(self._bank, sample, self.head, self.preprocessing, settings)
            run = task_runner(fitter, partial(self._payload, sample, settings), executor, backup)
            least = 1 if executor is None and backup is None else _SHARED_TASKS
            history = keras.callbacks.History()
            try:
                history.history = fit_differentiators(fitter, run, verbose, least)
            finally:
                forget()
        history.epoch = list(range(len(history.history["loss"])))
        self._set_stage(_FITTED)
        return history

    def _identity(self) -> dict[str, Any]:
        """What a fit depends on, besides the data, what was drawn, and the Student's functions."""
        names = ("head", "head_layer", "tune", "jitter", "cut", "seed")
        roster = ("members_per_class", "classes_per_member", "grouping")
        return {name: getattr(self, name) for name in names + roster} | {
            "ratios": sorted(self.ratios.items()),
            "Student's weights": fingerprint(self.student.get_weights()),
        }

    def _begin(self, backup: Backup, seed: int, sample: ClassImages) -> None:
        """Keep what `adapt` drew, or take what a fit that was stopped began with."""
        drawn = self._bank.pruning_weights
        images = self._preprocess(tf.constant(sample.images[:8], tf.float32))
        logits = self._graph.run(images, [self._graph.output])[self._graph.output].numpy()
        if backup.start is None:
            backup.begin(Start([to_numpy(weight) for weight in drawn], seed))
        backup.check_data(sample, logits)
        backup.restore(drawn)

    def _payload(self, sample: ClassImages, settings: FitSettings) -> Payload:
        try:
            config = self.get_config()
        except ValueError as error:
            raise ValueError(
                "To share out the work, `preprocessing` must be a Keras layer or a registered "
                f"function that the workers can import. Received: {self.preprocessing!r}"
            ) from error
        layer = isinstance(self.preprocessing, keras.layers.Layer)
        return Payload(
            type(self).from_config,
            config,
            self.student.get_weights(),
            self.preprocessing.get_weights() if layer else [],
            [to_numpy(weight) for weight in self._bank.pruning_weights],
            sample,
            settings,
        )

    def calibrate(
        self,
        x: Any,
        y: Any = None,
        *,
        retention: float | None = None,
        batch_size: int = 32,
        verbose: int | str = "auto",
    ) -> Rate:
        """Set the score's threshold on honest images, and decide by it from now on.

        Args:
            x: Images, as for `adapt`, that neither the Student nor the differentiators were trained
                on. Of pictures of one thing, such as the frames of a film, all must be left out of
                training.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            retention: Share to keep of the images that the Student answers rightly, in (0, 1).
                Defaults to the one given to the constructor.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.

        Returns:
            The share that is kept of the images given, with its interval; also in `calibration`. It
            is near the one asked for by construction: whether it holds, only other images tell.

        Raises:
            RuntimeError: `fit` was not called, or votes decide (`mode="vote"`).
            ValueError: The Student answers too few of the images rightly.
        """
        self._check_score_decides()
        asked = self.retention if retention is None else check_retention(retention)
        batches = self._batches(x, y, batch_size, labelled=True)
        details, labels = self._explain(batches, verbose)
        scores = details["score"][details["student_class"] == labels]
        threshold = score_threshold(scores, asked)
        kept = Rate.of(scores >= threshold)
        self._calibration.assign([asked, threshold, kept.count, kept.n])
        self.decision = "score"
        return kept

    def _check_score_decides(self) -> None:
        if self.mode == "vote":
            raise RuntimeError(
                'With `mode="vote"` the votes decide, and there is no threshold to set. Make the '
                "defence with `mode=\"validate\"`. Received: mode='vote'"
            )

    def rekey(self) -> None:
        """Draw a new secret key from the operating system's randomness.

        From now on other differentiators check the same input, where more know a class than check
        an input. Which pairs of classes have one stays as it is. Models that were saved or exported
        before keep the old key.
        """
        self._key.assign(new_key())

    def call(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """Answer a batch, as `explain` does, as tensors and without an error for bad input.

        Images are rounded to whole grey levels before anything else; less than half of one changes
        neither the draw nor the answer. One with NaN, infinity or values outside 0..255 (by more
        than one) is rejected with the lowest finite score.

        Args:
            inputs: Images of shape `(batch, H, W, C)` in 0..255.

        Raises:
            RuntimeError: `adapt` or `fit` was not called. In a graph, such as a model around this
                one, only a defence without any ratios yet is refused.
        """
        self._check_answers()
        return self._answer(inputs, self.ensemble_size)

    def _check_answers(self) -> None:
        """Inside a graph, what a weight says is not known."""
        if self._bank is None:
            raise RuntimeError(_NOT_PRUNED)
        if tf.executing_eagerly():
            self._require(_FITTED)

    def white_box(
        self, inputs: tf.Tensor, members: tf.Tensor, classes: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        """What an attacker computes who has all of this model, with gradients.

        Nothing is rounded, checked or drawn: members and classes are the attacker's choice.

        Args:
            inputs: Float images of shape `(batch, H, W, C)` in 0..255.
            members: Int tensor of shape `(batch, k)`: rows of `member_classes`, of differentiators
                that know the image's class.
            classes: Int tensor of shape `(batch,)` in `0..K-1`: as what each image is to be taken.

        Returns:
            Float tensors: `logits`, what the Student returns, `(batch, K)`; `features` that the
            members' heads read, `(batch, k, …)`, and `reference_features`, those of the references,
            `(batch, r, …)`; `margins`, `(batch, k)`, and `score`, `(batch,)`, as `explain` would
            give them if the Student said these classes and drew these members.

        Raises:
            RuntimeError: `adapt` or `fit` was not called; see `call`.
        """
        self._check_answers()
        return white_box_answer(
            tf.cast(inputs, tf.float32), self._graph, self._preprocess, self._bank, members, classes
        )

    def _trace(self, size: int) -> Any:
        spec = self._image_spec()
        return tf.function(partial(self._answer, size=size), input_signature=[spec])

    def _answer(self, inputs: tf.Tensor, size: int) -> dict[str, tf.Tensor]:
        rules = Rules(
            key=tf.convert_to_tensor(self._key),
            fresh=self.selection == "random",
            reject_threshold=self.reject_threshold,
            by_score=tf.equal(self._decision, 1),
            least_score=tf.convert_to_tensor(self._calibration)[1],
            vote=self.mode == "vote",
        )
        return answer_images(inputs, self._graph, self._preprocess, self._bank, rules, size)

    def predict(self, x: Any, batch_size: int = 32, verbose: int | str = "auto") -> np.ndarray:
        """Answer images.

        Args:
            x: Images of shape `(n, H, W, C)` in 0..255: array, tensor, or batched
                `tf.data.Dataset`, with or without labels.
            batch_size: Images per batch, for arrays. The answers do not depend on it.
            verbose: 0 shows no progress bar.

        Returns:
            Int32 array of shape `(n,)`: 0 for rejected, else the Student's class plus one (with
            `mode="vote"`, the winning class plus one).

        Raises:
            RuntimeError: `fit` was not called.
            ValueError: The images do not fit the Student, or are not finite.
        """
        return self.explain(x, batch_size, verbose)["answer"]

    def explain(
        self,
        x: Any,
        batch_size: int = 32,
        verbose: int | str = "auto",
        *,
        ensemble_size: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Answer images and say how each answer came about.

        Args:
            x: Images, as for `predict`.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.
            ensemble_size: Another number of members than the defence has, `reject_threshold` at
                least, to see what it would answer. With `selection="keyed"` the first are the same.

        Returns:
            Arrays with the images as first dimension: `answer`, as from `predict`; `accepted`;
            `student_class` in `0..K-1`; `disagreements`, number of members that disagree;
            `score`, the members' mean margin (1 is usual for an honest image of the Student's
            class, -1 for one of another class), plus twice the margin that the references give
            the Student's class, less 2.25 times the largest that they give another class;
            `members`, `(n, ensemble_size)`, rows of `member_classes`; and `margins`, of the same
            shape: how surely each takes the image for the Student's class, above 0 where it
            agrees.
        """
        size = self.ensemble_size
        if ensemble_size is not None:
            size = check_ensemble_size(ensemble_size, self._roster, self.reject_threshold)
        if self.mode == "vote":
            check_vote(self.head, self._roster, size, self.reject_threshold)
        return self._explain(self._batches(x, None, batch_size), verbose, size)[0]

    def evaluate(
        self, x: Any, y: Any = None, batch_size: int = 32, verbose: int | str = "auto"
    ) -> dict[str, Rate]:
        """How many honest inputs the defence keeps answering.

        Args:
            x: Images, as for `adapt`.
            y: Integer labels of shape `(n,)` in `0..K-1`.
            batch_size: Images per batch, for arrays.
            verbose: 0 shows no progress bar.

        Returns:
            `student_accuracy`, `retention` (accepted of those that the Student answers rightly),
            `clean_acceptance` (accepted of all) and `clean_accuracy` (accepted and right of all),
            each with its count and Wilson 95 % interval.
        """
        batches = self._batches(x, y, batch_size, labelled=True)
        details, labels = self._explain(batches, verbose)
        return clean_rates(labels, details["student_class"], details["answer"])

    def sparsity(self) -> pd.DataFrame:
        """What the differentiators keep of each layer that is pruned.

        Returns:
            Columns `level` (0 for the ratios, 1 and 2 for three quarters and half of them),
            `differentiators` (how many have it), `layer`, `units` (filters of a convolution,
            connections of a Dense layer) and `kept`. Unfrozen layers of `tune="unfrozen"` keep
            the same at every level.

        Raises:
            RuntimeError: `adapt` was not called.
        """
        self._require(_ADAPTED)
        columns = ["level", "differentiators", "layer", "units", "kept"]
        return pd.DataFrame(self._bank.kept(), columns=columns)

    def memory(self) -> pd.DataFrame:
        """What the Student and the parts of its differentiators take, as they are kept.

        What they need while they answer comes on top. Smaller: `members_per_class`, `head="pair"`,
        or a `head_layer` with fewer features.

        Returns:
            Columns `part`, `bytes`, `each` (of a differentiator, for its heads and own layers) and
            `of_student` (in sizes of the Student); a row for the `student`, the differentiators'
            `heads`, `own layers` (of `tune="unfrozen"`), `masks` and the classes' `activations`
            (from which the masks come, those of Dense layers at every answer), the `references`,
            the `draw` of members; for the sum of `all` these; and for `students instead`: a Student
            for each differentiator, and one more.

        Raises:
            RuntimeError: `adapt` was not called.

        Reference:
            Wu et al. (above), Table 2.
        """
        self._require(_ADAPTED)
        return memory_table(self, self._bank.parts())

    def left_alone(self) -> dict[str, str]:
        """The convolutions and Dense layers before the heads that are not pruned, and why.

        Raises:
            RuntimeError: The ratios are not known before `adapt`.
        """
        if self.head_layer is None or self._bank is None:
            raise RuntimeError("No ratios are known yet. Call `adapt(x_train, y_train)` first.")
        tensor = self._graph.layer_output(self.head_layer)
        return left_alone(self._graph, tensor, set(self.ratios))

    def save(self, filepath: str | Path, overwrite: bool = True, **options: Any) -> None:
        """Write a `.keras` file, for `keras.models.load_model` of the same Keras generation.

        The process that loads it imports `keras_tl_defense` before. The file appears whole or not
        at all; it holds the secret key.

        Args:
            filepath: Where to write, ending in `.keras`.
            overwrite: Whether a file that is there may be replaced.
            **options: Passed to `keras.Model.save`.

        Raises:
            ValueError: The name does not end in `.keras`, the file exists and may not be replaced,
                or `preprocessing` cannot be saved.
            OSError: The folder cannot be written.
        """
        self._require(_ADAPTED)
        self.get_config()  # before a long write, which would fail in the end
        save = super().save
        save_whole(lambda path: save(path, **options), filepath, overwrite)

    def export(self, path: str | Path) -> Path:
        """Write a SavedModel for TF Serving, which answers without this library.

        Its signature `serving_default` takes float32 images of shape `(batch, H, W, C)` in 0..255
        and returns what `explain` does, less `members` and `margins`.

        Args:
            path: Folder. When its last part is not a version number, the next free one is added.

        Returns:
            The folder that was written.

        Raises:
            RuntimeError: `fit` was not called.
            ValueError: The version exists already.
            OSError: The folder cannot be written.
        """
        self._require(_FITTED)
        return export_saved_model(self, path, self._image_spec())

    def serve(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        """What the exported model answers: `call` without the members, which are secret, and
        their margins.
        """
        answer = self.call(inputs)
        del answer["members"], answer["margins"]
        return answer

    def get_config(self) -> dict[str, Any]:
        """What `from_config` needs; activations, heads and the key are weights."""
        return {
            "name": self.name,
            "student": keras.utils.serialize_keras_object(self.student),
            "ratios": self.ratios if self.ratios == "auto" else dict(self.ratios),
            "retention": self.retention,
            "head": self.head,
            "head_layer": self.head_layer,
            "tune": self.tune,
            "iterations": self.iterations,
            "jitter": self.jitter,
            "ensemble_size": self.ensemble_size,
            "reject_threshold": self.reject_threshold,
            "mode": self.mode,
            "selection": self.selection,
            "members_per_class": self.members_per_class,
            "classes_per_member": self.classes_per_member,
            "grouping": self.grouping,
            "cut": self.cut,
            "preprocessing": serialize_preprocessing(self.preprocessing),
            "search_budget": self.search_budget,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Make a model from `get_config`, without what it learned."""
        config = dict(config)
        check_loadable(config, custom_objects)
        for part in ("student", "preprocessing"):
            if config[part] is not None:
                config[part] = keras.utils.deserialize_keras_object(
                    deepcopy(config[part]),  # Keras empties what it is given
                    custom_objects=custom_objects,
                )
        return cls(**config)

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `compile_from_config` needs."""
        return self._optimizer_config and {"optimizer": self._optimizer_config}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile a loaded model as it was."""
        check_loadable(config)
        self.compile(keras.optimizers.deserialize(config["optimizer"]))

    def _explain(
        self, batches: Batches, verbose: int | str, members: int | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        self._require(_FITTED)
        members = members or self.ensemble_size
        answer = self._answer_graph(members)
        bar = keras.utils.Progbar(batches.count, verbose=0 if verbose == 0 else 1)
        parts, labels = [], []
        rows = max(members, len(self._bank.references))  # of an image
        size = max(1, self._bank.rows_at_once(_ANSWER_BYTES) // rows)
        for images, label in batches:
            for start in range(0, len(images), size):
                part = images[start : start + size].astype(np.float32)
                parts.append(answer(part))
            labels.append(label)
            bar.add(1)
        if not parts:
            raise ValueError("At least one image is needed. Received: an empty dataset")
        names = parts[0]
        details = {name: np.concatenate([part[name].numpy() for part in parts]) for name in names}
        return details, np.concatenate(labels)

    def _batches(self, x: Any, y: Any, batch_size: int, labelled: bool = False) -> Batches:
        return Batches(
            x,
            y,
            shape=self._graph.input_shape,
            classes=self.classes if labelled else None,
            batch_size=batch_size,
            pixels=True,
        )

    def _image_spec(self) -> tf.TensorSpec:
        return tf.TensorSpec((None, *self._graph.input_shape), tf.float32, name="images")

    def _preprocess(self, images: tf.Tensor) -> tf.Tensor:
        return images if self.preprocessing is None else self.preprocessing(images)

    def _require(self, stage: int) -> None:
        if not self.adapted:
            raise RuntimeError(_NOT_PRUNED)
        if stage == _FITTED and not self.fitted:
            raise RuntimeError(
                "The differentiators are not trained since the last `adapt`. Call "
                "`fit(x_train, y_train)`."
            )
