"""Trainings of a model that leave it, its optimizer and random generators as they were."""

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_sngm.backend.common import seeds
from keras_sngm.backend.common.model_parts import build, held_by, only_optimizer, other_optimizers

DECAY_POWER = 1.1
"""Power of the polynomial by which the learning rate decays to zero."""


class Trials:
    """Context in which a model is trained any number of times from the state it has now.

    At the end of the context, also after an exception, all is as it was before, to the bit:
    weights, batch statistics, seeds and other variables of the model, the attributes of model and
    layers, the state of the optimizer and of others that these have as attributes, their learning
    rates and the global random states. Metrics that did not exist before are reset.
    A model or an optimizer that was not built is built then. State is kept in the memory of the
    host meanwhile.

    What plain Python objects hold that are no layers is not restored.

    A backend supplies `_saved`, `_load` and `_random_state`, and may replace `_scope`,
    `_native_state`, `_save_modes`, `_new_rate`, `reset_metrics` and `mean_over_processes`.

    Args:
        model: a compiled model, built or not.

    Attributes:
        optimizer: the optimizer that updates the model's variables, without those that wrap it.

    Raises:
        ValueError: if the model is not compiled with one Keras optimizer.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.optimizer = only_optimizer(model)
        self._undo = contextlib.ExitStack()
        self._values: list[tuple[Any, Any]] = []
        self._set_random_state: Callable[[], None] = lambda: None

    def __enter__(self) -> "Trials":
        self._undo.callback(self._all_random_states())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._undo.close()

    def prepare(self, batch: Any, updates: int) -> None:
        """Build what is not built, save all state and have the learning rate decay to zero.

        Args:
            batch: the first batch of training data, as `fit` gets it from a dataset.
            updates: the number of updates of each training.

        Raises:
            ValueError: if the model cannot be built from the data, or if it has another optimizer
                that is not built.
        """
        # What has been drawn to read data is undone, what is drawn to build stays.
        self._undo.close()
        self._save_modes()
        # Keras' `fit` reads a batch, and so draws an order of samples, to build these.
        for compiled in (self._model._compile_loss, self._model._compile_metrics):
            if compiled is not None and not compiled.built:
                self._undo.callback(_set_attributes, compiled, dict(vars(compiled)))
        with self._scope(), seeds.existing_generator():
            build(self._model, batch)
        self._set_random_state = self._all_random_states()
        self._undo.callback(self._set_random_state)
        others = other_optimizers(self._model, self.layers())
        variables = self._all_variables(others)
        self._values = [(variable, self._saved(variable)) for variable in variables]
        self._undo.callback(self._restore, {id(variable) for variable in variables})
        for keeper in (self._model, *self.layers(), self.optimizer, *others):
            self._undo.callback(_set_attributes, keeper, dict(vars(keeper)))
        with self._scope():
            self._rate = self._new_rate()
        self._first_step = self._steps_taken()
        self.optimizer._learning_rate = Decay(self._rate, self._first_step, self.steps(updates))
        # The function that the model was trained with before reads another learning rate.
        self._model.train_function = None
        self._model.steps_per_execution = 1
        # A model that was resumed would leave out the epochs that it had been trained for.
        self._model._initial_epoch = None

    def layers(self) -> list[keras.layers.Layer]:
        """Return all layers inside of the model, those inside of other layers, too."""
        return list(self._model._flatten_layers(include_self=False))

    def steps(self, updates: int) -> int:
        """Return the number of training steps, one for each micro-batch, of some updates."""
        return updates * (self.optimizer.gradient_accumulation_steps or 1)

    def train(self, rate: float, data: Any, **arguments: Any) -> None:
        """Train the model from the saved state for one epoch.

        Args:
            rate: the learning rate of the first update.
            data: a dataset with the batches of all steps.
            arguments: other arguments of `fit`.
        """
        self._restore_values()
        self._set_random_state()
        self._rate.assign(rate)
        self._model.fit(data, verbose=0, shuffle=False, **arguments)

    def has_stepped(self) -> bool:
        """Return whether the last training has called the optimizer."""
        return self._steps_taken() > self._first_step

    def _steps_taken(self) -> int:
        """Return how often the optimizer was called."""
        return int(self.optimizer._iterations.numpy())

    def mean_over_processes(self, values: Sequence[float]) -> list[float]:
        """Return each value averaged over the processes that train one model together.

        Here as it is: all of them read the same.
        """
        return list(values)

    def _all_variables(self, others: Sequence[Any]) -> list[Any]:
        """Return all variables of the model, its metrics and its optimizers, each once.

        Some are not among those that Keras lists, such as the states of recurrent layers.

        Args:
            others: the optimizers besides the one that the model is compiled with.
        """
        held = list(held_by([self._model, *self.layers()]))
        keepers = [
            *(one for one in held if isinstance(one, keras.Metric)),
            *(self._model.optimizer, *others),
        ]
        variables = [
            *self._model.variables,
            *self._model.metrics_variables,
            *(one for one in held if isinstance(one, keras.Variable)),
            *(variable for keeper in keepers for variable in keeper.variables),
            *self._native_state(held),
        ]
        return list({id(variable): variable for variable in variables}.values())

    def _native_state(self, held: Sequence[Any]) -> list[Any]:
        """Return the state of the model that is in variables of the backend, not of Keras.

        Args:
            held: what the attributes of the model and its layers hold.
        """
        return []

    def _save_modes(self) -> None:
        """Have modes that the backend keeps for layers set back in the end. Here there are none."""

    def _new_rate(self) -> keras.Variable:
        """Return a new variable for the learning rate of the first update."""
        return keras.Variable(0.0, dtype="float32", trainable=False, name="trial_rate")

    def _restore(self, saved: set[int]) -> None:
        """Restore all saved values; reset metrics that have other variables.

        Args:
            saved: the `id` of each variable that was saved.
        """
        for metric in self._model.metrics:
            if any(id(variable) not in saved for variable in metric.variables):
                metric.reset_state()
        self._restore_values()

    def _restore_values(self) -> None:
        """Set all saved variables to their saved values."""
        for variable, value in self._values:
            self._load(variable, value)

    def _all_random_states(self) -> Callable[[], None]:
        """Return a function that sets all global random states to what they are now."""
        python, numpy = random.getstate(), np.random.get_state()
        of_backend, of_keras = self._random_state(), self._keras_random_state()

        def set_back() -> None:
            """Set Python's, NumPy's, Keras' and the backend's random states."""
            random.setstate(python)
            np.random.set_state(numpy)
            of_keras()
            of_backend()

        return set_back

    def _keras_random_state(self) -> Callable[[], None]:
        """Return a function that sets the seed of Keras' global generator to what it is now."""
        generator = seeds.generator()
        value = None if generator is None else self._saved(generator.state)

        def set_back() -> None:
            """Set the seed, or remove a generator that did not exist."""
            if generator is not None:
                self._load(generator.state, value)
            seeds.set_generator(generator)

        return set_back

    def _scope(self) -> contextlib.AbstractContextManager:
        """Return the context in which variables of the model are created."""
        return contextlib.nullcontext()

    def _saved(self, variable: keras.Variable) -> Any:
        """Return the value of a variable, in memory of the host that nothing else uses."""
        raise NotImplementedError

    def _load(self, variable: keras.Variable, value: Any) -> None:
        """Set a variable to a value that `_saved` has returned."""
        raise NotImplementedError

    def _random_state(self) -> Callable[[], None]:
        """Return a function that sets the backend's global random state to what it is now."""
        raise NotImplementedError

    def reset_metrics(self) -> None:
        """Reset the metrics of the model in the middle of a training."""
        self._model.reset_metrics()


class Decay(keras.optimizers.schedules.LearningRateSchedule):
    """Polynomial decay of the learning rate to zero.

    Args:
        rate: variable, the learning rate of the first step.
        first: the value of the optimizer's count of steps at the first step.
        steps: the number of steps.
    """

    def __init__(self, rate: keras.Variable, first: int, steps: int) -> None:
        self._rate, self._first, self._steps = rate, first, steps

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of a step."""
        taken = keras.ops.cast(step - self._first, "float32")
        left = keras.ops.clip(1.0 - taken / self._steps, 0.0, 1.0)
        return self._rate * keras.ops.power(left, DECAY_POWER)

    def get_config(self) -> dict[str, Any]:
        """Raise an error: a learning rate of a trial is part of no saved model."""
        raise NotImplementedError("A model cannot be saved in the middle of a trial.")


def _set_attributes(keeper: Any, attributes: dict[str, Any]) -> None:
    """Set the attributes of an object to those that it had, and remove all others.

    Args:
        keeper: a model or an optimizer.
        attributes: a copy of its `__dict__`.
    """
    # Keras' own `__setattr__` would track variables and layers once more.
    for name in set(vars(keeper)) - set(attributes):
        vars(keeper).pop(name)
    vars(keeper).update(attributes)
