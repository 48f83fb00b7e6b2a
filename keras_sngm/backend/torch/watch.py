"""Attaching of recorders to the optimizers of a model on PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch

from keras_sngm.backend.common import recorded_apply, watch
from keras_sngm.backend.common.host_count import HostCount
from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import conditions_of_step, ready_recorders
from keras_sngm.backend.torch.lists import at_least_float32, dense
from keras_sngm.backend.torch.norm import normalized_by
from keras_sngm.backend.torch.optimizer import unscaled
from keras_sngm.backend.torch.recorder import Change, Recorder


class _RecordedApply(recorded_apply.RecordedApply):
    """Replacement of an optimizer's `apply` that records, on PyTorch."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._calls = HostCount()

    @torch.compiler.disable
    @torch.no_grad()
    def _update(
        self, inputs: recorded_apply.UpdateInputs, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        """Record the gradients if this call ends an update, and apply them to the variables.

        Args:
            inputs: the gradients that are not `None`, with their variables and the indices of
                these.
            gradients: the gradients of this call.
            variables: the variables of this call, or `None` for all of the optimizer's.
        """
        optimizer = self._optimizer
        weights = optimizer._trainable_variables
        final = self._gradient_of_update(inputs.gradients, inputs.indices)
        measured, directions = recorded_apply.measure(
            normalized_by(recorded_apply.PLAIN_RULE, final), final, inputs.indices, len(weights)
        )
        micro_batches = optimizer.gradient_accumulation_steps or 1
        calls = self._calls.of(optimizer._iterations)
        number, is_update = calls // micro_batches + 1, (calls + 1) % micro_batches == 0
        recorders = ready_recorders(optimizer)
        recorded = [r for r in recorders if is_update or (r.plan.stops and not measured.is_finite)]
        change = None
        if any(recorder.is_due(number) for recorder in recorded):
            change = Change.begin([weight.value for weight in weights], directions())
        if self._may_step(recorders, measured):
            self._apply(gradients, variables)
            self._calls.set(optimizer._iterations, calls + 1)
        for recorder in recorded:
            recorder.record(number, measured, change)

    def _gradient_of_update(self, gradients: list[Any], indices: list[int]) -> list[torch.Tensor]:
        """Return the gradients of the next update: unscaled, averaged over micro-batches.

        The average takes this call for the last micro-batch of the update.

        Args:
            gradients: gradients of some variables in this call.
            indices: the index of each of these variables among the optimizer's.
        """
        optimizer = self._optimizer
        new = at_least_float32(unscaled([dense(g) for g in gradients], optimizer.loss_scale_factor))
        micro_batches = optimizer.gradient_accumulation_steps
        if not micro_batches:
            return new
        before = at_least_float32([optimizer._accumulated_gradients[i].value for i in indices])
        return list(torch._foreach_div(torch._foreach_add(new, before), float(micro_batches)))

    def _may_step(self, recorders: Sequence[Recorder], measured: Measured) -> bool:
        """Return whether the optimizer may apply the gradients.

        It may unless a recorder whose plan stops has stopped training, or stops it at this
        gradient. Waits for the device if there is such a recorder: what Keras does on PyTorch has
        no condition.

        Args:
            recorders: the recorders of the optimizer.
            measured: what was measured on the gradient.
        """
        conditions = conditions_of_step(recorders)
        if not conditions:
            return True
        return bool(torch.stack([*conditions, measured.is_finite]).all())


class Attachment(watch.Attachment):
    """Attachment of one logger's recorders to the optimizers of a model, on PyTorch."""

    recorder_type = Recorder
    apply_type = _RecordedApply
