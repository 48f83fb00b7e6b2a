"""Tests of `suggest_learning_rate`: what it tries, what it returns, and that it leaves no trace."""

import math
import random
import warnings

import keras
import numpy as np
import pytest

from foreign_models import (
    MODELS,
    OPTIMIZERS,
    TOKENS,
    X,
    Y,
    build_optimizers,
    functional,
    multi,
    sequential,
)
from keras_sngm import SNGM, LearningRateSuggestion, suggest_learning_rate, typical_learning_rate
from keras_sngm.suggestion import probe, search
from keras_sngm.suggestion.suggest import EndLosses
from problems import BACKEND
from selection import quick_only, whole

BATCH, EPOCHS = 8, 3
ARGUMENTS = {"batch_size": BATCH, "epochs": EPOCHS, "verbose": 0}
# Models that are as large as this have no doubts but that of their length.
LENGTH = "updates in all"


def suggested(model, x=X, y=Y, **arguments):
    """Return a suggestion for a model, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return suggest_learning_rate(model, x, y, **{**ARGUMENTS, **arguments})


def variables_of(model):
    """Return all variables of a model, its metrics and its optimizers, each once."""
    others = [model.other] if hasattr(model, "other") else []
    of_optimizers = [v for one in (model.optimizer, *others) for v in one.variables]
    found = [*model.variables, *model.metrics_variables, *of_optimizers]
    return list({id(variable): variable for variable in found}.values())


def state_of(model):
    """Return the values of all variables, and the attributes of model and optimizer."""
    values = [keras.ops.convert_to_numpy(variable).copy() for variable in variables_of(model)]
    return values, dict(vars(model)), dict(vars(model.optimizer))


def random_states():
    """Return the next values that global random generators would give, as they are now."""
    python, numpy = random.getstate(), np.random.get_state()
    drawn = [random.random(), np.random.random()]
    random.setstate(python)
    np.random.set_state(numpy)
    return drawn


def assert_unchanged(model, before):
    """Assert that the state of a model is what it was, to the bit."""
    values, *attributes = state_of(model)
    assert len(values) == len(before[0])
    for value, wanted in zip(values, before[0], strict=True):
        np.testing.assert_array_equal(value, wanted)
    for now, then in zip(attributes, before[1:], strict=True):
        assert now.keys() == then.keys()
        assert [name for name in now if now[name] is not then[name]] == []


def trained(make, optimizer, x, ask):
    """Return the state of a new model after two epochs, before which a rate is asked for or not.

    Args:
        make: makes the model for an optimizer.
        optimizer: makes the optimizer.
        x: the inputs.
        ask: whether to ask for a learning rate.
    """
    keras.utils.set_random_seed(3)
    model = make(optimizer())
    if hasattr(model, "other"):
        build_optimizers(model)
    if ask:
        suggested(model, x)
    losses = model.fit(x, Y, BATCH, epochs=2, verbose=0).history["loss"]
    return losses, state_of(model)[0], random_states()


SINGLE = [name for name in OPTIMIZERS if name != "MultiOptimizer"]


@pytest.mark.parametrize(
    "kind", quick_only(MODELS, ["Sequential without Input", "subclassed", "custom train_step"])
)
def test_training_goes_on_as_if_nobody_had_asked(kind):
    """A model trains after a suggestion as without one, to the bit, built or not."""
    results = [
        trained(MODELS[kind].make, OPTIMIZERS["SNGM"], MODELS[kind].x, ask) for ask in (False, True)
    ]
    (losses, values, drawn), (losses_asked, values_asked, drawn_asked) = results
    assert losses == losses_asked
    assert drawn == drawn_asked
    assert len(values) == len(values_asked)
    for value, wanted in zip(values_asked, values, strict=True):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize(
    "kind, optimizer",
    quick_only(
        [*(("Sequential", name) for name in SINGLE), *((k, "SNGM") for k in MODELS if k == "GAN")],
        [("Sequential", "SNGM, averaged and accumulated"), ("Sequential", "Adam, loss scaled")],
    ),
)
def test_all_is_afterwards_as_it_was(kind, optimizer):
    """Every array and every attribute of a model in training is the same after a suggestion."""
    make, x = MODELS[kind]
    model = make(OPTIMIZERS[optimizer]())
    if kind == "GAN":
        build_optimizers(model)
    model.fit(x, Y, BATCH, epochs=1, verbose=0)
    before, drawn = state_of(model), random_states()
    suggested(model, x)
    assert_unchanged(model, before)
    assert random_states() == drawn


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [1, 30])
def test_all_is_as_it_was_after_an_interruption(monkeypatch, error, after):
    """An exception in the first trial or a later one passes through and changes nothing."""
    calls = []
    take = EndLosses.on_train_batch_end

    def interrupted(self, batch, logs=None):
        calls.append(batch)
        if len(calls) == after:
            raise error
        take(self, batch, logs)

    model = sequential(SNGM(0.05))
    model.fit(X, Y, BATCH, epochs=1, verbose=0)
    before, drawn = state_of(model), random_states()
    monkeypatch.setattr(EndLosses, "on_train_batch_end", interrupted)
    with pytest.raises(error):
        suggested(model)
    assert_unchanged(model, before)
    assert random_states() == drawn
    model.fit(X, Y, BATCH, verbose=0)


def noisy(optimizer, **arguments):
    """Return a model with dropout, whose training depends on its seeds."""
    layers = [keras.Input((6,)), keras.layers.Dense(8), keras.layers.Dropout(0.5, seed=1)]
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", **arguments)
    return model


def test_every_trial_begins_in_the_same_state():
    """A rate has the same loss whatever was tried before it."""
    keras.utils.set_random_seed(0)
    model = noisy(SNGM())
    losses = suggested(model, start=0.1).losses
    for rate in list(losses)[:3]:
        assert suggested(model, start=rate).losses[rate] == losses[rate]


def test_the_same_call_suggests_the_same_rate():
    keras.utils.set_random_seed(0)
    model = noisy(SNGM())
    first, second, other = (suggested(model, seed=seed) for seed in (5, 5, 6))
    assert first == second
    assert first.losses != other.losses


def test_a_batch_and_its_micro_batches_have_the_same_rate():
    """Losses of whole batches and of micro-batches agree, and so do the suggested rates."""
    suggestions = []
    for micro_batches in (None, 2, 4):
        keras.utils.set_random_seed(0)
        model = sequential_without_statistics(SNGM(gradient_accumulation_steps=micro_batches))
        suggestions.append(suggested(model, batch_size=16 // (micro_batches or 1), epochs=8))
    assert len({one.learning_rate for one in suggestions}) == 1
    for one in suggestions[1:]:
        np.testing.assert_allclose(
            list(one.losses.values()), list(suggestions[0].losses.values()), rtol=1e-4
        )


def sequential_without_statistics(optimizer):
    """Return a model whose loss does not depend on how a batch is divided."""
    layers = [keras.Input((6,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer, loss="mse")
    return model


def test_the_rate_decays_to_zero_over_all_updates():
    """Trials use the polynomial decay of the study, from any number of earlier steps."""
    from keras_sngm.backend.common.trials import Decay

    rate = keras.Variable(0.5)
    decay = Decay(rate, first=7, steps=10)
    got = [float(keras.ops.convert_to_numpy(decay(step))) for step in (7, 12, 17, 20)]
    np.testing.assert_allclose(got, [0.5, 0.5 * 0.5**1.1, 0.0, 0.0], rtol=1e-6)


def test_a_trial_is_the_training_that_it_stands_for():
    """The loss of a rate is that of `fit` with a decaying schedule on the same batches."""
    steps = EPOCHS * len(X) // BATCH
    keras.utils.set_random_seed(0)
    model = sequential(SNGM(0.05))
    suggestion = suggested(model, shuffle=False)
    rate = suggestion.start
    schedule = keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0, power=1.1)
    keras.utils.set_random_seed(0)
    twin = sequential(SNGM(schedule))
    losses = []

    class Losses(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if BACKEND == "jax":
                self.model.jax_state_sync()
            self.model.reset_metrics()

        def on_train_batch_end(self, batch, logs=None):
            losses.append(float(logs["loss"]))

    twin.fit(X, Y, BATCH, epochs=EPOCHS, shuffle=False, verbose=0, callbacks=[Losses()])
    assert len(losses) == steps
    assert suggestion.losses[rate] == pytest.approx(np.mean(losses[-5:]), rel=1e-4)


class Stateful(keras.Model):
    """A model whose state is where Keras does not list it, or in attributes of its layers."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)
        self.head = keras.layers.Dense(1)
        self.kept = {"calls": [keras.Variable(0.0, trainable=False)]}

    def call(self, inputs):
        (calls,) = self.kept["calls"]
        calls.assign_add(1.0)
        return self.head(self.dense(inputs)) * (1.0 + 0.1 / calls)


def stateful():
    model = Stateful()
    model.compile(SNGM(), loss="mse")
    return model


def recurrent():
    layers = [keras.layers.LSTM(3, stateful=True), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3, 2), batch_size=BATCH), *layers])
    model.compile(SNGM(), loss="mse")
    return model


def resumed():
    """Return a model as `BackupAndRestore` leaves it."""
    model = sequential_without_statistics(SNGM())
    model._initial_epoch = 1
    return model


STATEFUL = {"variables in containers": (stateful, X), "resumed": (resumed, X)}
# On PyTorch Keras cannot train recurrent layers that are stateful.
if BACKEND != "torch":
    STATEFUL["states of recurrent layers"] = (recurrent, X.reshape(-1, 3, 2))


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_that_keras_does_not_list(kind):
    make, x = STATEFUL[kind]
    results = []
    for ask in (False, True):
        keras.utils.set_random_seed(3)
        model = make()
        if ask:
            suggested(model, x, shuffle=False)
        losses = model.fit(x, Y, BATCH, epochs=3, shuffle=False, verbose=0).history["loss"]
        results.append([losses, random.random(), np.random.random()])
    assert results[0] == results[1]


class Holder:
    """An object with random generators."""

    def __init__(self):
        self.python = random.Random(0)
        self.seeds = keras.random.SeedGenerator(0)


class Batches(keras.utils.PyDataset):
    """Dataset with the batches of `X` and `Y`, which draws from a random generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)
        self.legacy = np.random.RandomState(0)
        self.held = {"by": [Holder()]}

    def __len__(self):
        return len(X) // BATCH

    def __getitem__(self, index):
        self.generator.random(), self.legacy.random_sample(), random.random()
        self.held["by"][0].python.random()
        keras.random.normal((), seed=self.held["by"][0].seeds)
        span = slice(index * BATCH, (index + 1) * BATCH)
        return X[span], Y[span]

    def drawn(self):
        """Return what the generators draw next."""
        (holder,) = self.held["by"]
        numbers = [self.generator.random(), self.legacy.random_sample(), holder.python.random()]
        return [*numbers, *keras.ops.convert_to_numpy(holder.seeds.state)]


def tensorflow_dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH)


def torch_loader():
    import torch

    pairs = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return torch.utils.data.DataLoader(pairs, BATCH)


DATASETS = {"PyDataset": Batches}
if BACKEND == "tensorflow":
    DATASETS["tf.data"] = tensorflow_dataset
if BACKEND == "torch":
    DATASETS["DataLoader"] = torch_loader


@pytest.mark.parametrize("kind", DATASETS)
def test_datasets_give_the_rate_of_their_arrays(kind):
    keras.utils.set_random_seed(0)
    model = noisy(SNGM())
    of_arrays = suggested(model, shuffle=False)
    of_dataset = suggested(model, DATASETS[kind](), None, batch_size=None, shuffle=False)
    assert of_dataset.start == of_arrays.start
    assert of_dataset.updates == of_arrays.updates == EPOCHS * len(X) // BATCH
    np.testing.assert_allclose(
        list(of_dataset.losses.values()), list(of_arrays.losses.values()), rtol=1e-4
    )


def test_random_generators_of_a_dataset_are_set_back():
    data = Batches()
    expected = Batches().drawn()
    suggested(noisy(SNGM()), data, None, batch_size=None)
    assert data.drawn() == expected


def test_inputs_of_all_structures_and_weights_of_samples():
    """Dictionaries of arrays, weights of samples and of classes reach the training step."""
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((3,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    model = keras.Model(inputs, keras.layers.Dense(1)(joined))
    model.compile(SNGM(), loss="mse")
    x = {"a": X[:, :3].astype("float64"), "b": X[:, 3:]}
    plain = suggested(model, x)
    weighted = suggested(model, x, sample_weight=np.linspace(0.0, 1.0, len(X)))
    assert plain.losses != weighted.losses
    y = (Y > 0).astype("int32")
    by_class = [suggested(model, x, y, class_weight={0: 1.0, 1: w}).losses for w in (1.0, 3.0)]
    assert by_class[0] != by_class[1]


def test_lists_and_inputs_that_are_left_out():
    """Lists of inputs, targets and weights, some of them `None`, are as for `fit`."""
    inputs = [keras.Input((3,)), keras.Input((3,))]
    joined = keras.layers.Concatenate()(inputs)
    model = keras.Model(inputs, [keras.layers.Dense(1)(joined), keras.layers.Dense(2)(joined)])
    model.compile(SNGM(), loss=["mse", "mse"])
    x, y = [X[:, :3], X[:, 3:]], [Y, X[:, :2]]
    plain = suggested(model, x, y)
    weights = [np.linspace(0.0, 1.0, len(X)), np.ones(len(X))]
    assert suggested(model, x, y, sample_weight=weights).losses != plain.losses
    model.compile(SNGM(), loss=["mse", None])
    assert suggested(model, x, [Y, None]).losses != plain.losses


def test_batches_in_memory_that_is_used_again():
    class Reusing(Batches):
        """Dataset that reads each batch into the same arrays."""

        x, y = np.empty((BATCH, 6), "float32"), np.empty((BATCH, 1), "float32")

        def __getitem__(self, index):
            self.x[:], self.y[:] = super().__getitem__(index)
            return self.x, self.y

    keras.utils.set_random_seed(0)
    model = sequential_without_statistics(SNGM())
    expected = suggested(model, Batches(), None, batch_size=None)
    assert suggested(model, Reusing(), None, batch_size=None) == expected


def test_the_batch_size_of_a_given_number_of_steps():
    """As in `fit`, arrays are divided into that number of batches."""
    model = sequential_without_statistics(SNGM())
    by_steps = suggested(model, batch_size=None, steps_per_epoch=len(X) // BATCH)
    assert by_steps == suggested(model)


@whole
def test_tables_of_pandas():
    import pandas

    keras.utils.set_random_seed(0)
    model = noisy(SNGM())
    table = suggested(model, pandas.DataFrame(X), pandas.Series(Y[:, 0]))
    assert table == suggested(model)


@pytest.mark.parametrize("name", ["SGD", "LAMB", "schedule", "scaled"])
def test_other_optimizers_start_at_their_own_rate(name):
    optimizer = {
        "SGD": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
        "LAMB": lambda: keras.optimizers.Lamb(0.02),
        "schedule": lambda: keras.optimizers.Adam(
            keras.optimizers.schedules.ExponentialDecay(0.02, 100, 0.5)
        ),
        "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.02)),
    }[name]()
    model = sequential_without_statistics(optimizer)
    assert suggested(model).start == pytest.approx(0.02)
    assert float(keras.ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(0.02)


def test_sngm_starts_at_the_formula():
    model = sequential_without_statistics(SNGM(gradient_accumulation_steps=2))
    assert suggested(model, epochs=8).start == typical_learning_rate(len(X) / BATCH / 2)


def run_of(loss):
    """Return the losses of all exponents that a search tries, where `loss` tells each one's."""
    losses = {}
    while (exponent := search.next_exponent(losses)) is not None:
        assert search.expected_rates(losses) > len(losses)
        losses[exponent] = loss(exponent)
    return losses


@pytest.mark.parametrize("best", range(-6, 7))
def test_the_search_finds_the_best_rate(best):
    losses = run_of(lambda k: abs(k - best))
    assert search.best_exponent(losses) == best
    assert search.is_bracketed(losses)
    assert len(losses) <= search.MOST_RATES
    assert search.expected_rates(losses) == len(losses)
    assert {best - 1, best + 1} <= set(losses)


def test_the_suggested_rate_leans_to_the_better_neighbour():
    """It is the best rate if the next higher is better than the next lower, else lower."""
    assert search.suggested_rate({-1: 3.0, 0: 1.0, 1: 2.0}, 0.5) == 0.5
    assert search.suggested_rate({-1: 2.0, 0: 1.0, 1: 3.0}, 0.5) == pytest.approx(0.5**1.5)
    assert search.suggested_rate({0: 1.0}, 0.5) == pytest.approx(0.5**1.5)


def test_the_search_ends_where_there_is_no_best_rate():
    for slope in (-1, 1):
        losses = run_of(lambda k, slope=slope: slope * k)
        assert len(losses) == search.MOST_RATES
        assert not search.is_bracketed(losses)
    losses = run_of(lambda k: math.inf if k > -4 else -k)
    assert search.best_exponent(losses) == -4
    assert search.best_exponent(run_of(lambda k: 1.0)) < 0


def test_a_loss_that_is_not_finite_is_infinite():
    """Rates at which training fails count as worst, and are among the results."""
    keras.utils.set_random_seed(0)
    model = sequential_without_statistics(keras.optimizers.SGD())
    model.compile(model.optimizer, loss=lambda y, p: keras.ops.exp((y - p) ** 2))
    losses = suggested(model, start=0.1).losses
    assert math.inf in losses.values()
    assert math.isfinite(min(losses.values()))
    with pytest.raises(ValueError, match=r"not finite at any learning rate from 3.91e\+05 to"):
        suggested(model, start=1e8)


def doubts(model, x=X, y=Y, **arguments):
    """Return the warnings of a suggestion, which are its doubts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        suggestion = suggest_learning_rate(model, x, y, **{**ARGUMENTS, **arguments})
    assert [str(one.message) for one in caught if one.filename == __file__] == suggestion.doubts
    return suggestion.doubts


def test_doubts():
    """Each reason not to trust a suggestion is a warning."""
    model = sequential(SNGM())
    assert any("batch statistics of normalized" in one for one in doubts(model))
    assert any(LENGTH in one for one in doubts(model))
    tables = keras.Sequential([keras.layers.Embedding(7, 4), keras.layers.Flatten()])
    tables.add(keras.layers.Dense(1))
    tables.compile(SNGM(), loss="mse")
    assert any("in embeddings" in one for one in doubts(tables, TOKENS))
    model = sequential_without_statistics(SNGM())
    assert any("at an edge" in one for one in doubts(model, start=1e-6))
    assert not any("at an edge" in one for one in doubts(model))


def test_no_doubts():
    keras.utils.set_random_seed(0)
    model = sequential_without_statistics(SNGM())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        suggestion = suggest_learning_rate(model, X, 9.0 * Y, len(X), 100, verbose=0)
    assert suggestion.doubts == []
    assert suggestion.updates == 100
    best = min(suggestion.losses, key=suggestion.losses.get)
    assert best / suggestion.learning_rate == pytest.approx(1.0) or (
        best / suggestion.learning_rate == pytest.approx(math.sqrt(2))
    )
    assert float(suggestion) == suggestion.learning_rate
    assert list(suggestion.losses) == sorted(suggestion.losses)


def test_losses_that_differ_by_less_than_their_noise():
    assert probe.are_alike([1.0, 1.2, 0.9, 1.1], [1.1, 1.1, 1.0, 1.0])
    assert not probe.are_alike([1.0, 1.2, 0.9, 1.1], [2.0, 2.2, 1.9, 2.1])
    assert not probe.are_alike([1.0], [1.0, 1.0])


class WithoutLoss(keras.Model):
    """A model whose training step returns no loss."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1)

    def call(self, inputs):
        return self.dense(inputs)

    def train_step(self, *arguments):
        result = super().train_step(*arguments)
        if BACKEND == "jax":
            return {"other": result[0]["loss"]}, result[1]
        return {"other": result["loss"]}


class WithoutStep(WithoutLoss):
    """A model whose training step does not call the optimizer."""

    def train_step(self, *arguments):
        loss = keras.ops.mean(self.dense.kernel.value) if BACKEND != "jax" else 1.0
        return ({"loss": loss}, arguments[0]) if BACKEND == "jax" else {"loss": loss}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": iter([(X, Y)]), "y": None}, "`x` must be data that can be read again"),
        ({"x": Batches()}, "`y` and `sample_weight` must be None"),
        ({"y": Y[1:]}, "same number of samples"),
        ({"epochs": 0}, "`epochs` must be an integer >= 1. Received: epochs=0"),
        ({"batch_size": 2.0}, "`batch_size` must be an integer >= 1. Received: batch_size=2.0"),
        ({"start": 0.0}, "`start` must be a positive finite number. Received: start=0.0"),
        ({"batch_size": 48}, "at least 5 updates in all. Received: 3 in epochs=3"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        suggest_learning_rate(
            sequential_without_statistics(SNGM()), **{"x": X, "y": Y, **ARGUMENTS, **change}
        )


def test_models_that_cannot_be_trained_are_refused():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="`model` must be compiled with a Keras optimizer"):
        suggested(model)
    model = WithoutLoss()
    model.compile(SNGM(), loss="mse")
    with pytest.raises(ValueError, match="must return a value named 'loss'"):
        suggested(model)
    model = WithoutStep()
    model.compile(SNGM(), loss="mse")
    with pytest.raises(ValueError, match="must be trained by the optimizer that it is compiled"):
        suggested(model)
    if hasattr(keras.optimizers, "MultiOptimizer"):
        with pytest.raises(ValueError, match="one optimizer for all variables"):
            suggested(functional(multi()))


def test_the_progress_bar_tells_what_is_left(capsys):
    suggested(sequential_without_statistics(SNGM()), verbose="auto")
    shown = capsys.readouterr().out
    assert "/update" in shown
    assert "learning_rate:" in shown
    assert "loss:" in shown


@whole
def test_plot():
    import matplotlib.pyplot as plt

    suggestion = LearningRateSuggestion(0.1, 0.2, {0.1: 1.0, 0.2: 0.5, 0.4: math.inf}, 100, [])
    axes = suggestion.plot()
    assert axes.get_xscale() == "log"
    assert list(axes.lines[0].get_ydata()) == [1.0, 0.5]
    assert list(axes.lines[1].get_xdata()) == [0.4]
    assert suggestion.plot(ax=axes) is axes
    plt.close("all")


def test_plot_needs_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="`plot` needs matplotlib"):
        LearningRateSuggestion(0.1, 0.1, {0.1: 1.0}, 100, []).plot()


def test_the_formula():
    assert typical_learning_rate(1) == 0.7
    assert typical_learning_rate(16.0) == pytest.approx(0.35)
    for wrong in (0, -1.0, math.inf, math.nan, True, "4"):
        with pytest.raises(ValueError, match="`updates_per_epoch` must be a positive finite"):
            typical_learning_rate(wrong)
