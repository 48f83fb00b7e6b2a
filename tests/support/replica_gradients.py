"""Takes steps in which replicas have gradients of different kinds, or for different variables.

`test_distribution.py` runs this in its own process, as devices must be configured before
TensorFlow starts.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM
from reference import ReferenceSNGM
from replica_training import forbid_merge_call, make_strategy

SHAPES = [(3, 2), (3, 2), (4,)]
Give: TypeAlias = Callable[[], list[Any]]  # It returns the gradients of one replica.
MODES: dict[str, Callable[[Callable[[], None]], Callable[[], None]]] = {
    "eager": lambda step: step,
    "function": tf.function,
}
SHARED = np.full((3, 2), 0.5, "float32")
# TensorFlow warns of retracing when functions of the same code are traced, unless each of them is
# called several times.
UPDATES = 4


def rows(values: np.ndarray, *indices: int) -> tf.IndexedSlices:
    """Return slices of a gradient whose dense shape is not given."""
    return tf.IndexedSlices(tf.constant(values, "float32"), tf.constant(indices))


def ones(shape: tuple[int, ...], value: float = 1.0) -> tf.Tensor:
    return tf.fill(shape, value)


# The gradients of each of two replicas, as functions that return them.
GRADIENTS: dict[str, list[Give]] = {
    "other variables": [
        lambda: [ones((3, 2)), None, None],
        lambda: [None, ones((3, 2), 2.0), None],
    ],
    "other shapes": [
        lambda: [ones((3, 2)), None, None],
        lambda: [None, None, ones((4,), 2.0)],
    ],
    "slices and nothing": [
        lambda: [rows(np.ones((2, 2)), 1, 1), None, ones((4,))],
        lambda: [None, ones((3, 2)), ones((4,))],
    ],
    "slices and a tensor": [
        lambda: [rows(np.ones((2, 2)), 2, 0), ones((3, 2)), None],
        lambda: [ones((3, 2)), rows(np.ones((1, 2)), 1), None],
    ],
}


def in_replica(give: list[Give]) -> list[Any]:
    """Return the gradients of the replica in whose context this is called."""
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    return give[number if isinstance(number, int) else int(tf.get_static_value(number))]()


def dense(gradient: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return a gradient, or zeros in place of `None`, as a dense array."""
    total = np.zeros(shape)
    if isinstance(gradient, tf.IndexedSlices):
        np.add.at(total, gradient.indices.numpy(), gradient.values.numpy())
    elif gradient is not None:
        total += gradient.numpy()
    return total


def stepping(
    strategy: tf.distribute.Strategy, mode: str, give: list[Give], **options: Any
) -> tuple[list[keras.Variable], Callable[[], None]]:
    """Return variables, and a function that takes a step with the gradients of each replica.

    Args:
        strategy: a strategy of two replicas.
        mode: a key of `MODES`.
        give: the functions that return the gradients of each replica.
        **options: keyword arguments of SNGM.
    """
    with strategy.scope():
        variables = [keras.Variable(np.ones(shape, "float32")) for shape in SHAPES]
        optimizer = SNGM(0.1, **options)
        optimizer.build(variables)

    def step() -> None:
        strategy.run(lambda: optimizer.apply(in_replica(give), variables))

    return variables, MODES[mode](step)


def check(
    strategy: tf.distribute.Strategy, name: str, mode: str, micro_batches: int | None
) -> None:
    """Assert that steps agree with the reference, whose gradient is the sum over replicas.

    Args:
        strategy: a strategy of two replicas.
        name: a key of `GRADIENTS`.
        mode: a key of `MODES`.
        micro_batches: the number of micro-batches in an accumulation cycle, or `None`.
    """
    give = GRADIENTS[name]
    variables, step = stepping(strategy, mode, give, gradient_accumulation_steps=micro_batches)
    sums = [
        dense(a, shape) + dense(b, shape)
        for a, b, shape in zip(give[0](), give[1](), SHAPES, strict=True)
    ]
    active = [any(give[k]()[i] is not None for k in range(2)) for i in range(len(SHAPES))]
    reference = ReferenceSNGM([np.ones(shape) for shape in SHAPES])
    for _ in range(UPDATES):
        for _ in range(micro_batches or 1):
            step()
        reference.step(sums, 0.1)
    for variable, weight, moves in zip(variables, reference.w, active, strict=True):
        assert moves or (weight == 1.0).all()
        for part in strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(
                part, weight, rtol=1e-5, err_msg=f"{name}, {mode}, {micro_batches}"
            )


def check_one_tensor_of_all(strategy: tf.distribute.Strategy, mode: str) -> None:
    """Assert that a step is right if the gradient of both replicas is the same tensor object."""
    constant = tf.constant(SHARED)
    variables, step = stepping(strategy, mode, 2 * [lambda: [constant, None, None]])
    step()
    moved = 0.1 * SHARED / np.linalg.norm(SHARED)
    for part in strategy.experimental_local_results(variables[0].value):
        np.testing.assert_allclose(part, 1.0 - moved, rtol=1e-5)


def check_refusal(strategy: tf.distribute.Strategy) -> None:
    """Assert that gradients for different variables are refused without cross-replica context.

    A replica cannot know then for which variables the others have gradients.
    """
    _, step = stepping(strategy, "function", GRADIENTS["other variables"])
    with pytest.raises(ValueError, match="All replicas must have gradients for the same var"):
        step()


def main() -> None:
    strategy = make_strategy(2)
    for name in GRADIENTS:
        for mode in MODES:
            for micro_batches in (None, 2):
                check(strategy, name, mode, micro_batches)
    for mode in MODES:
        check_one_tensor_of_all(strategy, mode)
    forbid_merge_call()
    check_refusal(strategy)


if __name__ == "__main__":
    main()
