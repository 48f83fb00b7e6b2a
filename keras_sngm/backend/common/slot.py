"""A weight with the optimizer's state for it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Slot(NamedTuple):
    """A weight on one device, with the optimizer's state for it there.

    Attributes:
        weight: the weight, a variable of TensorFlow or a tensor of PyTorch, as all others.
        momentum: its momentum, or `None` if none is kept.
        average: its moving average, or `None` if none is kept.
        decays: whether weight decay applies to it.
        constraint: maps the weight to one that its layer allows, or `None`.
    """

    weight: Any
    momentum: Any
    average: Any
    decays: bool
    constraint: Callable[[Any], Any] | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.weight.shape)
