"""Tests in modes in which a backend raises an error for every NaN and every infinity.

Neither SNGM nor the logger produces one, not even while the noise scale is unknown.
"""

import contextlib

import keras
import numpy as np
import pytest

from foreign_models import X, Y, functional
from keras_sngm import SNGM, GradientNormLogger
from problems import BACKEND
from selection import whole

NOISE = {"noise_scale_batch_size": 8, "gradient_accumulation_steps": 2}
OPTIMIZERS = {
    "SNGM": SNGM,
    "noise scale": lambda: SNGM(**NOISE),
    "averages": lambda: SNGM(use_ema=True, ema_overwrite_frequency=2),
    "blockwise": lambda: SNGM(blockwise=True),
    "clipnorm": lambda: SNGM(clipnorm=0.1),
    "clipvalue": lambda: SNGM(clipvalue=0.1),
    "SGD": lambda: keras.optimizers.SGD(0.01),
}


@contextlib.contextmanager
def check_numerics():
    """Make TensorFlow raise an error for NaN and infinity, within a `with` statement."""
    import tensorflow as tf

    tf.debugging.enable_check_numerics()
    try:
        yield
    finally:
        tf.debugging.disable_check_numerics()


@contextlib.contextmanager
def debug_nans_and_infs():
    """Make JAX raise an error for NaN and infinity, within a `with` statement."""
    import jax

    with jax.debug_nans(True), jax.debug_infs(True):
        yield


# PyTorch has no such mode for operations that autograd does not record.
MODE = {
    "tensorflow": check_numerics,
    "jax": debug_nans_and_infs,
    "torch": contextlib.nullcontext,
}[BACKEND]


def everything(folder):
    """Return a logger that logs all it can, and stops training at NaN or infinity."""
    return GradientNormLogger(
        folder,
        folder / "log.csv",
        per_variable=True,
        update_ratio=True,
        histogram_every=2,
        on_nonfinite="stop",
    )


@whole
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_is_taken_for_a_fault(tmp_path, make):
    """Training with a logger raises no error about NaN or infinity."""
    model = functional(make())
    with MODE():
        history = model.fit(X, Y, 8, 2, verbose=0, callbacks=[everything(tmp_path)]).history
    assert np.isfinite(history["grad_norm"]).all()
    assert int(getattr(model.optimizer, "skipped_steps", 0)) == 0


def test_a_noise_scale_without_signal_is_no_fault(tmp_path):
    """A noise scale that is unknown, as the estimate of norm(G)^2 is negative, raises no error.

    Micro-batches that cancel each other make the estimate negative.
    """
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(SNGM(0.0, **NOISE), lambda y, prediction: y * prediction)
    x, y = np.ones((16, 2), "float32"), np.repeat([[1.0], [-1.0]], 8, axis=0)
    with MODE():
        history = model.fit(
            x, y, 8, 2, shuffle=False, verbose=0, callbacks=[everything(tmp_path)]
        ).history
    assert history["gradient_noise_scale"] == [np.inf, np.inf]
    assert model.optimizer.gradient_noise_scale.numpy() == np.finfo("float32").max


if BACKEND == "tensorflow":

    @pytest.mark.parametrize("jit_compile", ["auto", False])
    def test_a_large_variable_trains_where_xla_cannot_compile(jit_compile):
        """A variable that is too large for TensorFlow's kernel trains where XLA is ruled out.

        The checks of this mode are callbacks, which XLA cannot compile.
        """
        inputs = keras.Input((600,))
        model = keras.Model(inputs, keras.layers.Dense(600)(inputs))
        model.compile(SNGM(jit_compile=jit_compile), "mse", jit_compile=False)
        x = np.ones((16, 600), "float32")
        model.fit(x, x, 8, verbose=0)
        with MODE():
            model.make_train_function(force=True)
            model.fit(x, x, 8, verbose=0)
        assert int(model.optimizer.skipped_steps) == 0
