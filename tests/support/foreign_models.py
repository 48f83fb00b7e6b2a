"""Models of all kinds that users of Keras write, for tests that a logger does not change them.

Each model is made by a function of an optimizer, which returns it compiled. The inputs are `X` or
`TOKENS`, the targets are `Y`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from autodiff import CustomModel
from keras_sngm import SNGM
from problems import BACKEND
from replica_options import sequence

FEATURES = 6
X = np.random.default_rng(0).standard_normal((48, FEATURES)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))
TOKENS = np.random.default_rng(0).integers(0, 7, X.shape).astype("int32")

Optimizer = keras.optimizers.Optimizer


def layers() -> list[keras.layers.Layer]:
    return [
        keras.layers.Dense(5, activation="tanh", name="hidden"),
        keras.layers.BatchNormalization(name="normalized"),
        keras.layers.Dense(1, name="head"),
    ]


def sequential_without_input(optimizer: Optimizer) -> keras.Model:
    return compiled(keras.Sequential(layers()), optimizer)


def sequential(optimizer: Optimizer) -> keras.Model:
    return compiled(keras.Sequential([keras.Input((FEATURES,)), *layers()]), optimizer)


def functional(optimizer: Optimizer) -> keras.Model:
    inputs = keras.Input((FEATURES,))
    x = inputs
    for layer in layers():
        x = layer(x)
    return compiled(keras.Model(inputs, x), optimizer)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.normalized, self.head = layers()

    def call(self, inputs: Any, training: bool = False) -> Any:
        return self.head(self.normalized(self.hidden(inputs), training=training))


def subclassed(optimizer: Optimizer) -> keras.Model:
    return compiled(Subclassed(), optimizer)


def with_a_training_step_of_its_own(optimizer: Optimizer) -> keras.Model:
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    return compiled(CustomModel(inputs, keras.layers.Dense(1, name="head")(x)), optimizer)


def of_unknown_length(optimizer: Optimizer) -> keras.Model:
    """Return a model of sequences whose length TensorFlow does not know while it traces."""
    return compiled(keras.Sequential(sequence()), optimizer)


def with_an_unused_layer(optimizer: Optimizer) -> keras.Model:
    inputs = keras.Input((FEATURES,))
    x = keras.layers.Dense(5, activation="tanh", name="hidden")(inputs)
    unused = keras.layers.Dense(3, name="unused")(x)
    model = keras.Model(inputs, [keras.layers.Dense(1, name="head")(x), unused])
    model.compile(optimizer, loss=["mse", None])
    return model


class GAN(keras.Model):
    """A model of two networks with one optimizer each; `model.optimizer` is that of the generator.

    `model.other` is the optimizer of the discriminator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.layers.Dense(FEATURES, name="generator")])
        self.discriminator = keras.Sequential([keras.layers.Dense(1, name="discriminator")])

    def compile(self, optimizer: Optimizer, other: Optimizer, **kwargs: Any) -> None:
        super().compile(optimizer, **kwargs)
        self.other = other

    def call(self, inputs: Any) -> Any:
        return self.discriminator(self.generator(inputs))

    def train_step(self, data: Any) -> dict[str, Any]:
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            fooled = keras.ops.mean((self(x) - y) ** 2)
        weights = self.generator.trainable_variables
        self.optimizer.apply(tape.gradient(fooled, weights), weights)
        with tf.GradientTape() as tape:
            caught = keras.ops.mean((self(x) + y) ** 2)
        weights = self.discriminator.trainable_variables
        self.other.apply(tape.gradient(caught, weights), weights)
        return {"loss": fooled, "caught": caught}


def gan(optimizer: Optimizer) -> keras.Model:
    model = GAN()
    model.compile(optimizer, keras.optimizers.SGD(0.1), loss="mse")
    return model


def build_optimizers(gan: GAN) -> None:
    """Build both optimizers of a GAN, as its training step would."""
    gan(X[:1])
    gan.optimizer.build(gan.generator.trainable_variables)
    gan.other.build(gan.discriminator.trainable_variables)


def compiled(model: keras.Model, optimizer: Optimizer) -> keras.Model:
    model.compile(optimizer, loss="mse")
    return model


class Foreign(NamedTuple):
    """A model to test: the function that makes it for an optimizer, and its inputs."""

    make: Callable[[Optimizer], keras.Model]
    x: np.ndarray = X


MODELS = {
    "Sequential": Foreign(sequential),
    "Sequential without Input": Foreign(sequential_without_input),
    "functional": Foreign(functional),
    "subclassed": Foreign(subclassed),
    "custom train_step": Foreign(with_a_training_step_of_its_own),
    "unused layer": Foreign(with_an_unused_layer),
    "sequences of unknown length": Foreign(of_unknown_length, TOKENS),
}
# The training step of the GAN is written for TensorFlow, where a step may use any optimizers.
if BACKEND == "tensorflow":
    MODELS["GAN"] = Foreign(gan)


def multi() -> Optimizer:
    """Return a `MultiOptimizer`: SNGM for the layer `head`, SGD for all other variables."""
    first = SNGM(0.05, use_ema=True)
    second = keras.optimizers.SGD(0.05, momentum=0.9)
    return keras.optimizers.MultiOptimizer(lambda v: first if "head" in v.path else second)


OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {
    "SNGM": lambda: SNGM(0.05),
    "SNGM, averaged and accumulated": lambda: SNGM(
        0.05, use_ema=True, ema_overwrite_frequency=1, gradient_accumulation_steps=2
    ),
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "Adam, loss scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05)),
}
# On JAX, Keras' own optimizers fail once moving averages have overwritten the weights.
if BACKEND != "jax":
    OPTIMIZERS["SGD, averaged"] = lambda: keras.optimizers.SGD(
        0.05, use_ema=True, ema_overwrite_frequency=1
    )
if hasattr(keras.optimizers, "MultiOptimizer"):  # Keras 3.10 does not have it.
    OPTIMIZERS["MultiOptimizer"] = multi
