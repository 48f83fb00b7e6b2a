"""A sink that keeps a full disk from ending a training run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keras_sngm.monitoring.sinks import ColumnsError, Sink


class ResilientSink:
    """A sink that is given up at its first error, while training and other sinks go on.

    The error is kept for `warn`, as it happens in a thread whose warnings nobody may see.

    Args:
        make: makes the sink.
        name: name of the file or the directory, for the warning.
        must_open: whether to raise an error of `make`.
    """

    def __init__(self, make: Callable[[], Sink], name: str, must_open: bool) -> None:
        self._name = name
        self._sink: Sink | None = None
        self._error: Exception | None = None
        self._has_warned = False
        try:
            self._sink = make()
        except Exception as error:
            if must_open:
                raise
            self._error = error

    def begin(self, columns: Sequence[str]) -> None:
        """Tell the sink the names of the values.

        Raises:
            ColumnsError: if its file has other columns.
        """
        self._attempt("begin", columns)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step, by name, unless the sink has failed."""
        self._attempt("write", step, scalars)

    def write_histograms(self, step: int, histograms: Mapping[str, np.ndarray]) -> None:
        """Write histograms of a step, by name, unless the sink has failed.

        Each is a vector: least value, greatest value, counts.
        """
        self._attempt("write_histograms", step, histograms)

    def flush(self) -> None:
        """Make what was written visible to others, unless the sink has failed."""
        self._attempt("flush")

    def close(self) -> None:
        """Close the sink, also after an error: it may have a file open."""
        if self._sink is not None:
            try:
                self._sink.close()
            except Exception as error:
                self._error = self._error or error

    def warn(self) -> None:
        """Warn of the error once, if there is one."""
        if self._error is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._name} is no longer written, while training and the logs of epochs go "
                f"on. {type(self._error).__name__}: {self._error}",
                stacklevel=2,
            )

    def _attempt(self, name: str, *arguments: Any) -> None:
        """Call a method of the sink, unless it has failed before; keep an error for `warn`."""
        if self._error is not None:
            return
        try:
            getattr(self._sink, name)(*arguments)
        except ColumnsError:
            raise
        except Exception as error:  # TensorFlow and remote file systems have errors of their own
            self._error = error
