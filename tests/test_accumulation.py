"""Tests of gradient accumulation: the number of micro-batches does not change what is learned."""

import warnings

import keras
import numpy as np
import pytest

from keras_sngm import SNGM
from problems import (
    IN_GRAPH,
    assert_close,
    random_arrays,
    random_gradients,
    stepping,
    train,
    values_of,
    variables_of,
)
from reference import ReferenceSNGM
from selection import quick_only

UPDATES, BATCH = 6, 24
AVERAGED = {"use_ema": True, "ema_momentum": 0.8}


def dense():
    """Return two dense layers, the first of which has a constraint on its kernel."""
    return [
        keras.layers.Dense(5, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.7)),
        keras.layers.Dense(1),
    ]


def embedding():
    """Return the layers of a model of tokens, with an embedding."""
    return [keras.layers.Embedding(7, 3), keras.layers.Flatten(), keras.layers.Dense(1)]


def data(layers):
    """Return inputs and targets for a model that consists of `layers()`."""
    generator = np.random.default_rng(0)
    shape = (UPDATES * BATCH, 6)
    tokens = generator.integers(0, 7, shape).astype("int32")
    x = tokens if layers is embedding else generator.standard_normal(shape).astype("float32")
    return x, 2.0 + np.sin(x.sum(1, keepdims=True))


def trained(layers, micro_batches, rate=0.1, **options):
    """Return a model after one epoch with SNGM, each batch split into micro-batches.

    Args:
        layers: a function that returns the layers of the model.
        micro_batches: the number of micro-batches that each batch of 24 samples is split into.
        rate: the learning rate.
        **options: keyword arguments of SNGM.
    """
    keras.utils.set_random_seed(0)
    model = keras.Sequential(layers())
    if micro_batches > 1:
        options["gradient_accumulation_steps"] = micro_batches
    optimizer = SNGM(rate, jit_compile=False, **options)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer=optimizer, loss="mse")
    x, y = data(layers)
    model.fit(x, y, batch_size=BATCH // micro_batches, shuffle=False, verbose=0)
    return model


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"nesterov": True}], ids=str)
def test_a_variable_may_have_a_gradient_in_some_micro_batches_alone(options):
    start, (g, h) = random_arrays([(3,), (2, 2)]), random_gradients([(3,), (2, 2)], steps=2)
    cycles = [
        ([(g[0], None), (None, g[1])], (g[0] / 2, g[1] / 2)),
        ([(None, g[1]), (None, h[1])], (None, (g[1] + h[1]) / 2)),
        ([(h[0], h[1]), (g[0], None)], ((g[0] + h[0]) / 2, h[1] / 2)),
        ([(None, h[1]), (h[0], None)], (h[0] / 2, h[1] / 2)),
    ]
    results = []
    for steps in (2, None):
        variables = variables_of(start)
        optimizer = SNGM(0.1, gradient_accumulation_steps=steps, jit_compile=False, **options)
        optimizer.build(variables)
        for micro_batches, whole in cycles:
            for gradients in micro_batches if steps else [whole]:
                tensors = [None if g is None else keras.ops.convert_to_tensor(g) for g in gradients]
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Gradients do not exist")
                    optimizer.apply(tensors, variables)
        results.append(values_of([*variables, *optimizer.momentums]))
    for value, expected in zip(*results):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_a_cycle_that_began_elsewhere_is_known():
    """An optimizer that gets the state of another amid an accumulation cycle completes the cycle.

    The first variable has a gradient before the state is copied, the second variable after it.
    """
    results = []
    for resumed in (False, True):
        variables = variables_of(random_arrays([(3,), (2, 2)]))
        g, h = (keras.ops.convert_to_tensor(x, "float32") for x in random_arrays([(3,), (2, 2)], 1))
        first = SNGM(0.1, gradient_accumulation_steps=2)
        first.build(variables)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            first.apply([g, None], variables)
            second = first
            if resumed:
                second = SNGM(0.1, gradient_accumulation_steps=2)
                second.build(variables)
                for variable, value in zip(second.variables, values_of(first.variables)):
                    variable.assign(value)
            second.apply([None, h], variables)
        results.append(values_of(variables))
    for value, expected in zip(*results):
        np.testing.assert_array_equal(value, expected)


def cosine(steps):
    return keras.optimizers.schedules.CosineDecay(0.1, steps)


@pytest.mark.parametrize("micro_batches", quick_only([2, 8], quick=[2]))
@pytest.mark.parametrize(
    "layers, options",
    [
        (dense, {}),
        (dense, {"weight_decay": 0.1, "nesterov": True}),
        (dense, {"weight_decay": 0.1, "decoupled_weight_decay": False, "clipnorm": 0.1}),
        (dense, {"clipvalue": 0.1, **AVERAGED}),
        (dense, {"ema_overwrite_frequency": 2, "global_clipnorm": 0.1, **AVERAGED}),
        (dense, {"loss_scale_factor": 1024.0}),
        (dense, {"blockwise": True, "weight_decay": 0.1, "decoupled_weight_decay": False}),
        (embedding, {}),
        (embedding, {"loss_scale_factor": 3.0, "clipnorm": 0.1}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_micro_batches_train_like_the_whole_batch(layers, options, micro_batches):
    accumulated = trained(layers, micro_batches, **options)
    whole = trained(layers, 1, **options)
    assert_close(accumulated.weights, values_of(whole.weights), 1e-5)
    assert_close(accumulated.optimizer.momentums, values_of(whole.optimizer.momentums), 1e-5)
    np.testing.assert_allclose(
        accumulated.optimizer.gradient_norms, whole.optimizer.gradient_norms, rtol=1e-4
    )
    assert int(accumulated.optimizer.iterations) == int(whole.optimizer.iterations) == UPDATES


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_a_schedule_counts_micro_batches(micro_batches):
    """With k micro-batches per update, a schedule that is k times as long gives the same rates."""
    accumulated = trained(dense, micro_batches, cosine(micro_batches * UPDATES))
    whole = trained(dense, 1, cosine(UPDATES))
    assert_close(accumulated.weights, values_of(whole.weights), 1e-5)


def test_nothing_moves_until_the_last_micro_batch():
    variables = variables_of(random_arrays())
    optimizer = SNGM(0.1, gradient_accumulation_steps=3, use_ema=True, weight_decay=0.1)
    step = stepping(optimizer, variables)
    gradients = random_gradients(steps=3)
    for micro_batch in gradients[:2]:
        step(micro_batch)
        assert_close(variables, random_arrays(), 1e-7)
        assert float(optimizer.gradient_norm) == 0.0
    step(gradients[2])
    reference = ReferenceSNGM(random_arrays(), weight_decay=0.1)
    reference.step([sum(gs) / 3 for gs in zip(*gradients)], 0.1)
    assert_close(variables, reference.w, 1e-6)
    assert all(not np.any(v.numpy()) for v in optimizer._accumulated_gradients)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_accumulated_in_32_bits(dtype):
    """A sum of 1,000 gradients of 0.01 would stop growing too early in a dtype of 16 bits."""
    variables = variables_of([[0.0, 0.0]], dtype)
    optimizer = SNGM(1.0, momentum=0.0, gradient_accumulation_steps=1000)
    train(optimizer, variables, [[[0.01, 0.01]]] * 1000, IN_GRAPH)
    np.testing.assert_allclose(optimizer.gradient_norm, 0.01 * 2**0.5, rtol=5e-3)
