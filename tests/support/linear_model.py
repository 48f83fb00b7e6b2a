"""A linear network whose gradients are written out in NumPy, and how optimizers train it.

A second computation, in float64, of all that a logger measures.
"""

import copy
from typing import NamedTuple

import keras
import numpy as np

from reference import ReferenceSNGM, norm

FEATURES, UNITS = 3, 2
PATHS = ["net/hidden/kernel", "net/hidden/bias", "net/head/kernel", "net/head/bias"]
NOISE_MOMENTUM = 0.9


def keras_model():
    """The network of `gradients_of`, with small weights of which none is 0."""
    model = keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(UNITS, name="hidden"),
            keras.layers.Dense(1, name="head"),
        ],
        name="net",
    )
    generator = np.random.default_rng(0)
    model.set_weights([generator.uniform(0.5, 1.0, v.shape) for v in model.trainable_variables])
    return model


def gradients_of(weights, x, y):
    """The gradient of the mean squared error, one array per variable."""
    hidden_kernel, hidden_bias, head_kernel, head_bias = weights
    hidden = x @ hidden_kernel + hidden_bias
    error = 2.0 / len(x) * (hidden @ head_kernel + head_bias - y)
    back = error @ head_kernel.T
    return [x.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


class SNGM:
    """Takes steps of SNGM, whose options are those of the reference."""

    def __init__(self, weights, rate, options):
        self.reference = ReferenceSNGM(weights, **options)
        self.rate = rate

    @property
    def momenta(self):
        return [u.copy() for u in self.reference.u] if self.reference.beta else []

    def step(self, weights, gradient):
        """Return the gradient as it was normalized, and the new weights."""
        reference = self.reference
        reference.w = list(weights)
        reference.step(gradient, self.rate)
        if not np.isfinite(norm(gradient)):
            return gradient, weights
        return reference.g, reference.w


class SGD:
    """Takes steps of Keras' SGD."""

    momenta = ()

    def __init__(self, weights, rate, options):
        self.rate = rate
        self.beta = options.get("momentum", 0.0)
        self.velocity = [0.0] * len(weights)

    def step(self, weights, gradient):
        """Return the gradient, and the new weights."""
        self.velocity = [
            self.beta * v - self.rate * g for v, g in zip(self.velocity, gradient, strict=True)
        ]
        return gradient, [w + v for w, v in zip(weights, self.velocity, strict=True)]


class Adam:
    """Takes steps of Keras' Adam."""

    momenta = ()

    def __init__(self, weights, rate, options):
        self.rate = rate
        self.first = [0.0] * len(weights)
        self.second = [0.0] * len(weights)
        self.steps = 0

    def step(self, weights, gradient):
        """Return the gradient, and the new weights."""
        self.steps += 1
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, gradient)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, gradient)]
        alpha = self.rate * np.sqrt(1.0 - 0.999**self.steps) / (1.0 - 0.9**self.steps)
        return gradient, [
            w - alpha * m / (np.sqrt(v) + 1e-7)
            for w, m, v in zip(weights, self.first, self.second, strict=True)
        ]


class NoiseScale:
    """Averages over updates of what the gradient noise scale is the quotient of."""

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.noise = self.signal = 0.0
        self.size = 0.0
        """Of the terms that `signal` is a difference of."""

    def add(self, gradients):
        """Take in the gradients of the micro-batches of an update."""
        small = np.mean([norm(g) ** 2 for g in gradients])
        large = norm([np.mean(of, axis=0) for of in zip(*gradients)]) ** 2
        if not np.isfinite(small):
            return
        each, whole = self.batch_size, self.batch_size * len(gradients)
        self.noise = _average(self.noise, (small - large) / (1 / each - 1 / whole))
        self.signal = _average(self.signal, (whole * large - each * small) / (whole - each))
        self.size = _average(self.size, (whole * large + each * small) / (whole - each))

    def copy(self):
        return copy.copy(self)

    def assert_is(self, value, tolerance):
        """Assert that a number is the quotient, allowing for what cancels in its parts."""
        error = tolerance * self.size
        if not self.size:
            assert np.isnan(value)
        elif np.isinf(value):
            assert self.signal <= error
        else:
            assert abs(value * self.signal - self.noise) <= error * (value + self.batch_size)


def _average(average, new):
    return NOISE_MOMENTUM * average + (1.0 - NOISE_MOMENTUM) * new


class Update(NamedTuple):
    """What an update was made of: lists of arrays, one per variable."""

    gradient: list
    momenta: list
    before: list
    after: list

    def scalars(self, members):
        """What is logged of the variables at these positions."""
        gradient, momenta, before, after = ([of[i] for i in members if of] for of in self)
        change = [new - old for new, old in zip(after, before)]
        values = {
            "grad_norm": norm(gradient),
            "update_ratio": _quotient(norm(change), norm(before)),
            "update_norm": norm(change),
            "weight_norm": norm(before),
        }
        if momenta:
            along = sum(np.sum(u * g) for u, g in zip(momenta, gradient))
            values["momentum_norm"] = norm(momenta)
            values["momentum_cosine"] = _quotient(along, norm(momenta) * norm(gradient))
        return values


def _quotient(numerator, denominator):
    return numerator / denominator if denominator else np.nan
