"""What there is on the JAX backend alone."""

import jax
import keras
import numpy as np
import pytest
from jax.experimental import sparse

from keras_sngm import SNGM
from processes import TESTS, run_python


def dense_and_sparse_gradient():
    """Of an embedding with 5 rows, one of which was looked up three times."""
    rows = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    gradient = sparse.BCOO((rows, np.array([[2], [0], [2], [2]])), shape=(5, 3))
    return gradient.todense(), gradient


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_sparse_gradients_train_like_dense_ones(options, in_graph):
    """Duplicate rows are added before the norm is taken."""
    trained = []
    for gradient in dense_and_sparse_gradient():
        table = keras.Variable(np.ones((5, 3)), dtype="float32")
        optimizer = SNGM(**options)
        optimizer.build([table])
        step = jax.jit(optimizer.stateless_apply) if in_graph else optimizer.stateless_apply
        state = [table.value], [v.value for v in optimizer.variables]
        for _ in range(6):
            state = step(state[1], [gradient], state[0])
        trained.append(np.array(state[0][0]))
    assert not np.array_equal(trained[0], np.ones((5, 3)))
    np.testing.assert_allclose(*trained, rtol=1e-6)


def averaging_model(loss="mse"):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile(optimizer=SNGM(use_ema=True, ema_momentum=0.5), loss=loss)
    return model


def test_training_goes_on_after_averages_have_replaced_the_weights():
    model = averaging_model()
    x, y = np.ones((8, 6), "float32"), np.ones((8, 1), "float32")
    model.fit(x, y, verbose=0)
    weights = model.get_weights()
    model.fit(x, y, verbose=0)
    assert not np.array_equal(model.get_weights()[0], weights[0])


def test_the_error_of_a_training_step_is_seen():
    def broken(y, predicted):
        raise NotImplementedError("no such loss")

    with pytest.raises(NotImplementedError, match="no such loss"):
        averaging_model(broken).fit(np.ones((8, 6)), np.ones((8, 1)), verbose=0)


def test_float64_where_jax_is_told_to_have_it():
    run_python("-m", "pytest", "-n", "0", TESTS / "test_float64.py", JAX_ENABLE_X64="1")
