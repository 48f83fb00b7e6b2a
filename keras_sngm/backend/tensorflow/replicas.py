"""The replicas a step is taken on, and how they sum up their gradients.

Under a `tf.distribute` strategy one optimizer has weights on several devices.
Where TensorFlow can leave the replicas and act on all of them at once, it must
be done: there, and only there, may a `tf.cond` decide whether they communicate.
Where it cannot, each replica acts for itself. Both look the same to a step.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf
from tensorflow.python.distribute.cross_device_ops import CollectiveAllReduce
from tensorflow.python.distribute.distribute_utils import regroup
from tensorflow.python.distribute.values_util import get_current_replica_id_as_int
from tensorflow.python.framework.ops import get_default_graph

from keras_sngm.backend.tensorflow.slot import dense


class Replicas(Protocol):
    """Those replicas that the code in hand acts for."""

    def parts(self, value: Any) -> tuple[Any, ...]:
        """What a variable or a gradient is on each of the replicas."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """The gradient that has these parts."""

    def completed(self, gradient: Any, variable: Any) -> Any:
        """A gradient that each of the replicas has, of one kind and in its own memory.

        Args:
            gradient: what they gave for a variable, at least one of them a gradient.
            variable: that variable.
        """

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

    def completed(self, gradient: Any, variable: Any) -> Any:
        parts, weights = self.parts(gradient), self.parts(variable)
        if len({type(part) for part in parts}) == 1 and len(parts) == len(weights):
            return gradient
        if len(parts) < len(weights):  # all gave the same object
            parts = parts * len(weights)
        dtype = next(part.dtype for part in parts if part is not None)
        complete = []
        for part, weight in zip(parts, weights, strict=True):
            with tf.device(weight.device):
                if part is None:
                    complete.append(tf.zeros(weight.shape, dtype))
                else:
                    complete.append(tf.identity(dense(part, weight.shape)))
        return self.joined(complete)

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        reduce = self._strategy.extended.batch_reduce_to
        if _uses_a_ring_in_memory(self._strategy):
            reduce = tf.distribute.ReductionToOneDevice().batch_reduce
        # A gradient is its own destination: with the variable there TensorFlow
        # would reduce them one by one.
        return reduce(tf.distribute.ReduceOp.SUM, [(gradient, gradient) for gradient in gradients])


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

    def completed(self, gradient: Any, variable: Any) -> Any:
        return gradient

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        if self._context.num_replicas_in_sync == 1:
            return list(gradients)
        return self._context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients))


class Agreement:
    """Sees to it that replicas which act for themselves have gradients for the same variables.

    Each of them is traced by itself, and none knows what another will have.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[Any, dict[int, list[Any]]]
        self._calls = weakref.WeakKeyDictionary()

    def check(self, context: tf.distribute.ReplicaContext, has_gradient: list[bool]) -> None:
        """Refuse what differs from the same call of a replica before.

        Raises:
            ValueError: if it does.
        """
        if context.num_replicas_in_sync == 1:
            return
        calls = self._calls.setdefault(_outermost_function(get_default_graph()), {})
        own = calls.setdefault(get_current_replica_id_as_int(), [])
        own.append(has_gradient)
        for others in calls.values():
            if len(others) >= len(own) and others[len(own) - 1] != has_gradient:
                raise ValueError(
                    "All replicas must have gradients for the same variables where XLA compiles "
                    "what each of them does. Give zeros for a variable that a replica does not "
                    f"use. Received: {others[len(own) - 1]} and {has_gradient} (whether there is "
                    "a gradient, for each variable)"
                )


def _outermost_function(graph: Any) -> Any:
    while hasattr(getattr(graph, "outer_graph", None), "outer_graph"):
        graph = graph.outer_graph
    return graph


def _uses_a_ring_in_memory(strategy: tf.distribute.Strategy) -> bool:
    """Whether CPUs that could read each other's gradients are to send them around.

    That is what TensorFlow does unless told otherwise. Measured: most of a step's time.
    """
    return (
        isinstance(strategy, tf.distribute.MirroredStrategy)
        and isinstance(strategy.extended._cross_device_ops, CollectiveAllReduce)
        and all(_is_cpu(device) for device in strategy.extended.worker_devices)
    )


def _is_cpu(device: str) -> bool:
    return tf.DeviceSpec.from_string(device).device_type == "CPU"


def native_variable(value: Any) -> Any:
    return value.value if isinstance(value, keras.Variable) else value


def first_gradient_of(
    replicas: Replicas, replica: int, gradients: Sequence[Any]
) -> list[tf.Tensor]:
    """Return a tensor that one replica has only if there were data, or none.

    At the end of a dataset of unknown length TensorFlow runs whatever does not wait for data.
    """
    first = [replicas.parts(gradient)[replica] for gradient in gradients[:1]]
    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in first]
