"""The callback that logs gradient norms.

Its arguments, their documentation and all methods that Keras calls are in one file.
"""

import contextlib
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_sngm.backend import Attachment
from keras_sngm.checks import check_count
from keras_sngm.measurements import Plan
from keras_sngm.monitoring.outputs import (
    claim_file,
    claim_folder,
    new_outputs,
    numbered_file,
    numbered_folder,
)
from keras_sngm.monitoring.recording import Fault, Recording
from keras_sngm.monitoring.resilient_sink import ResilientSink
from keras_sngm.monitoring.sinks import (
    SUFFIXES,
    ColumnsError,
    FileSink,
    Sink,
    TensorBoardSink,
    tensorboard_parts,
)
from keras_sngm.monitoring.values import DESCRIPTIONS, LoggedValues
from keras_sngm.monitoring.variable_groups import check_per_variable

_MOST_UPDATES = 1024
"""Most updates whose rows are kept on the device at a time."""


class GradientNormLogger(keras.callbacks.Callback):
    r"""Logs the norm of the gradient, and what else there is to know of a training step.

    Works with `SNGM` and with any other Keras optimizer, so that they can be compared,
    also inside of a `LossScaleOptimizer` or a `MultiOptimizer`. `grad_norm` is the
    Euclidean norm of the whole gradient of an update over all trainable variables,
    summed over replicas and averaged over accumulated micro-batches:

    - with `SNGM`, as it was normalized: after coupled weight decay and clipping. The
      optimizer has computed it anyway.
    - with other optimizers, before clipping and whatever else they do with it. Here it
      costs one more pass over the gradient in every step, and under a distribution
      strategy one more all-reduce.

    What is measured stays on the device. Once a second a thread of its own fetches it,
    so that after its first step training does not wait for it inside an epoch, unless
    values come in faster than they can be written. Every update counts, also those inside
    of `steps_per_execution`. A step that a `LossScaleOptimizer` leaves out is no update.
    The memory of the host that is needed does not grow with the length of an epoch.

    Keys, where `<path>` is a variable's or a group's, see `per_variable`:

    | key | what | epoch `logs` | `log_dir`, `filename` |
    |---|---|---|---|
    | `grad_norm` | see above | mean | each |
    | `grad_norm_max`, `grad_norm_min` | | extremes | |
    | `grad_norm/<path>` | of the variables of `<path>` | mean | each |
    | `gradient_noise_scale` | if `SNGM` measures it | last | each |
    | `update_ratio` | norm(dw) / norm(w), w before the step | mean | each |
    | `update_norm` | norm(dw) | mean | each |
    | `weight_norm` | norm(w) before the step | mean | each |
    | `momentum_norm` | norm(u) after the step, `SNGM` only | mean | each |
    | `momentum_cosine` | cosine of u and g / norm(g), `SNGM` only | mean | each |
    | `update_ratio/<path>`, ... | the same five | | each |
    | `gradients/<path>`, `momenta/<path>` | histograms | | TensorBoard |

    "Each" means every `log_every` updates, against `optimizer.iterations`, which goes
    on counting when training is resumed. `logs` of batches hold `grad_norm` of the
    newest update, a tensor on the device (on PyTorch a NumPy array). A gradient that is
    not finite makes means and extremes NaN or infinite. An infinite `gradient_noise_scale`
    is one that is not known yet.

    Nothing but what is logged changes: neither weights nor the optimizer's variables, state
    trees and files. A model that is not built yet is built by Keras, as without a logger;
    one that is compiled anew while it trains is followed.

    One logger can be used for several models, one after the other, as for folds or in a
    search. The first one's values go to `filename` and `log_dir`, those of others to names
    with a number, `log_1.csv` and so on. A second `fit` of a model goes on with its file,
    unless its values have other names by then: then it gets another. Copies of a logger
    share the numbers; one that was sent to another process takes the next name that nobody
    has taken.

    If a disk fills up while a model trains, the logger warns once and writes the file or
    directory on it no longer; training, `logs` and what is written elsewhere go on. A line
    that was broken off is left where it is, and `append=True` goes on below it.

    Args:
        log_dir: Directory for TensorBoard, or `None`. Needs the package `tensorboard`.
        filename: File for the same scalars, or `None`: CSV if it ends in `.csv`, one
            JSON object per line if it ends in `.jsonl`.
        log_every: Integer. Every how many updates `log_dir` and `filename` get values.
        per_variable: Boolean, `"layer"`, integer or function. `True` adds keys for each
            trainable variable, a function `variable -> bool` for those it is true for.
            `"layer"` adds them for each layer of the model, whatever kind of model that
            is; a model among its layers counts as its layers. An integer adds them for
            groups of variables whose paths begin with the same so many parts.
        update_ratio: Boolean. Whether to measure how far the weights move. Done at every
            `log_every`-th update alone, where it takes some passes over the weights. A
            copy of the weights is kept for it.
        histogram_every: Integer or `None`. Every how many updates `log_dir` gets
            histograms of 30 intervals of each variable's gradient, as it was
            normalized, and with `SNGM` of its momentum. Those of all variables, or of
            those that the function `per_variable` is true for. Keeps the same copy.
        on_nonfinite: `"warn"`, `"stop"` or `"ignore"`: what to do about the first
            gradient with NaN or infinity in it. `"warn"` says in which step it was and
            in which variables, and goes on. `"stop"` takes no step any more, with any
            optimizer, ends training within about a second, with several processes on
            JAX at the end of the epoch, and says so; trainable and other weights are as
            they were after the last step before.
        append: Boolean. Whether to go on with `filename` if it exists, rather than
            overwrite it, whichever model the values are of.

    Raises:
        ImportError: if `log_dir` is set and `tensorboard` is not installed.
        ValueError: if an argument is out of its range; when training begins, if the
            model has no optimizer, `filename` has other columns, or this logger is in
            `callbacks` twice.
        OSError: when training begins, if `log_dir` or `filename` cannot be written.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sngm import SNGM, GradientNormLogger
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=SNGM(), loss="mse")
    >>> history = model.fit(
    ...     np.ones((8, 2)), np.ones((8, 1)), callbacks=[GradientNormLogger()], verbose=0
    ... )
    >>> sorted(history.history)
    ['grad_norm', 'grad_norm_max', 'grad_norm_min', 'loss']
    """

    async_safe = True
    """Attribute that Keras reads: without it Keras would wait for the loss after every batch."""

    # What changes while a model is trained, as it is before. Copies fall back to these values,
    # and so do pickles of earlier versions, which lack some of the attributes.
    _attachment: Any = None
    _watched_model: Any = None
    _recording: Any = None
    _sinks: Sequence[ResilientSink] = ()
    _must_open = True
    _has_warned = False

    def __init__(
        self,
        log_dir: str | os.PathLike | None = None,
        filename: str | os.PathLike | None = None,
        log_every: int = 1,
        per_variable: bool | int | str | Callable[[Any], bool] = False,
        update_ratio: bool = False,
        histogram_every: int | None = None,
        on_nonfinite: str = "warn",
        append: bool = False,
    ) -> None:
        super().__init__()
        check_count("log_every", log_every)
        check_per_variable(per_variable)
        _check_boolean("update_ratio", update_ratio)
        _check_boolean("append", append)
        if histogram_every is not None:
            check_count("histogram_every", histogram_every)
            if log_dir is None:
                raise ValueError(
                    "`histogram_every` needs `log_dir`, where histograms are written to. "
                    f"Received: histogram_every={histogram_every}, log_dir=None"
                )
        if on_nonfinite not in ("warn", "stop", "ignore"):
            raise ValueError(
                '`on_nonfinite` must be "warn", "stop" or "ignore". '
                f"Received: on_nonfinite={on_nonfinite}"
            )
        if filename is not None and pathlib.Path(filename).suffix not in SUFFIXES:
            raise ValueError(
                f"`filename` must end in {' or '.join(SUFFIXES)}. Received: filename={filename}"
            )
        if log_dir is not None:
            tensorboard_parts()
        self.log_dir = None if log_dir is None else str(log_dir)
        self.filename = None if filename is None else str(filename)
        self.log_every = log_every
        self.per_variable = per_variable
        self.update_ratio = update_ratio
        self.histogram_every = histogram_every
        self.on_nonfinite = on_nonfinite
        self.append = append
        self._outputs = new_outputs()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state that copies begin with: the arguments, nothing of a running `fit`.

        What a running `fit` sets has a default in the class, by which it is known here.
        """
        state = vars(self) | vars(keras.callbacks.Callback())
        of_a_fit = vars(GradientNormLogger)
        return {name: value for name, value in state.items() if name not in of_a_fit}

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Attach recorders to the model's optimizers, and open the files.

        Raises:
            ValueError: if this `fit` has begun with this logger before: it is in `callbacks` twice.
            OSError: if a file cannot be opened.
        """
        is_there_twice = self._has_begun()
        self._close_after_interruption()
        if is_there_twice:
            raise ValueError(
                "A `GradientNormLogger` can be in `callbacks` once. Received: the same one twice"
            )
        self._start(self.model, must_open=True)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Begin to record, just before the model is trained."""
        self._restart_if_recompiled()
        # Recording begins here, as other callbacks may restore the model in `on_train_begin`.
        self._recording.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Read what was recorded, if that is due, and warn of faults."""
        # Keras calls this method in the training thread before each step, unlike
        # `on_train_batch_end`, so that rows are read before they are overwritten.
        if self._restart_if_recompiled():
            self._recording.begin_epoch()
        self._recording.before_updates()
        self._warn()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the norm of the newest update, over all optimizers, into the `logs` of the batch."""
        if logs is not None:
            logs["grad_norm"] = _latest_norm(self._attachment.recorders)

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """After a gradient that stops training, restore the model before it is validated."""
        if self._recording is not None and self.on_nonfinite == "stop":
            self._recording.wait()
            self._recording.restore()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Put the statistics of the epoch into its `logs`, and warn of faults.

        After a gradient that stops training the model is restored to before that step.
        """
        values = self._recording.end_epoch()
        self._recording.restore()
        self._warn()
        if logs is not None:
            logs.update(values)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Write what there is, detach the recorders and close the files."""
        self._close()

    def _has_begun(self) -> bool:
        """Return whether this `fit`, not one that was interrupted, has begun to log already."""
        # Keras gives all callbacks of a `fit` the same `params`.
        return (
            bool(self.params)
            and self._attachment is not None
            and self._attachment.fit_params is self.params
        )

    def _restart_if_recompiled(self) -> bool:
        """Log the new optimizer of a model that was compiled anew. Returns whether it was."""
        if self._attachment.is_current(self._watched_model):
            return False
        model = self._watched_model
        self._close()
        self._start(model, must_open=False)
        return True

    def _start(self, model: keras.Model, must_open: bool) -> None:
        """Attach recorders to a model's optimizers, and open the files.

        Args:
            model: a compiled model.
            must_open: whether to raise an error if a file cannot be opened.
        """
        if not isinstance(model.optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "`GradientNormLogger` needs a model compiled with a Keras optimizer. "
                f"Received: model.optimizer={model.optimizer}"
            )
        self._has_warned = False
        plan = self._plan(model)
        self._watched_model = model
        self._attachment = Attachment(model, plan, self.params)
        self._must_open = must_open
        self._recording = Recording(
            model, self._attachment, plan, self._begin_output, self.log_every
        )
        try:
            goes_on = self.append or self._outputs.is_known(model)
            number = 0 if self.append else self._outputs.number(model, self._claim)
            self._open_sinks(number, goes_on)
            self._recording.open()
        except Exception:
            self._close()
            raise

    def _plan(self, model: keras.Model) -> Plan:
        """Return what the recorders are to keep."""
        return Plan(
            per_variable=bool(self.per_variable),
            details_every=self.log_every if self.update_ratio else None,
            histogram_every=self.histogram_every,
            stops=self.on_nonfinite == "stop",
            least_updates=2 * model.steps_per_execution,
            most_updates=_MOST_UPDATES,
        )

    def _open_sinks(self, number: int, goes_on: bool) -> None:
        """Open the file and the directory of a number, or note why that fails.

        Args:
            number: the number of the model.
            goes_on: whether to continue existing files.
        """
        if self.filename is not None:
            filename = numbered_file(self.filename, number)
            self._open_sink(lambda: FileSink(filename, goes_on), f"`filename` {filename}")
        if self.log_dir is not None:
            log_dir = numbered_folder(self.log_dir, number)
            self._open_sink(lambda: TensorBoardSink(log_dir, DESCRIPTIONS), f"`log_dir` {log_dir}")

    def _open_sink(self, make: Callable[[], Sink], name: str) -> None:
        """Open a file or a directory, and add it to the sinks.

        Its errors become a warning, but an error in opening it is raised if `_must_open` is set.

        Args:
            make: opens it.
            name: its name for warnings.
        """
        self._sinks = [*self._sinks, ResilientSink(make, name, self._must_open)]

    def _begin_output(self, recorders: Sequence[Any]) -> tuple[LoggedValues, Sequence[Sink]]:
        """Tell the sinks the names of the values, once the optimizers are built.

        If a CSV file has other columns, files with another number in their names are begun.

        Args:
            recorders: the recorders of the optimizers.

        Returns:
            The values to log, and the sinks.

        Raises:
            ColumnsError: if a CSV file has other columns, and `append` is set.
        """
        values = LoggedValues(recorders, self.per_variable, self._watched_model)
        try:
            for sink in self._sinks:
                sink.begin(values.columns())
        except ColumnsError:
            if self.append:
                raise
            # The model has another optimizer than in its last `fit`, with other values.
            self._close_sinks()
            self._open_sinks(
                self._outputs.new_number(self._watched_model, self._claim), goes_on=False
            )
            for sink in self._sinks:
                sink.begin(values.columns())
        return values, self._sinks

    def _claim(self, number: int) -> bool:
        """Create the file and the directory of a number. Returns `False` if one of them exists."""
        claimed = self.filename is None or claim_file(numbered_file(self.filename, number))
        if claimed and self.log_dir is not None:
            return claim_folder(numbered_folder(self.log_dir, number))
        return claimed

    def _warn(self) -> None:
        """Warn of files that cannot be written and of a gradient that is not finite, once each."""
        for sink in self._sinks:
            sink.warn()
        fault = self._recording.fault
        if fault is not None and not self._has_warned and self.on_nonfinite != "ignore":
            self._has_warned = True
            warnings.warn(self._message(fault), stacklevel=2)

    def _message(self, fault: Fault) -> str:
        """Return the warning about a gradient that is not finite."""
        message = f"The gradient of step {fault.step} is not finite. Variables: "
        message += ", ".join(fault.variables) or "none by itself, their sum of squares overflows"
        if self.on_nonfinite == "stop":
            return f"{message}. Training stops; the model is as it was before that step."
        return f"{message}."

    def _close(self) -> None:
        """Write what there is, detach the recorders and close the files."""
        recording, self._recording = self._recording, None
        attachment, self._attachment = self._attachment, None
        self._watched_model = None
        with contextlib.ExitStack() as ends:
            if attachment is not None:
                ends.callback(attachment.detach)
            ends.callback(self._close_sinks)
            if recording is not None:
                recording.close()

    def _close_sinks(self) -> None:
        """Close the files, and warn of those that could not be written."""
        sinks, self._sinks = self._sinks, ()
        with contextlib.ExitStack() as ends:
            for sink in sinks:
                ends.callback(sink.warn)
                ends.callback(sink.close)

    def _close_after_interruption(self) -> None:
        """Close what an interrupted `fit` has left open; turn errors into a warning."""
        try:
            self._close()
        except Exception as error:
            warnings.warn(
                f"What an interrupted `fit` had not written yet is lost: {error}", stacklevel=2
            )


def _check_boolean(name: str, value: Any) -> None:
    """Raise a `ValueError` if an argument is not a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be a boolean. Received: {name}={value}")


def _latest_norm(recorders: list[Any]) -> Any:
    """Return the norm of the newest update over the variables of all optimizers; NaN without one.

    Args:
        recorders: the recorders of the optimizers.
    """
    norms = [recorder.latest_norm() for recorder in recorders if recorder.is_open]
    if not norms:
        return math.nan
    return norms[0] if len(norms) == 1 else sum(norm * norm for norm in norms) ** 0.5
