"""Stub of a backend's recorder, by which tests of `Recording` can do without training."""

import types

import numpy as np

from keras_sngm.backend.common.recorder import NewRows, Progress
from keras_sngm.measurements import DETAILS, Plan, Rows
from keras_sngm.monitoring.recording import Recording
from keras_sngm.monitoring.values import LoggedValues

PLAN = Plan(
    per_variable=True,
    details_every=1,
    histogram_every=None,
    stops=False,
    least_updates=2,
    most_updates=8,
)


class RecorderStub:
    """A recorder that has recorded `updates` updates.

    Args:
        variables: the number of variables of the optimizer.
        value_of: a function of the number of an update that returns every value measured on it.
    """

    is_open = True
    has_momentum = True
    keeps_noise_scale = True
    has_other_processes = False
    begun_at = Progress(0, 0, 0)
    plan = PLAN

    def __init__(self, variables=20, value_of=float):
        self.variables = [types.SimpleNamespace(path=f"layer_{i}/v") for i in range(variables)]
        self.updates_kept = self.plan.updates(variables)
        self.updates = 0
        self._snapshots = 0
        self._snapshots_read = 0
        self._value_of = value_of

    @property
    def unread(self):
        """Return the number of snapshots that were made and are not read yet."""
        return self._snapshots - self._snapshots_read

    def begin(self):
        pass

    end = back_up = begin

    def limit_halt(self, updates):
        pass

    def snapshot(self):
        self._snapshots += 1
        return self.updates

    def progress(self, snapshot):
        return Progress(snapshot, snapshot, 0)

    def new_rows(self, progress, snapshot):
        self._snapshots_read += 1
        steps = np.arange(progress.updates + 1, snapshot + 1)
        values = np.array([self._value_of(int(step)) for step in steps], "float64")
        count = len(self.variables)
        details = {
            int(step): np.full((count, len(DETAILS)), value) for step, value in zip(steps, values)
        }
        rows = Rows(values, values, np.repeat(values[:, np.newaxis], count, axis=1))
        return NewRows(steps, rows, details, {}, 0, np.zeros(count))


def recording_of(recorder, *sinks):
    """Return a `Recording` of one recorder, in its first epoch.

    Args:
        recorder: a `RecorderStub`.
        *sinks: the sinks that values are logged to.
    """
    model = types.SimpleNamespace(
        steps_per_execution=1, trainable_variables=recorder.variables, layers=[]
    )
    watch = types.SimpleNamespace(recorders=[recorder])
    values = LoggedValues([recorder], True, model)
    for sink in sinks:
        sink.begin(values.columns())
    recording = Recording(model, watch, PLAN, lambda recorders: (values, sinks), log_every=1)
    recording.begin_epoch()
    return recording


def make_updates(recording, recorder, count):
    """Have the recorder record `count` more updates, one in each training step."""
    for _ in range(count):
        recording.before_updates()
        recorder.updates += 1
