"""One SNGM step on the variables of one device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_sngm import update_rule
from keras_sngm.update_rule import Coefficients, Normalization, Rule


class Slot(NamedTuple):
    """A weight and what the optimizer keeps for it on this device."""

    weight: tf.Variable
    momentum: tf.Variable | None
    average: tf.Variable | None
    decays: bool
    constraint: Callable[[tf.Tensor], tf.Tensor] | None


class Readings(NamedTuple):
    """The state a user may read, on this device."""

    gradient_norm: tf.Variable
    gradient_norms: tf.Variable
    skipped_steps: tf.Variable


class Moment(NamedTuple):
    """What changes from step to step besides the gradient."""

    learning_rate: tf.Tensor
    first_average: tf.Tensor
    overwrite_with_average: tf.Tensor


class LocalStep:
    """Reduced gradients in, variables of one device updated in place.

    Called eagerly it is one function call; called inside a `tf.function` it
    becomes a nested function. With `jit_compile` all variables are updated by
    one XLA program, a single pass over memory.

    Args:
        rule: the hyper-parameters to compile in.
        slots: those of all variables the optimizer was built with.
        active: positions in `slots` of the variables that have a gradient.
        readings: where to write what was measured.
        jit_compile: whether to compile with XLA.
    """

    def __init__(
        self,
        rule: Rule,
        slots: Sequence[Slot],
        active: Sequence[int],
        readings: Readings,
        jit_compile: bool,
    ) -> None:
        self.device = slots[active[0]].weight.device
        self._rule = rule
        self._slots = [slots[i] for i in active]
        self._idle = [
            slot for i, slot in enumerate(slots) if slot.average is not None and i not in active
        ]
        self._positions = [[i] for i in active]
        self._count = len(slots)
        self._readings = readings
        dtypes = [arithmetic_dtype(slot.weight.dtype) for slot in self._slots]
        self._norm_dtype = tf.float64 if tf.float64 in dtypes else tf.float32
        on_accelerator = _is_accelerator(self.device)
        # XLA on CPUs is several times slower than the native kernel at reducing
        # a tensor to a number, so there it gets the update alone.
        self._normalize_and_update = self._normalize_then_update
        self._update = self._update_all
        if jit_compile and on_accelerator:
            self._normalize_and_update = _function(self._normalize_then_update, jit_compile=True)
        elif jit_compile:
            self._update = _function(self._update_all, jit_compile=True)
        self._run = _function(self._run_and_read)

    def __call__(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices], moment: Moment) -> None:
        dense = [
            _densified(gradient, slot.weight.shape)
            for gradient, slot in zip(gradients, self._slots, strict=True)
        ]
        self._run(dense, moment)

    def _run_and_read(self, gradients: list[tf.Tensor], moment: Moment) -> None:
        normalized = self._normalize_and_update(gradients, moment)
        self._constrain(normalized.finite)
        norms = tf.cast(normalized.norms, tf.float32)
        self._readings.gradient_norm.assign(tf.cast(normalized.norm, tf.float32))
        self._readings.gradient_norms.assign(tf.scatter_nd(self._positions, norms, [self._count]))
        skipped = self._readings.skipped_steps
        skipped.assign_add(tf.cast(tf.logical_not(normalized.finite), skipped.dtype))

    def _normalize_then_update(self, gradients: list[tf.Tensor], moment: Moment) -> Normalization:
        gradients = [
            update_rule.final_gradient(
                self._rule,
                tf.cast(gradient, arithmetic_dtype(slot.weight.dtype)),
                _for_arithmetic(slot.weight),
                slot.decays,
            )
            for gradient, slot in zip(gradients, self._slots, strict=True)
        ]
        normalized = self._normalize(gradients)
        self._update(gradients, normalized, moment)
        return normalized

    def _constrain(self, taken: tf.Tensor) -> None:
        # Constraints are the user's code: XLA need not be able to compile them.
        for slot in self._slots:
            if slot.constraint is not None:
                weight = tf.convert_to_tensor(slot.weight)
                slot.weight.assign(tf.where(taken, slot.constraint(weight), weight))

    def _normalize(self, gradients: list[tf.Tensor]) -> Normalization:
        limits = np.finfo(self._norm_dtype.as_numpy_dtype)
        size = sum(slot.weight.shape.num_elements() for slot in self._slots)
        least = update_rule.trusted_range(size, float(limits.tiny), float(limits.eps))
        rescue = tf.constant(2.0 ** update_rule.rescue_exponent(limits.maxexp), self._norm_dtype)
        gradients = [tf.cast(gradient, self._norm_dtype) for gradient in gradients]

        squares = _sums_of_squares(gradients)
        total = tf.reduce_sum(squares)

        def rescued() -> tuple[tf.Tensor, tf.Tensor]:
            prescale = tf.where(total < least, rescue, 1.0 / rescue)
            return _sums_of_squares([gradient * prescale for gradient in gradients]), prescale

        squares, prescale = tf.cond(
            tf.logical_and(total >= least, tf.math.is_finite(total)),
            lambda: (squares, tf.ones([], self._norm_dtype)),
            rescued,
        )
        return update_rule.normalization(self._rule, squares, prescale)

    def _update_all(
        self, gradients: list[tf.Tensor], normalized: Normalization, moment: Moment
    ) -> None:
        directions = update_rule.directions(normalized, gradients)
        by = {
            dtype: update_rule.coefficients(
                self._rule,
                tf.cast(moment.learning_rate, dtype),
                moment.first_average,
                normalized.finite,
            )
            for dtype in (tf.float32, tf.float64)
        }
        overwrite = tf.logical_and(moment.overwrite_with_average, normalized.finite)
        for slot, direction in zip(self._slots, directions, strict=True):
            weight, momentum = update_rule.descend(
                self._rule,
                by[direction.dtype],
                _for_arithmetic(slot.weight),
                None if slot.momentum is None else _for_arithmetic(slot.momentum),
                direction,
                slot.decays,
            )
            if slot.momentum is not None:
                _assign(slot.momentum, momentum)
            _store(slot, weight, by[direction.dtype], overwrite)
        for slot in self._idle:
            weight = _for_arithmetic(slot.weight)
            _store(slot, weight, by[weight.dtype], overwrite)


def _store(slot: Slot, weight: tf.Tensor, by: Coefficients, overwrite: tf.Tensor) -> None:
    """Write a new weight, and where averages are kept, its average."""
    if slot.average is not None:
        average = update_rule.moving_average(by, _for_arithmetic(slot.average), weight)
        _assign(slot.average, average)
        weight = tf.where(overwrite, average, weight)
    _assign(slot.weight, weight)


def _function(method: Callable[..., Any], jit_compile: bool | None = None) -> Callable[..., Any]:
    # TensorFlow counts traces by code object, and would warn that a method is
    # retraced when it is traced once for each of several devices. A partial
    # has no code object and counts for itself.
    return tf.function(functools.partial(method), jit_compile=jit_compile, autograph=False)


def _densified(gradient: tf.Tensor | tf.IndexedSlices, shape: tf.TensorShape) -> tf.Tensor:
    # Duplicate rows of a sparse gradient must be added before a norm is taken,
    # and the momentum is dense anyway.
    if isinstance(gradient, tf.IndexedSlices):
        return tf.ensure_shape(tf.convert_to_tensor(gradient), shape)
    return gradient


def _sums_of_squares(tensors: list[tf.Tensor]) -> tf.Tensor:
    return 2.0 * tf.stack([tf.nn.l2_loss(tensor) for tensor in tensors])


def _is_accelerator(device: str) -> bool:
    return tf.DeviceSpec.from_string(device).device_type not in (None, "CPU")


def arithmetic_dtype(dtype: tf.DType) -> tf.DType:
    """16-bit variables are stored in 16 bits and computed with in 32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def _for_arithmetic(variable: tf.Variable) -> tf.Tensor:
    return tf.cast(variable, arithmetic_dtype(variable.dtype))


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    variable.assign(tf.cast(value, variable.dtype))
