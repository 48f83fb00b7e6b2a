"""Tests with gradients whose parts differ far in magnitude, or lie at the limits of a dtype."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM, GradientNormLogger
from problems import BACKEND, MODES, assert_close, modes, stepping, variables_of
from reference import ReferenceSNGM, norm
from selection import quick_only, whole

NAMES = modes("eager", "eager-xla", "function", "xla-function")
mode = pytest.mark.parametrize(
    "jit_compile, outer",
    quick_only([MODES[name] for name in NAMES], [MODES[name] for name in NAMES[:1]]),
    ids=NAMES,
)
DECAY = {"weight_decay": 0.1, "decoupled_weight_decay": False}


def steps_beside_the_reference(rows, outer, jit_compile, dtypes="float32", rate=0.1, **options):
    """Take steps with SNGM and with the reference, compare them, and return the SNGM.

    Args:
        rows: the gradients of each step.
        outer: the `jit_compile` of the function around a step; `None` for eager steps.
        jit_compile: the `jit_compile` of SNGM.
        dtypes: the dtype of all variables, or of each.
        rate: the learning rate.
        **options: keyword arguments of both optimizers.
    """
    start = [np.full(np.shape(gradient), 2.0) for gradient in rows[0]]
    variables = variables_of(start, dtypes)
    optimizer = SNGM(rate, jit_compile=jit_compile, **options)
    reference = ReferenceSNGM(start, **options)
    step = stepping(optimizer, variables, outer)
    for gradients in rows:
        before = [v.numpy().astype("float64") for v in variables]
        step(gradients)
        reference.step(gradients, rate)
        moved = [v.numpy() - old for v, old in zip(variables, before)]
        if not optimizer.weight_decay:
            assert norm(moved) <= rate / (1 - optimizer.momentum) * (1 + 1e-5)
        assert_close(variables, reference.w, 1e-5)
        for momentum, u in zip(optimizer.momentums, reference.u):
            np.testing.assert_allclose(momentum, u, rtol=1e-5, atol=1e-37)
        with np.errstate(over="ignore"):
            norms = np.array([norm([g]) for g in reference.g], "float32")
            np.testing.assert_allclose(optimizer.gradient_norms, norms, rtol=1e-5)
            whole = np.float32(reference.gradient_norm)
        np.testing.assert_allclose(optimizer.gradient_norm, whole, rtol=1e-5)
    assert int(optimizer.skipped_steps) == 0
    return optimizer


@whole
@mode
@pytest.mark.parametrize("options", [{"clipnorm": 1.0}, {"clipnorm": 1.0, **DECAY}, {}, DECAY])
@pytest.mark.parametrize(
    "magnitudes",
    [(1e20, 1e5), (1e20, 1e-5), (1e30, 1e-30), (1.0, 1e-30), (3e38, 0.0), (1e-25, 1e-36)],
)
def test_an_exploding_layer_leaves_the_others_alone(jit_compile, outer, options, magnitudes):
    a, b = (magnitude * np.array([0.6, 0.8]) for magnitude in magnitudes)
    steps_beside_the_reference([[a, b]] * 2, outer, jit_compile, **options)


@mode
@pytest.mark.parametrize("clipnorm", [1e-37, 1e-25, 1e25, 1e37, 1e300])
def test_limits_of_any_magnitude_clip(jit_compile, outer, clipnorm):
    rows = [[m * np.ones((3, 2)), np.ones(4)] for m in (1e-36, 1.0, 1e36)]
    steps_beside_the_reference(rows, outer, jit_compile, clipnorm=clipnorm)


@mode
@pytest.mark.parametrize("options", [{}, {"blockwise": True}, {"clipnorm": 1e20}, DECAY])
def test_norms_above_the_largest_float32_are_divided_by(jit_compile, outer, options):
    """A step whose gradient is finite is taken, even if its norm is infinite in float32."""
    rows = [[np.full((3, 2), 3e38), np.full(4, m)] for m in (3e38, 1.0)]
    optimizer = steps_beside_the_reference(rows, outer, jit_compile, **options)
    if "clipnorm" not in options:
        assert np.isposinf(optimizer.gradient_norm)
        assert list(np.isposinf(optimizer.gradient_norms)) == [True, False]


@pytest.mark.parametrize("make", [SNGM, keras.optimizers.SGD])
def test_a_logger_takes_a_large_norm_for_no_fault(make):
    """A logger does not stop at a finite gradient whose norm is infinite in float32."""

    class Steep(keras.layers.Layer):
        def build(self, input_shape):
            self.w = self.add_weight(shape=(4,), initializer="ones")

        def call(self, inputs):
            return 2e38 * self.w + 0.0 * inputs

    model = keras.Sequential([keras.Input((4,)), Steep()])
    model.compile(make(1e-39), lambda y, prediction: keras.ops.sum(prediction - 2e38, axis=-1))
    logger = GradientNormLogger(on_nonfinite="stop")
    x = np.ones((8, 4), "float32")
    history = model.fit(x, x, 1, epochs=2, verbose=0, callbacks=[logger]).history
    assert np.isposinf(history["grad_norm"]).all()
    assert int(model.optimizer.iterations) == 16


@mode
def test_micro_batches_that_a_float32_cannot_add_up(jit_compile, outer):
    """A step is right even if the sum of its micro-batches is above the largest float32."""
    variables = variables_of([np.ones(2), np.ones(3)])
    optimizer = SNGM(0.1, gradient_accumulation_steps=2, jit_compile=jit_compile)
    step = stepping(optimizer, variables, outer)
    for _ in range(2):
        step([np.full(2, 2e38), np.zeros(3)])
    np.testing.assert_allclose(variables[0], 1.0 - 0.1 * np.full(2, 0.5**0.5), rtol=1e-6)
    assert int(optimizer.skipped_steps) == 0


@mode
@pytest.mark.parametrize("options", [{}, {"use_ema": True}, {"use_ema": True, "blockwise": True}])
def test_all_variables_of_a_dtype_may_be_without_a_gradient(jit_compile, outer, options):
    variables = variables_of([np.ones(2), np.ones(2)], ["float16", "float32"])
    optimizer = SNGM(0.1, jit_compile=jit_compile, **options)
    optimizer.build(variables)
    optimizer.apply([None, keras.ops.convert_to_tensor(np.array([3.0, 4.0], "float32"))])
    np.testing.assert_allclose(variables[1], [0.94, 0.92], rtol=1e-6)
    np.testing.assert_array_equal(variables[0], [1.0, 1.0])


@pytest.mark.parametrize("which", [(0, 1), (1, 0)])
@pytest.mark.parametrize("options", [{}, {"nesterov": True, "weight_decay": 0.1}])
def test_a_weight_may_be_a_gradient(which, options):
    """A gradient may be the tensor of a weight, as it is for the loss norm(w)^2 / 2."""
    start = [np.array([3.0, 4.0]), np.array([1.0, -2.0])]
    variables = variables_of(start)
    optimizer = SNGM(0.1, **options)
    optimizer.build(variables)
    reference = ReferenceSNGM(start, **options)
    for _ in range(3):
        reference.step([reference.w[i] for i in which], 0.1)
        optimizer.apply([keras.ops.convert_to_tensor(variables[i]) for i in which])
    assert_close(variables, reference.w, 1e-6)


@pytest.mark.parametrize("magnitude, known", [(5e-25, False), (0.0, False), (1.0, True)])
def test_equal_gradients_have_no_noise(magnitude, known):
    variables = variables_of([np.ones(2)])
    optimizer = SNGM(0.1, gradient_accumulation_steps=2, noise_scale_batch_size=8)
    optimizer.build(variables)
    for _ in range(4):
        optimizer.apply([keras.ops.full((2,), magnitude)])
    assert float(optimizer.gradient_noise_scale) == pytest.approx(0.0, abs=1e-5)
    assert bool(np.asarray(optimizer.noise_moments)[2]) == known


@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_gradient_in_one_micro_batch_counts_if_it_is_zero_or_not(first):
    """A variable with a gradient in one micro-batch is updated, even if this gradient is zero.

    With a gradient of zero the momentum alone moves the variable.
    """
    variables = variables_of([np.ones(2), np.ones(2)])
    optimizer = SNGM(0.1, gradient_accumulation_steps=2)
    optimizer.build(variables)
    optimizer.momentums[0].assign([1.0, 0.0])
    one = keras.ops.ones((2,))
    optimizer.apply([first * one, one])
    optimizer.apply([None, one])
    moved = 0.1 * (0.9 + 0.5 * first / np.sqrt(0.5 + 2.0) * (first > 0)) if first else 0.09
    assert float(variables[0][0]) == pytest.approx(1.0 - moved, rel=1e-5)


def test_loading_in_a_cycle_goes_on_with_what_has_accumulated_there():
    """An optimizer that loads a state within an accumulation cycle continues the loaded cycle.

    The cycle that is replaced may have had as many micro-batches.
    """
    optimizers = []
    for gradients in ([None, 1.0], [1.0, None]):
        variables = variables_of([np.ones(2), np.ones(2)])
        optimizer = SNGM(0.1, gradient_accumulation_steps=2)
        optimizer.build(variables)
        optimizer.apply([g if g is None else keras.ops.ones((2,)) for g in gradients])
        optimizers.append(optimizer)
    store = {}
    optimizers[1].save_own_variables(store)
    optimizers[0].load_own_variables(store)
    first, second = optimizers[0]._trainable_variables
    optimizers[0].apply([None, keras.ops.ones((2,))])
    np.testing.assert_allclose(first, np.full(2, 0.95), rtol=1e-6)
    np.testing.assert_allclose(second, np.full(2, 0.95), rtol=1e-6)


def test_a_variable_is_given_once():
    """Two gradients for one variable in one call are refused."""
    variable = variables_of([np.ones(2)])[0]
    gradient = keras.ops.ones((2,))
    with pytest.raises(ValueError, match="several for 'v0'"):
        SNGM().apply([gradient, gradient], [variable, variable])


def sparse_16_bit(values, rows, shape):
    """Return a sparse float16 gradient of the backend, whose `values` belong to the given rows."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.IndexedSlices(tf.constant(values, "float16"), tf.constant(rows))
    if BACKEND == "jax":
        import jax.numpy as jnp
        from jax.experimental.sparse import BCOO

        return BCOO((jnp.asarray(values, "float16"), jnp.asarray(rows)[:, None]), shape=shape)
    import torch

    values = torch.tensor(values, dtype=torch.float16)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


def test_rows_are_not_added_up_in_16_bits():
    """Duplicate rows of a sparse float16 gradient are added up in float32.

    On TensorFlow the slices do not know their dense shape.
    """
    table = variables_of([np.ones((3, 2))], "float16")[0]
    optimizer = SNGM(0.5)
    optimizer.build([table])
    optimizer.apply([sparse_16_bit(np.full((3, 2), 6e4), [1, 1, 1], (3, 2))])
    assert int(optimizer.skipped_steps) == 0
    np.testing.assert_allclose(table.numpy()[1], 1.0 - np.full(2, 0.5**1.5), rtol=1e-3)
