"""Tests of SNGM in the ways in which Keras users train a model."""

import keras
import numpy as np
import pytest

from autodiff import CustomModel, custom_step
from keras_sngm import SNGM, GradientNormLogger
from problems import BACKEND, assert_close, values_of
from selection import whole

X = np.random.default_rng(0).standard_normal((48, 6)).astype("float32")
Y = np.tanh(X.sum(axis=1, keepdims=True))


def build_model(model_class=keras.Model, **first_layer):
    """Build a model with the same initial weights at every call and on every backend.

    The weights come from NumPy, because the random numbers of backends differ.

    Args:
        model_class: the class of the model.
        **first_layer: keyword arguments of the first layer.
    """
    inputs = keras.Input((6,))
    x = keras.layers.Dense(5, activation="tanh", **first_layer)(inputs)
    model = model_class(inputs, keras.layers.Dense(1)(x))
    generator = np.random.default_rng(0)
    model.set_weights([generator.uniform(-0.5, 0.5, v.shape) for v in model.weights])
    return model


def fit(model, epochs=2, **kwargs):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs)


def trained_model(optimizer=None, model=None, epochs=2, callbacks=None, **compile_options):
    """Train a model on `X` and `Y`, a new model with a new SNGM by default; return the model."""
    model = model or build_model()
    model.compile(optimizer=optimizer or SNGM(), loss="mse", **compile_options)
    fit(model, epochs, callbacks=callbacks)
    return model


def assert_same_weights(model, other, tolerance=1e-5):
    assert_close(model.weights, values_of(other.weights), tolerance)


@pytest.fixture(scope="module")
def expected():
    """Return a model trained with the defaults, with which other ways of training must agree."""
    return trained_model()


WAYS_TO_COMPILE = [{"run_eagerly": True}, {"jit_compile": False}]
if BACKEND != "torch":
    WAYS_TO_COMPILE += [
        {"jit_compile": True},
        {"steps_per_execution": 3},
        {"steps_per_execution": 4, "jit_compile": False},
    ]


@pytest.mark.parametrize("options", WAYS_TO_COMPILE, ids=str)
@pytest.mark.parametrize("jit_compile", [True, False])
def test_ways_to_compile_a_model(expected, options, jit_compile):
    assert_same_weights(trained_model(SNGM(jit_compile=jit_compile), **options), expected)


def test_training_lowers_the_loss():
    model = build_model()
    model.compile(optimizer=SNGM(0.02), loss="mse")
    losses = fit(model, epochs=20).history["loss"]
    assert losses[-1] < 0.1 * losses[0]


def test_custom_train_step(expected):
    assert_same_weights(trained_model(model=build_model(model_class=CustomModel)), expected)


CUSTOM_LOOPS = [(False, False), (False, True)]
if BACKEND == "tensorflow":
    CUSTOM_LOOPS += [(True, False)]
if BACKEND != "torch":
    CUSTOM_LOOPS += [(True, True)]


@pytest.mark.parametrize("in_graph, build_first", CUSTOM_LOOPS)
def test_custom_loop(expected, in_graph, build_first):
    model = build_model()
    optimizer = SNGM()
    if build_first:
        optimizer.build(model.trainable_variables)
    step = custom_step(model, optimizer, in_graph)
    for _ in range(2):
        for i in range(0, len(X), 8):
            step(*(keras.ops.convert_to_tensor(array[i : i + 8]) for array in (X, Y)))
    assert_same_weights(model, expected)
    assert int(optimizer.iterations) == 12


class Halving(keras.callbacks.Callback):
    """Callback that halves the learning rate in each epoch, by assigning to it."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.optimizer.learning_rate = 0.1 / 2**epoch


@whole
@pytest.mark.parametrize(
    "learning_rate, callbacks",
    [
        (keras.optimizers.schedules.PiecewiseConstantDecay([5, 11], [0.1, 0.05, 0.025]), []),
        (0.3, [keras.callbacks.LearningRateScheduler(lambda epoch, _: 0.1 / 2**epoch)]),
        (0.3, [Halving()]),
        (
            0.1,
            [
                keras.callbacks.ReduceLROnPlateau(
                    monitor="loss", factor=0.5, patience=0, min_delta=1e6, cooldown=0
                )
            ],
        ),
    ],
    ids=["schedule", "LearningRateScheduler", "assignment", "ReduceLROnPlateau"],
)
def test_learning_rates_that_change(learning_rate, callbacks):
    """Every way to change the learning rate trains like a schedule with the same rates."""
    if isinstance(callbacks[0] if callbacks else None, keras.callbacks.ReduceLROnPlateau):
        # The callback sees an improvement in the first epoch alone, and so halves the rate later.
        rates = [0.1, 0.1, 0.05]
    else:
        rates = [0.1, 0.05, 0.025]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5, 11], rates)
    model = trained_model(SNGM(learning_rate), epochs=3, callbacks=callbacks)
    assert_same_weights(model, trained_model(SNGM(schedule), epochs=3))


def test_callable_learning_rate():
    rate = keras.Variable(0.1)
    # A step that JAX has compiled keeps the learning rate that it was traced with.
    model = trained_model(SNGM(lambda: rate), run_eagerly=BACKEND == "jax")
    assert_same_weights(model, trained_model(SNGM(0.1)))
    rate.assign(0.0)
    before = values_of(model.weights)
    fit(model)
    assert_close(model.weights, before, 0.0)


def test_frozen_layers_stay_as_they_are():
    model = build_model()
    model.layers[1].trainable = False
    before = values_of(model.layers[1].weights)
    trained_model(model=model)
    for value, expected in zip(values_of(model.layers[1].weights), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert model.optimizer.gradient_norms.shape == (2,)


def test_variables_without_gradient_stay_as_they_are():
    used, unused = keras.Variable([1.0, 1.0]), keras.Variable([2.0])
    optimizer = SNGM(0.5, use_ema=True)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply_gradients([(None, unused), (keras.ops.array([3.0, 4.0]), used)])
    np.testing.assert_allclose(used, [0.7, 0.6], rtol=1e-6)
    np.testing.assert_allclose(optimizer.gradient_norms, [0.0, 5.0])
    optimizer.finalize_variable_values([unused, used])
    np.testing.assert_allclose(unused, [2.0])


def test_a_subset_of_the_variables_can_be_updated():
    first, second = keras.Variable([1.0]), keras.Variable([2.0])
    optimizer = SNGM(0.5)
    optimizer.build([first, second])
    optimizer.apply([keras.ops.ones(1)], [second])
    optimizer.apply([keras.ops.ones(1)], [first])
    np.testing.assert_allclose([first.numpy(), second.numpy()], [[0.5], [1.5]])


def test_unknown_variables_are_refused():
    optimizer = SNGM()
    optimizer.build([keras.Variable([1.0])])
    with pytest.raises(ValueError, match="Unknown variable"):
        optimizer.apply([keras.ops.ones(1)], [keras.Variable([1.0])])


@pytest.mark.parametrize("policy, tolerance", [("mixed_float16", 2e-2), ("mixed_bfloat16", 1e-1)])
def test_mixed_precision(expected, policy, tolerance):
    keras.mixed_precision.set_dtype_policy(policy)
    try:
        model = build_model()
    finally:
        keras.mixed_precision.set_dtype_policy("float32")
    trained_model(model=model, callbacks=[GradientNormLogger()])
    assert_same_weights(model, expected, tolerance)


@pytest.mark.parametrize("factor", [2.0**-20, 3.0, 2.0**20])
def test_the_loss_scale_changes_nothing(expected, factor):
    model = trained_model(SNGM(loss_scale_factor=factor))
    assert_same_weights(model, expected)
    np.testing.assert_allclose(
        model.optimizer.gradient_norm, expected.optimizer.gradient_norm, rtol=1e-4
    )


def test_constraints_hold():
    model = trained_model(
        model=build_model(kernel_constraint=keras.constraints.MaxNorm(0.5, axis=0))
    )
    norms = np.linalg.norm(model.layers[1].kernel.numpy(), axis=0)
    assert (norms <= 0.5 + 1e-6).all()
    assert np.isclose(norms, 0.5).any()


class DenseEmbedding(keras.layers.Embedding):
    """Embedding layer whose table has a dense gradient on every backend."""

    def call(self, inputs):
        tokens = keras.ops.cast(inputs, "int32")
        return keras.ops.matmul(keras.ops.one_hot(tokens, self.input_dim), self.embeddings)


@pytest.mark.parametrize(
    "other, options",
    [
        (keras.layers.Embedding, {"run_eagerly": True}),
        (DenseEmbedding, {}),
        (DenseEmbedding, {"run_eagerly": True}),
    ],
)
def test_sparse_gradients_of_embeddings_train_like_dense_ones(other, options):
    tokens = np.random.default_rng(0).integers(0, 11, (48, 5))
    models = []
    for layer, compile_options in ((keras.layers.Embedding, {}), (other, options)):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([layer(11, 4), keras.layers.Flatten(), keras.layers.Dense(1)])
        model.compile(optimizer=SNGM(clipnorm=0.1), loss="mse", **compile_options)
        model.fit(tokens, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
        models.append(model)
    assert_same_weights(*models)


def test_excluded_variables_do_not_decay():
    kept, decayed = keras.Variable([1.0], name="bias"), keras.Variable([1.0], name="kernel")
    named = keras.Variable([1.0], name="gain")
    optimizer = SNGM(0.5, weight_decay=0.5, momentum=0.0)
    optimizer.exclude_from_weight_decay(var_list=[named], var_names=["bias"])
    variables = [kept, decayed, named]
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros(1)] * 3, variables)
    np.testing.assert_allclose([v.numpy()[0] for v in variables], [1.0, 0.75, 1.0])
    with pytest.raises(ValueError, match="before"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


def build_and_decay(optimizer):
    """Build an optimizer for a new model, and return the paths of the variables that decay.

    The gradients are zeros, so that weight decay alone changes a variable.
    """
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(2, name="hidden"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(keras.ops.ones(variable.shape))
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    return [v.path.partition("/")[2] for v in variables if v.numpy().max() < 1]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    "names, decaying",
    [
        (["head"], ["hidden/kernel", "hidden/bias"]),
        (["hidden/kernel"], ["hidden/bias", "head/kernel", "head/bias"]),
        (["^bias$"], ["hidden/kernel", "head/kernel"]),
        (["d.*/k", "head"], ["hidden/bias"]),
    ],
)
def test_exclusions_are_found_in_the_path(names, decaying, saved):
    optimizer = SNGM(0.5, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=names)
    if saved:
        optimizer = SNGM.from_config(optimizer.get_config())
    assert build_and_decay(optimizer) == decaying


def test_exclusions_that_fit_nothing_are_told():
    """Exclusions from weight decay that apply to no variable raise a warning."""
    optimizer = SNGM(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias", "haed"])
    with pytest.warns(UserWarning, match=r"var_names=\['haed'\]\)` excludes nothing"):
        build_and_decay(optimizer)
    optimizer = SNGM(weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[keras.Variable(1.0, name="other")])
    with pytest.warns(UserWarning, match=r"var_list=.*not built with.*Received: \['other'\]"):
        build_and_decay(optimizer)


class Linear(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate schedule of a user. It multiplies the step, a Keras variable, by a float."""

    def __call__(self, step):
        return 0.1 + step * 0.01

    def get_config(self):
        return {}


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}])
def test_a_schedule_gets_what_keras_gives_it_under_accumulation(options):
    """A schedule is called with the number of the first micro-batch of each accumulation cycle."""
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3, 5], [0.1, 0.12, 0.14, 0.16])
    models = [
        trained_model(SNGM(rate, gradient_accumulation_steps=2), epochs=1, **options)
        for rate in (Linear(), rates)
    ]
    assert_same_weights(*models)
    assert int(models[0].optimizer._iterations) == 6


def test_averages_do_not_depend_on_counters_that_users_assign():
    """Moving averages begin with the first update that is not skipped, whatever `_iterations` is.

    A checkpoint of another program may assign to `_iterations` after skipped steps.
    """
    model = build_model()
    model.compile(optimizer=SNGM(use_ema=True, ema_momentum=0.5), loss="mse")
    model.fit(np.full_like(X, np.nan), Y, 8, verbose=0)
    assert int(model.optimizer.skipped_steps) == 6
    model.optimizer._iterations.assign(0)
    fit(model, epochs=1)
    averages = model.optimizer._model_variables_moving_average
    for weight, average in zip(values_of(model.trainable_variables), values_of(averages)):
        np.testing.assert_array_equal(weight, average)
    assert int(model.optimizer.averaged_updates) == 6


def test_averages_of_nothing_replace_nothing():
    """Moving averages that no update has begun do not replace the weights at the end of `fit`."""
    model = build_model()
    before = values_of(model.weights)
    model.compile(optimizer=SNGM(use_ema=True), loss="mse")
    model.fit(np.full_like(X, np.nan), Y, 8, verbose=0)
    assert_close(model.weights, before, 0.0)


def test_momentum_cannot_be_switched_on_after_building():
    optimizer = SNGM(momentum=0.0)
    optimizer.build([keras.Variable([1.0])])
    optimizer.momentum = 0.9
    with pytest.raises(ValueError, match="built with `momentum=0.0`.*Received: momentum=0.9"):
        optimizer.apply([keras.ops.ones(1)])


@whole
@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"gradient_accumulation_steps": 2}])
def test_float8_layers_train(options):
    """Gradients overwrite the scales of float8 layers, which have no momentum."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16), keras.layers.Dense(1)])
    model.layers[0].quantize("float8")
    model.compile(optimizer=SNGM(0.01, **options), loss="mse")
    logger = GradientNormLogger(update_ratio=True)
    x, y = np.ones((16, 16), "float32"), np.ones((16, 1), "float32")
    losses = model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[logger]).history["loss"]
    assert losses[1] < losses[0]


def test_coupled_weight_decay_of_nothing():
    """Coupled weight decay changes nothing if all variables are excluded from it."""
    weights = []
    for decay in (None, 0.1):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.set_weights([np.ones((2, 1)), np.zeros(1)])
        optimizer = SNGM(weight_decay=decay, decoupled_weight_decay=False)
        optimizer.exclude_from_weight_decay(var_names=["kernel", "bias"])
        model.compile(optimizer=optimizer, loss="mse")
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
        weights.append(model.get_weights())
    for got, expected in zip(*weights):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "of_gradient, of_variable", [((1,), (4,)), ((9,), (4,)), ((4,), (4, 1)), ((2, 2), (4,))]
)
def test_gradients_of_another_shape_are_refused(of_gradient, of_variable):
    variable = keras.Variable(np.ones(of_variable), dtype="float32")
    optimizer = SNGM()
    optimizer.build([variable])
    with pytest.raises(ValueError, match="must have the shape of its variable. Received: gradient"):
        optimizer.apply([keras.ops.ones(of_gradient)])
