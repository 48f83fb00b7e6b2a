"""Conversion of code that assigns to Keras variables into pure functions for JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import keras

from keras_sngm.update_rule import arithmetic_dtype


def pure(action: Callable[..., None], variables: Sequence[keras.Variable]) -> Callable[..., Any]:
    """Turn an action that assigns to variables into a pure function.

    Args:
        action: assigns to no other variables than these.
        variables: the variables that it may read and assign to.

    Returns:
        A function of the variables' values and of the arguments of `action`, which returns the
        variables' new values.
    """

    def function(values: Sequence[jax.Array], *arguments: Any) -> list[jax.Array]:
        with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
            action(*arguments)
        return [scope.get_current_value(variable) for variable in variables]

    return function


def assign(variables: Sequence[keras.Variable], values: Sequence[jax.Array]) -> None:
    """Assign to each variable its value."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def do_if(
    condition: jax.Array, action: Callable[[], None], variables: Sequence[keras.Variable]
) -> None:
    """Call an action if a condition holds, also while a function is traced.

    Args:
        condition: boolean scalar.
        action: assigns to no other variables than these.
        variables: the variables that it may assign to.
    """
    if not isinstance(condition, jax.core.Tracer):
        if condition:
            action()
        return
    new = pure(action, variables)

    # A loop of at most one round stands in for `lax.cond`: XLA copies what a condition
    # returns, also if it does not hold, but changes the state of a loop in place.
    def act(state: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        """Call the action, as the only round of a loop: return `False`, and the new values."""
        again, values = state
        return jax.numpy.zeros_like(again), new(values)

    begin = (condition, [variable.value for variable in variables])
    assign(variables, jax.lax.while_loop(lambda state: state[0], act, begin)[1])


def zeros_in_place_of(array: jax.Array, never: jax.Array) -> jax.Array:
    """Return zeros of the shape and dtype of an array, which XLA writes in its place.

    XLA moves a constant out of a loop, stores it there and copies it back. So these zeros
    depend on something that XLA does not know, in the form that is quickest on the device.

    Args:
        array: the array.
        never: boolean scalar, always `False`.
    """

    def on_cpu(array: jax.Array, never: jax.Array) -> jax.Array:
        """Return zeros like `array`; `never` is always `False`, which XLA does not know."""
        return jax.numpy.full_like(array, jax.numpy.where(never, 1, 0))

    def elsewhere(array: jax.Array, never: jax.Array) -> jax.Array:
        """Return zeros like `array`; `never` is always `False`, which XLA does not know."""
        return jax.numpy.where(never, array, jax.numpy.zeros_like(array))

    return jax.lax.platform_dependent(array, never, cpu=on_cpu, default=elsewhere)


def at_least_float32(array: jax.Array) -> jax.Array:
    """Return an array in the dtype that it is computed with: float32 if it has 16 bits."""
    return array.astype(arithmetic_dtype(array.dtype.name))
