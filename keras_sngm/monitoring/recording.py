"""Brings what recorders have kept on the device to the host, while training goes on.

A look at the recorders takes copies on the device, which does not wait. A thread of
its own waits for the copies and hands what came in to the sinks.
"""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sngm.measurements import Plan, RowsLostError, joined_rows
from keras_sngm.monitoring.epoch_statistics import EpochStatistics
from keras_sngm.monitoring.sinks import Sink
from keras_sngm.monitoring.values import LoggedValues

_SECONDS_BETWEEN_LOOKS = 1.0
_MOST_UNREAD = 2
"""Copies of all rows that wait for the thread at a time. More of them would take memory without
end where values come in faster than it can write them."""
# Where there are several processes.
_MOST_UPDATES_PER_STEP = 64


class Fault(NamedTuple):
    """The first update with a gradient that was not finite."""

    step: int
    variables: list[str]
    """Paths of those that it belongs to."""


class Recording:
    """What is logged during one `fit`.

    Args:
        model: the model in training. It is told to stop if the plan says so.
        watch: what is recorded of its optimizers.
        plan: what that is.
        begin_output: is called once the optimizers are built, with the recorders of those
            that update variables. Returns what to log of them, and the sinks to log it to.
        log_every: every how many updates the sinks get values.
    """

    def __init__(
        self,
        model: keras.Model,
        watch: Any,
        plan: Plan,
        begin_output: Callable[[Sequence[Any]], tuple[LoggedValues, Sequence[Sink]]],
        log_every: int,
    ) -> None:
        self.fault: Fault | None = None
        self._model = model
        self._watch = watch
        self._plan = plan
        self._begin_output = begin_output
        self._log_every = log_every
        self._recorders: list[Any] = []
        self._values: Any = None
        self._sinks: Sequence[Sink] = ()
        self._progress: list[Any] = []
        self._has_begun = False
        self._epoch = EpochStatistics(["grad_norm"])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="GradientNormLogger")
        self._reads: list[Future] = []
        self._updates_per_step: int | None = None
        self._unseen_steps = 0
        self._steps = 0
        self._looked = -math.inf

    def begin_epoch(self) -> None:
        """Be told that no more will be done to the model in this epoch but to train it."""
        if not self._has_begun:
            self.open()
            for recorder in self._recorders:
                recorder.begin()
            self._progress = [recorder.begun_at for recorder in self._recorders]
        elif self.fault is None:
            for recorder in self._recorders:
                recorder.back_up()
        self._has_begun = True

    def open(self) -> None:
        """Begin the output, if that is not done and there is an optimizer that is built."""
        recorders = [recorder for recorder in self._watch.recorders if recorder.is_open]
        if self._values is None and recorders:
            self._values, self._sinks = self._begin_output(recorders)
            self._epoch = EpochStatistics(self._values.columns_of_epoch())
            self._recorders = recorders
            self._progress = [recorder.begun_at for recorder in recorders]

    def before_updates(self) -> None:
        """To be called before each execution of training steps.

        Waits for the device after the first one alone, and for the thread where values come
        in faster than it can write them. Raises what went wrong in the thread.
        """
        count = self._model.steps_per_execution
        self.open()
        while self._reads and self._reads[0].done():
            self._take(self._reads.pop(0))
        if self._recorders and self._unseen_steps and self._is_due(count):
            self._look()
            if self._updates_per_step is None:
                self._take(self._reads.pop())
            while len(self._reads) > _MOST_UNREAD:
                self._take(self._reads.pop(0))
        self._unseen_steps += count
        self._steps += count
        for recorder in self._watch.recorders:
            # Processes come to know it at different times, and must agree.
            known = _MOST_UPDATES_PER_STEP if recorder.one_of_several else self._updates_per_step
            recorder.hold(count * (known or 1))

    def _is_due(self, count: int) -> bool:
        """Return whether to look at the recorders before so many more steps are executed."""
        room = min(recorder.updates_kept for recorder in self._recorders)
        no_room = (self._unseen_steps + count) * (self._updates_per_step or 1) > room
        is_time = time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS
        return no_room or (is_time and not self._reads)

    def wait(self) -> None:
        """Bring all there is to the host."""
        self.open()
        if self._recorders:
            self._look()
        while self._reads:
            self._take(self._reads.pop(0))

    def end_epoch(self) -> dict[str, float]:
        """What belongs into the logs of the epoch. Waits for the device."""
        self.wait()
        if self._plan.stops and self.fault is not None:
            # In every process, where there are several.
            self._model.stop_training = True
        if self._values is None or not self._updates_per_step:
            self._tell_of_no_updates()
        return self._epoch.end()

    def _tell_of_no_updates(self) -> None:
        micro_batches = [
            recorder.optimizer().gradient_accumulation_steps or 1
            for recorder in self._watch.recorders
        ]
        if not self._model.trainable_variables:
            warnings.warn(
                "`GradientNormLogger` has nothing to log: the model has no trainable weights.",
                stacklevel=4,
            )
        elif self._steps >= max(micro_batches, default=1):
            warnings.warn(
                "`GradientNormLogger` has seen no update by `model.optimizer`. Those by other "
                "optimizers are not logged.",
                stacklevel=4,
            )

    def restore(self) -> None:
        """After a stop, bring the model back to its state after the last good step."""
        if self._plan.stops and self.fault is not None:
            for recorder in self._recorders:
                recorder.restore()

    def close(self) -> None:
        """Write what there is, and end."""
        with contextlib.ExitStack() as ends:
            for recorder in self._watch.recorders:
                ends.callback(recorder.end)
            ends.callback(self._thread.shutdown)
            self.wait()

    def _look(self) -> None:
        snapshots = [recorder.snapshot() for recorder in self._recorders]
        self._reads.append(self._thread.submit(self._read, snapshots, self._unseen_steps))
        self._unseen_steps = 0
        self._looked = time.monotonic()

    def _take(self, read: Future) -> None:
        """Re-raise an error of the reader thread; turn lost rows into a warning."""
        try:
            read.result()
        except RowsLostError as error:
            warnings.warn(str(error), stacklevel=2)

    def _read(self, snapshots: Sequence[Any], training_steps: int) -> None:
        """In the thread: waits for the copies."""
        last = self._progress
        self._progress = [
            recorder.progress(snapshot)
            for recorder, snapshot in zip(self._recorders, snapshots, strict=True)
        ]
        if training_steps:
            updates = self._progress[0].updates - last[0].updates
            per_step = math.ceil(updates / training_steps)
            self._updates_per_step = max(per_step, self._updates_per_step or 0)
        parts = [
            recorder.since(progress, snapshot)
            for recorder, progress, snapshot in zip(self._recorders, last, snapshots, strict=True)
        ]
        rows = joined_rows([part.rows for part in parts])
        steps = parts[0].steps[: self._until_the_stop(parts)].tolist()
        self._note_fault(parts)
        values = {name: of[: len(steps)] for name, of in self._values.of_updates(rows).items()}
        self._epoch.add(values)
        for i, step in enumerate(steps):
            self._log_step(step, {name: float(of[i]) for name, of in values.items()}, parts)
        for sink in self._sinks:
            sink.flush()

    def _until_the_stop(self, parts: Sequence[Any]) -> int:
        """How many of the updates came before steps were no longer taken."""
        steps, nonfinite = parts[0].steps, _first_nonfinite_step(parts)
        if not self._plan.stops or (self.fault is None and not nonfinite):
            return len(steps)
        # Steps that are not taken have the number of the bad one, too.
        return 0 if self.fault is not None else int(np.searchsorted(steps, nonfinite)) + 1

    def _log_step(self, step: int, scalars: dict[str, float], parts: Sequence[Any]) -> None:
        if step in parts[0].details:
            table = np.concatenate([rows.details[step] for rows in parts])
            details = self._values.of_details(table)
            self._epoch.add(details)
            scalars |= details
        if step % self._log_every == 0:
            for sink in self._sinks:
                sink.write(step, scalars)
        if step in parts[0].histograms:
            self._log_histograms(step, parts)

    def _log_histograms(self, step: int, parts: Sequence[Any]) -> None:
        first = 0
        histograms: dict[str, np.ndarray] = {}
        for rows in parts:
            histograms |= self._values.of_histograms(rows.histograms[step], first)
            first += len(rows.nonfinite)
        for sink in self._sinks:
            sink.write_histograms(step, histograms)

    def _note_fault(self, parts: Sequence[Any]) -> None:
        step = _first_nonfinite_step(parts)
        if self.fault is not None or not step:
            return
        nonfinite = np.concatenate(
            [rows.nonfinite & (rows.nonfinite_step == step) for rows in parts]
        )
        paths = [path for path, is_bad in zip(self._values.paths, nonfinite, strict=True) if is_bad]
        self.fault = Fault(step, paths)
        if self._plan.stops and not self._recorders[0].one_of_several:
            self._model.stop_training = True


def _first_nonfinite_step(parts: Sequence[Any]) -> int:
    """Return the first update whose gradient was not finite, or 0."""
    return min((rows.nonfinite_step for rows in parts if rows.nonfinite_step), default=0)
