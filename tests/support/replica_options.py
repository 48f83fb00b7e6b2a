"""What the support table of the README is about: every option, as one small training job."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

BATCH, STEPS_PER_EPOCH, EPOCHS = 24, 4, 3
SAMPLES = BATCH * STEPS_PER_EPOCH
FEATURES, TOKENS = 6, 7
BAD_BATCH = 1
# The last sample of a batch lies on the last replica, however many there are.
BAD_SAMPLE = (BAD_BATCH + 1) * BATCH - 1


def has_bad_sample(batch: int) -> bool:
    """Whether the batch, counted from the epoch's begin, holds an option's bad sample."""
    return batch == BAD_BATCH


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Of a `LossScaleOptimizer` the one that it wraps."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def dense(**layer: Any) -> list[keras.layers.Layer]:
    return [
        keras.Input((FEATURES,)),
        keras.layers.Dense(5, activation="tanh", name="hidden", **layer),
        keras.layers.Dense(1, name="head", dtype="float32"),
    ]


def embedding() -> list[keras.layers.Layer]:
    return [
        keras.Input((FEATURES,), dtype="int32"),
        keras.layers.Embedding(TOKENS, 3, name="table"),
        keras.layers.Flatten(),
        keras.layers.Dense(1, name="head", dtype="float32"),
    ]


@keras.saving.register_keras_serializable(package="tests")
class HiddenLength(keras.layers.Layer):
    """Has TensorFlow forget how many steps a sequence has while it traces.

    As where `padded_batch` makes sequences, whose lengths differ from batch to batch.
    """

    def call(self, inputs):
        if keras.backend.backend() != "tensorflow":
            return inputs
        import tensorflow as tf

        return tf.gather(inputs, tf.range(tf.shape(inputs)[1]), axis=1)


def sequence() -> list[keras.layers.Layer]:
    """Layers whose gradients have shapes that TensorFlow knows in part."""
    return [
        keras.Input((FEATURES,), dtype="int32"),
        HiddenLength(),
        keras.layers.Embedding(TOKENS, 3, name="table"),
        keras.layers.Dense(4, activation="tanh", name="hidden"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(1, name="head", dtype="float32"),
    ]


def frozen() -> list[keras.layers.Layer]:
    return dense(trainable=False)


def constrained() -> list[keras.layers.Layer]:
    return dense(kernel_constraint=keras.constraints.MaxNorm(0.7))


def everything() -> list[keras.layers.Layer]:
    return [
        *embedding()[:-1],
        keras.layers.Dense(4, activation="tanh", name="frozen", trainable=False),
        keras.layers.Dense(
            4, activation="tanh", name="hidden", kernel_constraint=keras.constraints.UnitNorm()
        ),
        keras.layers.Dense(1, name="head", dtype="float32"),
    ]


class Option(NamedTuple):
    """One row of the support table.

    Attributes:
        arguments: of the optimizer.
        layers: of the model.
        policy: dtype policy of the model.
        loss_scale: whether a `LossScaleOptimizer` is wrapped around.
        excluded: names of variables that do not decay.
        callbacks: for `fit`, made anew for each run.
        compile: arguments of `model.compile`.
        bad: what the target of one sample is set to. It lies on one replica.
    """

    arguments: dict[str, Any] = {}  # noqa: RUF012
    layers: Callable[[], list[keras.layers.Layer]] = dense
    policy: str = "float32"
    loss_scale: bool = False
    excluded: tuple[str, ...] = ()
    callbacks: tuple[Callable[[], keras.callbacks.Callback], ...] = ()
    compile: dict[str, Any] = {}  # noqa: RUF012
    bad: float = 0.0

    @property
    def runs_in_replicas(self) -> bool:
        """Whether it can do without the cross-replica context, as XLA on GPUs must.

        Eager loops never can. A `LossScaleOptimizer` would let every replica
        decide for itself whether to take a step.
        """
        return "run_eagerly" not in self.compile and not self.loss_scale

    @property
    def tolerance(self) -> float:
        return 1e-2 if "16" in self.policy else 1e-5

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(0)
        x = generator.standard_normal((SAMPLES, FEATURES)).astype("float32")
        y = 2.0 + np.sin(x.sum(axis=1, keepdims=True))
        if self.layers in (embedding, everything, sequence):
            x = generator.integers(0, TOKENS, x.shape).astype("int32")
        if self.bad:
            y[BAD_SAMPLE] = self.bad
        return x, y

    def model(self, optimizer_class: type[keras.optimizers.Optimizer]) -> keras.Model:
        """A compiled model, the same at every call."""
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(self.policy)
        try:
            model = keras.Sequential(self.layers())
        finally:
            keras.config.set_dtype_policy("float32")
        optimizer = optimizer_class(**{"learning_rate": 0.05, "momentum": 0.9, **self.arguments})
        if self.excluded:
            optimizer.exclude_from_weight_decay(var_names=list(self.excluded))
        if self.loss_scale:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=256.0)
        model.compile(optimizer=optimizer, loss="mse", **self.compile)
        return model


class Outcome(NamedTuple):
    """What training with one option gave; `error` if it failed."""

    error: str = ""
    weights: list[np.ndarray] = []  # noqa: RUF012
    state: list[np.ndarray] = []  # noqa: RUF012
    norms: list[float] = []  # noqa: RUF012
    skipped_steps: int = 0
    changed_by_bad_batches: bool = False
    replicas: int = 1
    replicas_agree: bool = True
    reductions: int = 0
    sparse_reductions: int = 0


def cosine() -> keras.optimizers.schedules.LearningRateSchedule:
    return keras.optimizers.schedules.CosineDecay(0.1, EPOCHS * STEPS_PER_EPOCH)


def swap_weights() -> keras.callbacks.Callback:
    return keras.callbacks.SwapEMAWeights(swap_on_epoch=True)


AVERAGED = {"use_ema": True, "ema_momentum": 0.8}

OPTIONS = {
    "plain step": Option(),
    "`nesterov`": Option({"nesterov": True}),
    "`blockwise`": Option({"blockwise": True}),
    "learning rate schedule": Option({"learning_rate": cosine()}),
    "`weight_decay`, with exclusions": Option({"weight_decay": 0.5}, excluded=("bias",)),
    "coupled weight decay, with exclusions": Option(
        {"weight_decay": 0.5, "decoupled_weight_decay": False}, excluded=("bias",)
    ),
    "`clipnorm`": Option({"clipnorm": 0.02}),
    "`clipvalue`": Option({"clipvalue": 0.01}),
    "`global_clipnorm`": Option({"global_clipnorm": 0.02}),
    "`use_ema`": Option(AVERAGED),
    "`ema_overwrite_frequency`": Option({**AVERAGED, "ema_overwrite_frequency": 3}),
    "`SwapEMAWeights`": Option(AVERAGED, callbacks=(swap_weights,)),
    "`gradient_accumulation_steps`": Option({"gradient_accumulation_steps": 3}),
    "`gradient_accumulation_steps` with averages": Option(
        {**AVERAGED, "gradient_accumulation_steps": 2, "ema_overwrite_frequency": 2}
    ),
    "`noise_scale_batch_size` with `gradient_accumulation_steps`": Option(
        {"noise_scale_batch_size": BATCH, "gradient_accumulation_steps": 2}
    ),
    "`loss_scale_factor`": Option({"loss_scale_factor": 1024.0}),
    "`LossScaleOptimizer`": Option(loss_scale=True),
    "`mixed_float16`": Option(policy="mixed_float16", loss_scale=True),
    "`mixed_float16` with `loss_scale_factor`": Option(
        {"loss_scale_factor": 1024.0}, policy="mixed_float16", compile={"auto_scale_loss": False}
    ),
    "`mixed_bfloat16`": Option(policy="mixed_bfloat16"),
    "constraints": Option(layers=constrained),
    "constraints with `gradient_accumulation_steps`": Option(
        {"gradient_accumulation_steps": 2}, layers=constrained
    ),
    "embeddings (sparse gradients)": Option(layers=embedding),
    "embeddings with `gradient_accumulation_steps`": Option(
        {"gradient_accumulation_steps": 2}, layers=embedding
    ),
    "embeddings with `loss_scale_factor`": Option({"loss_scale_factor": 4.0}, layers=embedding),
    "embeddings with `clipnorm`": Option({"clipnorm": 0.02}, layers=embedding),
    "sequences of unknown length": Option(layers=sequence),
    "sequences of unknown length, all at once": Option(
        {
            **AVERAGED,
            "blockwise": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": False,
            "clipnorm": 0.02,
            "loss_scale_factor": 8.0,
            "gradient_accumulation_steps": 2,
            "noise_scale_batch_size": BATCH,
        },
        layers=sequence,
    ),
    "frozen layers": Option(layers=frozen),
    "`run_eagerly`": Option(compile={"run_eagerly": True}),
    "all at once, coupled decay": Option(
        {
            **AVERAGED,
            "learning_rate": cosine(),
            "nesterov": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": False,
            "clipnorm": 0.02,
            "ema_overwrite_frequency": 2,
            "loss_scale_factor": 8.0,
            "gradient_accumulation_steps": 2,
        },
        layers=everything,
        excluded=("bias",),
    ),
    "all at once, `mixed_float16`": Option(
        {
            **AVERAGED,
            "nesterov": True,
            "weight_decay": 0.1,
            "clipvalue": 0.02,
            "gradient_accumulation_steps": 2,
        },
        layers=constrained,
        policy="mixed_float16",
        loss_scale=True,
        excluded=("bias",),
        callbacks=(swap_weights,),
    ),
}

FAULTS = {
    "NaN on one replica": Option({**AVERAGED, "weight_decay": 0.1}, bad=np.nan),
    "inf on one replica": Option(
        {**AVERAGED, "ema_overwrite_frequency": 2, "clipvalue": 0.01},
        layers=constrained,
        bad=np.inf,
    ),
    "NaN on one replica, with `gradient_accumulation_steps`": Option(
        {**AVERAGED, "gradient_accumulation_steps": 2}, bad=np.nan
    ),
    "NaN on one replica, under `LossScaleOptimizer`": Option(
        {**AVERAGED, "weight_decay": 0.1}, loss_scale=True, bad=np.nan
    ),
}
