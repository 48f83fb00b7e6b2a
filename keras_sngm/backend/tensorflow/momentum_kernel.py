"""Updates by TensorFlow's own kernels for momentum and descent, variable by variable.

For small variables that is quicker than an XLA program, which takes some
microseconds for each of its arguments, and nothing has to be compiled. The kernel
wants the normalized gradient as a tensor, so for large variables XLA, which needs
none, is the better choice, unless the gradient is changed before it is normalized:
XLA would change it twice, for the norm and for the update, and is slow at that norm.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.tensorflow.tensors import arithmetic_dtype
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients, Rule, changes_gradient

# The greatest numbers of elements up to which the kernel is as quick as XLA, without and with
# a moving average, which XLA updates in the same pass; and up to which copying several
# gradients into one tensor is quicker than calling every operation for each of them.
# Measured on two cores, see benchmarks/step_time.py.
_LARGEST = 300_000
_LARGEST_AVERAGED = 16_384
_LARGEST_STACKED = 4096


class Bundle(NamedTuple):
    """Variables that one call updates: one, or several small ones of one shape, dtype and device.

    Attributes:
        indices: the index of each variable among those that have a gradient.
        slots: the variables with their state.
    """

    indices: tuple[int, ...]
    slots: tuple[Slot, ...]

    def joined(self, gradients: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the gradients as one tensor, with one row each if the variables are several."""
        return tf.stack(gradients) if len(self.slots) > 1 else gradients[0]

    def update(
        self, rule: Rule, coefficients: Coefficients, normalized: Normalization, joined: tf.Tensor
    ) -> None:
        """Update the bundle's variables and momenta, in place.

        A step that is skipped multiplies the momentum by 1 and adds 0 to it, and
        changes the weight by 0 times the momentum.

        Args:
            rule: the hyper-parameters.
            coefficients: the factors of this step, in the dtype of the variables.
            normalized: how to normalize, with divisors for these variables alone and a
                `prescale` of 1.
            joined: the gradients, as the method `joined` returns them.
        """
        divisor = tf.where(
            coefficients.is_taken, normalized.divisor, tf.zeros_like(normalized.divisor)
        )
        several = len(self.slots) > 1
        if divisor.shape.rank == 1:
            rows = [-1] if several else []
            divisor = tf.reshape(divisor, rows + [1] * self.slots[0].weight.shape.rank)
        direction = tf.math.divide_no_nan(joined, divisor)
        directions = tf.unstack(direction) if several else [direction]
        for slot, slot_direction in zip(self.slots, directions, strict=True):
            if slot.decays and rule.weight_decay is not None and rule.decoupled_weight_decay:
                _descend(slot, coefficients.learning_rate * rule.weight_decay, slot.weight)
            if slot.momentum is None:
                _descend(slot, coefficients.learning_rate, slot_direction)
            else:
                tf.raw_ops.ResourceApplyMomentum(
                    var=slot.weight.handle,
                    accum=slot.momentum.handle,
                    lr=coefficients.learning_rate,
                    grad=slot_direction,
                    momentum=coefficients.momentum,
                    use_nesterov=rule.nesterov,
                )


def updated_by_kernel(rule: Rule, slots: Sequence[Slot], jit_compile: bool | str) -> list[bool]:
    """Return for each variable on a CPU whether TensorFlow's kernel is to update it.

    With `jit_compile=False` it does wherever it can; with `"auto"` where it is as quick
    as XLA; with `True` never.
    """
    if len({arithmetic_dtype(slot.weight.dtype) for slot in slots}) > 1:
        return [False] * len(slots)
    choice = [_suits(slot) and slot.size <= _limit(rule, slot, jit_compile) for slot in slots]
    if jit_compile and changes_gradient(rule) and not all(choice):
        # XLA then takes the norm of the whole gradient, and so must get all variables.
        return [False] * len(slots)
    return choice


def bundled(slots: Sequence[Slot], indices: Sequence[int]) -> list[Bundle]:
    """Put slots into bundles, small variables that are alike into one.

    Args:
        slots: the slots of all variables that have a gradient.
        indices: the indices in `slots` of those to put into bundles.

    Returns:
        The bundles, those of one variable first.
    """
    groups: dict[Hashable, list[int]] = {}
    for i in indices:
        weight = slots[i].weight
        alike = (tuple(weight.shape), weight.dtype, weight.device)
        groups.setdefault(alike if slots[i].size <= _LARGEST_STACKED else i, []).append(i)
    bundles = [Bundle(tuple(group), tuple(slots[i] for i in group)) for group in groups.values()]
    return sorted(bundles, key=lambda bundle: len(bundle.slots) > 1)


def _limit(rule: Rule, slot: Slot, jit_compile: bool | str) -> float:
    """Return the greatest number of elements of a variable that is left to TensorFlow's kernel.

    That is the kernel for momentum. XLA updates larger ones.

    Args:
        rule: the hyper-parameters.
        slot: the variable with its state.
        jit_compile: `True`, `False` or `"auto"`, as for `SNGM`.
    """
    if jit_compile is True:
        return 0
    if jit_compile is False or changes_gradient(rule):
        return math.inf
    return _LARGEST if slot.average is None else _LARGEST_AVERAGED


def _suits(slot: Slot) -> bool:
    """Return whether the kernels, which compute in the weight's dtype, are precise enough."""
    return slot.weight.dtype == arithmetic_dtype(slot.weight.dtype)


def _descend(slot: Slot, rate: tf.Tensor, direction: Any) -> None:
    """Subtract `rate * direction` from a weight, in place, by TensorFlow's kernel."""
    tf.raw_ops.ResourceApplyGradientDescent(var=slot.weight.handle, alpha=rate, delta=direction)
