"""Tests of the chunks in which XLA updates large variables; here chunks are small."""

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM
from keras_sngm.backend.tensorflow import xla_order as tensorflow_order
from problems import (
    FAR_FROM_ZERO,
    TWICE,
    assert_follows_the_reference,
    random_arrays,
    random_gradients,
    train,
    values_of,
    variables_of,
)
from processes import run_python
from selection import whole


@pytest.fixture(autouse=True)
def chunk(monkeypatch):
    """Lower the least size of a chunk to 24 elements."""
    monkeypatch.setattr(tensorflow_order, "_CHUNK_SIZE", 24)


def test_chunks_are_as_small_as_may_be():
    slices = tensorflow_order.chunks([1, 3, 20, 24, 30, 5, 6])
    assert slices == [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 7)]


@pytest.mark.parametrize("sizes", [[], [0], [1], [24], [0, 24, 0], [24] * 5, [5] * 100], ids=str)
def test_chunks_have_all_variables(sizes):
    """Chunks contain each variable once, in order, and all but the last have the least size."""
    slices = tensorflow_order.chunks(sizes)
    assert list(itertools.chain(*(sizes[chunk] for chunk in slices))) == sizes
    assert all(sum(sizes[chunk]) >= 24 for chunk in slices[:-1])


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"momentum": 0.0}, {"clipnorm": 1.5}, {"clipvalue": 0.3}],
    ids=str,
)
def test_a_step_in_chunks_agrees_with_the_reference(options):
    gradients = random_gradients(TWICE, 12)
    assert_follows_the_reference(FAR_FROM_ZERO, gradients, None, jit_compile=True, **options)


@pytest.mark.parametrize("use_ema", [False, True])
def test_mixed_dtypes_are_updated_in_chunks(monkeypatch, use_ema):
    def trained_values():
        dtypes = ["float32", "float64", "bfloat16", "float16", "float32"] * 2
        variables = variables_of(FAR_FROM_ZERO, dtypes)
        optimizer = SNGM(0.1, use_ema=use_ema, jit_compile=True)
        train(optimizer, variables, random_gradients(TWICE, 5))
        return values_of(variables) + values_of(optimizer.momentums)

    in_chunks = trained_values()
    monkeypatch.setattr(tensorflow_order, "_CHUNK_SIZE", 10**9)
    for value, expected in zip(in_chunks, trained_values(), strict=True):
        np.testing.assert_array_equal(value, expected)


@whole
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -0.0])
def test_what_a_chunk_waits_for_may_be_any_number(value):
    """A weight that is not finite does not spoil the weights of later chunks."""
    start = [np.full_like(array, value) for array in FAR_FROM_ZERO[:5]] + FAR_FROM_ZERO[5:]
    variables = variables_of(start)
    others = variables_of(FAR_FROM_ZERO)
    for each in (variables, others):
        train(SNGM(0.1, jit_compile=True), each, random_gradients(TWICE, 3))
    for variable, expected in zip(variables[5:], others[5:], strict=True):
        np.testing.assert_array_equal(variable, expected)


def test_a_skipped_step_in_chunks_changes_no_bit():
    start = [*random_arrays(TWICE[:-1]), np.full(TWICE[-1], -0.0)]
    variables = variables_of(start)
    optimizer = SNGM(0.1, jit_compile=True)
    train(optimizer, variables, random_gradients(TWICE, 2))
    before = [value.tobytes() for value in values_of(variables + optimizer.momentums)]
    (gradients,) = random_gradients(TWICE, 1)
    gradients[0] = np.array(np.inf)
    optimizer.apply([tf.constant(g, tf.float32) for g in gradients], variables)
    assert [value.tobytes() for value in values_of(variables + optimizer.momentums)] == before


def test_xla_keeps_the_order(tmp_path):
    """XLA computes momentum and weight of a variable before it begins the one after the next."""
    shapes = [(1000, 1000 + i) for i in range(6)]
    run_python(
        "-c",
        f"""
import tensorflow as tf
from keras_sngm import SNGM
variables = [tf.Variable(tf.ones(shape)) for shape in {shapes}]
SNGM().apply([variable + 1.0 for variable in variables], variables)
""",
        XLA_FLAGS=f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
    )
    (path,) = tmp_path.glob("*after_optimizations.txt")
    entry = path.read_text().split("ENTRY")[1]
    loops = re.findall(r"= f32\[1000,(\d+)\]\S* (?:fusion|call)\(", entry)
    assert len(loops) == 2 * len(shapes)
    for i in range(len(shapes) - 2):
        weight_is_updated = loops.index(str(1000 + i), loops.index(str(1000 + i)) + 1)
        assert weight_is_updated < loops.index(str(1002 + i))
