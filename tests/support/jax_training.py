r"""Trains models with every option on one device and on several, and writes the results.

`test_jax_distribution.py` runs this in its own process, as devices must be configured before JAX
starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=6 \
        python -c "import jax_training; jax_training.main('results')"
"""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

import logged_training
from keras_sngm import SNGM, GradientNormLogger
from logged_cases import CASES
from replica_options import (
    BATCH,
    EPOCHS,
    FAULTS,
    FEATURES,
    OPTIONS,
    Option,
    Outcome,
    has_bad_sample,
    inner,
)

Variables = Sequence[keras.Variable]
# Embedding tables have 7 rows and 3 columns, so that 3 devices can share a table by columns.
DATA_PARALLEL, MODEL_PARALLEL = 4, (2, 3)
LOGGED = ("SNGM", "SNGM, accumulated", "SNGM, embedding", "SNGM, LossScaleOptimizer", "SGD")
STOPPED = {"SNGM": SNGM, "SGD": keras.optimizers.SGD}
STEPS_BEFORE_STOP = 2


class Result(NamedTuple):
    """The result of training with one option.

    Attributes:
        outcome: the values that tests compare on every backend.
        shardings: for each trainable variable, the axis of the device mesh along which each
            axis of the variable is sharded.
        momentum_shardings: the same for each momentum.
    """

    outcome: Outcome
    shardings: list[tuple]
    momentum_shardings: list[tuple]


class Stopped(NamedTuple):
    """The result of training that a logger has stopped, and the weights before the bad step."""

    warnings: list[str]
    weights: list[np.ndarray]
    weights_before: list[np.ndarray]


class Recorder(keras.callbacks.Callback):
    """Callback that keeps the gradient norm of each step and watches batches with a bad sample.

    `changed` says whether such a batch has changed weights, momentums or moving averages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.changed = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.before = self._bytes() if has_bad_sample(batch) else []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.norms.append(float(inner(self.model.optimizer).gradient_norm))
        if has_bad_sample(batch):
            self.changed |= self._bytes() != self.before

    def _bytes(self) -> list[bytes]:
        """Return the bytes of weights, momentums and moving averages."""
        variables = [*self.model.weights, *kept(inner(self.model.optimizer))]
        return [variable.numpy().tobytes() for variable in variables]


def kept(sngm: SNGM) -> Variables:
    """Return the momentums and the moving averages of an optimizer."""
    return [*sngm.momentums, *(sngm._model_variables_moving_average if sngm.use_ema else [])]


def one_device(variables: Variables) -> contextlib.AbstractContextManager:
    """Return a context for training without a distribution."""
    return contextlib.nullcontext()


def data_parallel(variables: Variables) -> contextlib.AbstractContextManager:
    """Return a context in which `DATA_PARALLEL` devices share each batch."""
    devices = keras.distribution.list_devices()[:DATA_PARALLEL]
    return keras.distribution.DataParallel(devices=devices).scope()


def model_parallel(variables: Variables) -> contextlib.AbstractContextManager:
    """Return a context in which variables are sharded, and batches are too.

    Each variable is sharded along its first axis that can be divided among the devices.
    """
    mesh = keras.distribution.DeviceMesh(MODEL_PARALLEL, ("batch", "model"))
    layouts = keras.distribution.LayoutMap(mesh)
    for variable in variables:
        axes: list[str | None] = [None] * len(variable.shape)
        for i, size in enumerate(variable.shape):
            if size % MODEL_PARALLEL[1] == 0:
                axes[i] = "model"
                _, _, path = variable.path.partition("/")  # Only the path within the model counts.
                layouts[f".*/{path}"] = tuple(axes)
                break
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch").scope()


PLACES: dict[str, Callable[[Variables], contextlib.AbstractContextManager]] = {
    "one device": one_device,
    "DataParallel": data_parallel,
    "ModelParallel": model_parallel,
}


def fit(option: Option, start: Sequence[np.ndarray]) -> Result:
    """Train a model with an option, from the given weights on."""
    model = option.model(SNGM)
    model.set_weights(start)
    recorder = Recorder()
    model.fit(
        *option.data(),
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=[*(make() for make in option.callbacks), recorder],
    )
    sngm = inner(model.optimizer)
    outcome = Outcome(
        weights=model.get_weights(),
        state=[variable.numpy() for variable in kept(sngm)],
        norms=recorder.norms,
        skipped_steps=int(sngm.skipped_steps),
        changed_by_bad_batches=recorder.changed,
    )
    return Result(outcome, shardings(model.trainable_variables), shardings(sngm.momentums))


def shardings(variables: Variables) -> list[tuple]:
    """Return the partition spec of each variable, empty if it is not sharded."""
    return [tuple(getattr(v.value.sharding, "spec", ())) for v in variables]


def stop(optimizer: type[keras.optimizers.Optimizer]) -> Stopped:
    """Train until a target is NaN and a logger stops; also train only up to the batch before."""
    before = model_with_statistics(optimizer)
    x, y = (array[: BATCH * (STEPS_BEFORE_STOP + 1)] for array in Option().data())
    good = BATCH * STEPS_BEFORE_STOP
    before.fit(x[:good], y[:good], batch_size=BATCH, shuffle=False, verbose=0)

    model = model_with_statistics(optimizer)
    y[-1] = np.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logger = GradientNormLogger(on_nonfinite="stop")
        model.fit(x, y, batch_size=BATCH, epochs=4, shuffle=False, verbose=0, callbacks=[logger])
    messages = [str(warning.message) for warning in caught]
    return Stopped(messages, model.get_weights(), before.get_weights())


def model_with_statistics(optimizer: type[keras.optimizers.Optimizer]) -> keras.Model:
    """Return a model whose non-trainable weights also change in every step."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(5, name="hidden"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1, name="head"),
        ]
    )
    model.compile(optimizer=optimizer(0.05, momentum=0.9), loss="mse")
    return model


def main(output: str) -> None:
    """Train in every place, and write all results to a pickle file."""
    results: dict[str, dict[str, Any]] = {}
    for how, place in PLACES.items():
        trained = results[how] = {}
        for name, option in {**OPTIONS, **FAULTS}.items():
            alone = option.model(SNGM)
            with place(alone.weights):
                trained[name] = fit(option, alone.get_weights())
        keras.utils.clear_session()  # Layers then have the same names in every place.
        for name in LOGGED:
            with place(CASES[name].model().weights):
                trained[f"{name}, logged"] = logged_training.train(
                    logged_training.Place(), CASES[name]
                )
        for name, optimizer in STOPPED.items():
            with place(model_with_statistics(optimizer).weights):
                trained[f"{name}, stopped"] = stop(optimizer)
    with open(output, "wb") as file:
        pickle.dump(results, file)
