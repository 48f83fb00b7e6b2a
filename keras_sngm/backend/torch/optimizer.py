"""SNGM on PyTorch: eager, by kernels for lists of tensors.

`torch.compile` leaves the step as it is: there is nothing that it could fuse any more.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.measured import measured_by_sngm
from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.recorder import conditions_of_step, ready_recorders
from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.torch import step as torch_step
from keras_sngm.backend.torch.lists import (
    at_least_float32,
    copied_if_aliased,
    dense,
    in_dtypes,
    values,
)
from keras_sngm.backend.torch.norm import host_decides, normalized_by, sum_of_squares
from keras_sngm.backend.torch.recorder import Change
from keras_sngm.backend.torch.step import StepScalars
from keras_sngm.normalization import Normalization


class BackendOptimizer(WholeModelOptimizer):
    """Optimizer that takes the step of SNGM on PyTorch, in place, by kernels for lists of tensors.

    On CUDA the host does not wait for the device.
    """

    @torch.compiler.disable
    @torch.no_grad()
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables, or accumulate their gradients, without autograd and compilation."""
        super().apply(grads, trainable_variables)

    def _step(self, gradients: Sequence[Any], with_gradient: Sequence[int]) -> None:
        """Update the variables or accumulate the gradients, and count the call.

        Args:
            gradients: gradients of some variables, dense or sparse, times the loss scale.
            with_gradient: the index of each of these among the optimizer's variables.

        Raises:
            ValueError: if the noise scale is to be measured from a single batch.
        """
        if with_gradient and (meter := self._noise_meter()) is not None:
            meter.check()
        prepared = [dense(gradient) for gradient in gradients]
        loss_scale = self.loss_scale_factor or 1.0
        # Dividing costs a pass over the gradient, which CUDA saves. A quotient may overflow.
        if prepared and (host_decides(prepared[0]) or loss_scale < 1.0):
            prepared, loss_scale = unscaled(prepared, self.loss_scale_factor), 1.0
        prepared = copied_if_aliased(prepared, values(self._trainable_variables))
        calls = self._calls.of(self._iterations)
        if not with_gradient:
            pass
        elif self.gradient_accumulation_steps is None:
            self._update(with_gradient, prepared, [], loss_scale)
        else:
            self._accumulate(with_gradient, prepared, loss_scale)
            if (calls + 1) % self.gradient_accumulation_steps == 0:
                self._update_with_accumulated(with_gradient)
        self._iterations.value.add_(1)
        self._calls.set(self._iterations, calls + 1)

    def _accumulate(
        self, with_gradient: Sequence[int], gradients: list[torch.Tensor], loss_scale: float
    ) -> None:
        """Add the gradients of one micro-batch to the accumulated means.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients times the loss scale.
            loss_scale: the loss scale.
        """
        accumulators = values([self._accumulated_gradients[i] for i in with_gradient])
        dtypes = [accumulator.dtype for accumulator in accumulators]
        torch._foreach_add_(
            accumulators,
            in_dtypes(gradients, dtypes),
            alpha=1.0 / (self.gradient_accumulation_steps or 1) / loss_scale,
        )
        if self.noise_scale_batch_size is not None:
            self._accumulated_squares.value.add_(sum_of_squares(gradients) / loss_scale**2)

    def _update_with_accumulated(self, with_gradient: Sequence[int]) -> None:
        """Update the variables with the accumulated means, and reset all accumulators to zero.

        Args:
            with_gradient: indices of the variables that had a gradient in any of the micro-batches.
        """
        totals = [] if self.noise_scale_batch_size is None else [self._accumulated_squares.value]
        accumulators = values(self._accumulated_gradients)
        self._update(with_gradient, [accumulators[i] for i in with_gradient], totals, 1.0)
        torch._foreach_zero_([*accumulators, *totals])

    def _update(
        self,
        with_gradient: Sequence[int],
        gradients: list[torch.Tensor],
        totals: list[torch.Tensor],
        loss_scale: float,
    ) -> None:
        """Update the variables, and record the update.

        The step is skipped if the gradient is not finite, or if a recorder allows no more steps.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients, averaged over micro-batches, times the loss scale.
            totals: a list with the sum of the squares of all small batches, empty if the noise
                scale is not measured.
            loss_scale: the loss scale.
        """
        rule, slots = self._rule(), self._slots()
        active_slots = [slots[i] for i in with_gradient]
        others = set(range(len(slots))) - set(with_gradient)
        idle = [slots[i] for i in sorted(others) if slots[i].average is not None]
        rule_of_scaled = update_rule.scaled(rule, loss_scale)
        final = torch_step.final_gradients(rule_of_scaled, active_slots, gradients)
        normalized = normalization.unscaled(normalized_by(rule_of_scaled, final), loss_scale)
        recorders = ready_recorders(self)
        updates = self._calls.of(self._iterations) // (self.gradient_accumulation_steps or 1)
        scalars = self._scalars(updates, conditions_of_step(recorders))
        if scalars.may_step is not None:
            normalized = normalized._replace(is_taken=normalized.is_finite & scalars.may_step)
        for total in totals:
            self._measure_noise(
                total, normalized, lambda: sum_of_squares(gradients) / loss_scale**2
            )
        change = None
        if any(recorder.is_due(updates + 1) for recorder in recorders):
            # The step may overwrite the gradients, so directions are computed before it.
            directions = normalization.directions_by_global_norm(rule, normalized, final)
            change = Change.begin(
                [slot.weight for slot in slots], dict(zip(with_gradient, directions, strict=True))
            )
        torch_step.take_step(rule, active_slots, idle, final, normalized, scalars)
        self._assign_readings(with_gradient, normalized)
        for recorder in recorders:
            recorder.record(updates + 1, measured_by_sngm(self, normalized, with_gradient), change)

    def _slots(self) -> list[Slot]:
        """Return a slot for each variable: the weight with the optimizer's state for it."""
        weights = self._trainable_variables
        momentums = values(self.momentums) or [None] * len(weights)
        averages: list[Any] = [None] * len(weights)
        if self.use_ema:
            averages = values(self._model_variables_moving_average)
        constraints = [getattr(weight, "constraint", None) for weight in weights]
        return [
            Slot(*slot)
            for slot in zip(
                values(weights),
                momentums,
                averages,
                self._decays(weights),
                constraints,
                strict=True,
            )
        ]

    def _scalars(self, updates: int, conditions: list[torch.Tensor]) -> StepScalars:
        """Return the scalars of this step.

        Args:
            updates: number of updates before this one.
            conditions: boolean scalars, all of which must be true for the step to be taken.
        """
        overwrites = False
        if self.use_ema and self.ema_overwrite_frequency:
            overwrites = (updates + 1) % self.ema_overwrite_frequency == 0
        return StepScalars(
            learning_rate=ops.convert_to_tensor(self._learning_rate_of_update()),
            first_average=None
            if self.averaged_updates is None
            else self.averaged_updates.value == 0,
            overwrites_with_average=overwrites,
            may_step=torch.stack(conditions).all() if conditions else None,
        )

    def _assign_readings(self, with_gradient: Sequence[int], normalized: Normalization) -> None:
        """Assign the variables that a user may read: norms, skipped steps, averaged updates.

        Args:
            with_gradient: indices of the variables that have a gradient. The norm of others is 0.
            normalized: how the gradient was normalized.
        """
        self.gradient_norm.value.copy_(normalized.norm)
        norms = self.gradient_norms.value
        norms.copy_(update_rule.scatter(normalized.norms, with_gradient, len(norms)))
        self.skipped_steps.value.add_(torch.logical_not(normalized.is_taken))
        if self.averaged_updates is not None:
            self.averaged_updates.value.add_(normalized.is_taken)


def unscaled(gradients: list[torch.Tensor], loss_scale_factor: float | None) -> list[torch.Tensor]:
    """Divide gradients by the loss scale, not in 16 bits."""
    if loss_scale_factor is None:
        return gradients
    # In 16 bits a small gradient would become zero.
    return list(torch._foreach_div(at_least_float32(gradients), loss_scale_factor))
