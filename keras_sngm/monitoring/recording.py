"""Reading of what recorders keep on the device, while training goes on.

A read begins with copies on the device, for which nobody waits. A thread of its own waits
for the copies to reach the host and hands what is new to the sinks.

All that a read goes through is in one file.
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

_SECONDS_BETWEEN_READS = 1.0
_MOST_UNREAD = 2
"""Most reads that may wait for the thread. Without a limit they would take ever more memory where
values come in faster than the thread can write them."""
_MOST_UPDATES_PER_STEP = 64
"""Assumed where there are several processes, which must agree on the number."""


class Fault(NamedTuple):
    """The first update with a gradient that was not finite.

    Attributes:
        step: number of the update.
        variables: paths of the variables whose gradients were not finite.
    """

    step: int
    variables: list[str]


class Recording:
    """Logging of one `fit`: reads recorders, hands values to sinks, and sums up epochs.

    If the plan stops at a gradient that is not finite, recorders withhold steps from then on, until
    the training function returns to the host; that is called a halt.

    Args:
        model: the model in training. It is told to stop if the plan says so.
        attachment: the recorders of its optimizers, an `Attachment` of the backend.
        plan: what the recorders keep.
        begin_output: called with the recorders once the optimizers are built; returns the
            names of the values to log, and the sinks to write them to.
        log_every: number of updates from one that sinks get to the next.
    """

    def __init__(
        self,
        model: keras.Model,
        attachment: Any,
        plan: Plan,
        begin_output: Callable[[Sequence[Any]], tuple[LoggedValues, Sequence[Sink]]],
        log_every: int,
    ) -> None:
        self.fault: Fault | None = None
        self._model = model
        self._attachment = attachment
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
        self._unread_steps = 0
        self._steps = 0
        self._last_read = -math.inf

    def begin_epoch(self) -> None:
        """Begin to record, or in later epochs back up the model, just before it is trained.

        Other callbacks may change the model before.
        """
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
        """Begin the output, unless that is done or no optimizer is built yet."""
        recorders = [recorder for recorder in self._attachment.recorders if recorder.is_open]
        if self._values is None and recorders:
            self._values, self._sinks = self._begin_output(recorders)
            self._epoch = EpochStatistics(self._values.columns_of_epoch())
            self._recorders = recorders
            self._progress = [recorder.begun_at for recorder in recorders]

    def before_updates(self) -> None:
        """Read what is due. To be called before each execution of training steps.

        Waits for the device after the first one alone, and for the thread where values come
        in faster than it can write them. Raises an error of the thread.

        Tells the recorders for how many updates they may withhold steps after a gradient that is
        not finite: for those of this execution.
        """
        count = self._model.steps_per_execution
        self.open()
        while self._reads and self._reads[0].done():
            self._finish_read(self._reads.pop(0))
        if self._recorders and self._unread_steps and self._is_due(count):
            self._start_read()
            if self._updates_per_step is None:
                self._finish_read(self._reads.pop())
            while len(self._reads) > _MOST_UNREAD:
                self._finish_read(self._reads.pop(0))
        self._unread_steps += count
        self._steps += count
        for recorder in self._attachment.recorders:
            # Each process measures the number at another time, but all must use the same one.
            several = recorder.has_other_processes
            per_step = _MOST_UPDATES_PER_STEP if several else self._updates_per_step
            recorder.limit_halt(count * (per_step or 1))

    def _is_due(self, count: int) -> bool:
        """Return whether to read before so many more steps are executed.

        It is due when the ring buffers could overflow, and when the last read is a while ago.
        """
        room = min(recorder.updates_kept for recorder in self._recorders)
        no_room = (self._unread_steps + count) * (self._updates_per_step or 1) > room
        is_time = time.monotonic() - self._last_read > _SECONDS_BETWEEN_READS
        return no_room or (is_time and not self._reads)

    def wait(self) -> None:
        """Read all that was recorded, and wait until it is written."""
        self.open()
        if self._recorders:
            self._start_read()
        while self._reads:
            self._finish_read(self._reads.pop(0))

    def end_epoch(self) -> dict[str, float]:
        """Return the statistics of the epoch, for its `logs`. Waits for the device.

        Stops training if a gradient was not finite and the plan stops at that; warns if no update
        was recorded.
        """
        self.wait()
        if self._plan.stops and self.fault is not None:
            # Each of several processes must stop at the same step: the end of the epoch.
            self._model.stop_training = True
        if self._values is None or not self._updates_per_step:
            self._warn_of_no_updates()
        return self._epoch.end()

    def _warn_of_no_updates(self) -> None:
        """Warn if the model has no weights to train, or if another optimizer trains them."""
        micro_batches = [
            recorder.optimizer().gradient_accumulation_steps or 1
            for recorder in self._attachment.recorders
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
        """After a gradient that stops training, restore the model to before that step."""
        if self._plan.stops and self.fault is not None:
            for recorder in self._recorders:
                recorder.restore()

    def close(self) -> None:
        """Write what there is, and end the thread and the recording."""
        with contextlib.ExitStack() as ends:
            for recorder in self._attachment.recorders:
                ends.callback(recorder.end)
            ends.callback(self._thread.shutdown)
            self.wait()

    def _start_read(self) -> None:
        """Copy what was recorded, on the device, and have the thread read the copies."""
        snapshots = [recorder.snapshot() for recorder in self._recorders]
        self._reads.append(self._thread.submit(self._read, snapshots, self._unread_steps))
        self._unread_steps = 0
        self._last_read = time.monotonic()

    def _finish_read(self, read: Future) -> None:
        """Re-raise an error of the reader thread; turn lost rows into a warning."""
        try:
            read.result()
        except RowsLostError as error:
            warnings.warn(str(error), stacklevel=2)

    def _read(self, snapshots: Sequence[Any], training_steps: int) -> None:
        """Wait for copies, write what is new in them, and note a gradient that is not finite.

        Runs in the thread. Updates after the one that training stops at are left out.

        Args:
            snapshots: one copy of each recorder.
            training_steps: number of training steps since the last read.
        """
        last = self._progress
        self._progress = [
            recorder.progress(snapshot)
            for recorder, snapshot in zip(self._recorders, snapshots, strict=True)
        ]
        if training_steps:
            updates = self._progress[0].updates - last[0].updates
            per_step = math.ceil(updates / training_steps)
            self._updates_per_step = max(per_step, self._updates_per_step or 0)
        rows_by_recorder = [
            recorder.new_rows(progress, snapshot)
            for recorder, progress, snapshot in zip(self._recorders, last, snapshots, strict=True)
        ]
        rows = joined_rows([part.rows for part in rows_by_recorder])
        steps = rows_by_recorder[0].steps[: self._count_until_stop(rows_by_recorder)].tolist()
        self._note_fault(rows_by_recorder)
        values = {name: of[: len(steps)] for name, of in self._values.of_updates(rows).items()}
        self._epoch.add(values)
        for i, step in enumerate(steps):
            self._log_step(
                step, {name: float(of[i]) for name, of in values.items()}, rows_by_recorder
            )
        for sink in self._sinks:
            sink.flush()

    def _count_until_stop(self, rows_by_recorder: Sequence[Any]) -> int:
        """Return how many of the updates that were read are logged.

        All of them, unless the plan stops at a gradient that is not finite: then those up to the
        first such update, which is the last one logged.

        Args:
            rows_by_recorder: what each recorder has recorded of these updates.
        """
        steps, nonfinite = rows_by_recorder[0].steps, _first_nonfinite_step(rows_by_recorder)
        if not self._plan.stops or (self.fault is None and not nonfinite):
            return len(steps)
        # Steps that were not taken have the number of the update that was not finite.
        return 0 if self.fault is not None else int(np.searchsorted(steps, nonfinite)) + 1

    def _log_step(
        self, step: int, scalars: dict[str, float], rows_by_recorder: Sequence[Any]
    ) -> None:
        """Write one update to the sinks, if it is due.

        Args:
            step: number of the update.
            scalars: its values by name. Details are added.
            parts: what each recorder has recorded.
        """
        if step in rows_by_recorder[0].details:
            table = np.concatenate([rows.details[step] for rows in rows_by_recorder])
            details = self._values.of_details(table)
            self._epoch.add(details)
            scalars |= details
        if step % self._log_every == 0:
            for sink in self._sinks:
                sink.write(step, scalars)
        if step in rows_by_recorder[0].histograms:
            self._log_histograms(step, rows_by_recorder)

    def _log_histograms(self, step: int, rows_by_recorder: Sequence[Any]) -> None:
        """Write the histograms of one update to the sinks.

        Args:
            step: number of the update.
            rows_by_recorder: what each recorder has recorded, with histograms of this step. Its
                vector `nonfinite` has an element for each variable.
        """
        first = 0
        histograms: dict[str, np.ndarray] = {}
        for rows in rows_by_recorder:
            histograms |= self._values.of_histograms(rows.histograms[step], first)
            first += len(rows.nonfinite)
        for sink in self._sinks:
            sink.write_histograms(step, histograms)

    def _note_fault(self, rows_by_recorder: Sequence[Any]) -> None:
        """Note the first update whose gradient was not finite, and stop training if planned.

        With several processes training is stopped at the end of the epoch instead, as all of them
        must stop at the same step.

        Args:
            rows_by_recorder: what each recorder has recorded since the last read.
        """
        step = _first_nonfinite_step(rows_by_recorder)
        if self.fault is not None or not step:
            return
        nonfinite = np.concatenate(
            [rows.nonfinite & (rows.nonfinite_step == step) for rows in rows_by_recorder]
        )
        paths = [path for path, is_bad in zip(self._values.paths, nonfinite, strict=True) if is_bad]
        self.fault = Fault(step, paths)
        if self._plan.stops and not self._recorders[0].has_other_processes:
            self._model.stop_training = True


def _first_nonfinite_step(rows_by_recorder: Sequence[Any]) -> int:
    """Return the first update whose gradient was not finite, or 0."""
    return min((rows.nonfinite_step for rows in rows_by_recorder if rows.nonfinite_step), default=0)
