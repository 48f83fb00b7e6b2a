"""Tests of a logger with models of many kinds: it changes nothing and leaves nothing behind."""

import functools

import keras
import numpy as np
import pytest

from foreign_models import MODELS, OPTIMIZERS, X, Y
from keras_sngm import SNGM, GradientNormLogger
from keras_sngm.backend.common.recorder import attached_recorders
from problems import BACKEND, values_of
from selection import quick_only, whole

OF_EVERY_MODEL = ("SNGM, averaged and accumulated", "SGD")
JOBS = [(model, optimizer) for model in MODELS for optimizer in OF_EVERY_MODEL]
# These jobs have no batch statistics. Where more values depend on these, a compiler may round the
# last bit differently.
JOBS += [("unused layer", optimizer) for optimizer in OPTIMIZERS if optimizer not in OF_EVERY_MODEL]
JOBS += [("GAN", "SGD, averaged")] if "GAN" in MODELS else []


def leaves_of(tree, path=""):
    """Yield the path and the value of each leaf of a nested dictionary."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", value


def assert_same(value, expected):
    """Assert that arrays are equal to the bit; on JAX, where XLA compiles the whole step, nearly.

    With JAX 0.10 they are equal to the bit, too. JAX 0.12 rounds one element in a hundred
    differently.
    """
    if BACKEND == "jax":
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-8)
    else:
        np.testing.assert_array_equal(value, expected)


class StateRecord(keras.callbacks.Callback):
    """Callback that keeps the paths of optimizer variables and the state tree after each epoch."""

    def __init__(self):
        super().__init__()
        self.paths = []
        self.trees = []

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        self.paths.append([variable.path for variable in optimizer.variables])
        tree = self.model.get_state_tree(value_format="numpy_array")
        self.trees.append(dict(leaves_of(tree)))


def fit(model, x, *callbacks, epochs=2):
    return model.fit(x, Y, 8, epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history


def train(foreign, make, folder, *loggers):
    """Train a new model; return the model, its `StateRecord`, and its history.

    Args:
        foreign: a `Foreign` model.
        make: a function that makes the optimizer.
        folder: the folder in which the weights of each epoch are saved.
        *loggers: the loggers to train with.
    """
    keras.utils.clear_session()  # Layers and optimizers then get the same names.
    keras.utils.set_random_seed(0)
    model = foreign.make(make())
    record = StateRecord()
    save = keras.callbacks.ModelCheckpoint(folder / "{epoch}.weights.h5", save_weights_only=True)
    history = fit(model, foreign.x, *loggers, record, save)
    return model, record, history


@pytest.fixture
def products_as_written():
    """Keep TensorFlow from reordering products, which depends on how often their values are read.

    A logger reads gradients once more. On some processors that changes their last bits.
    """
    if BACKEND != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    yield
    tf.config.optimizer.set_experimental_options(
        {"arithmetic_optimization": before.get("arithmetic_optimization", True)}
    )


@pytest.mark.usefixtures("products_as_written")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("name, optimizer", quick_only(JOBS, JOBS[:2]))
def test_nothing_changes(tmp_path, name, optimizer):
    """Weights, optimizer state, state tree and files are the same with and without a logger."""
    foreign, make = MODELS[name], OPTIMIZERS[optimizer]
    everything = GradientNormLogger(
        tmp_path / "logs",
        tmp_path / "log.csv",
        per_variable=True,
        update_ratio=True,
        histogram_every=2,
        on_nonfinite="stop",
    )
    folders = tmp_path / "plain", tmp_path / "logged"
    for folder in folders:
        folder.mkdir()
    plain, before, _ = train(foreign, make, folders[0])
    model, after, history = train(
        foreign, make, folders[1], everything, GradientNormLogger(per_variable="layer")
    )
    assert np.isfinite(history["grad_norm"]).all()
    assert max(history["grad_norm"]) > 0
    assert after.paths == before.paths
    for own, other in zip(after.trees, before.trees, strict=True):
        assert list(own) == list(other)
        for path in own:
            assert_same(own[path], other[path])
    for value, expected in zip(
        values_of([*model.weights, *model.optimizer.variables]),
        values_of([*plain.weights, *plain.optimizer.variables]),
        strict=True,
    ):
        assert_same(value, expected)
    for epoch in (1, 2):
        own, other = (folder / f"{epoch}.weights.h5" for folder in folders)
        assert own.stat().st_size == other.stat().st_size
        assert BACKEND == "jax" or own.read_bytes() == other.read_bytes()
    fit(model, foreign.x)
    fit(plain, foreign.x)
    for value, expected in zip(values_of(model.weights), values_of(plain.weights), strict=True):
        assert_same(value, expected)


@pytest.mark.parametrize("make", [SNGM, keras.optimizers.SGD])
@pytest.mark.parametrize("name", ["Sequential without Input", "subclassed"])
def test_a_bad_first_step_leaves_a_model_as_it_was_built(name, make):
    """A stop at step 1 also restores the batch statistics, which this step creates and changes."""
    bad = X.copy()
    bad[0] = np.nan
    model = MODELS[name].make(make())
    logger = GradientNormLogger(on_nonfinite="stop")
    with pytest.warns(UserWarning, match="step 1 is not finite"):
        model.fit(bad, Y, 8, 2, shuffle=False, verbose=0, callbacks=[logger])
    normalization = next(v for v in model.layers if v.name.startswith("normalized"))
    np.testing.assert_array_equal(normalization.moving_mean, np.zeros(5))
    np.testing.assert_array_equal(normalization.moving_variance, np.ones(5))
    assert all(np.isfinite(value).all() for value in values_of(model.weights))


def compile_anew(optimizer, epoch, logs, model):
    """Compile a model with another optimizer and build it, if `epoch` is 0."""
    if epoch == 0:
        model.compile(optimizer, "mse")
        optimizer.build(model.trainable_variables)
        model.make_train_function()


@whole
@pytest.mark.parametrize("make", [lambda: SNGM(0.01), lambda: keras.optimizers.SGD(0.01)])
def test_a_logger_follows_a_model_that_is_compiled_anew(tmp_path, make):
    """A logger goes on with the optimizer of a model that is compiled anew in `fit`.

    Another file is begun if the new optimizer has other columns, as SNGM has.
    """
    model = MODELS["Sequential"].make(keras.optimizers.Adam(0.01))
    optimizer = make()
    anew = keras.callbacks.LambdaCallback(
        on_epoch_end=functools.partial(compile_anew, optimizer, model=model)
    )
    first = model.optimizer
    logger = GradientNormLogger(filename=tmp_path / "log.csv", update_ratio=True)
    history = fit(model, X, logger, anew, epochs=3)
    assert np.isfinite(history["grad_norm"]).all()
    assert int(optimizer.iterations) == 12
    assert not attached_recorders(first)
    assert not attached_recorders(optimizer)
    files = sorted(path.name for path in tmp_path.iterdir())
    lines = [len((tmp_path / name).read_text().splitlines()) for name in files]
    if isinstance(optimizer, SNGM):
        assert dict(zip(files, lines)) == {"log.csv": 1 + 6, "log_1.csv": 1 + 12}
    else:
        assert dict(zip(files, lines)) == {"log.csv": 1 + 18}


def test_a_training_function_that_is_made_anew_is_recorded():
    model = MODELS["Sequential"].make(SNGM(0.01))
    anew = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: model.make_train_function(force=True)
    )
    assert np.isfinite(fit(model, X, GradientNormLogger(), anew, epochs=3)["grad_norm"]).all()


def error_of(model, *callbacks):
    """Return the type of the error that training raises, and its message up to a colon."""
    with pytest.raises(Exception) as caught:
        fit(model, X, *callbacks, epochs=1)
    return type(caught.value), str(caught.value).partition(":")[0]


@pytest.mark.parametrize("make", [SNGM, keras.optimizers.SGD])
def test_errors_of_keras_come_through_unchanged(make):
    """Keras raises the same error with a logger as without.

    The error is about a layer that was unfrozen without compiling the model anew.
    """
    errors = []
    for loggers in ([], [GradientNormLogger()]):
        model = MODELS["Sequential"].make(make())
        model.layers[0].trainable = False
        model.compile(make(), "mse")
        fit(model, X, *loggers, epochs=1)
        model.layers[0].trainable = True
        model.make_train_function(force=True)
        errors.append(error_of(model, *loggers))
    assert errors[0] == errors[1]
    assert errors[0][0] is ValueError


def test_what_an_optimizer_raises_says_that_it_was_the_optimizer():
    """An error in an optimizer has a note that names the optimizer, where Python has notes."""

    class Broken(keras.optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            raise RuntimeError("cannot")

    model = MODELS["Sequential"].make(Broken())
    with pytest.raises(RuntimeError, match="cannot") as caught:
        fit(model, X, GradientNormLogger())
    notes = getattr(caught.value, "__notes__", None)
    assert notes is None or any("Raised by `Broken`" in note for note in notes)


def test_a_model_without_weights_is_told_from_one_that_others_train():
    """The logger has a warning of its own for models without trainable weights."""
    model = keras.Sequential([keras.Input((6,)), keras.layers.Flatten()])
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="the model has no trainable weights"):
        history = model.fit(X, X, verbose=0, callbacks=[GradientNormLogger()]).history
    assert np.isnan(history["grad_norm"]).all()


def test_a_restored_state_tree_is_gone_on_from():
    """Training and logging go on from a state tree that a callback restores."""
    model, kept = MODELS["functional"].make(keras.optimizers.Adam()), []

    def keep_and_restore(epoch, logs):
        if epoch == 0:
            kept.append(model.get_state_tree(value_format="numpy_array"))
        if epoch == 1:
            model.set_state_tree(kept[0])

    back = keras.callbacks.LambdaCallback(on_epoch_end=keep_and_restore)
    norms = fit(model, X, GradientNormLogger(), back, epochs=3)["grad_norm"]
    assert norms[2] == pytest.approx(norms[1], rel=1e-5)
