"""One SNGM step on the variables of one device.

What XLA compiles of a step depends on all of its parts, so they are in one file."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.tensorflow import momentum_kernel as kernel
from keras_sngm.backend.tensorflow import norm
from keras_sngm.backend.tensorflow import xla_order as order
from keras_sngm.backend.tensorflow.moving_average import (
    average_new_weight,
    average_unchanged_weight,
)
from keras_sngm.backend.tensorflow.scalars import StepScalars
from keras_sngm.backend.tensorflow.tensors import (
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
    """Variables that a user may read after a step, on this device.

    Attributes:
        gradient_norm: scalar, the norm of the whole gradient.
        gradient_norms: vector, the norm of each variable's gradient.
        skipped_steps: integer scalar, how many steps were skipped.
        averaged_updates: integer scalar, how often the moving averages were updated; `None`
            without them.
    """

    gradient_norm: tf.Variable
    gradient_norms: tf.Variable
    skipped_steps: tf.Variable
    averaged_updates: tf.Variable | None


class LocalStep:
    """Step of SNGM on one device: applies all-reduced gradients to its variables, in place.

    Called eagerly it is one function call; called while a graph is traced, it
    becomes part of that graph. Some variables may be left to TensorFlow's kernel
    for momentum, in bundles: one variable, or several small ones whose gradients are joined to one
    tensor. All others are updated together, with `jit_compile` by one XLA
    program without tensors of their size in between.

    Args:
        rule: the hyper-parameters to compile in.
        slots: one for each variable that the optimizer was built with.
        with_gradient: indices in `slots` of the variables that have a gradient.
        readings: the variables to write measurements to.
        jit_compile: whether to compile with XLA; `"auto"` compiles what the kernel
            is not quicker at.
        in_xla: whether XLA compiles the function around this step.
    """

    def __init__(
        self,
        rule: Rule,
        slots: Sequence[Slot],
        with_gradient: Sequence[int],
        readings: Readings,
        jit_compile: bool | str,
        in_xla: bool,
    ) -> None:
        self.device = slots[with_gradient[0]].weight.device
        self._rule = rule
        self._readings = readings
        self._count = len(slots)
        self._idle = [
            slot
            for i, slot in enumerate(slots)
            if slot.average is not None and i not in with_gradient
        ]
        can_call_kernel = not in_xla and not is_accelerator(self.device)
        by_kernel = [False] * len(with_gradient)
        if can_call_kernel:
            by_kernel = kernel.updated_by_kernel(
                rule, [slots[i] for i in with_gradient], jit_compile
            )
        self._arrange([slots[i] for i in with_gradient], with_gradient, by_kernel)
        self._compile(bool(jit_compile), in_xla)

    def _arrange(
        self, slots: Sequence[Slot], with_gradient: Sequence[int], by_kernel: Sequence[bool]
    ) -> None:
        """Order the slots: first those that are updated together, then those left to the kernel.

        The kernel is TensorFlow's own for momentum, which updates variables in bundles: one
        variable, or several small ones that are alike. Sets the order of the slots, the bundles
        with their places in this order, and `indices`.

        Args:
            slots: the slots of the variables that have a gradient.
            with_gradient: the index of each of these among all variables.
            by_kernel: which of these are left to the kernel.
        """
        together = [k for k in range(len(slots)) if not by_kernel[k]]
        self._bundles = kernel.bundled(slots, [k for k in range(len(slots)) if by_kernel[k]])
        self._order = [*together, *(k for bundle in self._bundles for k in bundle.indices)]
        self._count_without_kernel = len(together)
        ends = itertools.accumulate((len(b.slots) for b in self._bundles), initial=len(together))
        self._spans = list(itertools.starmap(slice, itertools.pairwise(ends)))
        self._slots = [slots[k] for k in self._order]
        self.indices = [with_gradient[k] for k in self._order]

    def _compile(self, jit_compile: bool, in_xla: bool) -> None:
        """Decide what XLA compiles: all of a step, the update alone, or nothing.

        It updates variables in chunks, one after the other. On CPUs TensorFlow's kernel for
        momentum may update bundles of variables; the gradients of a bundle with several are stacked
        to one tensor.

        Args:
            jit_compile: whether XLA is to compile.
            in_xla: whether XLA compiles the function around this step already.
        """
        self._normalize_and_update: Callable[..., Any] = self._normalize_then_update
        self._update: Callable[..., Any] = self._update_together
        # XLA on CPUs is slow at reducing a tensor to a number. So TensorFlow's kernel takes the
        # norm there, unless the gradient is changed first and would need one more tensor.
        on_accelerator = is_accelerator(self.device)
        with_norm = on_accelerator or update_rule.changes_gradient(self._rule)
        with_norm = with_norm and jit_compile and not self._bundles
        sizes = [slot.size for slot in self._slots[: self._count_without_kernel]]
        needs_order = jit_compile and not in_xla and not on_accelerator
        self._chunks = order.chunks(sizes) if needs_order else [slice(self._count_without_kernel)]
        if with_norm:
            self._normalize_and_update = _function(self._normalize_then_update, jit_compile=True)
        elif jit_compile:
            self._update = _function(self._update_together, jit_compile=True)
        norm_in_xla = in_xla or with_norm
        self._normalization_of = functools.partial(
            norm.normalized_on, on_accelerator, norm_in_xla, self._rule
        )
        # XLA has the gradients in one program with their norm and the update.
        self._in_one_program = on_accelerator and norm_in_xla
        self._prescaled_and_normalized = functools.partial(
            norm.prescaled_and_normalized,
            self._rule,
            stacks=sum(len(bundle.slots) > 1 for bundle in self._bundles),
        )
        self._run = _function(self._run_step)

    def __call__(
        self, gradients: Sequence[tf.Tensor | tf.IndexedSlices], scalars: StepScalars
    ) -> Normalization:
        """Take the step.

        Args:
            gradients: the gradients of the variables that have one, in the order in which the
                constructor was given their indices.
            scalars: the scalars of this step.

        Returns:
            How the gradient was normalized. Its vectors are in the order of `self.indices`.
        """
        # In a graph a nested function would cost an operation for each of its arguments.
        run = self._run if tf.executing_eagerly() else self._run_step
        return run(self._in_order(gradients), scalars)

    def directions(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices],
        weights: Sequence[tf.Tensor],
        normalized: Normalization,
    ) -> dict[int, tf.Tensor]:
        """Compute g / norm(g) of the whole gradient once more, after the step.

        That is what has entered the momentum, unless the rule is `blockwise`.

        Args:
            gradients: the gradients that the step was called with.
            weights: the weights of all variables before the step.
            normalized: what the step has returned.

        Returns:
            The part of g / norm(g) of each variable that has a gradient, by its index.
        """
        final = self._final_gradients(
            self._in_order(gradients), [weights[index] for index in self.indices]
        )
        directions = normalization.directions_by_global_norm(self._rule, normalized, final)
        return dict(zip(self.indices, directions, strict=True))

    def _in_order(self, gradients: Sequence[tf.Tensor | tf.IndexedSlices]) -> list[tf.Tensor]:
        """Return the gradients as dense tensors, in the order of this step's slots."""
        return [
            dense(gradients[k], slot.weight.shape)
            for k, slot in zip(self._order, self._slots, strict=True)
        ]

    def _run_step(self, gradients: list[tf.Tensor], scalars: StepScalars) -> Normalization:
        """Take the step, apply constraints, and assign the variables that a user may read.

        Args:
            gradients: dense gradients in the order of this step's slots.
            scalars: the scalars of this step.
        """
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
        """Normalize the gradients, and update weights, momenta and averages with them.

        Gradients of a bundle, variables that TensorFlow's kernel updates in one call, are joined to
        one tensor. The `prescale` is then multiplied by before the updates, else as a part of them.

        Args:
            gradients: dense gradients in the order of this step's slots.
            scalars: the scalars of this step.

        Returns:
            How the gradient was normalized.
        """
        weights = [for_arithmetic(slot.weight) for slot in self._slots]
        final = self._final_gradients(gradients, weights)
        joined = final[: self._count_without_kernel]
        for bundle, span in zip(self._bundles, self._spans, strict=True):
            joined.append(bundle.joined(final[span]))
        joined, pending, normalized = self._normalize(joined)
        if self._in_one_program and update_rule.changes_gradient(self._rule):
            gradients, normalized = norm.not_before(gradients, normalized)
            joined, pending = self._final_gradients(gradients, weights), normalized.prescale
        if scalars.may_step is not None:
            is_taken = tf.logical_and(normalized.is_finite, scalars.may_step)
            normalized = normalized._replace(is_taken=is_taken)
        to_do = normalized._replace(prescale=pending)
        if self._count_without_kernel or self._idle:
            count = self._count_without_kernel
            self._update(joined[:count], norm.part_of(to_do, slice(count)), scalars)
        self._update_bundles(joined[self._count_without_kernel :], to_do, scalars)
        return normalized

    def _final_gradients(
        self, gradients: list[tf.Tensor], weights: Sequence[tf.Tensor]
    ) -> list[tf.Tensor]:
        """Return the gradients to be normalized, after coupled weight decay and `clipvalue`."""
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
        """Update the variables that are left to TensorFlow's kernel, then their moving averages.

        Args:
            joined: one tensor of gradients for each bundle.
            normalized: how to normalize them, with a `prescale` of 1.
            scalars: the scalars of this step.
        """
        coefficients = self._coefficients(scalars, normalized.is_taken)
        for bundle, span, gradient in zip(self._bundles, self._spans, joined, strict=True):
            of_bundle = norm.part_of(normalized, span)
            bundle.update(self._rule, coefficients[gradient.dtype], of_bundle, gradient)
        for slot in self._slots[self._count_without_kernel :]:
            if slot.average is not None:
                average_unchanged_weight(slot, coefficients, scalars)

    def _constrain(self, is_taken: tf.Tensor) -> None:
        """Apply the constraints of the variables, unless the step is skipped."""
        # Constraints are the user's code, which XLA need not be able to compile.
        for slot in self._slots:
            if slot.constraint is not None:
                weight = tf.convert_to_tensor(slot.weight)
                slot.weight.assign(tf.where(is_taken, slot.constraint(weight), weight))

    def _normalize(
        self, gradients: list[tf.Tensor]
    ) -> tuple[list[tf.Tensor], tf.Tensor, Normalization]:
        """Compute how to normalize the gradients.

        Args:
            gradients: one tensor for each variable that is updated together with others, then one
                for each bundle of variables that TensorFlow's kernel for momentum updates, with a
                row for each variable if they are several.

        Returns:
            The gradients; the prescale that they are still to be multiplied by; and the whole
            normalization. Where there are bundles the gradients have been multiplied.
        """
        sizes = [slot.size for slot in self._slots]
        if self._bundles:
            gradients, normalized = self._prescaled_and_normalized(gradients, sizes)
            return gradients, tf.ones_like(normalized.prescale), normalized
        at_least_float32 = [tf.cast(gradient, widest(gradients)) for gradient in gradients]
        normalized = self._normalization_of(at_least_float32, sizes)
        return gradients, normalized.prescale, normalized

    def _coefficients(
        self, scalars: StepScalars, is_taken: tf.Tensor
    ) -> dict[tf.DType, Coefficients]:
        """Return the factors of this step for each dtype that variables are computed in."""
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
        """Update the variables that are not left to the kernel, chunk by chunk.

        A chunk waits for the one before the last, so that a weight is updated while its momentum is
        still in the caches. Of variables without a gradient only the moving averages are updated.

        Args:
            gradients: the gradients to be normalized.
            normalized: how to normalize them.
            scalars: the scalars of this step.
        """
        coefficients = self._coefficients(scalars, normalized.is_taken)
        directions = normalization.directions(normalized, gradients)
        done: list[tf.Tensor] = []
        for chunk in self._chunks:
            delayed = {
                dtype: factors._replace(momentum=order.delayed_until(factors.momentum, done))
                for dtype, factors in coefficients.items()
            }
            weights = [
                self._update_one(slot, direction, delayed[direction.dtype], scalars)
                for slot, direction in zip(self._slots[chunk], directions[chunk], strict=True)
            ]
            done.extend(weights[-1:])
        for slot in self._idle:
            average_unchanged_weight(slot, coefficients, scalars)

    def _update_one(
        self, slot: Slot, direction: tf.Tensor, coefficients: Coefficients, scalars: StepScalars
    ) -> tf.Tensor:
        """Update one variable with its state.

        Args:
            slot: the variable with its state.
            direction: its part of g / norm(g).
            coefficients: the factors of this step.
            scalars: the scalars of this step.

        Returns:
            Its new weight, which is its average if `ema_overwrite_frequency` says so.
        """
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
    """Return a `tf.function` of a method that counts traces for itself."""
    # TensorFlow counts traces by code object, and would warn that a method is
    # retraced when it is traced once for each of several devices. A partial
    # has no code object and counts for itself.
    return tf.function(functools.partial(method), jit_compile=jit_compile, autograph=False)
