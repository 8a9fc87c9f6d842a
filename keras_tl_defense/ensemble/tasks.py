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
        pruning: The bank's `pruning_weights`.
        sample: Training images.
        settings: What was asked for.
        legacy: Whether the Keras in use is the legacy one.
    """

    make: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    student: list[np.ndarray]
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
        defence.student.set_weights(self.student)
        bank = defence.get_layer("differentiators")
        for weight, value in zip(bank.pruning_weights, self.pruning, strict=True):
            weight.assign(value)
        return Fitter(bank, self.sample, defence.head, defence.preprocessing, self.settings)


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

    def here(tasks: Sequence[Task]) -> Iterator[tuple[int, Result]]:
        return ((number, fitter(task)) for number, task in enumerate(tasks))

    if executor is None:
        return partial(_run, here, backup)
    name, packed = uuid.uuid4().hex, payload()
    return partial(_run, partial(_share_out, executor, name, packed), backup)


def check_executor(executor: Any) -> Executor | None:
    """`executor`, when tasks can be given to it.

    Raises:
        TypeError: It is no executor.
        ValueError: It forks processes.
    """
    if executor is None:
        return None
    if not callable(getattr(executor, "submit", None)):
        raise TypeError(
            "`executor` must be a `concurrent.futures.Executor`, such as Dask's "
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
    kept: Executor = executor
    return kept


def _run(
    compute: Callable[[Sequence[Task]], Iterator[tuple[int, Result]]],
    backup: Backup | None,
    tasks: Sequence[Task],
    progress: Callable[[int], None],
) -> list[Result]:
    results: dict[int, Result] = {}
    for number, task in enumerate(tasks):
        known = None if backup is None else backup.load(task)
        if known is not None:
            results[number] = known
            progress(len(task.bodies))
    open_numbers = [number for number in range(len(tasks)) if number not in results]
    for place, result in compute([tasks[number] for number in open_numbers]):
        number = open_numbers[place]
        if backup is not None:
            backup.store(tasks[number], result)
        results[number] = result
        progress(len(tasks[number].bodies))
    return [results[number] for number in range(len(tasks))]


def _share_out(
    executor: Executor, name: str, payload: Payload, tasks: Sequence[Task]
) -> Iterator[tuple[int, Result]]:
    """Results of tasks as they come, with their places.

    The payload is large, so a task goes without it first; a process that does not know it asks.
    """
    waiting = list(range(len(tasks)))[::-1]
    running: dict[Future[Result | None], int] = {}
    done = 0
    try:
        while waiting or running:
            while waiting and len(running) < min(_FIRST_IN_FLIGHT + done, _MOST_IN_FLIGHT):
                number = waiting.pop()
                running[executor.submit(fit_elsewhere, name, None, tasks[number])] = number
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number, result = running.pop(future), future.result()
                if result is None:
                    again = executor.submit(fit_elsewhere, name, payload, tasks[number])
                    running[again] = number
                else:
                    done += 1
                    yield number, result
    finally:
        for future in running:
            future.cancel()


_lock = threading.Lock()  # a fitter has state, and TensorFlow uses all cores for one task
_fitters: dict[str, Fitter] = {}


def fit_elsewhere(name: str, payload: Payload | None, task: Task) -> Result | None:
    """Run a task in another process; `None` asks for the payload, which is kept for the next.

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
