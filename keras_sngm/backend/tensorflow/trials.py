"""Trainings of a model on TensorFlow that leave no trace."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.python.eager.context import context
from tensorflow.python.ops import stateful_random_ops

from keras_sngm.backend.common import trials
from keras_sngm.backend.tensorflow.replicas import native_variable


class BackendTrials(trials.Trials):
    """Context in which a model is trained from the state it has, on TensorFlow.

    Args:
        model: a compiled model, built or not.
    """

    def train(self, rate: float, data: Any, **arguments: Any) -> None:
        """Train the model from the saved state for one epoch.

        Args:
            rate: the learning rate of the first update.
            data: a dataset with the batches of all steps.
            arguments: other arguments of `fit`.
        """
        super().train(rate, _with_optionals(data), **arguments)

    def _scope(self) -> contextlib.AbstractContextManager:
        """Return the scope of the strategy that the model was created under."""
        return self._model.distribute_strategy.scope()

    def _saved(self, variable: Any) -> Any:
        """Return the values of a variable on all replicas, as NumPy arrays."""
        return [replica.numpy() for replica in self._on_replicas(variable)]

    def _load(self, variable: Any, value: Any) -> None:
        """Set a variable on all replicas to values that `_saved` has returned."""
        for replica, of_replica in zip(self._on_replicas(variable), value, strict=True):
            replica.assign(of_replica)

    def _native_state(self, held: Sequence[Any]) -> list[Any]:
        """Return the TensorFlow variables that are attributes of the model or its layers.

        Args:
            held: what the attributes of the model and its layers hold.
        """
        return [one for one in held if isinstance(one, tf.Variable)]

    def _on_replicas(self, variable: Any) -> tuple[Any, ...]:
        """Return the copies of a variable on all replicas of this process."""
        strategy = self._model.distribute_strategy
        return strategy.experimental_local_results(native_variable(variable))

    def _random_state(self) -> Callable[[], None]:
        """Return a function that sets the states of TensorFlow's global generators.

        They are those from which operations without a seed get theirs, and
        `tf.random.get_global_generator()` if there is one.
        """
        seeds = getattr(context(), "_rng", None)
        state = None if seeds is None else seeds.getstate()
        generator = stateful_random_ops.global_generator
        value = None if generator is None else generator.state.numpy()

        def set_back() -> None:
            """Set both states, or remove a generator that did not exist."""
            if seeds is not None:
                seeds.setstate(state)
            if generator is not None:
                generator.state.assign(value)
            stateful_random_ops.global_generator = generator

        return set_back


def _with_optionals(data: Any) -> Any:
    """Return a dataset in which an optional without value stands for each `None`.

    Keras puts it there for arrays that are `None`, but not for those of a `PyDataset`.

    Args:
        data: any dataset. It is returned as it is if it is no `PyDataset` or has no `None`.
    """
    if not isinstance(data, keras.utils.PyDataset):
        return data
    first = data[0]
    is_there = [leaf is not None for leaf in keras.tree.flatten(first)]
    if all(is_there):
        return data

    def batches() -> Iterator[tuple[Any, ...]]:
        """Yield the arrays of each batch."""
        for i in range(len(data)):
            yield tuple(leaf for leaf in keras.tree.flatten(data[i]) if leaf is not None)

    def in_structure(*arrays: tf.Tensor) -> Any:
        """Return the structure of a batch."""
        left = iter(arrays)
        leaves = [
            next(left) if there else tf.experimental.Optional.empty(None) for there in is_there
        ]
        return keras.tree.pack_sequence_as(first, leaves)

    signature = tuple(
        tf.TensorSpec((None, *leaf.shape[1:]), leaf.dtype)
        for leaf in keras.tree.flatten(first)
        if leaf is not None
    )
    return tf.data.Dataset.from_generator(batches, output_signature=signature).map(in_structure)
