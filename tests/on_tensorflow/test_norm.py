"""Tests of sums of squares, which TensorFlow's kernels and XLA compute in different ways."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM
from keras_sngm.backend.common.recorded_apply import PLAIN_RULE
from keras_sngm.backend.tensorflow import norm as tensorflow_norm
from problems import (
    assert_close,
    assert_follows_the_reference,
    random_arrays,
    random_gradients,
    train,
    variables_of,
)
from reference import ReferenceSNGM
from selection import quick_only, whole

# XLA adds up tensors of at least 4,096 elements in 16 lanes, some of these with a remainder.
SIZES = [(), (1,), (4095,), (4096,), (4111,), (129, 33)]
RANGES = [("float32", 10.0**k) for k in (-35, -20, -15, 0, 15, 20, 35)]
RANGES += [("float64", 10.0**k) for k in (-300, -150, 0, 150, 300)]
LARGE = [(3,), (129, 33), (600, 600)]


@pytest.mark.parametrize("jit_compile", [True, False])
def test_lanes_add_up_to_the_whole(jit_compile):
    """Sums of squares that are added up in lanes are those of NumPy, and so are all others."""
    arrays = random_arrays(SIZES)
    tensors = [tf.constant(array, "float32") for array in arrays]
    expected = [np.sum(array**2) for array in arrays]
    lanes = tf.function(tensorflow_norm.sums_of_squares_in_lanes, jit_compile=jit_compile)
    np.testing.assert_allclose(lanes(tensors), expected, rtol=1e-6)
    np.testing.assert_allclose(
        tensorflow_norm.sums_of_squares(tensors, stacks=0), expected, rtol=1e-6
    )


@pytest.mark.parametrize("dtype, scale", quick_only(RANGES, [RANGES[0], RANGES[-1]]))
def test_squares_of_any_magnitude(monkeypatch, dtype, scale):
    """TensorFlow's kernels and XLA compute norms of gradients of any magnitude."""
    arrays = [scale * array for array in random_arrays(SIZES)]
    tensors = [tf.constant(array, dtype) for array in arrays]
    sizes = [array.size for array in arrays]
    monkeypatch.setattr(tensorflow_norm, "_LEAST_SIZE_IF_RARE", 4100)
    for in_xla in (False, True):
        sums = tensorflow_norm.sums_on(on_accelerator=False, in_xla=in_xla)
        measure = tf.function(
            functools.partial(tensorflow_norm.normalized_by, *sums, PLAIN_RULE, sizes=sizes),
            jit_compile=in_xla,
        )
        normalized = measure(tensors)
        expected = [scale * np.linalg.norm(array.ravel() / scale) for array in arrays]
        np.testing.assert_allclose(normalized.norms, expected, rtol=1e-6)
        total = float(normalized.divisor) / float(normalized.prescale)
        assert total == pytest.approx(scale * np.linalg.norm(np.array(expected) / scale), rel=1e-6)


@whole
@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_no_magnitude_hides_what_is_not_finite(size, scale, bad):
    vector = np.full(size, scale, "float32")
    vector[size - 7] = bad
    sums = tensorflow_norm.sums_on(on_accelerator=False, in_xla=True)
    normalized = tf.function(
        lambda vector: tensorflow_norm.normalized_by(*sums, PLAIN_RULE, [vector], [size]),
        jit_compile=True,
    )(vector)
    assert not normalized.is_finite
    assert not np.isfinite(normalized.norms)


def test_rows_of_a_stack_are_variables():
    """Each row of a stacked tensor has its own sum of squares."""
    arrays = random_arrays([(7,), (2, 3, 4)])
    stack = tf.constant(np.stack(random_arrays([(3, 2)] * 4)), "float32")
    tensors = [*(tf.constant(array, "float32") for array in arrays), stack]
    expected = [np.sum(array**2) for array in [*arrays, *stack.numpy()]]
    np.testing.assert_allclose(
        tensorflow_norm.sums_of_squares(tensors, stacks=1), expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    "jit_compile, outer",
    [("auto", None), ("auto", False), ("auto", True), (True, None)],
    ids=["eager", "function", "xla-function", "xla"],
)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.05, "decoupled_weight_decay": False}, {"clipvalue": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("scale", quick_only([1.0, 1e30, 1e-30], quick=[1.0]))
def test_large_variables_follow_the_reference(jit_compile, outer, options, scale):
    gradients = random_gradients(LARGE, 4, scale=scale)
    start = random_arrays(LARGE)
    assert_follows_the_reference(start, gradients, outer, jit_compile, rate=0.5, **options)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.05, "decoupled_weight_decay": False}], ids=str
)
def test_accumulated_gradients_are_taken_as_a_sum(options):
    """The norm of an update is that of the mean of its micro-batches' gradients."""
    start = random_arrays(LARGE)
    micro = random_gradients(LARGE, 9)
    variables = variables_of(start)
    optimizer = SNGM(0.5, gradient_accumulation_steps=3, clipnorm=50.0, **options)
    reference = ReferenceSNGM(start, clipnorm=50.0, **options)
    train(optimizer, variables, micro)
    for i in range(0, 9, 3):
        reference.step([np.mean(parts, axis=0) for parts in zip(*micro[i : i + 3])], 0.5)
    assert_close(variables, reference.w, 1e-5)
    np.testing.assert_allclose(optimizer.gradient_norm, reference.gradient_norm, rtol=1e-5)
