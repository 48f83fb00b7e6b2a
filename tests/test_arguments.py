"""Tests of SNGM's arguments: bad ones are refused at once, in Keras' wording."""

import math

import keras
import numpy as np
import pytest

from keras_sngm import SNGM

BAD = [
    ("momentum", -0.1),
    ("momentum", 1.0),
    ("momentum", math.nan),
    ("momentum", 0),
    ("momentum", "0.9"),
    ("momentum", None),
    ("learning_rate", -0.1),
    ("learning_rate", math.inf),
    ("learning_rate", math.nan),
    ("learning_rate", "fast"),
    ("learning_rate", 1),
    ("weight_decay", -1e-4),
    ("weight_decay", math.nan),
    ("weight_decay", "1e-4"),
    ("clipnorm", 0.0),
    ("clipnorm", -1.0),
    ("clipvalue", -1.0),
    ("clipvalue", math.inf),
    ("global_clipnorm", -1.0),
    ("loss_scale_factor", 0.0),
    ("gradient_accumulation_steps", -1),
    ("gradient_accumulation_steps", 0),
    ("gradient_accumulation_steps", 1),
    ("gradient_accumulation_steps", 2.5),
    ("jit_compile", "yes"),
    ("jit_compile", None),
]


@pytest.mark.parametrize("name, value", BAD)
def test_bad_values_are_named(name, value):
    """The error about a bad argument gives the argument's name and value."""
    with pytest.raises(ValueError) as raised:
        SNGM(**{name: value})
    assert f"`{name}`" in str(raised.value)
    assert f"{name}={value}" in str(raised.value)


@pytest.mark.parametrize("ema", [{"ema_momentum": 1.5}, {"ema_overwrite_frequency": 1.5}])
def test_bad_averages_are_refused(ema):
    with pytest.raises(ValueError, match="`ema_"):
        SNGM(use_ema=True, **ema)


@pytest.mark.parametrize(
    "clips",
    [
        {"clipnorm": 1.0, "clipvalue": 1.0},
        {"clipnorm": 1.0, "global_clipnorm": 1.0},
        {"clipvalue": 1.0, "global_clipnorm": 1.0},
    ],
)
def test_two_clip_arguments_at_once_are_refused(clips):
    with pytest.raises(ValueError, match="Only one of `clipnorm`, `clipvalue` and"):
        SNGM(**clips)


def test_numbers_of_numpy_are_numbers():
    """Arguments may be NumPy scalars."""
    optimizer = SNGM(weight_decay=np.float32(0.25), clipnorm=np.int64(2))
    assert (optimizer.weight_decay, optimizer.clipnorm) == (0.25, 2)


def test_complex_variables_are_refused():
    variable = keras.Variable(np.ones(2), dtype="complex64", name="wave")
    with pytest.raises(ValueError, match="real variables.*'wave'.*complex64"):
        SNGM().build([variable])


def test_unknown_keywords_are_refused():
    with pytest.raises(ValueError, match="not recognized.*blockwize"):
        SNGM(blockwize=True)


def test_defaults():
    keras.utils.clear_session()  # The session counts the names of optimizers.
    optimizer = SNGM()
    assert float(optimizer.learning_rate) == pytest.approx(0.2)
    assert optimizer.get_config() == {
        "name": "sngm",
        "learning_rate": pytest.approx(0.2),
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": None,
        "decoupled_weight_decay": True,
        "clipnorm": None,
        "clipvalue": None,
        "global_clipnorm": None,
        "use_ema": False,
        "ema_momentum": 0.99,
        "ema_overwrite_frequency": None,
        "loss_scale_factor": None,
        "gradient_accumulation_steps": None,
        "jit_compile": "auto",
        "noise_scale_batch_size": None,
        "noise_scale_momentum": 0.99,
        "blockwise": False,
    }


@pytest.mark.parametrize("value", [0.0, 1e-300, 0.5, np.float64(0.5)])
def test_the_edges_of_the_ranges_are_allowed(value):
    SNGM(learning_rate=value, momentum=value, weight_decay=value)


def test_state_can_be_read_before_the_first_step():
    assert float(SNGM().gradient_norm) == 0.0
    assert int(SNGM().skipped_steps) == 0
