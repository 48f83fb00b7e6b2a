"""Optimizer steps with the gradients of a random case, on each backend."""

from typing import Any, NamedTuple

import keras
import numpy as np

from keras_sngm import SNGM
from problems import BACKEND
from random_cases import Case, Given, State, start_of


def variables_of(case: Case) -> list[keras.Variable]:
    """Return new variables for a case, with their initial values."""
    made = []
    for i, (weight, start) in enumerate(zip(case.weights, start_of(case))):
        variable = keras.Variable(start, dtype=weight.dtype, name=f"v{i}")
        if weight.constrained:
            variable.constraint = keras.constraints.NonNeg()
        made.append(variable)
    return made


def read(array: Any) -> np.ndarray:
    """Return a tensor or variable as a NumPy array in float64."""
    return keras.ops.convert_to_numpy(array).astype("float64")


def state_of(optimizer: SNGM, variables: list[keras.Variable]) -> State:
    """Read the state of an optimizer and the weights."""
    values = [read(v) for v in [*variables, *optimizer.variables]]
    return state_from(optimizer, values)


def state_from(optimizer: SNGM, values: list[np.ndarray]) -> State:
    """Return the state of an optimizer, given values of all weights and of its variables.

    Args:
        optimizer: the optimizer, whose own variables may have other values.
        values: the values of the weights, followed by those of `optimizer.variables`.
    """
    count = len(values) - len(optimizer.variables)
    of = dict(zip(map(id, optimizer.variables), values[count:], strict=True))
    noise = optimizer.noise_moments
    averaged = optimizer.averaged_updates
    averages = optimizer._model_variables_moving_average if optimizer.use_ema else []
    return State(
        values[:count],
        [of[id(v)] for v in optimizer.momentums],
        [of[id(v)] for v in averages],
        np.zeros(3) if noise is None else of[id(noise)],
        0.0 if noise is None else float(of[id(optimizer.gradient_noise_scale)]),
        int(of[id(optimizer.skipped_steps)]),
        0 if averaged is None else int(of[id(averaged)]),
        float(of[id(optimizer.gradient_norm)]),
        of[id(optimizer.gradient_norms)],
    )


class Steps:
    """An SNGM and its variables, for the calls of a case.

    Args:
        case: the case.
        jit_compile: the `jit_compile` of SNGM.
        outer: `None` for eager steps; else the function around a step is compiled, on TensorFlow
            with this `jit_compile`, on JAX with donated arguments if it is "donate".
    """

    def __init__(self, case: Case, jit_compile: Any = "auto", outer: Any = None) -> None:
        self.case = case
        self._jit_compile = jit_compile
        self._outer = outer
        self.variables = variables_of(case)
        self._begin(self._optimizer())

    def _optimizer(self) -> SNGM:
        return SNGM(jit_compile=self._jit_compile, **self.case.options)

    def _begin(self, optimizer: SNGM) -> None:
        """Build an optimizer and use it from now on."""
        optimizer.build(self.variables)
        self.optimizer = optimizer
        self._apply = lambda gradients: optimizer.apply(gradients, self.variables)
        if self._outer is not None:
            self._apply = compiled(optimizer, self.variables, self._outer)

    def state(self) -> State:
        return state_of(self.optimizer, self.variables)

    def call(self, gradients: list[Given | None]) -> None:
        """Call the optimizer with tensors made of the given gradients."""
        made: list[Any] = []
        for gradient, variable in zip(gradients, self.variables):
            made.append(self._tensor(gradient, variable, made))
        self._apply(made)

    def _tensor(self, gradient: Given | None, variable: Any, made: list[Any]) -> Any:
        """Return a gradient as a tensor; `made` has the tensors of the variables before."""
        if gradient is None:
            return None
        if gradient.same_as is not None:
            kind, i = gradient.same_as
            return keras.ops.convert_to_tensor(self.variables[i]) if kind == "weight" else made[i]
        shape, dtype = tuple(variable.shape), variable.dtype
        if gradient.known and self._outer is not None:
            return Known(shape, dtype)
        return {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}[BACKEND](
            gradient, shape, dtype
        )

    def assign(self, name: str, value: Any) -> None:
        setattr(self.optimizer, name, value)

    def move(self) -> None:
        """Continue with a new optimizer that has loaded the state of the old one."""
        options = {name: getattr(self.optimizer, name) for name in ASSIGNED}
        store: dict[str, Any] = {}
        self.optimizer.save_own_variables(store)
        self._begin(self._optimizer())
        self.optimizer.load_own_variables(store)
        for name, value in options.items():
            setattr(self.optimizer, name, value)

    def rewind(self, gradients: list[Given | None]) -> None:
        """Make a call, and undo it by loading the state before it."""
        store: dict[str, Any] = {}
        self.optimizer.save_own_variables(store)
        before = [read(v) for v in self.variables]
        self.call(gradients)
        self.optimizer.load_own_variables(store)
        for variable, value in zip(self.variables, before):
            variable.assign(value)


# Hyper-parameters that may be assigned and are not part of the saved state.
ASSIGNED = ("nesterov", "blockwise", "clipnorm", "weight_decay")


def compiled(optimizer: SNGM, variables: list[keras.Variable], how: Any) -> Any:
    """Return a function of gradients that takes a compiled step.

    Gradients that are `Known` become constants of the compiled function.
    """
    make = {"tensorflow": _in_a_function, "jax": _in_a_jit, "torch": _in_a_compiled_function}
    steps: dict[Any, Any] = {}

    def apply(gradients: list[Any]) -> None:
        known = tuple(isinstance(gradient, Known) for gradient in gradients)
        if known not in steps:
            zeros = [g if is_known else None for g, is_known in zip(gradients, known)]
            steps[known] = make[BACKEND](optimizer, variables, how, zeros)
        steps[known]([None if is_known else g for g, is_known in zip(gradients, known)])

    return apply


class Known(NamedTuple):
    """A gradient of zeros that becomes a constant of a compiled function."""

    shape: tuple[int, ...]
    dtype: str

    def tensor(self) -> Any:
        return keras.ops.zeros(self.shape, self.dtype)


def _with_known(gradients: list[Any], zeros: list[Known | None]) -> list[Any]:
    """Return the gradients, with constants in place of those that are known."""
    return [g if zero is None else zero.tensor() for g, zero in zip(gradients, zeros)]


def _in_a_function(
    optimizer: SNGM, variables: list[keras.Variable], how: Any, zeros: list[Known | None]
) -> Any:
    import tensorflow as tf

    return tf.function(
        lambda gradients: optimizer.apply(_with_known(gradients, zeros), variables),
        jit_compile=how,
    )


def _in_a_compiled_function(
    optimizer: SNGM, variables: list[keras.Variable], how: Any, zeros: list[Known | None]
) -> Any:
    import torch

    return torch.compile(
        lambda gradients: optimizer.apply(_with_known(gradients, zeros), variables),
        backend="eager",
    )


def _in_a_jit(
    optimizer: SNGM, variables: list[keras.Variable], how: Any, zeros: list[Known | None]
) -> Any:
    import jax

    donated = (0, 2) if how == "donate" else ()
    step = jax.jit(
        lambda own, gradients, weights: optimizer.stateless_apply(
            own, _with_known(gradients, zeros), weights
        ),
        donate_argnums=donated,
    )

    def apply(gradients: list[Any]) -> None:
        if donated:  # JAX cannot donate an array that is also another argument.
            gradients = jax.tree.map(jax.numpy.copy, gradients)
        own, weights = ([v.value for v in of] for of in (optimizer.variables, variables))
        weights, own = step(own, gradients, weights)
        for variable, value in zip([*variables, *optimizer.variables], [*weights, *own]):
            variable.assign(value)

    return apply


def scanned(case: Case, gradients: list[list[Given]]) -> list[State]:
    """Take all steps in one `jax.lax.scan`; return the state before the first and after each."""
    import jax

    steps = Steps(case)
    optimizer, variables = steps.optimizer, steps.variables

    def step(state: Any, own_gradients: Any) -> Any:
        weights, own = optimizer.stateless_apply(state[1], own_gradients, state[0])
        return (weights, own), [*weights, *own]

    begin = [v.value for v in variables], [v.value for v in optimizer.variables]
    _, states = jax.jit(lambda *of: jax.lax.scan(step, *of))(begin, stacked(gradients))
    return [
        steps.state(),
        *(
            state_from(optimizer, [read(values[i]) for values in states])
            for i in range(len(gradients))
        ),
    ]


def side_by_side(case: Case, gradients: list[list[list[Given]]]) -> list[list[State]]:
    """Take the steps of several trainings at once, with `jax.vmap`.

    Args:
        case: the case, which sets the options and the initial weights of all trainings.
        gradients: the gradients of each call, for each training.

    Returns:
        The states of all trainings before the first call and after each.
    """
    import jax

    steps = Steps(case)
    optimizer, variables = steps.optimizer, steps.variables
    count = len(gradients[0])
    step = jax.jit(jax.vmap(lambda own, g, weights: optimizer.stateless_apply(own, g, weights)))
    of_each = jax.numpy.stack
    weights, own = (
        [of_each([v.value] * count) for v in of] for of in (variables, optimizer.variables)
    )
    states = [[steps.state()] * count]
    for call in gradients:
        weights, own = step(own, stacked(call), weights)
        values = [read(value) for value in [*weights, *own]]
        states.append([state_from(optimizer, [v[k] for v in values]) for k in range(count)])
    return states


def stacked(gradients: list[list[Given | None]]) -> list[Any]:
    """Stack the gradients of several trainings or calls, variable by variable."""
    import jax.numpy as jnp

    return [
        None if of[0] is None else jnp.stack([jnp.asarray(one.array) for one in of])
        for of in zip(*gradients, strict=True)
    ]


def _tensorflow(gradient: Given, shape: tuple[int, ...], dtype: str) -> Any:
    """Return a gradient as a TensorFlow tensor or `tf.IndexedSlices`."""
    import tensorflow as tf

    tensor = tf.constant(gradient.array, dtype)
    if gradient.rows is None:
        return tensor
    knows_shape = len(gradient.rows) % 2 == 0
    return tf.IndexedSlices(
        tensor, tf.constant(gradient.rows), tf.constant(shape) if knows_shape else None
    )


def _jax(gradient: Given, shape: tuple[int, ...], dtype: str) -> Any:
    """Return a gradient as a JAX array or a sparse `BCOO`."""
    import jax.numpy as jnp
    from jax.experimental.sparse import BCOO

    array = jnp.asarray(gradient.array)
    if gradient.rows is None:
        return array
    return BCOO((array, jnp.asarray(gradient.rows)[:, None]), shape=shape)


def _torch(gradient: Given, shape: tuple[int, ...], dtype: str) -> Any:
    """Return a gradient as a PyTorch tensor, in its layout or sparse."""
    import torch
    from keras.src.backend.torch.core import get_device

    array = gradient.array.astype("float32") if dtype == "bfloat16" else gradient.array
    tensor = torch.from_numpy(np.array(array)).to(get_device(), getattr(torch, dtype))
    if gradient.rows is not None:
        rows = torch.from_numpy(gradient.rows)[None].to(tensor.device)
        return torch.sparse_coo_tensor(rows, tensor, shape)
    if gradient.layout == "columns":
        back = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(back).contiguous().permute(back)
    if gradient.layout == "every second" and tensor.ndim:
        return tensor.repeat_interleave(2, dim=0)[::2]
    return tensor
