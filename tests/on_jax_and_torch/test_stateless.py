"""Test of `stateless_apply`, on the backends on which an optimizer has it."""

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import (
    assert_close,
    random_arrays,
    random_gradients,
    tensors_of,
    train,
    values_of,
    variables_of,
)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "use_ema": True}])
def test_stateless_steps_train_like_others_and_assign_to_no_variable(options):
    gradients = random_gradients(steps=4)
    expected = variables_of(random_arrays())
    train(SNGM(**options), expected, gradients)

    variables = variables_of(random_arrays())
    optimizer = SNGM(**options)
    optimizer.build(variables)
    before = values_of([*variables, *optimizer.variables])
    # The tensors are copies, because PyTorch's optimizers overwrite the tensors they are given.
    weights, own = ([keras.ops.copy(v) for v in of] for of in (variables, optimizer.variables))
    for gradient in gradients:
        weights, own = optimizer.stateless_apply(own, tensors_of(gradient, variables), weights)
    for value, then in zip(values_of([*variables, *optimizer.variables]), before, strict=True):
        np.testing.assert_array_equal(value, then)
    for variable, value in zip([*variables, *optimizer.variables], [*weights, *own], strict=True):
        variable.assign(value)
    assert_close(variables, values_of(expected), 1e-6)
