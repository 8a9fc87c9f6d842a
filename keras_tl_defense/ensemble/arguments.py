"""What users pass to `DifferentiatorEnsemble`, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_tl_defense._validation import check_choice, check_integer, check_positive
from keras_tl_defense.ensemble.roster import Roster, most_members
from keras_tl_defense.graph import ModelGraph

_MEMBERS_OF_GROUPS = 10  # that know a class, unless the user says otherwise


def class_count(graph: ModelGraph) -> int:
    """Number of classes K of a Student, which must return K >= 2 numbers for each image."""
    shape = graph.shapes[graph.output]
    if len(shape) != 2 or shape[1] is None or shape[1] < 2:
        raise ValueError(
            "The student must return one row of K >= 2 logits or probabilities for each image. A "
            "single sigmoid output can be retrained as `Dense(2)`. "
            f"Received: output shape {shape}"
        )
    return shape[1]


def make_roster(
    classes: int, classes_per_member: int, members_per_class: int | None, grouping: str
) -> Roster:
    """Which differentiators there are; `ValueError` where that cannot be."""
    most = max(2, classes - 1)
    size = check_integer(
        "classes_per_member", classes_per_member, 2, most, f"for the {classes} classes"
    )
    check_choice("grouping", grouping, ("likeness", "random"))
    known = most_members(classes, size)
    if members_per_class is None:
        each = known if size == 2 else min(_MEMBERS_OF_GROUPS, known)
    else:
        why = "so that no two are the same"
        each = check_integer("members_per_class", members_per_class, 1, known, why)
    return Roster(classes, size, each, grouping == "likeness")


def check_ensemble_size(ensemble_size: int | None, roster: Roster, least: int = 1) -> int:
    """The ensemble size, by default 5 or what there are; `ValueError` for more than there are."""
    if ensemble_size is None:
        return min(5, roster.each)
    why = f"because only {roster.each} differentiators know a class"
    if roster.each < most_members(roster.classes, roster.size):
        why += " (more with `members_per_class=`)"
    if least > 1:
        why += f" and {least} of them reject an input"
    return check_integer("ensemble_size", ensemble_size, least, roster.each, why)


def check_vote(head: str, roster: Roster, ensemble_size: int | None, reject_threshold: int) -> None:
    """Refuse vote mode where a class cannot win against each of the others."""
    every = roster.classes - 1
    problem = ""
    if head != "pair":
        problem = f'`head` is {head!r}; give `head="pair"`, whose heads choose one of two classes'
    elif roster.size > 2:
        problem = "a differentiator knows more than two classes; leave out `classes_per_member`"
    elif roster.each < every:
        problem = "some pairs of classes have no differentiator; leave out `members_per_class`"
    elif ensemble_size not in (None, every):
        problem = "all of them vote; leave out `ensemble_size`"
    elif reject_threshold != 1:
        problem = "one lost vote is enough not to win; leave out `reject_threshold`"
    if problem:
        raise ValueError(
            "In vote mode a class must win against each of the others, so every pair of classes "
            f"needs a differentiator that says one of the two: {problem}. "
            "Received: mode='vote'"
        )


def penultimate(graph: ModelGraph) -> int:
    """Number of the tensor that the Student's last weighted layer, its own head, takes."""
    last = [step for step in graph.steps if getattr(step.layer, "weights", ())][-1]
    return last.inputs[0]


def key_words(key: bytes) -> np.ndarray:
    """Sixteen bytes as two int64, `ValueError` for anything else."""
    if not isinstance(key, bytes) or len(key) != 16:
        raise ValueError(
            "`key` must be 16 bytes. Leave it out to get a secret one. "
            f"Received: {type(key).__name__} of length "
            f"{len(key) if hasattr(key, '__len__') else 'unknown'}"
        )
    return np.frombuffer(key, np.int64).copy()


def check_retention(retention: Any) -> float:
    """A share of inputs, in (0, 1)."""
    value = check_positive("retention", retention)
    if value >= 1:
        raise ValueError(
            "A retention is the share of honest inputs that are kept, between 0 and 1. To keep "
            f"them all, reject nothing. Received: retention={retention}"
        )
    return value


def head_tensor(graph: ModelGraph, cut: int, head_layer: str | None) -> int:
    """Number of the tensor that the heads read: a layer's output on the way to the cut."""
    if head_layer is None:
        return cut
    tensor = graph.layer_output(head_layer)
    names = [graph.steps[index].name for index in graph.ancestors(cut)]
    if tensor != cut and graph.steps[graph.producer[tensor]].name not in names:
        raise ValueError(
            "The heads must read a frozen layer, at the cut or before it. Those are: "
            f"{', '.join(names)}. Received: head_layer={head_layer!r}"
        )
    return tensor
