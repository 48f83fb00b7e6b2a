"""The baselines of the examples are Keras' own optimizers, with coupled weight decay."""

import keras
import numpy as np
import tensorflow as tf

from baselines import Lamb, MomentumSGD
from problems import random_arrays, random_gradients, tensors_of, values_of, variables_of


def test_weight_decay_is_added_to_the_gradient():
    variable = keras.Variable([3.0, 0.0])
    optimizer = MomentumSGD(0.1, coupled_weight_decay=1.0)
    optimizer.apply([tf.constant([0.0, 4.0])], [variable])
    np.testing.assert_allclose(variable, [3.0 - 0.3, -0.4], rtol=1e-6)


def test_without_decay_they_train_like_those_of_keras():
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
