"""Trainings of a model on TensorFlow that leave no trace."""

import contextlib
from collections.abc import Callable
from typing import Any

import keras
from tensorflow.python.eager.context import context
from tensorflow.python.ops import stateful_random_ops

from keras_sngm.backend.common import trials
from keras_sngm.backend.tensorflow.replicas import native_variable


class BackendTrials(trials.Trials):
    """Context in which a model is trained from the state it has, on TensorFlow.

    Args:
        model: a compiled model, built or not.
    """

    def _scope(self) -> contextlib.AbstractContextManager:
        """Return the scope of the strategy that the model was created under."""
        return self._model.distribute_strategy.scope()

    def _saved(self, variable: keras.Variable) -> Any:
        """Return the values of a variable on all replicas, as NumPy arrays."""
        return [replica.numpy() for replica in self._on_replicas(variable)]

    def _load(self, variable: keras.Variable, value: Any) -> None:
        """Set a variable on all replicas to values that `_saved` has returned."""
        for replica, of_replica in zip(self._on_replicas(variable), value, strict=True):
            replica.assign(of_replica)

    def _on_replicas(self, variable: keras.Variable) -> tuple[Any, ...]:
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
