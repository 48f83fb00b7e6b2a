"""SNGM on JAX: pure functions of its state, which the function around them compiles.

Keras' `fit` compiles the whole training step. An optimizer that is called outside of any
compiled function compiles its own. Where arrays are sharded, XLA makes sums go over all
shards.

The parts of a step, which are traced as one function, are in one file.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.cache import Cache
from keras_sngm.backend.common.measured import measured_by_sngm
from keras_sngm.backend.common.optimizer import WholeModelOptimizer
from keras_sngm.backend.common.recorder import conditions_of_step, ready_recorders
from keras_sngm.backend.jax.gradients import dense, unscaled
from keras_sngm.backend.jax.norm import normalized_by, not_before, sum_of_squares
from keras_sngm.backend.jax.recorder import Change
from keras_sngm.backend.jax.state import (
    assign,
    at_least_float32,
    do_if,
    pure,
    zeros_in_place_of,
)
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Coefficients


class BackendOptimizer(WholeModelOptimizer):
    """Optimizer that takes its step on JAX, as a part of any function that is being traced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps = Cache()

    @contextlib.contextmanager
    def _iterations_being(self, value: Any) -> Iterator[None]:
        """Have the counter of calls read as `value` inside of the context, for a schedule."""
        # A nested `StatelessScope` would hide the values of all other variables.
        before = self._iterations.value
        self._iterations.assign(value)
        try:
            yield
        finally:
            self._iterations.assign(before)

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Replace the weights by their averages, as copies.

        The next training step donates the buffers of both, and JAX donates no buffer twice.
        """
        calls = self._iterations._value
        if calls is None or calls.is_deleted():
            return  # a training step failed, whose state is lost; let its error be seen
        super().finalize_variable_values(var_list)
        for average in self._model_variables_moving_average if self.use_ema else ():
            if average is not None:
                average.assign(jnp.copy(average.value))

    def drop_steps_with(self, recorder: Any) -> None:
        """Drop the steps that were compiled with a recorder, and with them the recorder."""
        self._steps.drop(lambda key: id(recorder) in key[2])

    def _step(self, gradients: Sequence[Any], with_gradient: Sequence[int]) -> None:
        """Update the variables or accumulate the gradients, and count the call.

        Compiled by JAX, unless a function is being traced already.

        Args:
            gradients: gradients of some variables, dense or sparse, times the loss scale.
            with_gradient: the index of each of these among the optimizer's variables.

        Raises:
            ValueError: if the noise scale is to be measured from a single batch.
        """
        with_gradient = tuple(with_gradient)
        if with_gradient and (meter := self._noise_meter()) is not None:
            meter.check()
        unscaled_gradients = [
            unscaled(dense(gradient), self.loss_scale_factor) for gradient in gradients
        ]
        rate = ops.convert_to_tensor(self._learning_rate_of_update())
        if self._state_is_known([*unscaled_gradients, rate]):
            self._step_compiled(with_gradient, unscaled_gradients, rate)
        else:
            self._step_traced(with_gradient, unscaled_gradients, rate)

    def _state_is_known(self, gradients: Sequence[Any]) -> bool:
        """Return whether gradients and state are arrays, not tracers of a function."""
        state = [*gradients, self._iterations.value]
        return not any(isinstance(array, jax.core.Tracer) for array in state)

    def _step_compiled(
        self, with_gradient: tuple[int, ...], gradients: list[jax.Array], rate: jax.Array
    ) -> None:
        """Take one step as a compiled function of the state, and assign the new state.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients.
            rate: learning rate.
        """
        variables = [*self._trainable_variables, *self.variables]
        recorders = ready_recorders(self)
        # Hyper-parameters are part of the key, so that assigning to one of them takes effect.
        # So are the variables and recorders, as their values are the compiled step's state.
        how = (
            self._rule(),
            self.use_ema,
            self.ema_overwrite_frequency,
            self.gradient_accumulation_steps,
            self._noise_meter(),
        )
        step = self._steps.get_or_make(
            (how, with_gradient, tuple(map(id, recorders)), tuple(map(id, variables))),
            lambda: jax.jit(
                pure(
                    lambda gradients, rate: self._step_traced(with_gradient, gradients, rate),
                    variables,
                )
            ),
        )
        assign(variables, step([v.value for v in variables], gradients, rate))

    def _step_traced(
        self, with_gradient: tuple[int, ...], gradients: list[jax.Array], rate: jax.Array
    ) -> None:
        """Take one step in place, or accumulate the gradients, and count the call.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients.
            rate: learning rate.
        """
        if not with_gradient:
            pass
        elif self.gradient_accumulation_steps is None:
            self._update(with_gradient, gradients, rate, [])
        else:
            self._accumulate(with_gradient, gradients)
            count = self._iterations.value + 1
            do_if(
                count % self.gradient_accumulation_steps == 0,
                lambda: self._update_with_accumulated(with_gradient, rate),
                [*self._trainable_variables, *self.variables],
            )
        self._iterations.assign_add(1)

    def _accumulate(self, with_gradient: tuple[int, ...], gradients: list[jax.Array]) -> None:
        """Add the gradients of one micro-batch to the accumulated means.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients.
        """
        for i, gradient in zip(with_gradient, gradients, strict=True):
            accumulator = self._accumulated_gradients[i]
            mean = gradient.astype(accumulator.dtype) / self.gradient_accumulation_steps
            accumulator.assign_add(mean)
        if self.noise_scale_batch_size is not None:
            self._accumulated_squares.assign_add(sum_of_squares(gradients))

    def _update_with_accumulated(self, with_gradient: tuple[int, ...], rate: jax.Array) -> None:
        """Update the variables with the accumulated means, and reset all accumulators to zero.

        Args:
            with_gradient: indices of the variables that have a gradient.
            rate: learning rate.
        """
        totals = [] if self.noise_scale_batch_size is None else [self._accumulated_squares]
        means = [self._accumulated_gradients[i].value for i in with_gradient]
        self._update(with_gradient, means, rate, [total.value for total in totals])
        never = self.gradient_norm.value < -1.0
        for accumulator in [*self._accumulated_gradients, *totals]:
            accumulator.assign(zeros_in_place_of(accumulator.value, never))

    def _update(
        self,
        with_gradient: tuple[int, ...],
        gradients: list[jax.Array],
        rate: jax.Array,
        totals: list[jax.Array],
    ) -> None:
        """Update the variables, and record the update.

        Args:
            with_gradient: indices of the variables that have a gradient.
            gradients: their gradients, averaged over micro-batches.
            rate: learning rate.
            totals: a list with the sum of the squares of all small batches, empty if the noise
                scale is not measured.
        """
        recorders = ready_recorders(self)
        rule, weights = self._rule(), [v.value for v in self._trainable_variables]
        final = self._final_gradients(with_gradient, gradients)
        normalized = normalized_by(rule, final)
        if update_rule.changes_gradient(rule):
            gradients, normalized = not_before(gradients, normalized)
            final = self._final_gradients(with_gradient, gradients)
        if conditions := conditions_of_step(recorders):
            is_taken = normalized.is_finite & jnp.all(jnp.stack(conditions))
            normalized = normalized._replace(is_taken=is_taken)
        self._descend(with_gradient, final, normalized, rate)
        self._assign_readings(with_gradient, normalized)
        for total in totals:
            self._measure_noise(total, normalized, lambda: sum_of_squares(gradients))
        for recorder in recorders:
            recorder.record(
                ops.convert_to_tensor(self.iterations) + 1,
                measured_by_sngm(self, normalized, with_gradient),
                Change(
                    weights,
                    [v.value for v in self._trainable_variables],
                    [None if momentum is None else momentum.value for momentum in self.momentums],
                ),
                lambda: dict(
                    zip(
                        with_gradient,
                        normalization.directions_by_global_norm(rule, normalized, final),
                        strict=True,
                    )
                ),
            )

    def _final_gradients(
        self, with_gradient: tuple[int, ...], gradients: list[jax.Array]
    ) -> list[jax.Array]:
        """Return the gradients to be normalized, after coupled weight decay and `clipvalue`."""
        rule = self._rule()
        weights = [at_least_float32(self._trainable_variables[i].value) for i in with_gradient]
        gradients = [g.astype(w.dtype) for g, w in zip(gradients, weights, strict=True)]
        if not update_rule.changes_gradient(rule):
            return gradients
        decays = self._decays(self._trainable_variables)
        return [
            update_rule.final_gradient(rule, gradient, weight, decays[i])
            for i, gradient, weight in zip(with_gradient, gradients, weights, strict=True)
        ]

    def _descend(
        self,
        with_gradient: tuple[int, ...],
        final: list[jax.Array],
        normalized: Normalization,
        rate: jax.Array,
    ) -> None:
        """Assign new weights, momenta and moving averages, and apply constraints.

        Args:
            with_gradient: indices of the variables that have a gradient.
            final: the gradients to be normalized.
            normalized: how to normalize them.
            rate: learning rate.
        """
        rule, decays = self._rule(), self._decays(self._trainable_variables)
        coefficients = self._coefficients(rate, normalized.is_taken)
        new = [at_least_float32(v.value) for v in self._trainable_variables]
        for i, direction in zip(
            with_gradient, normalization.directions(normalized, final), strict=True
        ):
            momentum = self.momentums[i].value if self.momentums else None
            new[i], velocity = update_rule.descend(
                rule,
                coefficients[new[i].dtype],
                new[i],
                None if momentum is None else at_least_float32(momentum),
                direction,
                decays[i],
            )
            if momentum is not None:
                self.momentums[i].assign(velocity)
        if self.use_ema:
            new = self._averaged(new, coefficients, normalized.is_taken)
        for i, weight in enumerate(new):
            variable = self._trainable_variables[i]
            constraint = getattr(variable, "constraint", None) if i in with_gradient else None
            if constraint is not None:
                stored = weight.astype(variable.dtype)
                weight = jnp.where(normalized.is_taken, constraint(stored), stored)
            if i in with_gradient or self.use_ema:
                variable.assign(weight)

    def _coefficients(self, rate: jax.Array, is_taken: jax.Array) -> dict[Any, Coefficients]:
        """Return the factors of this step for each dtype that variables are computed in."""
        count = self.averaged_updates
        first_average = None if count is None else jnp.equal(count.value, 0)
        dtypes = {at_least_float32(v.value).dtype for v in self._trainable_variables}
        return {
            dtype: update_rule.step_coefficients(
                self._rule(), rate.astype(dtype), first_average, is_taken
            )
            for dtype in dtypes
        }

    def _averaged(
        self, weights: list[jax.Array], coefficients: dict[Any, Coefficients], is_taken: jax.Array
    ) -> list[jax.Array]:
        """Update the moving averages of the weights.

        Args:
            weights: the new weights of all variables, at least float32.
            coefficients: the factors of this step, by dtype.
            is_taken: boolean scalar, `False` if the step is skipped.

        Returns:
            The weights, overwritten by their averages if `ema_overwrite_frequency` says so.
        """
        overwrite: Any = False
        if self.ema_overwrite_frequency:
            updates = ops.convert_to_tensor(self.iterations) + 1
            overwrite = (updates % self.ema_overwrite_frequency == 0) & is_taken
        new = list(weights)
        for i, average in enumerate(self._model_variables_moving_average):
            if average is None:
                continue
            value = update_rule.moving_average(
                coefficients[new[i].dtype], at_least_float32(average.value), new[i]
            )
            average.assign(value)
            if overwrite is not False:
                new[i] = jnp.where(overwrite, value, new[i])
        return new

    def _assign_readings(self, with_gradient: tuple[int, ...], normalized: Normalization) -> None:
        """Assign the variables that a user may read: norms, skipped steps, averaged updates.

        Args:
            with_gradient: indices of the variables that have a gradient. The norm of others is 0.
            normalized: how the gradient was normalized.
        """
        norms = update_rule.scatter(normalized.norms, with_gradient, len(self._trainable_variables))
        self.gradient_norm.assign(normalized.norm.astype("float32"))
        self.gradient_norms.assign(norms.astype("float32"))
        skipped = jnp.logical_not(normalized.is_taken)
        self.skipped_steps.assign_add(skipped.astype(self.skipped_steps.dtype))
        if self.averaged_updates is not None:
            is_taken = normalized.is_taken.astype(self.averaged_updates.dtype)
            self.averaged_updates.assign_add(is_taken)
