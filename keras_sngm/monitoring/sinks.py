"""Sinks that logged values are written to: TensorBoard, CSV, JSON lines.

All of them fail when they are made, rather than later, if they cannot be written.
"""

import csv
import io
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np

from keras_sngm.measurements import BUCKETS

SUFFIXES = (".csv", ".jsonl")


class Sink(Protocol):
    """A place that the values of one step after another are written to."""

    def begin(self, columns: Sequence[str]) -> None:
        """Take the names of the values that `write` will get, before its first call."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step, by name."""

    def write_histograms(self, step: int, histograms: Mapping[str, np.ndarray]) -> None:
        """Write histograms of a step, by name: least value, greatest value, counts."""

    def flush(self) -> None:
        """Make what was written visible to others."""

    def close(self) -> None:
        """Write no more."""


class TensorBoardSink:
    """Event files for TensorBoard, with one event per step.

    Args:
        log_dir: directory, created if there is none.
        descriptions: descriptions of the values, by the first part of their names.

    Raises:
        OSError: if the directory cannot be written.
    """

    def __init__(self, log_dir: str, descriptions: Mapping[str, str]) -> None:
        self._tensorboard = tensorboard_parts()
        self._descriptions = descriptions
        self._events: dict[tuple[str, ...], Any] = {}
        try:
            gfile = self._tensorboard.gfile
            gfile.makedirs(log_dir)
            # TensorBoard's stand-in for TensorFlow's `gfile` has no `remove`.
            remove = getattr(gfile, "remove", None if "://" in log_dir else os.remove)
            if remove is not None:
                probe = os.path.join(log_dir, f".probe.{os.getpid()}")
                with gfile.GFile(probe, "w") as file:
                    file.write("")
                remove(probe)
            self._writer = self._tensorboard.EventFileWriter(log_dir)
        except Exception as error:  # TensorFlow has errors of its own
            raise OSError(f"`log_dir` cannot be written. Received: log_dir={log_dir}") from error

    def begin(self, columns: Sequence[str]) -> None:
        """Do nothing: TensorBoard takes values of any name."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step, by name."""
        # Events are reused: making one of hundreds of values takes longer than a small step.
        names = tuple(scalars)
        if names not in self._events:
            self._events[names] = self._event_of(names)
        event = self._events[names]
        event.step = step
        event.wall_time = time.time()
        for value, scalar in zip(event.summary.value, scalars.values(), strict=True):
            value.tensor.float_val[0] = scalar
        self._writer.add_event(event)

    def _event_of(self, names: Sequence[str]) -> Any:
        """Return an event with a scalar of each name, all 0 for now."""
        parts = self._tensorboard
        event = parts.Event()
        for name in names:
            event.summary.value.add(
                tag=name,
                tensor=parts.make_tensor_proto(np.float32(0.0)),
                metadata=parts.scalar_metadata("", self._description(name)),
            )
        return event

    def write_histograms(self, step: int, histograms: Mapping[str, np.ndarray]) -> None:
        """Write histograms of a step, by name: least value, greatest value, counts."""
        parts = self._tensorboard
        event = parts.Event(step=step, wall_time=time.time())
        for name, (least, greatest, *counts) in histograms.items():
            edges = np.linspace(least, greatest, BUCKETS + 1)
            buckets = np.stack([edges[:-1], edges[1:], counts], axis=1)
            event.summary.value.add(
                tag=name,
                tensor=parts.make_tensor_proto(buckets, dtype=np.float64),
                metadata=parts.histogram_metadata("", self._description(name)),
            )
        self._writer.add_event(event)

    def _description(self, name: str) -> str:
        """Return the description of a value, by the first part of its name."""
        return self._descriptions.get(name.partition("/")[0], "")

    def flush(self) -> None:
        """Make the events written so far visible to others."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class FileSink:
    """A CSV file, or a file of one JSON object per line, by the suffix of its name.

    Args:
        filename: name of the file, whose folder is created if there is none.
        append: whether to continue an existing file.

    Raises:
        OSError: if the file cannot be written.
    """

    def __init__(self, filename: str, append: bool) -> None:
        path = pathlib.Path(filename)
        self._name = filename
        self._is_csv = path.suffix == ".csv"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._there = _Ends.of(path) if append and path.exists() else _Ends("", "")
            self._file = path.open("a" if append else "w", newline="")
        except OSError as error:
            raise OSError(f"`filename` cannot be written. Received: filename={filename}") from error

    def begin(self, columns: Sequence[str]) -> None:
        """Write the names of the values as a header, or check that the CSV file has these columns.

        Raises:
            ColumnsError: if it has others.
        """
        first_line, last_character = self._there
        names = ["step", *columns]
        self._csv = csv.DictWriter(self._file, names) if self._is_csv else None
        if self._is_csv and _is_cut_off(first_line, names):
            self._file.truncate(0)
            self._file.write(_header(names))
            return
        if self._is_csv:
            _check_columns(self._name, names, first_line)
        if last_character not in ("", "\n"):
            self._file.write("\n")  # the end of a line that was broken off

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step, by name, as one line."""
        row = {"step": step, **scalars}
        if self._csv is not None:
            self._csv.writerow(row)
        else:
            self._file.write(json.dumps(row) + "\n")

    def write_histograms(self, step: int, histograms: Mapping[str, np.ndarray]) -> None:
        """Do nothing: lines hold numbers only."""

    def flush(self) -> None:
        """Make the lines written so far visible to others."""
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ColumnsError(ValueError):
    """An error about a CSV file that has other columns than are to be written to it."""


class _Ends(NamedTuple):
    """The first line and the last character of a text file, empty strings if it is empty."""

    first_line: str
    last_character: str

    @classmethod
    def of(cls, path: pathlib.Path) -> "_Ends":
        """Read the first line and the last character only: the file may be long."""
        with path.open() as text, path.open("rb") as data:
            first_line = text.readline()
            if first_line:
                data.seek(-1, os.SEEK_END)
            return cls(first_line, data.read(1).decode("latin-1"))


def _header(names: Sequence[str]) -> str:
    """Return the header line of a CSV file with these columns."""
    line = io.StringIO()
    csv.writer(line).writerow(names)
    return line.getvalue()


def _is_cut_off(first_line: str, names: Sequence[str]) -> bool:
    """Return whether a line is only the beginning of the header, or empty."""
    return not first_line.endswith("\n") and _header(names).startswith(first_line)


def _check_columns(filename: str, wanted: list[str], first_line: str) -> None:
    """Raise a `ColumnsError` if the first line of a CSV file is not the wanted header."""
    columns = next(csv.reader([first_line]))
    if columns != wanted:
        raise ColumnsError(
            "A CSV file can be appended to if it has the columns "
            f"{', '.join(wanted)}. Received: filename={filename} with the columns "
            f"{', '.join(columns)}"
        )


def tensorboard_parts() -> SimpleNamespace:
    """Import the parts of TensorBoard that write event files.

    Raises:
        ImportError: if TensorBoard is not installed.
    """
    try:
        from tensorboard.compat import tf
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.histogram import metadata as histogram
        from tensorboard.plugins.scalar import metadata as scalar
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError as error:
        raise ImportError(
            "`GradientNormLogger(log_dir=...)` needs TensorBoard. "
            "Install it with `pip install tensorboard`."
        ) from error
    return SimpleNamespace(
        gfile=tf.io.gfile,
        Event=Event,
        EventFileWriter=EventFileWriter,
        make_tensor_proto=make_tensor_proto,
        scalar_metadata=scalar.create_summary_metadata,
        histogram_metadata=histogram.create_summary_metadata,
    )
