"""One SNGM step on the variables of one device."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_sngm import normalization, update_rule
from keras_sngm.backend.tensorflow import momentum_kernel as kernel
from keras_sngm.backend.tensorflow import norm
from keras_sngm.backend.tensorflow import xla_order as order
from keras_sngm.backend.tensorflow.moving_average import (
    average_new_weight,
    average_unchanged_weight,
)
from keras_sngm.backend.tensorflow.scalars import StepScalars
from keras_sngm.backend.tensorflow.slot import (
    Slot,
    arithmetic_dtype,
    assign,
    dense,
    for_arithmetic,
    is_accelerator,
    widest,
)
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients, Rule


class Readings(NamedTuple):
    """The state a user may read, on this device."""

    gradient_norm: tf.Variable
    gradient_norms: tf.Variable
    skipped_steps: tf.Variable
    averaged_updates: tf.Variable | None


class LocalStep:
    """Reduced gradients in, variables of one device updated in place.

    Called eagerly it is one function call; called while a graph is traced, it
    becomes part of that graph. Some variables may be left to TensorFlow's kernel
    for momentum. All others are updated together, with `jit_compile` by one XLA
    program without tensors of their size in between.

    Args:
        rule: the hyper-parameters to compile in.
        slots: those of all variables the optimizer was built with.
        active: positions in `slots` of the variables that have a gradient.
        readings: where to write what was measured.
        jit_compile: whether to compile with XLA; `"auto"` compiles what the kernel
            is not quicker at.
        in_xla: whether XLA compiles the function around this step.
    """

    def __init__(
        self,
        rule: Rule,
        slots: Sequence[Slot],
        active: Sequence[int],
        readings: Readings,
        jit_compile: bool | str,
        in_xla: bool,
    ) -> None:
        self.device = slots[active[0]].weight.device
        self._rule = rule
        self._readings = readings
        self._count = len(slots)
        self._idle = [
            slot for i, slot in enumerate(slots) if slot.average is not None and i not in active
        ]
        can_call_kernel = not in_xla and not is_accelerator(self.device)
        by_kernel = [False] * len(active)
        if can_call_kernel:
            by_kernel = kernel.chosen(rule, [slots[i] for i in active], jit_compile)
        self._arrange([slots[i] for i in active], active, by_kernel)
        self._compile(bool(jit_compile), in_xla)

    def _arrange(
        self, slots: Sequence[Slot], active: Sequence[int], by_kernel: Sequence[bool]
    ) -> None:
        """Bring the slots into the order of a step: those updated together come first."""
        together = [k for k, chosen in enumerate(by_kernel) if not chosen]
        self._bundles = kernel.bundled(slots, [k for k, chosen in enumerate(by_kernel) if chosen])
        self._order = [*together, *(k for bundle in self._bundles for k in bundle.indices)]
        self._together = len(together)
        ends = itertools.accumulate((len(b.slots) for b in self._bundles), initial=len(together))
        self._spans = list(itertools.starmap(slice, itertools.pairwise(ends)))
        self._slots = [slots[k] for k in self._order]
        self.indices = [active[k] for k in self._order]

    def _compile(self, jit_compile: bool, in_xla: bool) -> None:
        """Decide what XLA gets: all of a step, the update alone, or nothing."""
        self._normalize_and_update: Callable[..., Any] = self._normalize_then_update
        self._update: Callable[..., Any] = self._update_together
        # XLA on CPUs is slow at reducing a tensor to a number. So there the norm is
        # taken by TensorFlow's kernel, unless that would need one more tensor for a
        # gradient that is changed first.
        on_accelerator = is_accelerator(self.device)
        with_norm = on_accelerator or update_rule.changes_gradient(self._rule)
        with_norm = with_norm and jit_compile and not self._bundles
        sizes = [slot.size for slot in self._slots[: self._together]]
        delayed_until = jit_compile and not in_xla and not on_accelerator
        self._chunks = order.chunks(sizes) if delayed_until else [slice(self._together)]
        if with_norm:
            self._normalize_and_update = _function(self._normalize_then_update, jit_compile=True)
        elif jit_compile:
            self._update = _function(self._update_together, jit_compile=True)
        stacks = sum(len(bundle.slots) > 1 for bundle in self._bundles)
        usual, rare = norm.sums_on(on_accelerator, in_xla or with_norm, stacks)
        self._normalized = functools.partial(norm.normalized_by, usual, rare, self._rule)
        self._prescaled_and_normalized = functools.partial(
            norm.prescaled_and_normalized_by, usual, self._rule, stacks=stacks
        )
        self._run = _function(self._run_and_read)

    def __call__(
        self, gradients: Sequence[tf.Tensor | tf.IndexedSlices], scalars: StepScalars
    ) -> Normalization:
        """Returns what was measured, in the order of this step's own; see `directions`."""
        # A nested function would cost an operation for each of its arguments.
        run = self._run if tf.executing_eagerly() else self._run_and_read
        return run(self._in_order(gradients), scalars)

    def directions(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        weights: Sequence[tf.Tensor],
        normalized: Normalization,
    ) -> dict[int, tf.Tensor]:
        """The direction of the whole gradient, computed once more.

        That is what has entered the momentum, unless the rule is `blockwise`.

        Args:
            gradients: those the step was called with.
            weights: all that the optimizer was built with, as they were before.
            normalized: what the step has returned.

        Returns:
            g / norm(g) by position among all variables.
        """
        final = self._final_gradients(
            self._in_order(gradients), [weights[index] for index in self.indices]
        )
        directions = normalization.directions_by_global_norm(self._rule, normalized, final)
        return dict(zip(self.indices, directions, strict=True))

    def _in_order(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices]) -> list[tf.Tensor]:
        return [
            dense(gradients[k], slot.weight.shape)
            for k, slot in zip(self._order, self._slots, strict=True)
        ]

    def _run_and_read(self, gradients: list[tf.Tensor], scalars: StepScalars) -> Normalization:
        normalized = self._normalize_and_update(gradients, scalars)
        self._constrain(normalized.is_taken)
        norms = tf.cast(normalized.norms, tf.float32)
        self._readings.gradient_norm.assign(tf.cast(normalized.norm, tf.float32))
        places = [[index] for index in self.indices]
        self._readings.gradient_norms.assign(tf.scatter_nd(places, norms, [self._count]))
        skipped = self._readings.skipped_steps
        skipped.assign_add(tf.cast(tf.logical_not(normalized.is_taken), skipped.dtype))
        averaged = self._readings.averaged_updates
        if averaged is not None:
            averaged.assign_add(tf.cast(normalized.is_taken, averaged.dtype))
        return normalized

    def _normalize_then_update(
        self, gradients: list[tf.Tensor], scalars: StepScalars
    ) -> Normalization:
        weights = [for_arithmetic(slot.weight) for slot in self._slots]
        gradients = self._final_gradients(gradients, weights)
        joined = gradients[: self._together]
        for bundle, span in zip(self._bundles, self._spans, strict=True):
            joined.append(bundle.joined(gradients[span]))
        joined, pending, normalized = self._normalize(joined)
        if scalars.may_step is not None:
            is_taken = tf.logical_and(normalized.is_finite, scalars.may_step)
            normalized = normalized._replace(is_taken=is_taken)
        to_do = normalized._replace(prescale=pending)
        if self._together or self._idle:
            own = norm.part_of(to_do, slice(self._together))
            self._update(joined[: self._together], own, scalars)
        self._update_bundles(joined[self._together :], to_do, scalars)
        return normalized

    def _final_gradients(
        self, gradients: list[tf.Tensor], weights: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """What is to be normalized."""
        gradients = [
            tf.cast(gradient, arithmetic_dtype(slot.weight.dtype))
            for gradient, slot in zip(gradients, self._slots, strict=True)
        ]
        if not update_rule.changes_gradient(self._rule):
            return gradients
        return [
            update_rule.final_gradient(self._rule, gradient, weight, slot.decays)
            for gradient, weight, slot in zip(gradients, weights, self._slots, strict=True)
        ]

    def _update_bundles(
        self, joined: list[tf.Tensor], normalized: Normalization, scalars: StepScalars
    ) -> None:
        coefficients = self._coefficients(scalars, normalized.is_taken)
        for bundle, span, gradient in zip(self._bundles, self._spans, joined, strict=True):
            own = norm.part_of(normalized, span)
            bundle.update(self._rule, coefficients[gradient.dtype], own, gradient)
        for slot in self._slots[self._together :]:
            if slot.average is not None:
                average_unchanged_weight(slot, coefficients, scalars)

    def _constrain(self, is_taken: tf.Tensor) -> None:
        # Constraints are the user's code: XLA need not be able to compile them.
        for slot in self._slots:
            if slot.constraint is not None:
                weight = tf.convert_to_tensor(slot.weight)
                slot.weight.assign(tf.where(is_taken, slot.constraint(weight), weight))

    def _normalize(
        self, gradients: list[tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor, Normalization]:
        """The gradients, the prescale that is still to be done to them, and the whole one."""
        sizes = [slot.size for slot in self._slots]
        if self._bundles:
            gradients, normalized = self._prescaled_and_normalized(gradients, sizes)
            return gradients, tf.ones_like(normalized.prescale), normalized
        at_least_float32 = [tf.cast(gradient, widest(gradients)) for gradient in gradients]
        normalized = self._normalized(at_least_float32, sizes)
        return gradients, normalized.prescale, normalized

    def _coefficients(
        self, scalars: StepScalars, is_taken: tf.Tensor
    ) -> dict[tf.DType, Coefficients]:
        dtypes = {arithmetic_dtype(slot.weight.dtype) for slot in [*self._slots, *self._idle]}
        return {
            dtype: update_rule.step_coefficients(
                self._rule,
                tf.cast(scalars.learning_rate, dtype),
                scalars.first_average,
                is_taken,
            )
            for dtype in dtypes
        }

    def _update_together(
        self,
        gradients: list[tf.Tensor],
        normalized: Normalization,
        scalars: StepScalars,
    ) -> None:
        coefficients = self._coefficients(scalars, normalized.is_taken)
        directions = normalization.directions(normalized, gradients)
        done: list[tf.Tensor] = []
        for chunk in self._chunks:
            now = {
                dtype: own._replace(momentum=order.delayed_until(own.momentum, done))
                for dtype, own in coefficients.items()
            }
            weights = [
                self._update_one(slot, direction, now[direction.dtype], scalars)
                for slot, direction in zip(self._slots[chunk], directions[chunk], strict=True)
            ]
            done.extend(weights[-1:])
        for slot in self._idle:
            average_unchanged_weight(slot, coefficients, scalars)

    def _update_one(
        self, slot: Slot, direction: tf.Tensor, coefficients: Coefficients, scalars: StepScalars
    ) -> tf.Tensor:
        """Returns the new weight."""
        weight, momentum = update_rule.descend(
            self._rule,
            coefficients,
            for_arithmetic(slot.weight),
            None if slot.momentum is None else for_arithmetic(slot.momentum),
            direction,
            slot.decays,
        )
        if slot.momentum is not None:
            assign(slot.momentum, momentum)
        return assign(slot.weight, average_new_weight(slot, weight, coefficients, scalars))


def _function(method: Callable[..., Any], jit_compile: bool | None = None) -> Callable[..., Any]:
    # TensorFlow counts traces by code object, and would warn that a method is
    # retraced when it is traced once for each of several devices. A partial
    # has no code object and counts for itself.
    return tf.function(functools.partial(method), jit_compile=jit_compile, autograph=False)
