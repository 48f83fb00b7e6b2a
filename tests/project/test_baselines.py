"""Tests of the examples' baselines: Keras' optimizers with coupled weight decay, and LARS."""

import jax
import keras
import numpy as np
import optax
import pytest
import tensorflow as tf

from common.baselines import LARS, Lamb, MomentumSGD
from problems import (
    SHAPES,
    assert_close,
    random_arrays,
    random_gradients,
    tensors_of,
    train,
    values_of,
    variables_of,
)

STEPS = 50
SCHEDULE = keras.optimizers.schedules.PolynomialDecay(8.0, STEPS, 0.0, power=1.1)


def test_weight_decay_is_added_to_the_gradient():
    variable = keras.Variable([3.0, 0.0])
    optimizer = MomentumSGD(0.1, coupled_weight_decay=1.0)
    optimizer.apply([tf.constant([0.0, 4.0])], [variable])
    np.testing.assert_allclose(variable, [3.0 - 0.3, -0.4], rtol=1e-6)


def test_without_decay_they_train_like_those_of_keras():
    """Without coupled weight decay, MomentumSGD and Lamb train like Keras' SGD and Lamb."""
    for coupled, plain in (
        (MomentumSGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9)),
        (Lamb(0.1), keras.optimizers.Lamb(0.1)),
    ):
        trained = []
        for optimizer in (coupled, plain):
            variables = variables_of(random_arrays())
            for gradients in random_gradients(steps=5):
                optimizer.apply(tensors_of(gradients, variables), variables)
            trained.append(values_of(variables))
        for value, other in zip(*trained):
            np.testing.assert_allclose(value, other, rtol=1e-6)


def test_without_decay_sparse_gradients_stay_sparse():
    table = keras.Variable(np.ones((3, 2)), dtype="float32")
    rows = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), dense_shape=(3, 2))
    MomentumSGD(0.5).apply([rows], [table])
    np.testing.assert_allclose(table, [[1, 1], [0.5, 0.5], [1, 1]])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.01},
        {"trust_coefficient": 0.02, "epsilon": 0.1},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_lars_is_that_of_optax_at_every_step(options, nesterov):
    """LARS takes the same steps as the LARS of Optax.

    One of the variables starts at zero, as biases do.
    """
    start = [*random_arrays(), np.zeros(4)]
    gradients = random_gradients([*SHAPES, (4,)], STEPS)
    gradients[7][1][:] = 0.0
    theirs = {"eps" if name == "epsilon" else name: value for name, value in options.items()}
    rule = optax.lars(rate_at, **{"momentum": 0.9, **theirs}, nesterov=nesterov)
    weights = [jax.numpy.asarray(array, "float32") for array in start]
    state = rule.init(weights)
    update = jax.jit(rule.update)

    variables = variables_of(start)
    optimizer = LARS(SCHEDULE, nesterov=nesterov, **options)
    optimizer.build(variables)
    apply = tf.function(lambda step: optimizer.apply(step, variables))
    for step in gradients:
        apply(tensors_of(step, variables))
        updates, state = update([jax.numpy.asarray(g, "float32") for g in step], state, weights)
        weights = optax.apply_updates(weights, updates)
        assert_close(variables, [np.asarray(w, "float64") for w in weights], 1e-5)


def rate_at(step):
    """Return the learning rate of a step for Optax, the same as that of `SCHEDULE`."""
    return 8.0 * (1.0 - step / STEPS) ** 1.1


def test_lars_trains_and_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    model.compile(LARS(0.5, weight_decay=0.1, nesterov=True, epsilon=0.25), "mse")
    x, y = np.ones((8, 2)), np.ones((8, 3))
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.get_config()["weight_decay"] == 0.1
    for each in (model, loaded):
        each.fit(x, y, verbose=0)
    assert_close(loaded.trainable_variables, values_of(model.trainable_variables), 1e-6)


def test_lars_leaves_out_what_is_excluded_from_decay():
    """LARS does not decay a variable that is excluded from weight decay."""
    variables = variables_of([np.ones(2), np.ones(2)])
    optimizer = LARS(1.0, weight_decay=0.5, trust_coefficient=1.0)
    optimizer.exclude_from_weight_decay(var_list=variables[1:])
    gradient = np.array([1.0, 0.0])
    train(optimizer, variables, [[gradient, gradient]])
    # The norm of w is sqrt(2), and the decayed gradient is (1.5, 0.5).
    decayed = np.array([1.5, 0.5]) * np.sqrt(2.0 / 2.5)
    np.testing.assert_allclose(variables[0], 1.0 - decayed, rtol=1e-6)
    np.testing.assert_allclose(variables[1], [1.0 - np.sqrt(2.0), 1.0], rtol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("momentum", 1.0),
        ("momentum", 1),
        ("trust_coefficient", 0.0),
        ("trust_coefficient", float("nan")),
        ("weight_decay", -1.0),
        ("epsilon", -1e-3),
    ],
)
def test_bad_values_of_lars_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must.*Received: {name}={value}"):
        LARS(**{name: value})
