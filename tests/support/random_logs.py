"""Random training jobs with loggers, and the values that the loggers write."""

import csv
import json
import pathlib
import warnings
from typing import Any, NamedTuple

import keras
import numpy as np
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

import linear_model
from keras_sngm import SNGM, GradientNormLogger
from linear_model import FEATURES, NOISE_MOMENTUM, PATHS
from problems import BACKEND

BATCH, MOST_BATCHES = 4, 7
_VARIABLES = {path: [i] for i, path in enumerate(PATHS)}
_LAYERS = {"net/hidden": [0, 1], "net/head": [2, 3]}
PER_VARIABLE = {
    "none": (False, {}),
    "variables": (True, _VARIABLES),
    "layers": ("layer", _LAYERS),
    "model": (1, {"net": [0, 1, 2, 3]}),
    "folders": (2, _LAYERS),
    "kernels": (
        lambda variable: "kernel" in variable.path,
        {path: members for path, members in _VARIABLES.items() if "kernel" in path},
    ),
}
"""Each `per_variable` of a logger, with the indices of the variables that each name stands for."""
OPTIMIZERS = {
    "SNGM": (SNGM, linear_model.SNGM, 0.05),
    "SGD": (keras.optimizers.SGD, linear_model.SGD, 0.005),
    "Adam": (keras.optimizers.Adam, linear_model.Adam, 0.05),
}
"""The Keras optimizer, the same optimizer in NumPy, and a learning rate."""


class Logger(NamedTuple):
    """Arguments of a logger.

    Attributes:
        log_every: as of `GradientNormLogger`.
        per_variable: a key of `PER_VARIABLE`.
        update_ratio: as of `GradientNormLogger`.
        histogram_every: as of `GradientNormLogger`, for loggers with a `log_dir`.
        suffix: the suffix of its file, ".csv" or ".jsonl".
        has_log_dir: whether it also writes to TensorBoard.
    """

    log_every: int
    per_variable: str
    update_ratio: bool
    histogram_every: int | None
    suffix: str
    has_log_dir: bool

    @property
    def groups(self) -> dict[str, list[int]]:
        """Return the indices of the variables that belong to each logged name."""
        return PER_VARIABLE[self.per_variable][1]

    def make(self, folder: pathlib.Path, on_nonfinite: str, append: bool) -> GradientNormLogger:
        """Return a new `GradientNormLogger` that writes to a folder."""
        return GradientNormLogger(
            log_dir=folder / "logs" if self.has_log_dir else None,
            filename=folder / f"log{self.suffix}",
            log_every=self.log_every,
            per_variable=PER_VARIABLE[self.per_variable][0],
            update_ratio=self.update_ratio,
            histogram_every=self.histogram_every if self.has_log_dir else None,
            on_nonfinite=on_nonfinite,
            append=append,
        )


class Fit(NamedTuple):
    """One call of `fit`.

    Attributes:
        batches: the number of batches in an epoch.
        epochs: the number of epochs, unless training is interrupted.
        interrupted: the number of batches after which training is interrupted, or `None`.
        by: the type of the exception that interrupts training.
        renewed: whether new loggers append to the files of the loggers before.
    """

    batches: int
    epochs: int
    interrupted: int | None = None
    by: type[BaseException] = KeyboardInterrupt
    renewed: bool = False


class Job(NamedTuple):
    """Some calls of `fit` for one model.

    Attributes:
        optimizer: a key of `OPTIMIZERS`.
        options: keyword arguments of the optimizer.
        micro_batches: the number of micro-batches in an accumulation cycle.
        compile: keyword arguments of `compile`.
        loggers: the loggers, all used at the same time.
        fits: the calls of `fit`, one after the other.
        bad_batch: the index of the batch in each epoch of the last `fit` whose targets have a
            NaN, modulo the number of batches; `None` for no such batch.
        on_nonfinite: as of `GradientNormLogger`, for all loggers.
    """

    optimizer: str
    options: dict[str, Any]
    micro_batches: int
    compile: dict[str, Any]
    loggers: list[Logger]
    fits: list[Fit]
    bad_batch: int | None
    on_nonfinite: str

    @property
    def has_noise_scale(self) -> bool:
        return self.optimizer == "SNGM" and self.micro_batches > 1

    @property
    def has_momentum(self) -> bool:
        return self.optimizer == "SNGM" and self.options.get("momentum") != 0.0

    def make_optimizer(self) -> keras.optimizers.Optimizer:
        make, _, rate = OPTIMIZERS[self.optimizer]
        options: dict[str, Any] = {"gradient_accumulation_steps": self.micro_batches}
        if self.micro_batches == 1:
            options = {}
        if self.has_noise_scale:
            options |= {
                "noise_scale_batch_size": BATCH,
                "noise_scale_momentum": NOISE_MOMENTUM,
            }
        return make(rate, **options, **self.options)

    def data(self, fit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of an epoch of the `fit` with the index `fit`."""
        generator = np.random.default_rng(fit)
        batches = self.fits[fit].batches
        x = generator.standard_normal((BATCH * batches, FEATURES)).astype("float32")
        y = generator.standard_normal((BATCH * batches, 1)).astype("float32")
        if self.bad_batch is not None and fit == len(self.fits) - 1:
            y[BATCH * (self.bad_batch % batches)] = np.nan
        return x, y


def jobs() -> st.SearchStrategy[Job]:
    """Return a strategy for jobs."""
    steps = [1] if BACKEND == "torch" else [1, 1, 2, 3]
    how = [{}, {"run_eagerly": True}]
    compiled = st.tuples(st.sampled_from(how), st.sampled_from(steps)).map(
        lambda drawn: {**drawn[0], "steps_per_execution": drawn[1]}
    )
    return st.builds(
        Job,
        optimizer=st.shared(st.sampled_from(["SNGM", "SNGM", *OPTIMIZERS]), key="optimizer"),
        options=st.shared(st.sampled_from(["SNGM", "SNGM", *OPTIMIZERS]), key="optimizer").flatmap(
            options_of
        ),
        micro_batches=st.sampled_from([1, 1, 2, 3]),
        compile=compiled,
        loggers=st.lists(loggers(), min_size=1, max_size=3),
        fits=some_fits(),
        bad_batch=st.none() | st.integers(0, MOST_BATCHES - 1),
        on_nonfinite=st.sampled_from(["warn", "stop", "ignore"]),
    )


def options_of(optimizer: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for keyword arguments of an optimizer."""
    if optimizer == "Adam":
        return st.just({})
    if optimizer == "SGD":
        return st.fixed_dictionaries({"momentum": st.sampled_from([0.0, 0.9])})
    return st.fixed_dictionaries(
        {"momentum": st.sampled_from([0.0, 0.9, 0.9])},
        optional={
            "nesterov": st.just(True),
            "blockwise": st.just(True),
            "weight_decay": st.just(0.5),
            "decoupled_weight_decay": st.booleans(),
            "clipnorm": st.just(0.2),
            "clipvalue": st.just(0.3),
            "global_clipnorm": st.just(0.4),
        },
    ).filter(are_allowed)


def are_allowed(options: dict[str, Any]) -> bool:
    """Return whether SNGM accepts these options together."""
    return not (options.get("nesterov") and options["momentum"] == 0.0) and (
        sum(name in options for name in ("clipnorm", "clipvalue", "global_clipnorm")) <= 1
    )


def loggers() -> st.SearchStrategy[Logger]:
    """Return a strategy for loggers."""
    return st.builds(
        Logger,
        log_every=st.integers(1, 4),
        per_variable=st.sampled_from(list(PER_VARIABLE)),
        update_ratio=st.booleans(),
        histogram_every=st.none() | st.integers(1, 4),
        suffix=st.sampled_from([".csv", ".jsonl"]),
        has_log_dir=st.booleans(),
    )


def some_fits() -> st.SearchStrategy[list[Fit]]:
    """Return a strategy for the calls of `fit` of a job, the last of which is not interrupted."""
    first = st.lists(fits(st.none() | st.integers(1, 2 * MOST_BATCHES)), max_size=2)
    return st.tuples(first, fits(st.none())).map(lambda drawn: [*drawn[0], drawn[1]])


def fits(interrupted: st.SearchStrategy[int | None]) -> st.SearchStrategy[Fit]:
    """Return a strategy for calls of `fit`, given one for `Fit.interrupted`."""
    return st.builds(
        Fit,
        batches=st.integers(1, MOST_BATCHES),
        epochs=st.integers(1, 3),
        interrupted=interrupted,
        by=st.sampled_from([KeyboardInterrupt, ArithmeticError]),
        renewed=st.booleans(),
    )


class MicroBatch(NamedTuple):
    """A micro-batch that a model was trained on.

    Attributes:
        fit: the index of the call of `fit`.
        number: the index of the micro-batch in its epoch.
        weights: the weights after it, or `None` if further steps followed in one execution.
    """

    fit: int
    number: int
    weights: list[np.ndarray] | None


class Witness(keras.callbacks.Callback):
    """Callback that keeps all micro-batches and the weights after them, and interrupts training."""

    def __init__(self) -> None:
        super().__init__()
        self.micro_batches: list[MicroBatch] = []
        self.epochs: list[range] = []
        """The indices of the micro-batches of each epoch that was completed."""
        self.fit = -1
        self._interrupted: int | None = None

    def begin(self, fit: Fit) -> None:
        """Prepare for a call of `fit`, which may be interrupted."""
        self.fit += 1
        self._by = fit.by
        self._batches = fit.batches
        self._interrupted = None
        if fit.interrupted is not None:
            self._interrupted = len(self.micro_batches) + fit.interrupted

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._first = len(self.micro_batches)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        batch = min(batch, self._batches - 1)  # The last execution may have fewer steps.
        weights = [v.numpy().astype("float64") for v in self.model.trainable_variables]
        for number in range(len(self.micro_batches) - self._first, batch):
            self.micro_batches.append(MicroBatch(self.fit, number, None))
        self.micro_batches.append(MicroBatch(self.fit, batch, weights))
        if self._interrupted is not None and len(self.micro_batches) >= self._interrupted:
            raise self._by

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(range(self._first, len(self.micro_batches)))


class EpochLogs(keras.callbacks.Callback):
    """Callback that keeps the `logs` of each epoch; it must follow the logger that fills them."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[dict[str, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.epochs.append(dict(logs))


class Logged(NamedTuple):
    """The output of one logger.

    Attributes:
        rows: the rows of its file by step.
        scalars: the scalars in TensorBoard, by step and name.
        histograms: the histograms in TensorBoard, by step and name.
        epochs: the `logs` of each epoch.
    """

    rows: dict[int, dict[str, float]]
    scalars: dict[int, dict[str, float]]
    histograms: dict[int, dict[str, np.ndarray]]
    epochs: list[dict[str, float]]


class Result(NamedTuple):
    """The result of a job."""

    start: list[np.ndarray]
    witness: Witness
    logged: list[Logged]
    messages: list[str]
    """Messages of all warnings that were raised."""


def run(job: Job, folder: pathlib.Path) -> Result:
    """Do a job, with the files of its loggers in a folder."""
    model = linear_model.keras_model()
    model.compile(job.make_optimizer(), "mse", **job.compile)
    start = [v.numpy().astype("float64") for v in model.trainable_variables]
    witness = Witness()
    epoch_logs = [EpochLogs() for _ in job.loggers]
    was_interrupted = False
    callbacks: list[keras.callbacks.Callback] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, fit in enumerate(job.fits):
            if not callbacks or (fit.renewed and not was_interrupted):
                # After an interruption a logger writes its last values only when it is used again.
                made = [
                    logger.make(folder / str(i), job.on_nonfinite, append=bool(callbacks))
                    for i, logger in enumerate(job.loggers)
                ]
                callbacks = [one for pair in zip(made, epoch_logs) for one in pair]
            was_interrupted = not _fitted(model, job, number, [*callbacks, witness])
    logged = [
        Logged(
            rows_of(folder / str(i) / f"log{logger.suffix}"),
            *(events_of(folder / str(i) / "logs") if logger.has_log_dir else ({}, {})),
            logs.epochs,
        )
        for i, (logger, logs) in enumerate(zip(job.loggers, epoch_logs, strict=True))
    ]
    return Result(start, witness, logged, [str(w.message) for w in caught])


def _fitted(model: keras.Model, job: Job, number: int, callbacks: list[Any]) -> bool:
    """Make the `fit` with the index `number`; return whether it was not interrupted."""
    fit = job.fits[number]
    callbacks[-1].begin(fit)
    try:
        model.fit(
            *job.data(number),
            BATCH,
            fit.epochs,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    except fit.by:
        return False
    return True


def rows_of(path: pathlib.Path) -> dict[int, dict[str, float]]:
    """Return the rows of a CSV or JSON lines file by step; each step must occur once."""
    if path.suffix == ".csv":
        with path.open() as file:
            lines = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {int(line.pop("step")): line for line in lines}
    assert len(rows) == len(lines)
    return rows


def events_of(log_dir: pathlib.Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the scalars and the histograms of TensorBoard, by step and name.

    Each name must occur once in a step.
    """
    events = EventAccumulator(str(log_dir), size_guidance={"tensors": 0}).Reload()
    scalars: dict[int, Any] = {}
    histograms: dict[int, Any] = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            steps = histograms if value.ndim else scalars
            of_step = steps.setdefault(event.step, {})
            assert tag not in of_step
            of_step[tag] = value if value.ndim else float(value)
    # TensorBoard reads files of the same second in any order.
    return dict(sorted(scalars.items())), dict(sorted(histograms.items()))
