"""Training jobs in which a logger logs all values that it can log."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sngm import SNGM
from problems import BACKEND
from replica_options import FEATURES, TOKENS, sequence

BATCH, STEPS_PER_EPOCH, EPOCHS = 8, 6, 2
LOG_EVERY, HISTOGRAM_EVERY = 2, 3
RATE = 0.05


class Case(NamedTuple):
    """One training job.

    Attributes:
        make: a function that makes the optimizer.
        options: keyword arguments of `ReferenceSNGM`; `None` for other optimizers.
        micro_batches: the number of micro-batches in an accumulation cycle.
        sparse: whether the model has an embedding.
        sequence: whether the inputs are sequences of unknown length.
        compile: keyword arguments of `model.compile`.
        strategies: the strategies to train under, as the argument STRATEGY of
            `logged_training.py`.
        noise: whether SNGM measures the gradient noise scale, averaged with momentum 0.9.
    """

    make: Callable[[], keras.optimizers.Optimizer]
    options: dict[str, Any] | None = None
    micro_batches: int = 1
    sparse: bool = False
    sequence: bool = False
    compile: dict[str, Any] = {}  # noqa: RUF012
    strategies: tuple[str, ...] = ("0", "2")
    noise: bool = False

    def model(self) -> keras.Model:
        """Return the model, not compiled; its weights are the same at every call."""
        keras.utils.set_random_seed(0)
        if self.sequence:
            return keras.Sequential(sequence())
        first = [keras.layers.Dense(5, activation="tanh", name="hidden")]
        inputs = keras.Input((FEATURES,))
        if self.sparse:
            inputs = keras.Input((FEATURES,), dtype="int32")
            first = [keras.layers.Embedding(TOKENS, 3, name="table"), keras.layers.Flatten()]
        return keras.Sequential([inputs, *first, keras.layers.Dense(1, name="head")])

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of an epoch."""
        generator = np.random.default_rng(0)
        x = generator.standard_normal((BATCH * STEPS_PER_EPOCH, FEATURES)).astype("float32")
        y = 2.0 + np.sin(x.sum(axis=1, keepdims=True))
        if self.sparse or self.sequence:
            x = generator.integers(0, TOKENS, x.shape).astype("int32")
        return x, y


def sngm(**options: Any) -> Callable[[], keras.optimizers.Optimizer]:
    """Return a function that makes an SNGM with these options."""
    return lambda: SNGM(RATE, **options)


def sgd(**options: Any) -> Callable[[], keras.optimizers.Optimizer]:
    """Return a function that makes Keras' SGD with these options."""
    return lambda: keras.optimizers.SGD(RATE, momentum=0.9, **options)


# With these options SNGM changes the gradient before it measures and normalizes it.
CHANGED = {"weight_decay": 0.5, "decoupled_weight_decay": False, "clipvalue": 0.3, "nesterov": True}
NOISE = {"noise_scale_batch_size": BATCH, "noise_scale_momentum": 0.9}
WITHOUT_STRATEGY = ("0",)
ALL = ("0", "1", "2", "2-in-replicas")
# TensorFlow's strategies cannot be used on other backends.
STRATEGIES = ALL if BACKEND == "tensorflow" else WITHOUT_STRATEGY

CASES = {
    "SNGM": Case(sngm(), {}, strategies=ALL),
    "SNGM, eager": Case(sngm(), {}, compile={"run_eagerly": True}),
    "SNGM, XLA": Case(sngm(), {}, compile={"jit_compile": True}, strategies=WITHOUT_STRATEGY),
    "SNGM, update in XLA": Case(sngm(jit_compile=True), {}),
    "SNGM, no momentum": Case(sngm(momentum=0.0), {"momentum": 0.0}),
    "SNGM, gradient changed": Case(sngm(**CHANGED), CHANGED, strategies=ALL),
    "SNGM, gradient changed, XLA": Case(
        sngm(**CHANGED), CHANGED, compile={"jit_compile": True}, strategies=WITHOUT_STRATEGY
    ),
    "SNGM, decay": Case(sngm(weight_decay=0.5), {"weight_decay": 0.5}),
    "SNGM, clipped": Case(sngm(clipnorm=0.2), {"clipnorm": 0.2}),
    "SNGM, blockwise": Case(
        sngm(blockwise=True, **CHANGED), {"blockwise": True, **CHANGED}, strategies=ALL
    ),
    "SNGM, accumulated": Case(
        sngm(gradient_accumulation_steps=2), {}, micro_batches=2, strategies=ALL
    ),
    "SNGM, accumulated, eager": Case(
        sngm(gradient_accumulation_steps=2), {}, micro_batches=2, compile={"run_eagerly": True}
    ),
    "SNGM, accumulated, gradient changed": Case(
        sngm(gradient_accumulation_steps=2, **CHANGED), CHANGED, micro_batches=2
    ),
    "SNGM, embedding": Case(sngm(), {}, sparse=True),
    "SNGM, sequence": Case(sngm(), {}, sequence=True, strategies=ALL),
    "SNGM, sequence, XLA": Case(
        sngm(), {}, sequence=True, compile={"jit_compile": True}, strategies=WITHOUT_STRATEGY
    ),
    "SNGM, loss scaled": Case(sngm(loss_scale_factor=64.0), {}),
    "SNGM, LossScaleOptimizer": Case(
        lambda: keras.optimizers.LossScaleOptimizer(SNGM(RATE), initial_scale=64.0), {}
    ),
    "SNGM, noise scale": Case(sngm(**NOISE), {}, strategies=("2", "2-in-replicas"), noise=True),
    "SNGM, noise scale, clipped": Case(
        sngm(clipnorm=0.2, **NOISE), {"clipnorm": 0.2}, strategies=("2",), noise=True
    ),
    "SNGM, noise scale, gradient changed": Case(
        sngm(**NOISE, **CHANGED), CHANGED, strategies=("2",), noise=True
    ),
    "SNGM, noise scale, accumulated": Case(
        sngm(gradient_accumulation_steps=2, **NOISE),
        {},
        micro_batches=2,
        strategies=ALL,
        noise=True,
    ),
    "SNGM, noise scale, accumulated, gradient changed": Case(
        sngm(gradient_accumulation_steps=2, **NOISE, **CHANGED),
        CHANGED,
        micro_batches=2,
        noise=True,
    ),
    "SNGM, noise scale, embedding, accumulated": Case(
        sngm(gradient_accumulation_steps=2, **NOISE), {}, micro_batches=2, sparse=True, noise=True
    ),
    "SNGM, noise scale, LossScaleOptimizer": Case(
        lambda: keras.optimizers.LossScaleOptimizer(sngm(**NOISE)(), initial_scale=64.0),
        {},
        strategies=("2",),
        noise=True,
    ),
    "SNGM, noise scale, eager": Case(
        sngm(gradient_accumulation_steps=3, **NOISE),
        {},
        micro_batches=3,
        compile={"run_eagerly": True},
        noise=True,
    ),
    "SNGM, noise scale, XLA": Case(
        sngm(gradient_accumulation_steps=2, **NOISE),
        {},
        micro_batches=2,
        compile={"jit_compile": True},
        strategies=WITHOUT_STRATEGY,
        noise=True,
    ),
    "SGD": Case(sgd(), strategies=("0", "1", "2")),
    "SGD, eager": Case(sgd(), compile={"run_eagerly": True}),
    "SGD, XLA": Case(sgd(), compile={"jit_compile": True}, strategies=WITHOUT_STRATEGY),
    "SGD, accumulated": Case(
        sgd(gradient_accumulation_steps=2), micro_batches=2, strategies=WITHOUT_STRATEGY
    ),
    "SGD, accumulated, eager": Case(
        sgd(gradient_accumulation_steps=2),
        micro_batches=2,
        compile={"run_eagerly": True},
        strategies=WITHOUT_STRATEGY,
    ),
    "SGD, accumulated, embedding": Case(
        sgd(gradient_accumulation_steps=2),
        micro_batches=2,
        sparse=True,
        strategies=WITHOUT_STRATEGY,
    ),
    "SGD, embedding": Case(sgd(), sparse=True),
    "SGD, sequence": Case(sgd(), sequence=True),
    "SGD, sequence, accumulated": Case(
        sgd(gradient_accumulation_steps=2),
        micro_batches=2,
        sequence=True,
        strategies=WITHOUT_STRATEGY,
    ),
    "SGD, loss scaled": Case(sgd(loss_scale_factor=64.0)),
    "SGD, LossScaleOptimizer": Case(
        lambda: keras.optimizers.LossScaleOptimizer(sgd()(), initial_scale=64.0)
    ),
    "SGD, averaged": Case(sgd(use_ema=True, ema_momentum=0.9, clipnorm=0.1)),
    "Adam": Case(lambda: keras.optimizers.Adam(RATE)),
}
# On PyTorch `jit_compile` stands for `torch.compile`, not for XLA.
if BACKEND == "torch":
    CASES = {name: case for name, case in CASES.items() if "jit_compile" not in case.compile}


class Logged(NamedTuple):
    """The output of a logger in one job, with the weights and momentums after each batch.

    Attributes:
        weights: the weights before the first batch and after each batch.
        momenta: the momentums after each batch; empty lists if there are none.
        lines: the rows of the JSON lines file.
        scalars: the scalars in TensorBoard, by step and name.
        histograms: the histograms in TensorBoard, by step and name.
        history: the history of `fit`.
        paths: the paths of the variables.
    """

    weights: list[list[np.ndarray]]
    momenta: list[list[np.ndarray]]
    lines: list[dict[str, float]]
    scalars: dict[int, dict[str, float]]
    histograms: dict[int, dict[str, np.ndarray]]
    history: dict[str, list[float]]
    paths: list[str]
