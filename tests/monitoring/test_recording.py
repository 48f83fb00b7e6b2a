"""Tests that the host's memory for records of an epoch does not grow with the number of updates."""

import gc
import threading
import tracemalloc

import numpy as np
import pytest

from keras_sngm.monitoring.sinks import FileSink
from recorder_stub import RecorderStub, make_updates, recording_of


@pytest.fixture
def looking_at_every_step(monkeypatch):
    """Make a read due before every step, unless another read is still under way."""
    monkeypatch.setattr("keras_sngm.monitoring.recording._SECONDS_BETWEEN_READS", -1.0)


def memory_after(updates, recording, recorder):
    """Record some more updates; return the bytes that Python has allocated after them."""
    make_updates(recording, recorder, updates)
    recording.wait()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.usefixtures("looking_at_every_step")
def test_memory_does_not_grow_within_an_epoch(tmp_path):
    recorder = RecorderStub(variables=8)
    sinks = [FileSink(str(tmp_path / f"log{suffix}"), False) for suffix in (".csv", ".jsonl")]
    recording = recording_of(recorder, *sinks)
    tracemalloc.start()
    try:
        before = memory_after(200, recording, recorder)
        after = memory_after(1_800, recording, recorder)
    finally:
        tracemalloc.stop()
    assert after - before < 50_000
    assert recording.end_epoch()["grad_norm"] == np.mean(range(1, 2_001))
    recording.close()
    for sink in sinks:
        sink.close()


def test_an_appended_file_is_not_kept_in_memory(tmp_path):
    filename = tmp_path / "log.jsonl"
    filename.write_text('{"step": 1}\n' * 100_000)
    tracemalloc.start()
    try:
        sink = FileSink(str(filename), append=True)
        sink.begin([])
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    sink.close()
    assert size < peak < 100_000


class SlowSink:
    """Sink whose `write` waits until training is far ahead of it, for 20 milliseconds at most.

    `ahead` is the greatest number of unread snapshots that a `write` has seen.
    """

    def __init__(self, recorder, most):
        self.ahead = 0
        self._recorder = recorder
        self._most = most

    def begin(self, columns):
        pass

    def flush(self):
        pass

    def write(self, step, scalars):
        waiting = threading.Event()
        for _ in range(10):
            self.ahead = max(self.ahead, self._recorder.unread)
            if self.ahead > self._most or waiting.wait(0.002):
                break


def test_values_that_cannot_be_written_as_fast_do_not_pile_up():
    recorder = RecorderStub()
    sink = SlowSink(recorder, most=3)
    recording = recording_of(recorder, sink)
    make_updates(recording, recorder, 24)
    recording.close()
    assert 0 < sink.ahead <= 3
