"""Random problems shared by the tests, and ways to take steps on them."""

import keras
import numpy as np
import tensorflow as tf

from keras_sngm import SNGM
from reference import ReferenceSNGM

SHAPES = [(), (3,), (4, 5), (2, 3, 4), (2, 2, 3, 2)]
STEPS = 60


def random_arrays(shapes=SHAPES, seed=0, scale=1.0):
    generator = np.random.default_rng(seed)
    return [scale * generator.standard_normal(shape) for shape in shapes]


def random_gradients(shapes=SHAPES, steps=STEPS, seed=1, scale=1.0):
    """One list of arrays per step."""
    return [random_arrays(shapes, seed + 1000 * step, scale) for step in range(1, steps + 1)]


TWICE = SHAPES * 2
# Start values for which a relative error means something.
FAR_FROM_ZERO = [4.0 + array for array in random_arrays(TWICE)]


def variables_of(arrays, dtypes="float32"):
    dtypes = [dtypes] * len(arrays) if isinstance(dtypes, str) else dtypes
    return [
        keras.Variable(array, dtype=dtype, name=f"v{i}")
        for i, (array, dtype) in enumerate(zip(arrays, dtypes, strict=True))
    ]


def tensors_of(arrays, variables):
    return [tf.constant(a, v.dtype) for a, v in zip(arrays, variables, strict=True)]


def train(optimizer, variables, gradients_by_step, jit_compile=None):
    """Apply the gradients one step after another.

    Eagerly if `jit_compile` is `None`, else in a `tf.function` of that
    `jit_compile`.
    """
    optimizer.build(variables)

    def apply(gradients):
        optimizer.apply(gradients, variables)

    if jit_compile is not None:
        apply = tf.function(apply, jit_compile=jit_compile)
    for gradients in gradients_by_step:
        apply(tensors_of(gradients, variables))


def assert_close(variables, arrays, tolerance):
    """Compare by Euclidean norm, variable by variable."""
    for variable, array in zip(variables, arrays, strict=True):
        value = variable.numpy().astype("float64")
        error, size = np.linalg.norm(value - array), np.linalg.norm(array)
        assert error <= tolerance * size, f"{variable.name}: error {error:.2e} of {size:.2e}"


def assert_follows_the_reference(start, gradients, outer, jit_compile="auto", rate=0.1, **options):
    """SNGM takes the steps of the reference, and skips none."""
    variables = variables_of(start)
    optimizer = SNGM(rate, jit_compile=jit_compile, **options)
    reference = ReferenceSNGM(start, **options)
    train(optimizer, variables, gradients, outer)
    for gradient in gradients:
        reference.step(gradient, rate)
    assert_close(variables, reference.w, 1e-5)
    assert_close(optimizer.momentums, reference.u if optimizer.momentum else [], 1e-5)
    np.testing.assert_allclose(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-5)
    assert int(optimizer.skipped_steps) == 0


def values_of(variables):
    return [variable.numpy() for variable in variables]
