"""Tests of errors that say what to do instead where no step can be taken."""

import keras
import pytest
import tensorflow as tf

from keras_sngm import SNGM


@pytest.fixture(scope="module")
def mirrored():
    """Return a `MirroredStrategy` with one CPU."""
    return tf.distribute.MirroredStrategy(["CPU:0"])


def test_a_strategy_that_is_not_supported_is_refused():
    strategy = tf.distribute.experimental.CentralStorageStrategy(["CPU:0"])
    with (
        strategy.scope(),
        pytest.raises(
            ValueError,
            match="`MultiWorkerMirroredStrategy` of .*Received: strategy=CentralStorageStrategy",
        ),
    ):
        SNGM()


def test_one_device_strategy_trains():
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        variable, optimizer = keras.Variable([1.0]), SNGM(0.5)
        optimizer.build([variable])
        strategy = tf.distribute.get_strategy()
    strategy.run(lambda: optimizer.apply([tf.ones(1)], [variable]))
    assert variable.numpy() == [0.5]


def test_variables_of_another_scope_are_refused(mirrored):
    outside = keras.Variable([1.0], name="kernel")
    with mirrored.scope():
        optimizer, inside = SNGM(), keras.Variable([1.0], name="kernel")
        with pytest.raises(
            ValueError, match="under MirroredStrategy, the variable 'kernel' created under no str"
        ):
            optimizer.build([outside])
    with pytest.raises(
        ValueError, match="under no strategy, the variable 'kernel' created under Mirr"
    ):
        SNGM().build([inside])


def test_an_optimizer_created_outside_of_the_scope_is_refused(mirrored):
    with mirrored.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer=SNGM(), loss="mse")
    with pytest.raises(ValueError, match=r"with strategy.scope\(\)"):
        model.fit(tf.ones((2, 1)), tf.ones((2, 1)), verbose=0)


def test_gradients_under_a_strategy_the_optimizer_does_not_know_are_refused(mirrored):
    variable, optimizer = keras.Variable([1.0]), SNGM()
    optimizer.build([variable])
    with pytest.raises(ValueError, match="created under no strategy, applied under MirroredStr"):
        mirrored.run(lambda: optimizer.apply([tf.ones(1)], [variable]))


def test_the_cross_replica_context_is_refused(mirrored):
    with mirrored.scope():
        optimizer, variable = SNGM(), keras.Variable([1.0])
        with pytest.raises(RuntimeError, match="replica context"):
            optimizer.apply([tf.ones(1)], [variable])


def test_as_many_gradients_as_variables():
    variables = [keras.Variable([1.0]), keras.Variable([2.0])]
    optimizer = SNGM()
    with pytest.raises(ValueError, match=r"optimizer.build\(trainable_variables\)"):
        optimizer.apply([tf.ones(1)])
    optimizer.build(variables)
    for arguments in ([tf.ones(1)],), ([tf.ones(1)], variables), ([tf.ones(1)] * 3, variables):
        with pytest.raises(ValueError, match="Received: [13] gradients for 2 variables"):
            optimizer.apply(*arguments)
    optimizer.apply([])
    assert int(optimizer.iterations) == 0
