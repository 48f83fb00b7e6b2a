"""The replicas a step is taken on, and how they sum up their gradients.

Under a `tf.distribute` strategy one optimizer has weights on several devices.
Where TensorFlow can leave the replicas and act on all of them at once, it must
be done: there, and only there, may a `tf.cond` decide whether they communicate.
Where it cannot, each replica acts for itself. Both look the same to a step.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf
from tensorflow.python.distribute.distribute_utils import regroup
from tensorflow.python.distribute.values_util import get_current_replica_id_as_int


class Replicas(Protocol):
    """Those replicas that the code in hand acts for."""

    def parts(self, value: Any) -> tuple[Any, ...]:
        """What a variable or a gradient is on each of the replicas."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """The gradient that has these parts."""

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        """Each gradient, summed over all replicas of all machines."""


class AllReplicas:
    """All replicas of this machine, from the cross-replica context."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy

    def parts(self, value: Any) -> tuple[Any, ...]:
        return self._strategy.experimental_local_results(native_variable(value))

    def joined(self, parts: Sequence[Any]) -> Any:
        return regroup(tuple(parts))

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        # A gradient is its own destination: with the variable there TensorFlow
        # would reduce them one by one.
        return self._strategy.extended.batch_reduce_to(
            tf.distribute.ReduceOp.SUM, [(gradient, gradient) for gradient in gradients]
        )


class OwnReplica:
    """One replica, from its own context."""

    def __init__(self, context: tf.distribute.ReplicaContext) -> None:
        self._context = context

    def parts(self, value: Any) -> tuple[Any, ...]:
        parts = self._context.strategy.experimental_local_results(native_variable(value))
        return (parts[get_current_replica_id_as_int() if len(parts) > 1 else 0],)

    def joined(self, parts: Sequence[Any]) -> Any:
        (part,) = parts
        return part

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        if self._context.num_replicas_in_sync == 1:
            return list(gradients)
        return self._context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients))


def native_variable(value: Any) -> Any:
    return value.value if isinstance(value, keras.Variable) else value
