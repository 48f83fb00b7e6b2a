"""Tests of `suggest_learning_rate` with what only TensorFlow has, and of several optimizers."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from foreign_models import X, Y, build_optimizers, gan, sequential
from keras_sngm import SNGM, suggest_learning_rate
from keras_sngm.suggestion.batches import Source


def suggested(model):
    """Return a suggestion for a model, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return suggest_learning_rate(model, X, Y, 8, 3, verbose=0)


def test_optimizers_of_a_gan_must_be_built_and_used():
    model = gan(SNGM())
    with pytest.raises(ValueError, match=r"call `optimizer.build\(variables\)`"):
        suggested(model)
    build_optimizers(model)
    model.train_step = lambda data: {"loss": keras.ops.mean(model(data[0]))}
    with pytest.raises(ValueError, match="must be trained by the optimizer that it is compiled"):
        suggested(model)


@pytest.mark.parametrize("place", ["dictionary", "layer"])
def test_optimizers_anywhere_in_the_model_are_set_back(place):
    model = gan(SNGM())
    build_optimizers(model)
    other = model.other
    del model.other
    if place == "dictionary":
        model.others = {"of": [other]}
        model.__class__ = type("InDictionary", (type(model),), {"other": property(lambda m: other)})
    else:
        model.discriminator.compile(other)
        model.__class__ = type(
            "InLayer", (type(model),), {"other": property(lambda m: m.discriminator.optimizer)}
        )
    model.fit(X, Y, 8, verbose=0)
    before = [variable.numpy() for variable in other.variables]
    suggested(model)
    for variable, value in zip(other.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    assert other.iterations > 0


@pytest.mark.parametrize("optimizer", [SNGM, keras.optimizers.Adam])
def test_checkpoints_and_exports_can_be_written(tmp_path, optimizer):
    """What TensorFlow saves after a suggestion is what it saves without."""
    names = []
    for ask in (False, True):
        model = sequential(optimizer())
        model.fit(X, Y, 8, verbose=0)
        if ask:
            suggested(model)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        path = checkpoint.save(tmp_path / f"checkpoint{ask}" / "of")
        names.append([name for name, _ in tf.train.list_variables(path)])
        tf.saved_model.save(model, str(tmp_path / f"model{ask}"))
    assert names[0] == names[1]


def test_variables_of_tensorflow_are_set_back():
    class Counting(keras.layers.Layer):
        """Layer that counts its calls in a variable of TensorFlow."""

        def __init__(self):
            super().__init__()
            self.calls = tf.Variable(0.0)

        def call(self, inputs):
            self.calls.assign_add(1.0)
            return inputs

    counting = Counting()
    model = keras.Sequential([keras.Input((6,)), counting, keras.layers.Dense(1)])
    model.compile(SNGM(), loss="mse")
    before = counting.calls.numpy()
    suggested(model)
    assert counting.calls.numpy() == before


def test_batches_of_a_dataset_that_reshuffles_are_kept():
    """All trials read the same batches, of one epoch after the other."""
    shuffled = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(len(X)).batch(8)
    steps = 10
    kept = Source(shuffled, None, None, None, None, True, 0).dataset(steps)
    first, second = ([x for x, _ in kept.as_numpy_iterator()] for _ in range(2))
    assert len(first) == steps
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[6])


def test_datasets_of_all_kinds():
    """Ragged batches, and datasets of unknown or infinite length, are as for `fit`."""

    class Sum(keras.Model):
        """A model of ragged rows."""

        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def call(self, inputs):
            return self.dense(tf.reduce_sum(inputs, axis=1)[:, None])

    rows = tf.ragged.constant([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0], [7.0]] * 12)
    batches = tf.data.Dataset.from_tensor_slices((rows, Y)).batch(8)
    model = Sum()
    model.compile(SNGM(), loss="mse")
    model(rows[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        finite = suggest_learning_rate(model, batches, epochs=3, verbose=0)
        infinite = suggest_learning_rate(
            model, batches.repeat(), epochs=3, steps_per_epoch=6, verbose=0
        )
    assert finite == infinite
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given with data of unknown"):
        suggest_learning_rate(model, batches.filter(lambda x, y: True), epochs=3, verbose=0)
