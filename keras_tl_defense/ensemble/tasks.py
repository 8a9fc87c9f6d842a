"""Run the tasks of a fit, here or through an executor, and keep what is done in a backup."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from keras_tl_defense._keras import LEGACY
from keras_tl_defense.ensemble.backup import Backup
from keras_tl_defense.ensemble.fitting import FitSettings, Fitter, Result, RunTasks, Task
from keras_tl_defense.ensemble.training import ClassImages

_FIRST_IN_FLIGHT = 2  # tasks; one more for each that is done
_MOST_IN_FLIGHT = 64


class Payload(NamedTuple):
    """What another process needs to fit differentiators: no file, and not the secret key.

    Attributes:
        make: `DifferentiatorEnsemble.from_config`.
        config: What it takes.
        student: The Student's weights.
        preprocessing: Weights of the preprocessing, where it is a layer.
        pruning: The bank's `pruning_weights`.
        sample: Training images.
        settings: What was asked for.
        legacy: Whether the Keras in use is the legacy one.
    """

    make: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    student: list[np.ndarray]
    preprocessing: list[np.ndarray]
    pruning: list[np.ndarray]
    sample: ClassImages
    settings: FitSettings
    legacy: bool = LEGACY

    def fitter(self) -> Fitter:
        """The same differentiators, in this process."""
        if self.legacy != LEGACY:
            raise RuntimeError(
                "The worker runs another generation of Keras. Set the environment variable "
                f"TF_USE_LEGACY_KERAS={int(self.legacy)} where it is started."
            )
        defence = self.make(self.config)
        _set_weights(defence.student, self.student)
        if self.preprocessing:
            _set_weights(defence.preprocessing, self.preprocessing)
        bank = defence.get_layer("differentiators")
        for weight, value in zip(bank.pruning_weights, self.pruning, strict=True):
            weight.assign(value)
        return Fitter(bank, self.sample, defence.head, defence.preprocessing, self.settings)


def _set_weights(layer: Any, weights: list[np.ndarray]) -> None:
    layer.set_weights(weights)
    for inner in layer._flatten_layers():
        if hasattr(inner, "finalize_state"):  # what Normalization computes of its weights
            inner.finalize_state()


def task_runner(
    fitter: Fitter,
    payload: Callable[[], Payload],
    executor: Executor | None,
    backup: Backup | None,
) -> RunTasks:
    """How tasks are run.

    Args:
        fitter: Runs them in this process.
        payload: Makes what other processes need.
        executor: Runs them elsewhere; `None` runs them here, one after the other.
        backup: Keeps what is done, and knows what was done before; `None` keeps nothing.
    """
    compute = partial(_here, fitter)
    if executor is not None:
        compute = partial(_share_out, executor, uuid.uuid4().hex, payload())
    return compute if backup is None else partial(_kept, compute, backup, fitter.gives)


def forget() -> None:
    """Drop what this process keeps of fits that others gave it."""
    with _lock:
        _fitters.clear()


def check_executor(executor: Any) -> Executor | None:
    """`executor`, when tasks can be given to it.

    Raises:
        TypeError: It is no executor.
        ValueError: It forks processes.
    """
    if executor is None:
        return None
    if not isinstance(executor, Executor):
        raise TypeError(
            "`executor` must be a `concurrent.futures.Executor`, such as a Dask client's "
            f"`client.get_executor()`. Received: executor={type(executor).__name__}"
        )
    if isinstance(executor, ProcessPoolExecutor):
        context = executor._mp_context
        if context is not None and context.get_start_method() == "fork":
            raise ValueError(
                "TensorFlow does not survive a fork: its threads are missing in the child, which "
                "hangs. Give `ProcessPoolExecutor` the context of another start method: "
                "`mp_context=multiprocessing.get_context('spawn')`. Received: start method 'fork'"
            )
    return executor


def _here(fitter: Fitter, tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    return ((task, fitter(task)) for task in tasks)


def _kept(
    compute: RunTasks,
    backup: Backup,
    gives: Callable[[Task, Result], bool],
    tasks: Sequence[Task],
) -> Iterator[tuple[Task, Result]]:
    """Results that the backup has, then those of the other tasks, which it gets."""
    missing = []
    for task in tasks:
        known = backup.load(task, gives)
        if known is None:
            missing.append(task)
        else:
            yield task, known
    for task, result in compute(missing):
        backup.store(task, result)
        yield task, result


def _share_out(
    executor: Executor, name: str, payload: Payload, tasks: Sequence[Task]
) -> Iterator[tuple[Task, Result]]:
    """Results of tasks as they come.

    The payload is large, so a task goes without it first; a process that does not know it asks.
    """
    waiting = list(tasks)[::-1]
    running: dict[Future[Result | None], Task] = {}
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < min(_FIRST_IN_FLIGHT + done, _MOST_IN_FLIGHT):
                task = waiting.pop()
                running[executor.submit(fit_elsewhere, name, None, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task, result = running.pop(future), future.result()
                if result is None:
                    running[executor.submit(fit_elsewhere, name, payload, task)] = task
                else:
                    done += 1
                    yield task, result
    finally:
        for future in running:
            future.cancel()


_lock = threading.Lock()  # a fitter has state, and TensorFlow uses all cores for one task
_fitters: dict[str, Fitter] = {}


def fit_elsewhere(name: str, payload: Payload | None, task: Task) -> Result | None:
    """Run a task in another process; `None` asks for the payload.

    What the process made of it is kept for the next task, until the next fit.

    Args:
        name: Name of the fit that the task belongs to.
        payload: What the process needs, when it does not have it.
        task: The task.
    """
    with _lock:
        if name not in _fitters:
            if payload is None:
                return None
            _fitters.clear()
            _fitters[name] = payload.fitter()
        return _fitters[name](task)
