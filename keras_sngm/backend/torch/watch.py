"""Has the optimizer of a model recorded while it is trained, Keras' own as well as SNGM."""

from collections.abc import Sequence
from typing import Any

import keras
import torch

from keras_sngm.backend.common import watch
from keras_sngm.backend.common.host_count import HostCount
from keras_sngm.backend.common.recorder import Measured, conditions_of_step, ready
from keras_sngm.backend.torch.lists import at_least_float32, dense
from keras_sngm.backend.torch.norm import normalized_by
from keras_sngm.backend.torch.optimizer import unscaled
from keras_sngm.backend.torch.recorder import Change, Recorder
from keras_sngm.measurements import Plan


def attach(model: keras.Model, plan: Plan, fit_params: Any) -> watch.Watch:
    """Record from the next training step on."""
    for recorder in watch.left_over(model, fit_params):
        watch.detach(recorder)
    own = watch.Watch(model, fit_params)
    own.begin(watch.maker(model, plan, Recorder), _Watched)
    return own


def detach(own: watch.Watch) -> None:
    """Record no longer."""
    own.end()


def is_current(own: watch.Watch, model: keras.Model) -> bool:
    """Return whether the next training step of the model is still recorded."""
    return own.root is model.optimizer


class _Watched(watch.Watched):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._calls = HostCount()

    @torch.compiler.disable
    @torch.no_grad()
    def _update(
        self, given: watch.Given, gradients: list[Any], variables: list[Any] | None
    ) -> None:
        optimizer = self._optimizer
        weights = optimizer._trainable_variables
        final = self._final(given.gradients, given.indices)
        measured, directions = watch.measured(
            normalized_by(watch.PLAIN_RULE, final), final, given.indices, len(weights)
        )
        micro_batches = optimizer.gradient_accumulation_steps or 1
        calls = self._calls.of(optimizer._iterations)
        number, is_update = calls // micro_batches + 1, (calls + 1) % micro_batches == 0
        recorders = ready(optimizer)
        recorded = [r for r in recorders if is_update or (r.plan.stops and not measured.is_finite)]
        change = None
        if any(recorder.is_due(number) for recorder in recorded):
            change = Change.begin([weight.value for weight in weights], directions())
        if self._may_step(recorders, measured):
            self._apply(gradients, variables)
            self._calls.set(optimizer._iterations, calls + 1)
        for recorder in recorded:
            recorder.record(number, measured, change)

    def _final(self, gradients: list[Any], indices: list[int]) -> list[torch.Tensor]:
        """The gradients that the next update is made with."""
        optimizer = self._optimizer
        own = at_least_float32(unscaled([dense(g) for g in gradients], optimizer.loss_scale_factor))
        micro_batches = optimizer.gradient_accumulation_steps
        if not micro_batches:
            return own
        before = at_least_float32([optimizer._accumulated_gradients[i].value for i in indices])
        return list(torch._foreach_div(torch._foreach_add(own, before), float(micro_batches)))

    def _may_step(self, recorders: Sequence[Recorder], measured: Measured) -> bool:
        """Waits for the device if the plan is to stop: what Keras does has no condition."""
        conditions = conditions_of_step(recorders)
        if not conditions:
            return True
        return bool(torch.stack([*conditions, measured.is_finite]).all())
