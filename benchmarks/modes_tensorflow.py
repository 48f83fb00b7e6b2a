"""Modes, the ways in which a program may take a step, on TensorFlow.

Benchmarks use it through `modes.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from contestants import KERAS, MICRO_BATCHES, Step, accumulating_optimizer, weights
from fitting import fit_sampler
from gradients_tensorflow import Gradients
from keras_sngm import SNGM
from shapes import Shape
from timing import Sampler, timed_sampler

STEPS_OF_A_FIT = 5

SNGM_COMPILATIONS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    f"SNGM, jit_compile={jit_compile}": partial(SNGM, 0.01, jit_compile=jit_compile)
    for jit_compile in (True, False)
}
OPTIMIZERS_WITH_COSTS = ("SNGM", *SNGM_COMPILATIONS, "SGD")


def momentum_kernel(gradients: Gradients) -> Step:
    """Return a step by TensorFlow's kernel for momentum SGD, without a norm and without Keras."""
    weights = [tf.Variable(tf.ones(shape)) for shape in gradients.shapes]
    momentums = [tf.Variable(tf.zeros(shape)) for shape in gradients.shapes]

    @tf.function(autograph=False)
    def step() -> None:
        for w, u, g in zip(weights, momentums, gradients.tensors(), strict=True):
            tf.raw_ops.ResourceApplyMomentum(
                var=w.handle, accum=u.handle, lr=0.01, grad=g, momentum=0.9
            )

    return step


CONTESTANTS: dict[str, tuple[str, ...]] = {
    "eager": ("SNGM", "SGD", "SGD, clipped", "Adam", "PyTorch"),
    "function": (*KERAS, "momentum kernel", "PyTorch", "Optax"),
    "fit": ("SNGM", "SGD", "SGD, clipped", "Adam"),
    "mirrored": ("SNGM", "SGD", "SGD, clipped", "Adam"),
    "accumulate": ("SNGM", "SGD"),
}


def accelerator() -> str | None:
    """Return the name of the first GPU, which steps run on, or `None` for CPUs."""
    for gpu in tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_device_details(gpu)["device_name"]
    return None


def gradients(mode: str, shapes: Sequence[Shape]) -> Gradients:
    """Return random gradients; for mode `mirrored`, split the CPU into two devices before."""
    if mode == "mirrored":
        _split_cpu()
    return Gradients(shapes)


def sampler(mode: str, name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of the time that a contestant takes for a step in a mode."""
    if name == "momentum kernel":
        return timed_sampler(momentum_kernel(gradients))
    return _KERAS[mode](name, gradients)


def function_step(name: str, gradients: Gradients) -> Step:
    """Return a step of a Keras optimizer in a `tf.function`."""
    return _in_graph((KERAS | SNGM_COMPILATIONS)[name](), gradients)


def _in_graph(optimizer: keras.optimizers.Optimizer, gradients: Gradients) -> Step:
    """Return a step that runs the optimizer's `apply` in a `tf.function`."""
    variables = weights(gradients.shapes)
    optimizer.build(variables)

    def step() -> None:
        optimizer.apply(gradients.tensors(), variables)

    return _as_tf_function(step)


def _as_tf_function(step: Step) -> Step:
    """Return a step as a `tf.function`."""
    # TensorFlow warns of many traces of one Python function; each partial is a new object.
    return tf.function(partial(step), autograph=False)


def _eager(name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of steps by `optimizer.apply` outside of a `tf.function`."""
    variables = weights(gradients.shapes)
    tensors = gradients.tensors()
    optimizer = KERAS[name]()
    optimizer.build(variables)
    return timed_sampler(lambda: optimizer.apply(tensors, variables))


def _function(name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of steps in a `tf.function`."""
    return timed_sampler(function_step(name, gradients))


def _accumulate(name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of whole accumulation cycles, in seconds per micro-batch."""
    step = _in_graph(accumulating_optimizer(name), gradients)

    def update() -> None:
        for _ in range(MICRO_BATCHES):
            step()

    return timed_sampler(update, steps=MICRO_BATCHES)


def _mirrored(name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of steps on two replicas of a `MirroredStrategy`."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        variables = weights(gradients.shapes)
        optimizer = KERAS[name]()
        optimizer.build(variables)

    def replica_step() -> None:
        # Replicas that compute gradients do not share tensors, so each gets copies.
        optimizer.apply([tf.identity(g) for g in gradients.tensors()], variables)

    return timed_sampler(_as_tf_function(lambda: strategy.run(replica_step)))


def _split_cpu() -> None:
    """Split the CPU into two logical devices; TensorFlow must not have used the CPU yet."""
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
    )


class _OptimizerAlone(keras.Model):
    """A model whose training step has neither a forward nor a backward pass."""

    def __init__(self, gradients: Gradients) -> None:
        super().__init__()
        for shape in gradients.shapes:
            self.add_weight(shape=shape, initializer="ones")
        self.gradients = gradients
        self.built = True

    def train_step(self, data: Any) -> dict[str, tf.Tensor]:
        self.optimizer.apply(self.gradients.tensors(), self.trainable_variables)
        return {"loss": tf.constant(0.0)}


def _fit(name: str, gradients: Gradients) -> Sampler:
    """Return a sampler of training steps of `fit(jit_compile=True)` that only run the optimizer."""
    model = _OptimizerAlone(gradients)
    model.compile(optimizer=KERAS[name](), jit_compile=True)
    return fit_sampler(model, tf.constant([0.0]), STEPS_OF_A_FIT)


_KERAS: dict[str, Callable[[str, Gradients], Sampler]] = {
    "eager": _eager,
    "function": _function,
    "fit": _fit,
    "mirrored": _mirrored,
    "accumulate": _accumulate,
}
