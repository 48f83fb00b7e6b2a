"""Tests of `suggest_learning_rate` for models with several optimizers."""

import keras
import pytest

from foreign_models import X, Y, build_optimizers, gan
from keras_sngm import SNGM, suggest_learning_rate


def test_optimizers_of_a_gan_must_be_built_and_used():
    model = gan(SNGM())
    with pytest.raises(ValueError, match=r"call `model.optimizer.build\(variables\)`"):
        suggest_learning_rate(model, X, Y, 8, 3, verbose=0)
    build_optimizers(model)
    model.train_step = lambda data: {"loss": keras.ops.mean(model(data[0]))}
    with pytest.raises(ValueError, match="must be trained by the optimizer that it is compiled"):
        suggest_learning_rate(model, X, Y, 8, 3, verbose=0)
