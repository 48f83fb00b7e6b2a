"""A linear network with gradients and optimizers written in NumPy.

Tests use it to compute again, in float64, all values that a logger measures.
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
    """Return a Keras model of two linear layers, with small weights of which none is 0."""
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
    """Return the gradient of the mean squared error, one array per variable."""
    hidden_kernel, hidden_bias, head_kernel, head_bias = weights
    hidden = x @ hidden_kernel + hidden_bias
    error = 2.0 / len(x) * (hidden @ head_kernel + head_bias - y)
    back = error @ head_kernel.T
    return [x.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


class SNGM:
    """An SNGM in NumPy.

    Args:
        weights: the weights at first, a list of arrays.
        rate: the learning rate.
        options: keyword arguments of `ReferenceSNGM`.
    """

    def __init__(self, weights, rate, options):
        self.reference = ReferenceSNGM(weights, **options)
        self.rate = rate

    @property
    def momenta(self):
        """Return copies of the momentums, none if the momentum coefficient is 0."""
        return [u.copy() for u in self.reference.u] if self.reference.beta else []

    def step(self, weights, gradient):
        """Take a step; return the gradient after decay and clipping, and the new weights.

        If the gradient is not finite the step is skipped.
        """
        reference = self.reference
        reference.w = list(weights)
        reference.step(gradient, self.rate)
        if not np.isfinite(norm(gradient)):
            return gradient, weights
        return reference.g, reference.w


class SGD:
    """Keras' SGD in NumPy."""

    momenta = ()

    def __init__(self, weights, rate, options):
        self.rate = rate
        self.beta = options.get("momentum", 0.0)
        self.velocity = [0.0] * len(weights)

    def step(self, weights, gradient):
        """Take a step; return the gradient and the new weights."""
        self.velocity = [
            self.beta * v - self.rate * g for v, g in zip(self.velocity, gradient, strict=True)
        ]
        return gradient, [w + v for w, v in zip(weights, self.velocity, strict=True)]


class Adam:
    """Keras' Adam in NumPy."""

    momenta = ()

    def __init__(self, weights, rate, options):
        self.rate = rate
        self.first = [0.0] * len(weights)
        self.second = [0.0] * len(weights)
        self.steps = 0

    def step(self, weights, gradient):
        """Take a step; return the gradient and the new weights."""
        self.steps += 1
        self.first = [0.9 * m + 0.1 * g for m, g in zip(self.first, gradient)]
        self.second = [0.999 * v + 0.001 * g * g for v, g in zip(self.second, gradient)]
        alpha = self.rate * np.sqrt(1.0 - 0.999**self.steps) / (1.0 - 0.9**self.steps)
        return gradient, [
            w - alpha * m / (np.sqrt(v) + 1e-7)
            for w, m, v in zip(weights, self.first, self.second, strict=True)
        ]


class NoiseScale:
    """Moving averages of the numerator and the denominator of the gradient noise scale.

    Args:
        batch_size: the number of samples in a micro-batch.
    """

    def __init__(self, batch_size):
        self.batch_size = batch_size
        self.noise = self.signal = 0.0
        self.size = 0.0
        """Moving average of the sum of the two terms whose difference `signal` averages.
        Rounding errors of `signal` are in proportion to it."""

    def add(self, gradients):
        """Update the averages with the gradients of all micro-batches of an update.

        An update with a gradient that is not finite is ignored.
        """
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
        """Assert that a number is the noise scale; allow for rounding in differences of squares.

        Args:
            value: the number. It must be NaN if no update came yet, and may be infinite if the
                denominator is not positive.
            tolerance: the relative error that is allowed in each term.
        """
        error = tolerance * self.size
        if not self.size:
            assert np.isnan(value)
        elif np.isinf(value):
            assert self.signal <= error
        else:
            assert abs(value * self.signal - self.noise) <= error * (value + self.batch_size)


def _average(average, new):
    """Return a moving average after one more value."""
    return NOISE_MOMENTUM * average + (1.0 - NOISE_MOMENTUM) * new


class Update(NamedTuple):
    """Gradient, momentums and weights of one update: lists of arrays, one per variable.

    Attributes:
        gradient: the gradient.
        momenta: the momentums after the update, empty if there are none.
        before: the weights before the update.
        after: the weights after the update.
    """

    gradient: list
    momenta: list
    before: list
    after: list

    def scalars(self, members):
        """Return the values to log of some variables together, given their indices."""
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
    """Divide two numbers; return NaN if the denominator is 0."""
    return numerator / denominator if denominator else np.nan
