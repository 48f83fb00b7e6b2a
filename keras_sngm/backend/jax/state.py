"""Lets code that assigns to Keras variables run inside of JAX's pure functions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from keras_sngm.update_rule import arithmetic_dtype


def pure(action: Callable[..., None], variables: Sequence[keras.Variable]) -> Callable[..., Any]:
    """A function of the variables' values and other arguments, which returns their new values."""

    def function(values: Sequence[jax.Array], *arguments: Any) -> list[jax.Array]:
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            action(*arguments)
        return [scope.get_current_value(variable) for variable in variables]

    return function


def assign(variables: Sequence[keras.Variable], values: Sequence[jax.Array]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def do_if(
    condition: jax.Array, action: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Do it if the condition holds.

    Args:
        condition: boolean scalar.
        action: what assigns to no other variables than these.
        variables: those that it may assign to.
    """
    if not isinstance(condition, jax.core.Tracer):
        if condition:
            action()
        return
    new = pure(action, variables)

    # A loop of at most one round. What a condition returns XLA would copy, whether it
    # holds or not; a loop changes it in place.
    def act(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        again, values = state
        return jax.numpy.zeros_like(again), new(values)

    begin = (condition, [variable.value for variable in variables])
    assign(variables, jax.lax.while_loop(lambda state: state[0], act, begin)[1])


def at_least_float32(array: jax.Array) -> jax.Array:
    """In the precision that it is computed with."""
    return array.astype(arithmetic_dtype(array.dtype.name))
