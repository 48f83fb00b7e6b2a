"""Trainings of a model on JAX that leave no trace."""

from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np

from keras_sngm.backend.common import trials


class BackendTrials(trials.Trials):
    """Context in which a model is trained from the state it has, on JAX.

    Args:
        model: a compiled model, built or not.
    """

    def _saved(self, variable: keras.Variable) -> Any:
        """Return the sharding of a variable's array, its shape and its parts on this host.

        They are a dictionary from the indices of each part, written as text, to its data.
        """
        array = variable.value
        if array.is_fully_replicated:
            # In several processes Keras makes arrays whose shards JAX cannot list.
            everything = tuple(slice(None) for _ in array.shape)
            parts = {str(everything): np.array(array)}
        else:
            parts = {str(shard.index): np.array(shard.data) for shard in array.addressable_shards}
        return array.sharding, array.shape, parts

    def _load(self, variable: keras.Variable, value: Any) -> None:
        """Set a variable to a new array from what `_saved` has returned.

        A training may be interrupted while Keras keeps the array of the variable elsewhere.
        """
        sharding, shape, parts = value
        # JAX may take the memory of an array that it is given, and training overwrites it.
        variable._value = jax.make_array_from_callback(
            shape, sharding, lambda index: parts[str(index)].copy()
        )

    def _random_state(self) -> Callable[[], None]:
        """Return a function that does nothing: JAX has no global random state."""
        return lambda: None

    def _new_rate(self) -> keras.Variable:
        """Return a new variable for the learning rate, for now among those of the optimizer.

        Anything else that is not the state of the model would be a constant of the training step.
        """
        rate = self.optimizer.add_variable((), dtype="float32", name="trial_rate")
        self._undo.callback(self.optimizer._untrack_variable, rate)
        return rate

    def reset_metrics(self) -> None:
        """Reset the metrics of the model in the middle of a training."""
        # Keras keeps their values elsewhere while it trains, and reads them again after this.
        self._model.jax_state_sync()
        super().reset_metrics()
