"""Keeps what is measured on each update of one optimizer, as a part of JAX's step.

Its variables go in and out of the step as those of the optimizer do, which they are while
the step is traced, and never where others can see it.
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

from keras_sngm.backend.common.recorder import Measured, RecorderBase
from keras_sngm.backend.common.ring import Ring, row_of
from keras_sngm.backend.jax.state import at_least_float32, do_if
from keras_sngm.measurements import HISTOGRAM, details, histogram


class Change(NamedTuple):
    """Weights and momenta around an update.

    Attributes:
        before: the weights before it.
        after: the weights after it.
        momentums: the momentum of each that has one after it, or nothing at all.
    """

    before: Sequence[jax.Array]
    after: Sequence[jax.Array]
    momentums: Sequence[jax.Array | None]


class Recorder(RecorderBase):
    """Holds its variables itself between calls of the training function.

    Attributes:
        own: its variables.
    """

    def __init__(self, *what: Any) -> None:
        super().__init__(*what)
        self.own: list[keras.Variable] = []
        self._is_tracked = False
        self._newest_norm: Any = math.nan

    def open(self) -> None:
        # While a function is traced no variables can be made.
        if not isinstance(self.optimizer()._iterations.value, jax.core.Tracer):
            super().open()

    @property
    def is_ready(self) -> bool:
        return self._is_tracked

    def _variable(self, shape: Sequence[int], dtype: str) -> keras.Variable:
        variable = super()._variable(shape, dtype)
        self.own.append(variable)
        return variable

    def _copy(self, variable: keras.Variable) -> jax.Array:
        """Copy a value in the thread that trains: its next step takes the original away."""
        return jnp.copy(variable._value)

    @property
    def one_of_several(self) -> bool:
        return jax.process_count() > 1

    def hold(self, updates: int) -> None:
        self._to_hold = updates

    # Around a call of the training function.

    def take(self) -> list[jax.Array]:
        """Return the values of its variables, for the function to take away."""
        if self.plan.stops:
            self._held._value = _like(self._held._value, self._to_hold)
            self._to_hold = 0
        return [variable._value for variable in self.own]

    def put(self, values: Sequence[jax.Array]) -> None:
        """Set the variables to what the function has returned."""
        for variable, value in zip(self.own, values, strict=True):
            variable._value = value
        # Keras may ask in another thread, when the next step has taken the original away.
        self._newest_norm = jnp.copy(self._latest._value)

    def latest_norm(self) -> Any:
        return self._newest_norm

    @contextlib.contextmanager
    def tracked(self) -> Iterator[None]:
        """Have its variables among those of the optimizer, at their end."""
        optimizer = self.optimizer()
        for variable in self.own:
            optimizer._track_variable(variable)
        self._is_tracked = True
        try:
            yield
        finally:
            self._is_tracked = False
            for variable in self.own:
                optimizer._untrack_variable(variable)

    # In a training step.

    def may_step(self) -> jax.Array:
        """Return whether a step may be taken. Asked only if the plan is to stop."""
        return jnp.logical_not(self._halted.value & (self._held.value > 0))

    def record(
        self,
        step: jax.Array,
        measured: Measured,
        change: Change,
        directions: Callable[[], Mapping[int, jax.Array]],
    ) -> None:
        """Record an update that was made.

        Args:
            step: integer scalar, its number.
            measured: what it has measured.
            change: what it has changed.
            directions: computes g / norm(g) for the positions of those variables that
                have a gradient.
        """
        _write(self._updates, step, self._row(measured))
        self._latest.assign(measured.norm)
        self._note_what_is_not_finite(step, measured)
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

    def _note_what_is_not_finite(self, step: jax.Array, measured: Measured) -> None:
        nonfinite = jnp.logical_not(measured.is_finite)
        first = nonfinite & (self._bad_step.value == 0)
        self._bad.assign(jnp.where(first, measured.nonfinite, self._bad.value))
        self._bad_step.assign(jnp.where(first, step, self._bad_step.value))
        if self.plan.stops:
            self._halted.assign(self._halted.value | nonfinite)
            self._held.assign(self._held.value - 1)

    # Around a training step.

    def backed_up(
        self,
        before: dict[int, jax.Array],
        after: dict[int, jax.Array],
    ) -> dict[int, jax.Array]:
        """The new values of the backups of guarded variables.

        Args:
            before: values of all variables before a training step, by their id.
            after: and after it.
        """
        count = id(self._updates.count)
        good = (before[count] != after[count]) & ~after[id(self._halted)]
        return {
            id(backup): jnp.where(good, after[id(variable)], before[id(backup)])
            for variable, backup in zip(self._guarded, self._backups, strict=True)
        }


def _write(ring: Ring, step: jax.Array, values: jax.Array) -> None:
    place = ring.count.value % ring.length
    ring.rows.assign(ring.rows.value.at[place].set(row_of(step, values)))
    ring.count.assign_add(1)


def _write_computed(ring: Ring, step: jax.Array, row: Callable[[], jax.Array]) -> None:
    _write(ring, step, row())


def _details(change: Change, directions: Mapping[int, jax.Array]) -> jax.Array:
    rows = [
        details(
            at_least_float32(before),
            at_least_float32(after),
            _of(change.momentums, i),
            directions.get(i),
        )
        for i, (before, after) in enumerate(zip(change.before, change.after, strict=True))
    ]
    return jnp.concatenate(rows)


def _like(array: jax.Array, number: int) -> jax.Array:
    """A number in place of a scalar, so that a step compiled for the one takes the other."""
    new = np.asarray(number, array.dtype)
    if not array.committed:
        return jnp.asarray(new)
    # Unlike `jax.device_put` this does not ask other processes whether they agree.
    return jax.make_array_from_callback((), array.sharding, lambda _: new)


def _histograms(change: Change, norm: jax.Array, directions: Mapping[int, jax.Array]) -> jax.Array:
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


def _of(momentums: Sequence[jax.Array | None], i: int) -> jax.Array | None:
    momentum = momentums[i] if momentums else None
    return None if momentum is None else at_least_float32(momentum)
