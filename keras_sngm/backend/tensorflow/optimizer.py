"""SNGM on TensorFlow: one update for the whole model, on any number of replicas.

Keras calls the optimizer once per replica. A step there is to

1. undo the loss scale,
2. accumulate, where that is asked for: k - 1 of k calls end here and communicate nothing,
3. sum up the gradients of all replicas,
4. update the variables of each device, see `LocalStep`.

The four are in one file, in this order.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from keras_sngm.backend.common.cache import Cache
from keras_sngm.backend.common.measured import measured_by_sngm
from keras_sngm.backend.common.optimizer import WholeModelOptimizer, name_for
from keras_sngm.backend.common.recorder import conditions_of_step, ready_recorders
from keras_sngm.backend.common.slot import Slot
from keras_sngm.backend.tensorflow.accumulation import add_to_means, set_to_zero, values_of
from keras_sngm.backend.tensorflow.checks import (
    check_strategy,
    check_variables,
    needs_merge_call,
    xla_is_supported,
)
from keras_sngm.backend.tensorflow.noise import sum_of_squares
from keras_sngm.backend.tensorflow.recorder import OnReplica
from keras_sngm.backend.tensorflow.replicas import (
    Agreement,
    AllReplicas,
    OwnReplica,
    Replicas,
    first_gradient_of,
    native_variable,
)
from keras_sngm.backend.tensorflow.scalars import StepScalars
from keras_sngm.backend.tensorflow.step import LocalStep, Readings
from keras_sngm.backend.tensorflow.tensors import arithmetic_dtype, of_known_shape
from keras_sngm.normalization import Normalization
from keras_sngm.update_rule import Rule


class BackendOptimizer(WholeModelOptimizer):
    """Optimizer that takes its step on TensorFlow, on all replicas that this process has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_strategy(type(self).__name__, tf.distribute.get_strategy())
        super().__init__(*args, **kwargs)
        self._local_steps = Cache()
        self._agreement = Agreement()

    def build(self, variables: Sequence[Any]) -> None:
        """Create the optimizer's variables.

        Raises:
            ValueError: if a variable was created under another strategy than the optimizer.
        """
        check_variables(type(self).__name__, self._distribution_strategy, variables)
        super().build(variables)

    @tf.autograph.experimental.do_not_convert
    def apply(self, grads: Iterable[Any], trainable_variables: Iterable[Any] | None = None) -> None:
        """Update the variables, or accumulate their gradients. AutoGraph does not convert this."""
        super().apply(grads, trainable_variables)

    def _add_accumulator(self, variable: Any) -> keras.Variable:
        """Add the variable in which each replica's gradients of one variable accumulate."""
        native = native_variable(variable)
        with self._distribution_strategy.extended.colocate_vars_with(native):
            return self._add_total(
                tuple(variable.shape),
                arithmetic_dtype(native.dtype).name,
                name_for(variable, "gradient_accumulator"),
            )

    def _add_total(
        self, shape: tuple[int, ...], dtype: str, name: str, layout: Any = None
    ) -> keras.Variable:
        """Add a variable of which each replica has its own; reading or saving it adds them up.

        Args:
            shape: shape of the variable.
            dtype: dtype of the variable.
            name: name of the variable; a number is added if another has this name.
            layout: not used: it is for backends that distribute by layouts.
        """
        with self._distribution_strategy.scope(), keras.name_scope(self.name, caller=self):
            variable = keras.Variable(
                keras.initializers.Zeros(),
                shape=shape,
                dtype=dtype,
                trainable=False,
                aggregation="sum",
                synchronization="on_read",
                name=self._unused_name(name),
            )
        self._track_variable(variable)
        return variable

    def _step(self, gradients: Sequence[Any], with_gradient: Sequence[int]) -> None:
        """Take one step, in the cross-replica context where TensorFlow can enter it.

        Args:
            gradients: gradients of some variables, dense or sparse, times the loss scale.
            with_gradient: the index of each of these among the optimizer's variables.

        Raises:
            ValueError: if replicas that act for themselves have gradients for different variables,
                or if no step can be taken here.
        """
        all_gradients: list[Any] = [None] * len(self._trainable_variables)
        for gradient, i in zip(gradients, with_gradient, strict=True):
            shape = self._trainable_variables[i].shape
            all_gradients[i] = self._unscaled(of_known_shape(gradient, shape))
        if needs_merge_call(type(self).__name__, self._distribution_strategy):
            tf.distribute.get_replica_context().merge_call(
                tf.autograph.experimental.do_not_convert(
                    lambda strategy, all_gradients: self._step_on(
                        AllReplicas(strategy), all_gradients
                    )
                ),
                args=(all_gradients,),
            )
        else:
            context = tf.distribute.get_replica_context()
            self._agreement.check(context, [gradient is not None for gradient in all_gradients])
            self._step_on(OwnReplica(context), all_gradients)

    def _state_is_known(self, gradients: Sequence[Any]) -> bool:
        """Return whether the call is eager and on one replica, so that state can be read."""
        return tf.executing_eagerly() and self._replicas() == 1

    def _calls_so_far(self) -> int:
        """Return how often the optimizer was called. Not to be asked while a function is traced."""
        return int(self._iterations)

    def _idle_with_gradient(
        self, calls: int, micro_batches: int, with_gradient: frozenset[int]
    ) -> list[int]:
        """Return the indices of variables whose only gradients were in earlier micro-batches.

        Args:
            calls: number of calls of the optimizer before this one.
            micro_batches: number of calls that make up an update.
            with_gradient: indices of the variables that have a gradient in this call.
        """
        # An assignment by others to a TensorFlow variable leaves no trace on the host, so what
        # is known of this cycle may be incomplete.
        known = self._cycle.indices(calls, micro_batches) or frozenset()
        return [i for i in self._idle(with_gradient) if i in known or self._has_accumulated(i)]

    def _unscaled(self, gradient: Any) -> Any:
        """Divide a gradient, dense or sparse, by the loss scale, not in 16 bits."""
        if self.loss_scale_factor is None:
            return gradient
        # In 16 bits a small gradient would become zero.
        gradient = tf.cast(gradient, arithmetic_dtype(gradient.dtype))
        if isinstance(gradient, tf.IndexedSlices):
            values = gradient.values / self.loss_scale_factor
            return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return gradient / self.loss_scale_factor

    def _step_on(self, replicas: Replicas, all_gradients: Sequence[Any]) -> None:
        """Take one step on some replicas: update the variables or accumulate, and count the call.

        A call without data, at the end of a dataset of unknown length, is not counted.

        Args:
            replicas: the replicas to act for.
            all_gradients: for each of the optimizer's variables its gradient or `None`.
        """
        with_gradient = tuple(i for i, gradient in enumerate(all_gradients) if gradient is not None)
        gradients = [
            replicas.completed(all_gradients[i], self._trainable_variables[i])
            for i in with_gradient
        ]
        squares = []
        if with_gradient and (meter := self._noise_meter()) is not None:
            meter.check()
            squares = [self._squares(replicas, with_gradient, gradients)]
        if not with_gradient:
            pass
        elif self.gradient_accumulation_steps is None:
            self._reduce_and_update(replicas, with_gradient, gradients, squares)
        else:
            micro_batches = self.gradient_accumulation_steps
            self._accumulate(replicas, with_gradient, gradients, squares, micro_batches)
            is_last = (self._iterations + 1) % micro_batches == 0
            tf.cond(
                is_last,
                lambda: self._update_with_accumulated(replicas, with_gradient),
                lambda: None,
            )
        for replica, part in enumerate(replicas.parts(self._iterations)):
            with (
                tf.device(part.device),
                tf.control_dependencies(first_gradient_of(replicas, replica, gradients)),
            ):
                part.assign_add(1)

    def _replicas(self) -> int:
        """Return the number of replicas, on all machines."""
        return self._distribution_strategy.num_replicas_in_sync

    def _squares(
        self, replicas: Replicas, with_gradient: tuple[int, ...], gradients: list[Any]
    ) -> Any:
        """Return a per-replica value: the sum of squares of each replica's own gradient.

        Args:
            replicas: the replicas to act for.
            with_gradient: indices of the variables that have a gradient.
            gradients: a per-replica value for each of these variables.
        """
        weight = self._trainable_variables[with_gradient[0]]
        sums: list[tf.Tensor] = []
        for parts in zip(*map(replicas.parts, gradients), strict=True):
            device = replicas.parts(weight)[len(sums)].device
            with tf.device(device):
                sums.append(self._local_squares(with_gradient, parts, device))
        return replicas.joined(sums)

    def _accumulate(
        self,
        replicas: Replicas,
        with_gradient: tuple[int, ...],
        gradients: list[Any],
        squares: list[Any],
        micro_batches: int,
    ) -> None:
        """Add each replica's gradients, and their squares if needed, to its own accumulators.

        Each gradient is divided by `micro_batches`, so that their sum is a mean.

        Args:
            replicas: the replicas to act for.
            with_gradient: indices of the variables that have a gradient.
            gradients: for each of these, a value with the gradients of all replicas.
            squares: a list with such a value, the sum of squares of all gradients of each replica;
                empty if the noise scale is not measured.
            micro_batches: number of calls that make up an update.
        """
        means = [self._accumulated_gradients[i] for i in with_gradient]
        add_to_means(replicas, means, gradients, micro_batches)
        if squares:
            add_to_means(replicas, [self._accumulated_squares], squares, 1)

    def _update_with_accumulated(self, replicas: Replicas, with_gradient: tuple[int, ...]) -> None:
        """Update the variables with the accumulated means, then reset these to zero.

        The means of all replicas are summed up: each loss was divided by the number of replicas.
        If the noise scale is measured, the accumulated sum of squares goes with them.

        Args:
            replicas: the replicas to act for.
            with_gradient: indices of the variables that have a gradient.
        """
        gradients = values_of(replicas, [self._accumulated_gradients[i] for i in with_gradient])
        totals = []
        if self.noise_scale_batch_size is not None:
            totals = [self._accumulated_squares]
        self._reduce_and_update(replicas, with_gradient, gradients, values_of(replicas, totals))
        set_to_zero(replicas, [*self._accumulated_gradients, *totals])

    def _reduce_and_update(
        self,
        replicas: Replicas,
        with_gradient: tuple[int, ...],
        gradients: list[Any],
        squares: list[Any],
    ) -> None:
        """Sum up gradients over all replicas, and update each replica's variables with the sums.

        Args:
            replicas: the replicas to act for.
            with_gradient: indices of the variables that have a gradient.
            gradients: for each of these, a value with the gradients of all replicas.
            squares: a list with such a value, the sum of squares of all gradients of each replica;
                empty if the noise scale is not measured.
        """
        sums = [replicas.parts(summed) for summed in replicas.sums([*gradients, *squares])]
        per_variable, of_squares = sums[: len(with_gradient)], sums[len(with_gradient) :]
        recorders = ready_recorders(self)
        scalars = self._scalars(conditions_of_step(recorders, _copy_on(replicas, 0)))
        for replica, local_gradients in enumerate(zip(*per_variable, strict=True)):
            step = self._local_step(replicas, replica, with_gradient)
            with tf.device(step.device):
                on_replica = _copy_on(replicas, replica)
                # All replicas measure the same, so one of them records.
                number = tf.cast(self.iterations, tf.int64) + 1
                recording = recorders if replica == 0 else []
                for recorder in recording:
                    recorder.before(on_replica, number)
                normalized = step(local_gradients, scalars)
                for total in of_squares:
                    self._measure_noise(
                        total[replica],
                        normalized,
                        functools.partial(
                            self._local_squares, with_gradient, local_gradients, step.device
                        ),
                        on_replica,
                    )
                for recorder in recording:
                    # Reading a variable alone would not wait for data.
                    with tf.control_dependencies([normalized.norm]):
                        recorder.after(
                            on_replica,
                            number,
                            measured_by_sngm(self, normalized, step.indices, on_replica),
                            functools.partial(_directions, step, local_gradients, normalized),
                        )

    def _local_squares(
        self, with_gradient: tuple[int, ...], gradients: Sequence[Any], device: str
    ) -> tf.Tensor:
        """Return the sum of the squares of all gradients that one replica has."""
        return sum_of_squares(
            gradients, [self._trainable_variables[i] for i in with_gradient], device
        )

    def _scalars(self, conditions: Sequence[tf.Tensor]) -> StepScalars:
        """Return what changes from step to step besides the gradient, each a scalar on the device.

        Args:
            conditions: boolean scalars, all of which must be true for the step to be taken. Without
                any, `may_step` is `None`, as the scalars of other options that are off are.
        """
        updates = tf.convert_to_tensor(self.iterations)
        overwrite = None
        if self.use_ema and self.ema_overwrite_frequency:
            overwrite = (updates + 1) % self.ema_overwrite_frequency == 0
        return StepScalars(
            learning_rate=tf.convert_to_tensor(self._learning_rate_of_update()),
            first_average=None
            if self.averaged_updates is None
            else tf.equal(tf.convert_to_tensor(self.averaged_updates), 0),
            overwrite_with_average=overwrite,
            may_step=tf.reduce_all(conditions) if conditions else None,
        )

    def _local_step(
        self, replicas: Replicas, replica: int, with_gradient: tuple[int, ...]
    ) -> LocalStep:
        """Return the step for one replica's variables, from the cache if it is there.

        It is called with the gradients and the scalars of a step, updates the variables in place
        and returns how the gradient was normalized.

        Args:
            replicas: the replicas that this code acts for.
            replica: which of these.
            with_gradient: indices of the variables that have a gradient.
        """
        on_replica = _copy_on(replicas, replica)
        # Hyper-parameters are part of the key, so that assigning to one of them takes effect
        # as it does in Keras: the next time that this Python code runs.
        rule, jit_compile = self._rule(), self.jit_compile
        if jit_compile == "auto" and not xla_is_supported():
            jit_compile = False
        device = on_replica(self._trainable_variables[with_gradient[0]]).device
        in_xla = GraphOrParentsInXlaContext(get_default_graph())
        return self._local_steps.get_or_make(
            (rule, jit_compile, with_gradient, device, in_xla),
            lambda: self._make_local_step(rule, jit_compile, with_gradient, on_replica, in_xla),
        )

    def _make_local_step(
        self,
        rule: Rule,
        jit_compile: bool | str,
        with_gradient: tuple[int, ...],
        on_replica: OnReplica,
        in_xla: bool,
    ) -> LocalStep:
        """Make the step for the variables of one device.

        Args:
            rule: the hyper-parameters.
            jit_compile: whether to compile with XLA, or `"auto"`.
            with_gradient: indices of the variables that have a gradient.
            on_replica: maps a variable to this replica's copy of it, and `None` for `None`.
            in_xla: whether XLA compiles the function around the step.
        """
        count = len(self._trainable_variables)
        slots = [
            Slot(
                on_replica(weight),
                on_replica(momentum),
                on_replica(average),
                decays,
                getattr(weight, "constraint", None),
            )
            for weight, momentum, average, decays in zip(
                self._trainable_variables,
                self.momentums or [None] * count,
                self._model_variables_moving_average if self.use_ema else [None] * count,
                self._decays(self._trainable_variables),
                strict=True,
            )
        ]
        readings = Readings(
            on_replica(self.gradient_norm),
            on_replica(self.gradient_norms),
            on_replica(self.skipped_steps),
            on_replica(self.averaged_updates),
        )
        one_device = len({slot.weight.device for slot in slots}) == 1
        if jit_compile == "auto" and not one_device:
            jit_compile = False
        return LocalStep(rule, slots, with_gradient, readings, jit_compile, in_xla)


def _directions(
    step: LocalStep, gradients: Sequence[Any], normalized: Normalization, weights: Sequence[Any]
) -> dict[int, tf.Tensor]:
    """Compute each variable's part of g / norm(g) once more, by its index.

    Args:
        step: the step that was taken.
        gradients: the gradients that it was called with.
        normalized: what it has returned.
        weights: the weights of all variables before the step.
    """
    return step.directions(gradients, weights, normalized)


def _copy_on(replicas: Replicas, replica: int) -> OnReplica:
    """Return a function that maps a variable to one replica's copy of it, and `None` to `None`."""
    return lambda variable: None if variable is None else replicas.parts(variable)[replica]
