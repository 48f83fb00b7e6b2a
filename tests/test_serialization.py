"""Tests of saving and loading: an optimizer loses nothing of its configuration and state."""

import pickle

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import random_arrays, random_gradients, train, values_of, variables_of
from processes import SUPPORT, run_python
from resumed_training import RESUMABLE, X, Y, build_model
from selection import whole

EVERYTHING = {
    "learning_rate": 0.25,
    "momentum": 0.5,
    "nesterov": True,
    "weight_decay": 0.125,
    "decoupled_weight_decay": False,
    "clipnorm": 2.0,
    "use_ema": True,
    "ema_momentum": 0.75,
    "ema_overwrite_frequency": 3,
    "loss_scale_factor": 4.0,
    "gradient_accumulation_steps": 2,
    "jit_compile": False,
    "noise_scale_batch_size": 8,
    "noise_scale_momentum": 0.5,
    "blockwise": True,
    "name": "mine",
}


@pytest.mark.parametrize("clip", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_config_holds_every_argument(clip):
    arguments = {**EVERYTHING, "clipnorm": None, clip: 2.0}
    config = SNGM(**arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert SNGM.from_config(config).get_config() == config


OPTIONS_WITH_STATE = {
    "use_ema": True,
    "gradient_accumulation_steps": 2,
    "noise_scale_batch_size": 8,
    "momentum": 0.9,
}


@pytest.mark.parametrize("paths", ["of Keras", "the same"])
def test_every_variable_has_a_path_of_its_own(tmp_path, paths):
    """Variables of the optimizer have different paths, even if variables of the model share one.

    In nested models, variables may share a path.
    """
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2), keras.layers.Dense(2)])
    if paths == "the same":
        for variable in model.trainable_variables:
            variable._path = "same"
    optimizer = SNGM(**OPTIONS_WITH_STATE)
    optimizer.build(model.trainable_variables)
    own = [variable.path for variable in optimizer.variables]
    assert len(set(own)) == len(own)


def test_a_model_with_accumulators_can_be_saved_in_every_way(tmp_path):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(2)(inputs)))
    model.compile(SNGM(**OPTIONS_WITH_STATE), keras.losses.MeanSquaredError())
    model.fit(np.ones((16, 2)), np.ones((16, 2)), 4, verbose=0)
    tree = model.get_state_tree(value_format="numpy_array")
    model.save(tmp_path / "m.h5")  # Keras cannot resume any optimizer from such a file.
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded.fit(np.ones((16, 2)), np.ones((16, 2)), 4, verbose=0)
    expected = values_of([*model.weights, *model.optimizer.variables])
    model.fit(np.ones((16, 2)), np.ones((16, 2)), 4, verbose=0)
    model.set_state_tree(tree)
    for value, kept in zip(values_of([*model.weights, *model.optimizer.variables]), expected):
        np.testing.assert_array_equal(value, kept)


def test_optimizers_are_named_as_those_of_keras_are():
    keras.utils.clear_session()
    assert [SNGM().name, SNGM().name] == ["sngm", "sngm_1"]
    assert SNGM(name="mine").name == "mine"
    assert SNGM.from_config(SNGM().get_config()).name == "sngm_2"


class Store(dict):
    """Stand-in for a Keras store: the value of each variable of an optimizer, by index."""


@pytest.mark.parametrize("skipped, expected", [(0, 4), (1, 3)])
def test_a_state_that_does_not_count_averages_is_loaded(skipped, expected):
    """A state without `averaged_updates`, which earlier versions did not have, can be loaded.

    The variable is the last one of an optimizer.
    """
    variables = variables_of(random_arrays())
    optimizer = SNGM(use_ema=True)
    train(optimizer, variables, random_gradients(steps=4))
    optimizer.skipped_steps.assign(skipped)
    store = Store()
    optimizer.save_own_variables(store)
    del store[str(len(optimizer.variables) - 1)]
    other = SNGM(use_ema=True)
    other.build(variables)
    other.load_own_variables(store)
    assert int(other.averaged_updates) == expected
    for value, kept in zip(
        values_of(other.variables[:-1]), values_of(optimizer.variables[:-1]), strict=True
    ):
        np.testing.assert_array_equal(value, kept)


def test_schedules_survive():
    schedule = keras.optimizers.schedules.PolynomialDecay(0.5, 100, power=1.1)
    optimizer = SNGM(schedule)
    restored = SNGM.from_config(optimizer.get_config())
    assert float(restored.learning_rate) == 0.5
    assert restored.get_config() == optimizer.get_config()


def test_keras_can_deserialize_it_by_name():
    optimizer = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(SNGM(**EVERYTHING))
    )
    assert isinstance(optimizer, SNGM)
    assert optimizer.get_config() == SNGM(**EVERYTHING).get_config()
    assert keras.saving.get_registered_name(SNGM) == "keras_sngm>SNGM"


def model_with_exclusions(name):
    """Return a model, and an SNGM that excludes one kernel and all biases from weight decay."""
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b")],
        name=name,
    )
    optimizer = SNGM(0.5, momentum=0.0, weight_decay=1.0)
    optimizer.exclude_from_weight_decay(var_list=[model.layers[0].kernel], var_names=["bias"])
    return model, optimizer


def means_after_a_step_of_decay(optimizer, model):
    """Set all weights to 1, apply gradients of zeros, and return the mean of each variable."""
    variables = model.trainable_variables
    for v in variables:
        v.assign(keras.ops.ones(v.shape))
    optimizer.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    return [float(np.mean(v.numpy())) for v in variables]


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", ["same", "other", "longer/same"])
def test_exclusions_from_weight_decay_survive(built, name):
    """Saved exclusions apply to a model whose variables have been renamed, if they can be matched.

    Keras renames variables when it loads a model, and so do users.
    """
    model, optimizer = model_with_exclusions("same")
    if built:
        optimizer.build(model.trainable_variables)
    restored = SNGM.from_config(optimizer.get_config())
    assert restored.get_config() == optimizer.get_config()
    other, _ = model_with_exclusions("same")
    for v in other.trainable_variables:
        v._path = v.path.replace("same", name)
    if name == "other" and not built:
        with pytest.raises(ValueError, match="'same/a/kernel'.* fits 0 of"):
            means_after_a_step_of_decay(restored, other)
    else:
        assert means_after_a_step_of_decay(restored, other) == [1.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize("train_first", [False, True])
def test_exclusions_survive_in_a_saved_model(tmp_path, train_first):
    model, optimizer = model_with_exclusions("model")
    model.compile(optimizer=optimizer, loss="mse")
    if train_first:
        model.train_on_batch(np.ones((2, 2)), np.ones((2, 2)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert means_after_a_step_of_decay(loaded.optimizer, loaded) == [1.0, 1.0, 0.5, 1.0]


def test_a_saved_exclusion_that_fits_two_variables_is_refused():
    model, optimizer = model_with_exclusions("same")
    restored = SNGM.from_config(optimizer.get_config())
    twin, _ = model_with_exclusions("same")
    variables = model.trainable_variables + twin.trainable_variables
    with pytest.raises(ValueError, match="'same/a/kernel'.* fits 2 of"):
        restored.apply([keras.ops.zeros(v.shape) for v in variables], variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the final states of uninterrupted and of resumed training.

    One process has trained and saved the model midway. Another one has loaded and trained it.
    """
    folder = tmp_path_factory.mktemp("resumed")
    run_python(SUPPORT / "resumed_training.py", "begin", folder)
    run_python(SUPPORT / "resumed_training.py", "resume", folder)
    return folder


@whole
@pytest.mark.parametrize("form", RESUMABLE)
def test_training_resumed_in_a_fresh_process_is_the_same_to_the_bit(folder, form):
    with np.load(folder / "uninterrupted.npz") as expected, np.load(folder / f"{form}.npz") as got:
        assert len(got.files) == len(expected.files) > 10
        for name in expected.files:
            np.testing.assert_array_equal(got[name], expected[name])


def test_backup_and_restore_resumes_to_the_bit(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(*callbacks):
        keras.utils.set_random_seed(0)
        model = build_model()
        model.fit(X, Y, batch_size=8, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
        return values_of([*model.variables, *model.optimizer.variables])

    expected = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(keras.callbacks.BackupAndRestore(tmp_path / "backup"), Interrupt())
    resumed = fit(keras.callbacks.BackupAndRestore(tmp_path / "backup"))
    for value, other in zip(resumed, expected, strict=True):
        np.testing.assert_array_equal(value, other)


def test_pickles_like_keras_own_optimizers():
    for optimizer in (keras.optimizers.SGD(0.25, momentum=0.5), SNGM(**EVERYTHING)):
        restored = pickle.loads(pickle.dumps(optimizer))
        assert type(restored) is type(optimizer)
        assert restored.get_config() == optimizer.get_config()


def test_a_model_pickles_with_its_training_state():
    model = build_model()
    model.fit(X, Y, batch_size=8, verbose=0)
    restored = pickle.loads(pickle.dumps(model))
    for value, other in zip(
        values_of(restored.optimizer.variables), values_of(model.optimizer.variables), strict=True
    ):
        np.testing.assert_array_equal(value, other)


def test_weights_of_the_optimizer_can_be_set():
    trained = []
    gradients = random_gradients(steps=6)
    variables = variables_of(random_arrays())
    optimizer = SNGM()
    train(optimizer, variables, gradients[:3])
    copy = variables_of(values_of(variables))
    other = SNGM()
    other.build(copy)
    other.set_weights(values_of(optimizer.variables))
    for each, on in ((optimizer, variables), (other, copy)):
        train(each, on, gradients[3:])
        trained.append(values_of(on))
    for value, same in zip(*trained, strict=True):
        np.testing.assert_array_equal(value, same)
