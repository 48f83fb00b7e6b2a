"""Recorder of the updates of one optimizer, as a part of JAX's training step.

The recorder's variables go in and out of the step behind those of the optimizer. They are
the optimizer's while the step is traced, and never where others can see it.

What goes in and out of a training step is in one file.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_sngm.backend.common.measured import Measured
from keras_sngm.backend.common.recorder import RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.jax.state import at_least_float32, do_if
from keras_sngm.measurements import HISTOGRAM, details, histogram


class Change(NamedTuple):
    """Weights and momenta around an update.

    Attributes:
        before: the weights before it.
        after: the weights after it.
        momentums: the momentum of each variable after it, `None` for one that has none; empty
            if the optimizer keeps no momenta.
    """

    before: Sequence[jax.Array]
    after: Sequence[jax.Array]
    momentums: Sequence[jax.Array | None]


class Recorder(RecorderBase):
    """Recorder that keeps its variables' values between calls of the training function.

    Within that function, while it is traced, they are the last of the optimizer's variables.

    Args:
        *what: the optimizer, the plan and a function that returns what is to be restored, as for
            `RecorderBase`.

    Attributes:
        state_variables: the variables on the device that it records to.
    """

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self.state_variables: list[keras.Variable] = []
        self._is_tracked = False
        self._newest_norm: Any = math.nan

    def open(self) -> None:
        """Create the variables and begin to record, unless that is done or not possible yet."""
        # No variables can be created while a function is traced.
        if not isinstance(self.optimizer()._iterations.value, jax.core.Tracer):
            super().open()

    @property
    def is_ready(self) -> bool:
        """Return whether the function that is traced has the recorder's variables in its state."""
        return self._is_tracked

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        """Create a variable of zeros, and keep it among the recorder's state variables."""
        variable = super()._variable(shape, dtype)
        self.state_variables.append(variable)
        return variable

    def _copy(self, variable: keras.Variable) -> jax.Array:
        """Return a copy of a variable's value, made in the thread that trains.

        The next training step donates the original's buffer.
        """
        return jnp.copy(variable._value)

    @property
    def has_other_processes(self) -> bool:
        """Return whether other processes take part in each step, and so must take the same ones."""
        return jax.process_count() > 1

    def limit_halt(self, updates: int) -> None:
        """Let a halt, in which no step is taken, last for at most `updates` more updates.

        This holds from the next training step on, and for that one alone.
        """
        self._halt_limit = updates

    # Methods to be called around a call of the training function.

    def values_for_step(self) -> list[jax.Array]:
        """Return the values of its variables, whose buffers the training function may donate.

        Before, it passes on to the device for how many updates a halt, in which no step is taken,
        may last. That holds for one call of the training function.
        """
        if self.plan.stops:
            self._halt_updates_left._value = _scalar_like(
                self._halt_updates_left._value, self._halt_limit
            )
            self._halt_limit = 0
        return [variable._value for variable in self.state_variables]

    def set_values(self, values: Sequence[jax.Array]) -> None:
        """Set its variables to the values that the training function has returned."""
        for variable, value in zip(self.state_variables, values, strict=True):
            variable._value = value
        # Keras may ask for it in another thread, after the next step has donated the original.
        self._newest_norm = jnp.copy(self._latest._value)

    def latest_norm(self) -> Any:
        """Return a copy of the gradient norm of the last update."""
        return self._newest_norm

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Return a context in which its variables are the last of the optimizer's variables."""
        optimizer = self.optimizer()
        for variable in self.state_variables:
            optimizer._track_variable(variable)
        self._is_tracked = True
        try:
            yield
        finally:
            self._is_tracked = False
            for variable in self.state_variables:
                optimizer._untrack_variable(variable)

    # Methods to be called in a training step, while it is traced.

    def may_step(self) -> jax.Array:
        """Return a boolean scalar: whether the optimizer may take its next step.

        It may not once a gradient was not finite, for as many updates as `limit_halt` has set.
        To be asked only if the plan `stops`.
        """
        return jnp.logical_not(self._is_halted.value & (self._halt_updates_left.value > 0))

    def record(
        self,
        step: jax.Array,
        measured: Measured,
        change: Change,
        directions: Callable[[], Mapping[int, jax.Array]],
    ) -> None:
        """Record an update that was made, in the function that is traced.

        Details and histograms are recorded in a `fit` alone that records, and if they are due.

        Args:
            step: integer scalar, the number of the update.
            measured: what was measured on its gradient.
            change: weights and momenta around it.
            directions: computes each variable's part of g / norm(g) by its index, if it has a
                gradient.
        """
        _write(self._updates, step, self._row(measured))
        self._latest.assign(measured.norm)
        self._record_nonfinite(step, measured)
        rarer = (
            (self._details, self.plan.details_every, lambda: _details(change, directions())),
            (
                self._histograms,
                self.plan.histogram_every,
                lambda: _histograms(change, measured.norm, directions()),
            ),
        )
        for ring, every, row in rarer:
            if every is not None:
                do_if(
                    self._active.value & (step % every == 0),
                    functools.partial(_write_computed, ring, step, row),
                    [ring.count, ring.rows],
                )

    def _record_nonfinite(self, step: jax.Array, measured: Measured) -> None:
        """Note the first update whose gradient is not finite; if the plan `stops`, begin a halt.

        In a halt no step is taken, for as many updates as are left to it, which are counted down in
        each update.

        Args:
            step: integer scalar, the number of the update.
            measured: what was measured on its gradient.
        """
        nonfinite = jnp.logical_not(measured.is_finite)
        first = nonfinite & (self._nonfinite_step.value == 0)
        self._nonfinite.assign(jnp.where(first, measured.nonfinite, self._nonfinite.value))
        self._nonfinite_step.assign(jnp.where(first, step, self._nonfinite_step.value))
        if self.plan.stops:
            self._is_halted.assign(self._is_halted.value | nonfinite)
            self._halt_updates_left.assign(self._halt_updates_left.value - 1)

    # Method to be called around a training step, while it is traced.

    def backed_up(
        self,
        before: dict[int, jax.Array],
        after: dict[int, jax.Array],
    ) -> dict[int, jax.Array]:
        """Return new values for the backups of the variables that are restored after a halt.

        In a halt no step is taken, as a gradient was not finite. A backup takes its variable's
        value if the training step made an update and no halt has begun; else it keeps its own.

        Args:
            before: values of all variables before a training step, by the variable's id.
            after: their values after it.

        Returns:
            The values by the backup's id.
        """
        count = id(self._updates.count)
        good = (before[count] != after[count]) & ~after[id(self._is_halted)]
        return {
            id(backup): jnp.where(good, after[id(variable)], before[id(backup)])
            for variable, backup in zip(self._restorable, self._backups, strict=True)
        }


def _write(ring: Ring, step: jax.Array, values: jax.Array) -> None:
    """Append a row to a ring buffer, in the place of the oldest if it is full.

    Args:
        ring: the ring buffer.
        step: integer scalar, the number of the update, which the row begins with.
        values: vector, the rest of the row.
    """
    place = ring.count.value % ring.length
    ring.rows.assign(ring.rows.value.at[place].set(row_of(step, values)))
    ring.count.assign_add(1)


def _write_computed(ring: Ring, step: jax.Array, row: Callable[[], jax.Array]) -> None:
    """Append a row to a ring buffer, in place: the step and the values that `row` computes."""
    _write(ring, step, row())


def _details(change: Change, directions: Mapping[int, jax.Array]) -> jax.Array:
    """Return the `DETAILS` of all variables, one after the other in one vector.

    These are norms of the weight, of its update and of its momentum, the inner product of momentum
    and direction, and the norm of the direction; 0 for what a variable does not have.

    Args:
        change: weights and momenta around the update.
        directions: each variable's part of g / norm(g), by its index, if it has a gradient.
    """
    rows = [
        details(
            at_least_float32(before),
            at_least_float32(after),
            _momentum_at(change.momentums, i),
            directions.get(i),
        )
        for i, (before, after) in enumerate(zip(change.before, change.after, strict=True))
    ]
    return jnp.concatenate(rows)


def _scalar_like(array: jax.Array, number: int) -> jax.Array:
    """Return `number` as an array with the dtype and sharding of a scalar.

    A function that was compiled for the scalar then takes the number without compiling anew.
    """
    new = np.asarray(number, array.dtype)
    if not array.committed:
        return jnp.asarray(new)
    # `jax.device_put` would ask other processes whether they agree.
    return jax.make_array_from_callback((), array.sharding, lambda _: new)


def _histograms(change: Change, norm: jax.Array, directions: Mapping[int, jax.Array]) -> jax.Array:
    """Return histograms of each variable's gradient and momentum, in one vector.

    Each histogram has a least value, a greatest value and counts; zeros stand for a gradient or a
    momentum that a variable does not have.

    Args:
        change: weights and momenta around the update.
        norm: scalar, the norm of the whole gradient.
        directions: each variable's part of g / norm(g), by its index, if it has a gradient. Times
            the norm these are gradients again.
    """
    rows = []
    for i in range(len(change.after)):
        direction = directions.get(i)
        if direction is None:
            rows.append(jnp.zeros(HISTOGRAM))
        else:
            rows.append(histogram(direction * norm.astype(direction.dtype)))
        if change.momentums:
            momentum = change.momentums[i]
            rows.append(jnp.zeros(HISTOGRAM) if momentum is None else histogram(momentum))
    return jnp.concatenate(rows)


def _momentum_at(momentums: Sequence[jax.Array | None], i: int) -> jax.Array | None:
    """Return the momentum of variable `i`, at least float32, or `None` if it has none."""
    momentum = momentums[i] if momentums else None
    return None if momentum is None else at_least_float32(momentum)
