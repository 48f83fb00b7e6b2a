"""Tests with gradients that are constants of a compiled step, with which the compiler computes.

Such computations must not change a result. Gradients of variables that take no part in the loss are
zeros on JAX. Gradients of a linear loss are constants on every backend.
"""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM, GradientNormLogger
from problems import BACKEND, MODES, assert_close, modes, values_of, variables_of
from reference import ReferenceSNGM
from replica_options import OPTIONS, QUICK_OPTIONS, inner
from selection import quick_only, whole

SHAPES = [[(4, 3), (3,)], [(), (1,)]]
# Each pair has the magnitudes of the gradients of two variables.
MAGNITUDES = [(0.0, 0.0), (0.0, 1.0), (1e-37, 1e-37), (1e-30, 1.0), (1e30, 1e30), (1e37, 1e37)]
ARGUMENTS = {
    "plain": {},
    "blockwise": {"blockwise": True},
    "clipnorm": {"clipnorm": 1e20},
    "small clipnorm": {"clipnorm": 1e-3},
    "global_clipnorm": {"global_clipnorm": 1e-3},
    "decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}
NAMES = modes("function", "function-xla-step", "xla-function")
every_way = pytest.mark.parametrize("jit_compile, outer", [MODES[n] for n in NAMES], ids=NAMES)


def known_step(optimizer, variables, magnitudes, jit_compile):
    """Return a function that takes a step with gradients that are constants of the compiled code.

    Args:
        optimizer: an SNGM, which is built here.
        variables: the variables to update.
        magnitudes: the value of all elements of the gradient, for each variable.
        jit_compile: whether XLA compiles the function on TensorFlow; `None` for eager steps.
    """
    optimizer.build(variables)

    def apply():
        gradients = [
            keras.ops.full(v.shape, magnitude) for v, magnitude in zip(variables, magnitudes)
        ]
        optimizer.apply(gradients, variables)

    if jit_compile is None:
        return apply
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(apply, jit_compile=jit_compile)
    import jax

    from keras_sngm.backend.jax.state import assign, pure

    state = [*variables, *optimizer.variables]
    compiled = jax.jit(pure(apply, state))
    return lambda: assign(state, compiled([v.value for v in state]))


@every_way
@pytest.mark.parametrize("name", quick_only(ARGUMENTS, ["plain", "clipnorm"]))
@pytest.mark.parametrize("shapes", quick_only(SHAPES, SHAPES[:1]), ids=str)
def test_constants_are_normalized_as_other_gradients_are(shapes, name, jit_compile, outer):
    arguments = ARGUMENTS[name]
    for magnitudes in MAGNITUDES:
        start = [np.full(shape, 4.0) for shape in shapes]
        variables = variables_of(start)
        optimizer = SNGM(0.1, jit_compile=jit_compile, **arguments)
        reference = ReferenceSNGM(start, **arguments)
        step = known_step(optimizer, variables, magnitudes, outer)
        for _ in range(2):
            step()
            reference.step([np.full(s, m) for s, m in zip(shapes, magnitudes)], 0.1)
        message = str(magnitudes)
        assert int(optimizer.skipped_steps) == 0, message
        for value, expected in zip(values_of(variables), reference.w):
            np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=message)
        assert float(optimizer.gradient_norm) == pytest.approx(
            reference.gradient_norm, rel=1e-5, abs=1e-42
        ), message


class Unused(keras.layers.Layer):
    """Layer with a weight that takes no part in the loss."""

    def build(self, input_shape):
        self.unused = self.add_weight(shape=(3,), initializer="ones", name="unused")

    def call(self, inputs):
        return inputs


class Constant(keras.layers.Layer):
    """Layer whose output is zero and whose gradient is zero, whatever its input."""

    def call(self, inputs):
        return 0.0 * keras.ops.stop_gradient(inputs) + 0.0 * inputs


def trained(option, *layers):
    """Train the model of an option with further layers; return the model and its history.

    Args:
        option: an `Option` of the support table.
        *layers: the classes of the layers to add at the end of the model.
    """
    # On JAX a variable that is not used has a gradient of zeros, to which coupled decay is added.
    changed = option._replace(
        layers=lambda: [*option.layers(), *(layer() for layer in layers)],
        excluded=(*option.excluded, "unused") if layers == (Unused,) else option.excluded,
    )
    model = changed.model(SNGM)
    model.optimizer.build(model.trainable_variables)  # TensorFlow then traces once.
    logger = GradientNormLogger(per_variable=True, update_ratio=True, on_nonfinite="stop")
    callbacks = [logger, *(make() for make in option.callbacks)]
    history = model.fit(
        *option.data(), batch_size=24, epochs=2, shuffle=False, verbose=0, callbacks=callbacks
    )
    return model, history.history


every_option = pytest.mark.parametrize("name", quick_only(OPTIONS, QUICK_OPTIONS))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@every_option
def test_a_variable_that_is_not_used_changes_nothing(name):
    option = OPTIONS[name]
    plain, _ = trained(option)
    model, history = trained(option, Unused)
    assert int(inner(model.optimizer).skipped_steps) == 0
    assert np.isfinite(history["grad_norm"]).all()
    weights = [v for v in model.weights if v.name != "unused"]
    assert_close(weights, values_of(plain.weights), option.tolerance)


@every_option
def test_gradients_that_are_all_zero_skip_no_step(name):
    model, history = trained(OPTIONS[name], Constant)
    assert int(inner(model.optimizer).skipped_steps) == 0
    assert all(np.isfinite(w).all() for w in values_of(model.weights))
    coupled = (
        inner(model.optimizer).weight_decay and not inner(model.optimizer).decoupled_weight_decay
    )
    if not coupled:
        assert history["grad_norm"] == [0.0, 0.0]


@whole
@pytest.mark.parametrize("make", [keras.optimizers.SGD, keras.optimizers.Adam, SNGM])
@pytest.mark.parametrize("compile_options", [{}, {"jit_compile": True}][: 1 + (BACKEND != "torch")])
def test_a_logger_takes_zeros_for_no_fault(make, compile_options):
    """A logger that stops at gradients that are not finite does not stop at gradients of zeros."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1), Constant()])
    model.compile(make(), "mse", **compile_options)
    logger = GradientNormLogger(on_nonfinite="stop", update_ratio=True)
    x = np.ones((48, 6), "float32")
    history = model.fit(x, x[:, :1], 8, epochs=2, verbose=0, callbacks=[logger]).history
    assert history["grad_norm"] == [0.0, 0.0]
