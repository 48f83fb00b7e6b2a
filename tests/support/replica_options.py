"""Options of the README's support table, each as one small training job."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

BATCH, STEPS_PER_EPOCH, EPOCHS = 24, 4, 3
SAMPLES = BATCH * STEPS_PER_EPOCH
FEATURES, TOKENS = 6, 7
BAD_BATCH = 1
# The last sample of a batch is on the last replica, whatever the number of replicas.
BAD_SAMPLE = (BAD_BATCH + 1) * BATCH - 1


def has_bad_sample(batch: int) -> bool:
    """Return whether a batch, counted from the start of its epoch, has the bad sample."""
    return batch == BAD_BATCH


def inner(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer within a `LossScaleOptimizer`; any other optimizer as it is."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def dense(**layer: Any) -> list[keras.layers.Layer]:
    """Return two dense layers; keyword arguments are for the first."""
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
    """A layer after which TensorFlow does not know the length of sequences while it traces.

    The same happens with `padded_batch`, whose sequences have another length in each batch.
    """

    def call(self, inputs):
        if keras.backend.backend() != "tensorflow":
            return inputs
        import tensorflow as tf

        return tf.gather(inputs, tf.range(tf.shape(inputs)[1]), axis=1)


def sequence() -> list[keras.layers.Layer]:
    """Return layers whose gradients have shapes that TensorFlow knows only in part."""
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
    """Return an embedding, a frozen layer, a constrained layer and an ordinary one."""
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
        arguments: keyword arguments of the optimizer.
        layers: a function that returns the layers of the model.
        policy: the dtype policy of the model.
        loss_scale: whether the optimizer is wrapped in a `LossScaleOptimizer`.
        excluded: names of variables that are excluded from weight decay.
        callbacks: functions that return the callbacks of `fit`, new ones for each run.
        compile: keyword arguments of `model.compile`.
        bad: the target of the bad sample, which is on one replica only; 0 for no such sample.
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
        """Return whether training can do without the cross-replica context, as XLA on GPUs must.

        Eager training cannot. A `LossScaleOptimizer` would let every replica decide by itself
        whether to take a step.
        """
        return "run_eagerly" not in self.compile and not self.loss_scale

    @property
    def tolerance(self) -> float:
        """Return the relative error that is allowed between two ways of training."""
        return 1e-2 if "16" in self.policy else 1e-5

    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the inputs and targets of an epoch."""
        generator = np.random.default_rng(0)
        x = generator.standard_normal((SAMPLES, FEATURES)).astype("float32")
        y = 2.0 + np.sin(x.sum(axis=1, keepdims=True))
        if self.layers in (embedding, everything, sequence):
            x = generator.integers(0, TOKENS, x.shape).astype("int32")
        if self.bad:
            y[BAD_SAMPLE] = self.bad
        return x, y

    def model(self, optimizer_class: type[keras.optimizers.Optimizer]) -> keras.Model:
        """Return a compiled model with the same weights at every call."""
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
    """The result of training with one option.

    Attributes:
        error: the type of the error if training failed, else "".
        weights: the weights at the end.
        state: the momentums and the moving averages at the end.
        norms: the gradient norm of each step.
        skipped_steps: the number of skipped steps.
        changed_by_bad_batches: whether a batch with a bad sample changed weights or state.
        replicas: the number of replicas.
        replicas_agree: whether weights and state are equal on all replicas.
        reductions: the number of reductions over replicas, if they were counted.
        sparse_reductions: the number of slices that were reduced, if they were counted.
    """

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


QUICK_OPTIONS = (
    "plain step",
    "`LossScaleOptimizer`",
    "embeddings with `gradient_accumulation_steps`",
    "all at once, coupled decay",
)
"""Names of options that the quick run trains with: together they have what most others have."""

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
