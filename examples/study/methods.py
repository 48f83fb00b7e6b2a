"""The methods that the study compares; the learning rate is all that is tuned of each."""

from collections.abc import Callable
from typing import Any

import keras

from common.baselines import LARS, Lamb, MomentumSGD
from keras_sngm import SNGM

DECAY_POWER = 1.1
WARM_UP = 0.05

Make = Callable[[Any, float], keras.optimizers.Optimizer]


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then polynomial decay to zero, or a constant rate.

    The greatest rate is the variable `peak`, so that a training step needs to be traced only
    once for all rates. Assign to it before training.

    Args:
        steps: the number of steps of the whole training.
        warm_up: the number of steps of the warm-up.
        power: the power of the decay; 0 for a constant rate.
    """

    def __init__(self, steps: int, warm_up: int, power: float = DECAY_POWER) -> None:
        self.steps = steps
        self.warm_up = warm_up
        self.power = power
        self.peak = keras.Variable(0.0, dtype="float32", trainable=False, name="peak")

    def __call__(self, step: Any) -> Any:
        step = keras.ops.cast(step, "float32")
        up = (step + 1.0) / max(self.warm_up, 1)
        left = 1.0 - (step - self.warm_up) / (self.steps - self.warm_up)
        down = keras.ops.power(keras.ops.clip(left, 0.0, 1.0), self.power)
        return self.peak * keras.ops.where(step < self.warm_up, up, down)


def sngm(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return SNGM(rate, weight_decay=weight_decay, decoupled_weight_decay=False)


def sngm_decoupled(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return SNGM(rate, weight_decay=weight_decay)


def sngm_blockwise(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return SNGM(rate, weight_decay=weight_decay, decoupled_weight_decay=False, blockwise=True)


def momentum_sgd(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return MomentumSGD(rate, momentum=0.9, coupled_weight_decay=weight_decay)


def clipped_sgd(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return MomentumSGD(rate, momentum=0.9, coupled_weight_decay=weight_decay, global_clipnorm=1.0)


def lars(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return LARS(rate, weight_decay=weight_decay)


def lamb(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    return Lamb(rate, coupled_weight_decay=weight_decay)


def adamw(rate: Any, weight_decay: float) -> keras.optimizers.Optimizer:
    """Return AdamW with Keras' default for its decoupled decay; `weight_decay` is ignored."""
    return keras.optimizers.AdamW(rate)


METHODS: dict[str, Make] = {
    "SNGM": sngm,
    "SNGM, warm-up": sngm,
    "SNGM, blockwise": sngm_blockwise,
    "momentum SGD": momentum_sgd,
    "momentum SGD, warm-up": momentum_sgd,
    "momentum SGD, clipped": clipped_sgd,
    "LARS": lars,
    "LARS, warm-up": lars,
    "LAMB": lamb,
    "AdamW": adamw,
    "SNGM, constant rate": sngm,
    "SNGM, decoupled decay": sngm_decoupled,
}

ABLATIONS = ("SNGM, constant rate", "SNGM, decoupled decay")
"""Variations of SNGM that are compared with it alone, and are not among "all" methods."""


def schedule(method: str, steps: int) -> Schedule:
    """Return the learning-rate schedule of a method for a training of `steps` steps."""
    warm_up = round(WARM_UP * steps) if method.endswith("warm-up") else 0
    return Schedule(steps, warm_up, 0.0 if method.endswith("constant rate") else DECAY_POWER)
