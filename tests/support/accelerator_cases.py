"""Options and magnitudes with which the programs for accelerators are tested."""

from problems import random_arrays
from reference import ReferenceSNGM

SHAPES = [(4, 5), (), (3,), (300, 20)]
RATE = 0.1
OPTIONS = {
    "plain": {},
    "nesterov": {"nesterov": True},
    "blockwise": {"blockwise": True},
    "coupled decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "decoupled decay": {"weight_decay": 0.1},
    "clipnorm": {"clipnorm": 0.1},
    "global_clipnorm": {"global_clipnorm": 0.1},
    "clipvalue": {"clipvalue": 0.1},
    "loss_scale_factor": {"loss_scale_factor": 128.0},
    "use_ema": {"use_ema": True, "ema_overwrite_frequency": 2},
}
_CHANGE_NO_FIRST_STEP = ("loss_scale_factor", "use_ema")
MAGNITUDES = [0.0, 1e-34, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30, 1e35]


def scale_of(name):
    """Return the number that the gradients are multiplied by before they are given to SNGM."""
    return OPTIONS[name].get("loss_scale_factor", 1.0)


def expected_step(name, gradients):
    """Return a reference after a first step, from `random_arrays(SHAPES)`.

    Args:
        name: the options, a key of `OPTIONS`.
        gradients: the gradients, not multiplied by the loss scale.
    """
    options = {} if name in _CHANGE_NO_FIRST_STEP else OPTIONS[name]
    reference = ReferenceSNGM(random_arrays(SHAPES), **options)
    reference.step(gradients, RATE)
    return reference
