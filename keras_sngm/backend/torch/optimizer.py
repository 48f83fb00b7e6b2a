"""How SNGM runs on PyTorch: eagerly, by kernels for lists of tensors.

`torch.compile` leaves the step as it is: there is nothing that it could fuse any more.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.recorder import conditions_of_step, measured_by, ready
from keras_sngm.backend.torch import step as torch_step
from keras_sngm.backend.torch.lists import apart_from, at_least_float32, dense, in_dtypes, values
from keras_sngm.backend.torch.norm import normalized_by, sum_of_squares
from keras_sngm.backend.torch.recorder import Change
from keras_sngm.backend.torch.step import Slot, StepScalars
from keras_sngm.normalization import Normalization


class BackendOptimizer(WholeModelOptimizer):
    """Takes the step where it is called. The host does not wait for the device."""

    @torch.compiler.disable
    @torch.no_grad()
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        super().apply(grads, trainable_variables)

    def _step(self, gradients: Sequence[Any], active: Sequence[int]) -> None:
        if active and (meter := self._noise_meter()) is not None:
            meter.check()
        own = unscaled([dense(gradient) for gradient in gradients], self.loss_scale_factor)
        own = apart_from(own, values(self._trainable_variables))
        calls = self._calls.of(self._iterations)
        if not active:
            pass
        elif self.gradient_accumulation_steps is None:
            self._update(active, own, [])
        else:
            self._accumulate(active, own)
            if (calls + 1) % self.gradient_accumulation_steps == 0:
                self._update_with_accumulated(active)
        self._iterations.value.add_(1)
        self._calls.set(self._iterations, calls + 1)

    def _accumulate(self, active: Sequence[int], gradients: list[torch.Tensor]) -> None:
        accumulators = values([self._accumulated_gradients[i] for i in active])
        dtypes = [accumulator.dtype for accumulator in accumulators]
        torch._foreach_add_(
            accumulators,
            in_dtypes(gradients, dtypes),
            alpha=1.0 / (self.gradient_accumulation_steps or 1),
        )
        if self.noise_scale_batch_size is not None:
            self._accumulated_squares.value.add_(sum_of_squares(gradients))

    def _update_with_accumulated(self, active: Sequence[int]) -> None:
        totals = [] if self.noise_scale_batch_size is None else [self._accumulated_squares.value]
        accumulators = values(self._accumulated_gradients)
        self._update(active, [accumulators[i] for i in active], totals)
        torch._foreach_zero_([*accumulators, *totals])

    def _update(
        self, active: Sequence[int], gradients: list[torch.Tensor], totals: list[torch.Tensor]
    ) -> None:
        """One update.

        Args:
            active: positions of the variables that have a gradient.
            gradients: theirs, averaged over micro-batches.
            totals: the sum of the squares of all small batches, if it is measured.
        """
        rule, slots = self._rule(), self._slots()
        own = [slots[i] for i in active]
        others = set(range(len(slots))) - set(active)
        idle = [slots[i] for i in sorted(others) if slots[i].average is not None]
        final = torch_step.final_gradients(rule, own, gradients)
        normalized = normalized_by(rule, final)
        recorders = ready(self)
        updates = self._calls.of(self._iterations) // (self.gradient_accumulation_steps or 1)
        scalars = self._moment(updates, conditions_of_step(recorders))
        if scalars.may_step is not None:
            normalized = normalized._replace(is_taken=normalized.is_finite & scalars.may_step)
        for total in totals:
            self._measure_noise(total, normalized, lambda: sum_of_squares(gradients))
        change = None
        if any(recorder.is_due(updates + 1) for recorder in recorders):
            # Before the step, which may overwrite the gradients.
            directions = normalization.directions_by_global_norm(rule, normalized, final)
            change = Change.begin(
                [slot.weight for slot in slots], dict(zip(active, directions, strict=True))
            )
        torch_step.take(rule, own, idle, final, normalized, scalars)
        self._read(active, normalized)
        for recorder in recorders:
            recorder.record(updates + 1, measured_by(self, normalized, active), change)

    def _slots(self) -> list[Slot]:
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

    def _moment(self, updates: int, conditions: list[torch.Tensor]) -> StepScalars:
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

    def _read(self, active: Sequence[int], normalized: Normalization) -> None:
        """Write what the user may read."""
        self.gradient_norm.value.copy_(normalized.norm)
        norms = self.gradient_norms.value
        norms.copy_(update_rule.scatter(normalized.norms, active, len(norms)))
        self.skipped_steps.value.add_(torch.logical_not(normalized.is_taken))
        if self.averaged_updates is not None:
            self.averaged_updates.value.add_(normalized.is_taken)


def unscaled(gradients: list[torch.Tensor], loss_scale_factor: float | None) -> list[torch.Tensor]:
    """The gradients of the loss itself."""
    if loss_scale_factor is None:
        return gradients
    # Not in 16 bits: there a small gradient would become zero.
    return list(torch._foreach_div(at_least_float32(gradients), loss_scale_factor))
