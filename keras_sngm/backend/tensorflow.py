"""How one SNGM step runs on TensorFlow, under any distribution strategy.

Keras calls the optimizer once per replica. Everything here happens in the
cross-replica context, which is entered once: there, and only there, may a
`tf.cond` decide whether the replicas communicate.
"""

import functools
import platform
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.distribute import distribute_utils
from tensorflow.python.framework.config import is_op_determinism_enabled

from keras_sngm.backend.tensorflow_step import LocalStep, Moment, Readings, Slot
from keras_sngm.update_rule import Rule


class BackendOptimizer(keras.optimizers.Optimizer):
    """Keras' optimizer with one update for the whole model instead of one per variable.

    A subclass supplies `_rule`, `_decays` and the variables read here:
    `momentums`, `gradient_norm`, `gradient_norms` and `skipped_steps`.
    """

    jit_compile: bool | str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._local_steps = _Cache()

    def _rule(self) -> Rule:
        raise NotImplementedError

    def _decays(self, variables: Sequence[Any]) -> Sequence[bool]:
        raise NotImplementedError

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Replace the weights by their averages, unless no step has been taken yet."""
        if self.iterations.numpy() > self.skipped_steps.numpy():
            super().finalize_variable_values(var_list)

    def _backend_apply_gradients(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any]
    ) -> None:
        replica = tf.distribute.get_replica_context()
        if replica is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must be applied in a replica context, "
                "that is inside a function passed to `strategy.run`."
            )
        active = tuple(self._get_variable_index(v) for v in trainable_variables)
        step = tf.autograph.experimental.do_not_convert(
            functools.partial(self._cross_replica_step, active)
        )
        replica.merge_call(step, args=(list(grads),))

    def _cross_replica_step(
        self, active: tuple[int, ...], strategy: tf.distribute.Strategy, gradients: list[Any]
    ) -> None:
        if self.gradient_accumulation_steps is None:
            self._reduce_and_update(active, strategy, gradients)
            return
        self._accumulate(active, strategy, gradients)
        is_last = (self._iterations + 1) % self.gradient_accumulation_steps == 0
        tf.cond(is_last, lambda: self._update_with_accumulated(active, strategy), lambda: None)

    def _accumulate(
        self, active: tuple[int, ...], strategy: tf.distribute.Strategy, gradients: list[Any]
    ) -> None:
        for i, gradient in zip(active, gradients, strict=True):
            accumulators = _local_results(strategy, self._accumulated_gradients[i])
            for accumulator, part in zip(
                accumulators, strategy.experimental_local_results(gradient), strict=True
            ):
                with tf.device(accumulator.device):
                    _add(accumulator, part)

    def _update_with_accumulated(
        self, active: tuple[int, ...], strategy: tf.distribute.Strategy
    ) -> None:
        means = []
        for i in active:
            parts = []
            for accumulator in _local_results(strategy, self._accumulated_gradients[i]):
                with tf.device(accumulator.device):
                    parts.append(accumulator / self.gradient_accumulation_steps)
            means.append(distribute_utils.regroup(tuple(parts)))
        self._reduce_and_update(active, strategy, means)
        for accumulator in self._accumulated_gradients:
            for part in _local_results(strategy, accumulator):
                with tf.device(part.device):
                    part.assign(tf.zeros_like(part))

    def _reduce_and_update(
        self, active: tuple[int, ...], strategy: tf.distribute.Strategy, gradients: list[Any]
    ) -> None:
        # A gradient is its own destination: with the variable there TensorFlow
        # would reduce them one by one.
        reduced = strategy.extended.batch_reduce_to(
            tf.distribute.ReduceOp.SUM, [(gradient, gradient) for gradient in gradients]
        )
        per_variable = [strategy.experimental_local_results(gradient) for gradient in reduced]
        moment = self._moment()
        for replica, local_gradients in enumerate(zip(*per_variable, strict=True)):
            step = self._local_step(active, strategy, replica)
            with tf.device(step.device):
                step(local_gradients, moment)

    def _moment(self) -> Moment:
        updates = tf.convert_to_tensor(self.iterations)
        overwrite = tf.constant(False)
        if self.use_ema and self.ema_overwrite_frequency:
            overwrite = (updates + 1) % self.ema_overwrite_frequency == 0
        return Moment(
            learning_rate=tf.convert_to_tensor(self.learning_rate),
            first_average=tf.equal(updates, tf.convert_to_tensor(self.skipped_steps)),
            overwrite_with_average=overwrite,
        )

    def _local_step(
        self, active: tuple[int, ...], strategy: tf.distribute.Strategy, replica: int
    ) -> LocalStep:
        # Hyper-parameters are part of the key, so that assigning to one of
        # them takes effect as it does in Keras: when Python runs again.
        rule = self._rule()
        return self._local_steps.get_or_make(
            (rule, self.jit_compile, active, replica),
            lambda: self._make_local_step(rule, active, strategy, replica),
        )

    def _make_local_step(
        self, rule: Rule, active: tuple[int, ...], strategy: tf.distribute.Strategy, replica: int
    ) -> LocalStep:
        def local(variable: Any) -> tf.Variable | None:
            return None if variable is None else _local_results(strategy, variable)[replica]

        count = len(self._trainable_variables)
        slots = [
            Slot(local(weight), local(momentum), local(average), decays)
            for weight, momentum, average, decays in zip(
                self._trainable_variables,
                self.momentums or [None] * count,
                self._model_variables_moving_average if self.use_ema else [None] * count,
                self._decays(self._trainable_variables),
                strict=True,
            )
        ]
        readings = Readings(
            local(self.gradient_norm), local(self.gradient_norms), local(self.skipped_steps)
        )
        jit_compile = self.jit_compile
        if jit_compile == "auto":
            jit_compile = _xla_is_supported() and len({slot.weight.device for slot in slots}) == 1
        return LocalStep(rule, slots, active, readings, bool(jit_compile))


class _Cache:
    """A dictionary that Keras and TensorFlow do not try to save with the optimizer."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Any] = {}

    def get_or_make(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._entries:
            self._entries[key] = make()
        return self._entries[key]


def _local_results(strategy: tf.distribute.Strategy, variable: Any) -> tuple[tf.Variable, ...]:
    """The components of a variable on this machine's replicas."""
    native = variable.value if isinstance(variable, keras.Variable) else variable
    return strategy.experimental_local_results(native)


def _add(accumulator: tf.Variable, gradient: Any) -> None:
    gradient = tf.cast(gradient, accumulator.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        accumulator.scatter_add(gradient)
    else:
        accumulator.assign_add(gradient)


def _xla_is_supported() -> bool:
    if is_op_determinism_enabled():
        return False
    return not (platform.system() == "Darwin" and tf.config.list_physical_devices("GPU"))
