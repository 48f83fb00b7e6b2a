"""The part of SNGM around its step that is the same on every backend.

The methods of Keras' optimizers that it replaces are in one file."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
from keras import ops

from keras_sngm import normalization, update_rule
from keras_sngm.backend.common.cache import Cache
from keras_sngm.backend.common.checks import check_each_variable_is_given_once, check_shapes
from keras_sngm.backend.common.host_count import AccumulationCycle, HostCount
from keras_sngm.backend.common.noise import NoiseMeter
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule, arithmetic_dtype


class WholeModelOptimizer(keras.optimizers.Optimizer):
    """Keras optimizer with one update for the whole model instead of one per variable.

    A backend supplies `_step`. An optimizer supplies `_rule`, `_decays`, the
    hyper-parameters below and these variables: `momentums`, `gradient_norm`,
    `gradient_norms` and `skipped_steps`, and `averaged_updates`, `gradient_noise_scale`
    and `noise_moments`, which may be `None`. Of all of them `averaged_updates` is made last.

    Attributes:
        jit_compile: `True`, `False` or `"auto"`, whether the step is compiled by XLA.
        noise_scale_batch_size: number of samples in one call of the optimizer, all replicas
            together; `None` if the noise scale is not measured.
        noise_scale_momentum: weight of the past in the averages behind the noise scale.
        gradient_accumulation_steps: number of calls that make up an update; `None` for one.
        averaged_updates: number of updates of the moving averages, `None` without them.
    """

    jit_compile: bool | str
    noise_scale_batch_size: int | None
    noise_scale_momentum: float
    gradient_accumulation_steps: int | None
    averaged_updates: keras.Variable | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._names = Cache()
        self._calls = HostCount()
        self._cycle = AccumulationCycle()

    def build(self, variables: Sequence[Any]) -> None:
        """Create Keras' own optimizer variables, and those in which gradients accumulate.

        With `gradient_accumulation_steps` there is one accumulator per variable, at least float32,
        and with `noise_scale_batch_size` a scalar for the sum of their squares.
        """
        # Keras' accumulators would have the dtype of the variables, and under a
        # strategy be saved from the first replica alone.
        steps = self.gradient_accumulation_steps
        self.gradient_accumulation_steps = None
        super().build(variables)
        self.gradient_accumulation_steps = steps
        if steps is not None:
            self._accumulated_gradients = [self._add_accumulator(v) for v in variables]
        if steps is not None and self.noise_scale_batch_size is not None:
            self._accumulated_squares = self._add_total((), "float32", "squares_accumulator")

    def add_variable(self, shape: Any, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Add a variable under a name, and so a path, that no other of the optimizer's has.

        Two variables of the model can share a path; the optimizer's variables that belong to them
        would otherwise share one, too.
        """
        return super().add_variable(shape, *args, name=self._unused_name(name), **kwargs)

    def _unused_name(self, name: str | None) -> str | None:
        """Return `name`, or `name` with the least number that no variable of the optimizer has."""
        candidates = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))
        unused = next(candidate for candidate in candidates if candidate not in self._names)
        if unused is not None:
            self._names.get_or_make(unused, lambda: True)
        return unused

    def load_own_variables(self, store: Any) -> None:
        """Set the state from a saved one, also from one without `averaged_updates`.

        Earlier versions did not count how often averages were updated.
        """
        if self.averaged_updates is None or len(store.keys()) != len(self.variables) - 1:
            super().load_own_variables(store)
            return
        for i, variable in enumerate(self.variables[:-1]):
            variable.assign(store[str(i)])
        self.averaged_updates.assign(ops.maximum(self.iterations - self.skipped_steps, 0))

    def _add_accumulator(self, variable: Any) -> keras.Variable:
        """Add the variable in which the gradients of one variable of the model accumulate."""
        return self._add_total(
            variable.shape,
            arithmetic_dtype(variable.dtype),
            name_for(variable, "gradient_accumulator"),
            getattr(variable, "_layout", None),
        )

    def _add_total(
        self, shape: tuple[int, ...], dtype: str, name: str, layout: Any = None
    ) -> keras.Variable:
        """Add a variable that sums something up over micro-batches.

        A backend with replicas may keep one sum on each of them.
        """
        return self.add_variable(shape, dtype=dtype, name=name, layout=layout)

    def _rule(self) -> Rule:
        """Return the hyper-parameters of the next step."""
        raise NotImplementedError

    def _decays(self, variables: Sequence[Any]) -> Sequence[bool]:
        """Return for each of the variables whether weight decay applies to it."""
        raise NotImplementedError

    def _step(self, gradients: Sequence[Any], with_gradient: Sequence[int]) -> None:
        """Update the variables or accumulate the gradients, and count the call.

        Args:
            gradients: gradients of some variables.
            with_gradient: the index of each of these among the optimizer's variables.
        """
        raise NotImplementedError

    def drop_steps_with(self, recorder: Any) -> None:
        """Drop compiled steps that call a recorder, on backends that keep such steps."""

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Replace the weights by their averages, unless no step has been taken yet."""
        if self.averaged_updates is not None and self.averaged_updates.numpy() > 0:
            super().finalize_variable_values(var_list)

    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables, or accumulate their gradients.

        Keras' own `apply` would divide by the loss scale in a way that fails
        for sparse gradients, apply constraints after micro-batches and skipped
        steps too, and count in a way that XLA on several GPUs forbids.

        Args:
            grads: gradients, as many as there are variables; `None` where there
                is none.
            trainable_variables: the variables that they belong to. May be left
                out once the optimizer is built.

        Raises:
            ValueError: if gradients and variables do not fit each other or the
                optimizer, or if no step can be taken here.
        """
        gradients = list(grads)
        if not gradients:
            return
        with keras.name_scope(self.name, caller=self):
            variables = self._variables_of(gradients, trainable_variables)
            gradients, variables = self._filter_empty_gradients(gradients, variables)
            gradients, variables = map(
                list, self._overwrite_variables_directly_with_gradients(gradients, variables)
            )
            check_shapes(gradients, variables)
            with_gradient = [self._get_variable_index(variable) for variable in variables]
            check_each_variable_is_given_once(with_gradient, variables)
            micro_batches = self.gradient_accumulation_steps
            if micro_batches is None or not self._state_is_known(gradients):
                self._step(gradients, with_gradient)
            else:
                self._step_in_cycle(gradients, with_gradient, micro_batches)

    def _step_in_cycle(
        self, gradients: list[Any], with_gradient: list[int], micro_batches: int
    ) -> None:
        """Take a step within an accumulation cycle.

        Variables that had a gradient in earlier micro-batches of the cycle, but have none in this
        one, get a gradient of zeros, so that all that was accumulated is applied.

        Args:
            gradients: gradients of some variables. Zeros are appended.
            with_gradient: the index of each of these. Indices are appended.
            micro_batches: number of calls that make up an update.
        """
        calls, in_this_call = self._calls_so_far(), frozenset(with_gradient)
        for i in self._idle_with_gradient(calls, micro_batches, in_this_call):
            total = ops.convert_to_tensor(self._accumulated_gradients[i])
            gradients.append(ops.zeros_like(total))
            with_gradient.append(i)
        self._step(gradients, with_gradient)
        self._calls.set(self._iterations, calls + 1)
        self._cycle.add(calls, micro_batches, in_this_call)

    def _calls_so_far(self) -> int:
        """Return how often the optimizer was called. Not to be asked while a function is traced.

        If others have assigned to `iterations`, what is known of the accumulation cycle is dropped.
        """
        if not self._calls.is_own(self._iterations):
            self._cycle = AccumulationCycle()
        return self._calls.of(self._iterations)

    def _idle_with_gradient(
        self, calls: int, micro_batches: int, with_gradient: frozenset[int]
    ) -> list[int]:
        """Return the indices of variables whose only gradients were in earlier micro-batches.

        Args:
            calls: number of calls of the optimizer before this one.
            micro_batches: number of calls that make up an update.
            with_gradient: indices of the variables that have a gradient in this call.
        """
        known = self._cycle.indices(calls, micro_batches)
        if known is not None:
            return sorted(known - with_gradient)
        return [i for i in self._idle(with_gradient) if self._has_accumulated(i)]

    def _idle(self, with_gradient: frozenset[int]) -> list[int]:
        """Return the indices of the variables without a gradient in this call."""
        return [i for i in range(len(self._trainable_variables)) if i not in with_gradient]

    def _has_accumulated(self, index: int) -> bool:
        """Return whether a variable's accumulated gradient is not zero. Waits for the device."""
        total = ops.convert_to_tensor(self._accumulated_gradients[index])
        return bool(ops.any(total != 0))

    def _state_is_known(self, gradients: Sequence[Any]) -> bool:
        """Return whether gradients and variables have values that can be read.

        Here always. A backend that traces functions returns `False` while it does.

        Args:
            gradients: the gradients of a call.
        """
        return True

    def _variables_of(
        self, gradients: list[Any], trainable_variables: Iterable[Any] | None
    ) -> list[Any]:
        """Return the variables that the gradients belong to; build the optimizer if it is not yet.

        Raises:
            ValueError: if gradients and variables do not fit each other or the optimizer.
        """
        if trainable_variables is not None:
            variables = list(trainable_variables)
            if not self.built:
                self.build(variables)
            self._check_variables_are_known(variables)
        elif self.built:
            variables = self._trainable_variables
        else:
            raise ValueError(
                "Gradients can be passed without variables once the optimizer is built. "
                "Call `optimizer.build(trainable_variables)` first."
            )
        if len(gradients) != len(variables):
            raise ValueError(
                "There must be one gradient, or None, for every variable. "
                f"Received: {len(gradients)} gradients for {len(variables)} variables"
            )
        return variables

    def _learning_rate_of_update(self) -> Any:
        """Return the learning rate of an update. To be called before its last call is counted."""
        schedule = self._learning_rate
        if self.gradient_accumulation_steps and isinstance(
            schedule, keras.optimizers.schedules.LearningRateSchedule
        ):
            # A schedule counts micro-batches. Read at the first micro-batch of each update, a
            # schedule that is k times as long as one for whole batches gives the same rates.
            first = self._iterations - (self.gradient_accumulation_steps - 1)
            with self._iterations_being(first):
                return schedule(self._iterations)
        return self.learning_rate

    def _iterations_being(self, value: Any) -> contextlib.AbstractContextManager:
        """Return a context in which the counter of calls reads as `value`, for a schedule."""
        return keras.StatelessScope([(self._iterations, value)])

    def _replicas(self) -> int:
        """Return the number of replicas that call the optimizer at a time."""
        return 1

    def _noise_meter(self) -> NoiseMeter | None:
        """Return the settings of the gradient noise scale, or `None` if it is not measured."""
        if self.noise_scale_batch_size is None:
            return None
        return NoiseMeter(
            self.noise_scale_batch_size,
            self.noise_scale_momentum,
            self._replicas(),
            self.gradient_accumulation_steps or 1,
        )

    def _measure_noise(
        self,
        total: Any,
        normalized: Normalization,
        squares: Callable[[], Any],
        on_replica: Callable[[Any], Any] = lambda variable: variable,
    ) -> None:
        """Update the gradient noise scale, if it is measured.

        A skipped update does not count, nor one whose gradients are so small that their squares
        have become zero.

        Args:
            total: scalar, the sum of the squares of the gradients of all small batches: one of each
                replica in each call.
            normalized: the normalization of the sum of these gradients.
            squares: computes the sum of the squares of the gradient of the update, for rules that
                change the gradient before it is normalized.
            on_replica: maps a variable to this replica's copy of it.
        """
        meter = self._noise_meter()
        if meter is None:
            return
        if update_rule.changes_gradient(self._rule()):
            large = squares()
        else:
            large = ops.cast(normalized.unclipped, "float32") ** 2
        meter.update(
            on_replica(self.noise_moments),
            on_replica(self.gradient_noise_scale),
            meter.estimates(total, large),
            ops.logical_and(normalized.is_taken, total >= self._least_total()),
        )

    def _least_total(self) -> float:
        """Return the least sum of squares over the whole model that is exact to a thousandth.

        A smaller one may be that of gradients so small that their squares became zero.
        """
        size = sum(math.prod(variable.shape) for variable in self._trainable_variables)
        return float(normalization.least_reliable_sums((size,), "float32", error=1e-3)[0])


def name_for(variable: Any, name: str) -> str:
    """Return the name of an optimizer's variable that belongs to one of the model."""
    path = getattr(variable, "path", variable.name)
    return f"{path.replace('/', '_').replace(':', '_')}_{name}"
