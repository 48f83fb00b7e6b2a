"""Replicas that a step is taken on, and how they sum up their gradients.

Under a `tf.distribute` strategy one optimizer has weights on several devices.
Where TensorFlow can enter the cross-replica context, a step must be taken there: only
there may a `tf.cond` decide whether replicas communicate. Where it cannot, each replica
acts for itself. Both look the same to a step.
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

from keras_sngm.backend.tensorflow.tensors import dense


class Replicas(Protocol):
    """The replicas that some code acts for: all of this machine, or a single one."""

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return each replica's copy of a variable, or its part of a gradient."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return the per-replica value that consists of these parts."""

    def completed(self, gradient: Any, variable: Any) -> Any:
        """Return a gradient that is dense, or slices, on all replicas, each part on its device.

        Zeros stand in for a replica that has none.

        Args:
            gradient: the replicas' gradients of a variable, of which some may be `None`.
            variable: the variable.
        """

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        """Return each gradient summed up over all replicas of all machines.

        Args:
            gradients: per-replica values, each dense or each slices on all replicas.

        Returns:
            For each of them a value that holds the sum on each replica that this acts for.
        """


class AllReplicas:
    """Replicas of this machine, all of them, seen from the cross-replica context."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return each replica's copy of a variable, or its part of a gradient."""
        return self._strategy.experimental_local_results(native_variable(value))

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return the per-replica value that consists of these parts, one for each replica."""
        return regroup(tuple(parts))

    def completed(self, gradient: Any, variable: Any) -> Any:
        """Return a gradient that is dense, or slices, on all replicas, each part on its device.

        Where all parts are of one type the gradient is returned as it is; else they are made
        dense, with zeros for a replica that has no gradient.

        Args:
            gradient: the replicas' gradients of a variable, of which some may be `None`.
            variable: the variable.
        """
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
        """Return each gradient summed up over all replicas of all machines.

        Args:
            gradients: per-replica values, all dense or all slices.

        Returns:
            For each of them a per-replica value that holds the sum on every replica.
        """
        reduce = self._strategy.extended.batch_reduce_to
        if _uses_a_ring_in_memory(self._strategy):
            reduce = tf.distribute.ReductionToOneDevice().batch_reduce
        # With the gradient as its own destination TensorFlow reduces all gradients together,
        # with the variable one by one.
        return reduce(tf.distribute.ReduceOp.SUM, [(gradient, gradient) for gradient in gradients])


class OwnReplica:
    """Replica that acts for itself alone, seen from its own context."""

    def __init__(self, context: tf.distribute.ReplicaContext) -> None:
        self._context = context

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return a tuple of this replica's copy of a variable, or its part of a gradient."""
        parts = self._context.strategy.experimental_local_results(native_variable(value))
        return (parts[get_current_replica_id_as_int() if len(parts) > 1 else 0],)

    def joined(self, parts: Sequence[Any]) -> Any:
        """Return the one part that a single replica has."""
        (part,) = parts
        return part

    def completed(self, gradient: Any, variable: Any) -> Any:
        """Return the gradient as it is: a single replica lacks none."""
        return gradient

    def sums(self, gradients: Sequence[Any]) -> list[Any]:
        """Return each of this replica's gradients summed up over all replicas."""
        if self._context.num_replicas_in_sync == 1:
            return list(gradients)
        return self._context.all_reduce(tf.distribute.ReduceOp.SUM, list(gradients))


class Agreement:
    """A check that replicas which act for themselves have gradients for the same variables.

    Each replica is traced by itself, and none knows what another will have.
    """

    def __init__(self) -> None:
        self._calls: weakref.WeakKeyDictionary[Any, dict[int, list[Any]]]
        self._calls = weakref.WeakKeyDictionary()

    def check(self, context: tf.distribute.ReplicaContext, has_gradient: list[bool]) -> None:
        """Compare a call on this replica with the same call on replicas that were traced before.

        Args:
            context: the context of this replica.
            has_gradient: for each variable, whether this replica has a gradient.

        Raises:
            ValueError: if they do not have gradients for the same variables.
        """
        if context.num_replicas_in_sync == 1:
            return
        calls = self._calls.setdefault(_outermost_function(get_default_graph()), {})
        own_calls = calls.setdefault(get_current_replica_id_as_int(), [])
        own_calls.append(has_gradient)
        call = len(own_calls) - 1
        for others in calls.values():
            if len(others) > call and others[call] != has_gradient:
                raise ValueError(
                    "All replicas must have gradients for the same variables where XLA compiles "
                    "what each of them does. Give zeros for a variable that a replica does not "
                    f"use. Received: {others[call]} and {has_gradient} (whether there is "
                    "a gradient, for each variable)"
                )


def _outermost_function(graph: Any) -> Any:
    """Return the graph of the outermost function that is being traced."""
    while hasattr(getattr(graph, "outer_graph", None), "outer_graph"):
        graph = graph.outer_graph
    return graph


def _uses_a_ring_in_memory(strategy: tf.distribute.Strategy) -> bool:
    """Return whether TensorFlow would reduce gradients of CPUs of one machine by a ring all-reduce.

    They could read each other's memory instead. Measured: the ring takes most of a step's time.
    """
    return (
        isinstance(strategy, tf.distribute.MirroredStrategy)
        and isinstance(strategy.extended._cross_device_ops, CollectiveAllReduce)
        and all(_is_cpu(device) for device in strategy.extended.worker_devices)
    )


def _is_cpu(device: str) -> bool:
    """Return whether the device of this name is a CPU."""
    return tf.DeviceSpec.from_string(device).device_type == "CPU"


def native_variable(value: Any) -> Any:
    """Return the TensorFlow variable inside of a Keras variable; anything else as it is."""
    return value.value if isinstance(value, keras.Variable) else value


def first_gradient_of(
    replicas: Replicas, replica: int, gradients: Sequence[Any]
) -> list[tf.Tensor]:
    """Return a list with one tensor that a replica has only if there were data, or an empty list.

    At the end of a dataset of unknown length TensorFlow runs whatever does not wait for data.
    """
    first = [replicas.parts(gradient)[replica] for gradient in gradients[:1]]
    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in first]
