"""Tests of what only the TensorFlow backend has, such as slices, AutoGraph and exported models."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM, GradientNormLogger
from keras_sngm.backend.tensorflow import step as tensorflow_step
from problems import compare_with_reference, trained_table
from processes import SUPPORT, run_python
from selection import whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 1.5, "weight_decay": 0.5, "decoupled_weight_decay": False},
        {"scale": 1e30},
        {"blockwise": True},
        {"blockwise": True, "scale": 1e30},
    ],
    ids=str,
)
def test_the_step_of_accelerators_agrees_with_the_reference(monkeypatch, options):
    """The step of accelerators, which XLA compiles together with the norm, is right on a CPU."""
    monkeypatch.setattr(tensorflow_step, "is_accelerator", lambda device: True)
    compare_with_reference("eager-xla", **options)


def test_sparse_gradients_train_like_dense_ones():
    """Duplicate rows of a sparse gradient are added up before the norm is computed."""
    indices = tf.constant([2, 0, 2, 2])
    rows = tf.constant(np.random.default_rng(0).standard_normal((4, 3)), "float32")
    sparse = tf.IndexedSlices(rows, indices, dense_shape=(5, 3))
    trained = [trained_table(gradient) for gradient in (sparse, tf.convert_to_tensor(sparse))]
    np.testing.assert_array_equal(*trained)


def test_plain_tf_variables_can_be_trained():
    variable = tf.Variable([1.0, 2.0])
    optimizer = SNGM(0.5)
    optimizer.apply_gradients([(tf.constant([3.0, 4.0]), variable)])
    np.testing.assert_allclose(variable, [1.0 - 0.3, 2.0 - 0.4], rtol=1e-6)


@pytest.mark.parametrize("make", [SNGM, keras.optimizers.SGD])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_function_of_the_user_does_not_warn(make, options):
    """AutoGraph does not warn of code of the optimizer that it cannot transform."""
    printed = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.getMessage())
    variables = [keras.Variable([1.0, 2.0])]
    optimizer = make(**options)
    optimizer.build(variables)
    tf.get_logger().addHandler(handler)
    try:
        tf.function(lambda g: optimizer.apply(g, variables))([tf.constant([3.0, 4.0])])
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [message for message in printed if "AutoGraph" in message]


OF_UNKNOWN_LENGTH = {
    "SNGM": SNGM,
    "averages": lambda: SNGM(use_ema=True),
    "micro-batches": lambda: SNGM(gradient_accumulation_steps=2),
    "SGD": lambda: keras.optimizers.SGD(0.01),
    "Adam": keras.optimizers.Adam,
}


@whole
@pytest.mark.parametrize("jit_compile", ["auto", False])
@pytest.mark.parametrize("make", OF_UNKNOWN_LENGTH.values(), ids=OF_UNKNOWN_LENGTH)
def test_the_end_of_a_dataset_is_no_step(tmp_path, make, jit_compile):
    """A call of the training function without a batch is no step.

    TensorFlow makes such a call at the end of a dataset of unknown length. Keras' own optimizers
    count it as a step.
    """
    x = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
    data = tf.data.Dataset.from_generator(
        lambda: zip(x, x[:, :1]), output_signature=(tf.TensorSpec((6,)), tf.TensorSpec((1,)))
    )
    model = keras.Sequential([keras.layers.Dense(1)])
    optimizer = make()
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    logger = GradientNormLogger(filename=tmp_path / "log.csv", on_nonfinite="stop")
    history = model.fit(data.batch(8), epochs=3, verbose=0, callbacks=[logger]).history
    assert min(history["grad_norm_min"]) > 0
    updates = 18 // (optimizer.gradient_accumulation_steps or 1)
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 1 + updates
    if isinstance(optimizer, SNGM):
        assert int(optimizer._iterations) == 18


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 3, "use_ema": True},
        {"gradient_accumulation_steps": 2, "noise_scale_batch_size": 8},
    ],
    ids=str,
)
def test_a_dataset_of_unknown_length_trains_like_one_of_known_length(options):
    """Each epoch has 5 batches, and so may end inside an accumulation cycle."""
    x = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")
    states = []
    for data in (
        tf.data.Dataset.from_tensor_slices((x, x[:, :1])),
        tf.data.Dataset.from_generator(
            lambda: zip(x, x[:, :1]), output_signature=(tf.TensorSpec((6,)), tf.TensorSpec((1,)))
        ),
    ):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)])
        model.compile(SNGM(**options), "mse", jit_compile=False)
        model.fit(data.batch(8), epochs=3, verbose=0)
        states.append([v.numpy() for v in [*model.weights, *model.optimizer.variables]])
    for value, expected in zip(*states, strict=True):
        np.testing.assert_array_equal(value, expected)


def test_a_trained_model_can_be_exported(tmp_path):
    x = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(optimizer=SNGM(), loss="mse")
    model.fit(x, x[:, :1], batch_size=8, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    exported = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(exported.serve(x), model(x), rtol=1e-6)
    tf.saved_model.save(model, str(tmp_path / "saved"))


@whole
def test_stopping_on_several_replicas():
    run_python(SUPPORT / "stopped_training.py")
