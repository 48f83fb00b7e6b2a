"""Takes steps in which replicas have gradients of different kinds, or for different variables.

Run by `test_distribution.py`, as devices must be configured before TensorFlow starts.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_sngm import SNGM
from reference import ReferenceSNGM
from replica_training import forbid_merge_call, make_strategy

SHAPES = [(3, 2), (3, 2), (4,)]
MODES = {"eager": None, "function": False}
SHARED = np.full((3, 2), 0.5, "float32")


def rows(values: np.ndarray, *indices: int) -> tf.IndexedSlices:
    """Slices that do not know their shape."""
    return tf.IndexedSlices(tf.constant(values, "float32"), tf.constant(indices))


def ones(shape: tuple[int, ...], value: float = 1.0) -> tf.Tensor:
    return tf.fill(shape, value)


# What each of two replicas gives.
GRADIENTS: dict[str, list[Callable[[], list[Any]]]] = {
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


def in_replica(give: list[Callable[[], list[Any]]]) -> list[Any]:
    """What the replica that asks gives."""
    number = tf.distribute.get_replica_context().replica_id_in_sync_group
    return give[number if isinstance(number, int) else int(tf.get_static_value(number))]()


def dense(gradient: Any, shape: tuple[int, ...]) -> np.ndarray:
    total = np.zeros(shape)
    if isinstance(gradient, tf.IndexedSlices):
        np.add.at(total, gradient.indices.numpy(), gradient.values.numpy())
    elif gradient is not None:
        total += gradient.numpy()
    return total


def stepping(strategy: tf.distribute.Strategy, how: Any, **options: Any) -> Any:
    """Weights, and a function that takes a step with what each replica gives."""
    with strategy.scope():
        variables = [keras.Variable(np.ones(shape, "float32")) for shape in SHAPES]
        optimizer = SNGM(0.1, **options)
        optimizer.build(variables)

    def step(give: list[Callable[[], list[Any]]]) -> None:
        strategy.run(lambda: optimizer.apply(in_replica(give), variables))

    return variables, step if how is None else lambda give: tf.function(lambda: step(give))()


def check(strategy: tf.distribute.Strategy, name: str, how: Any, times: int | None) -> None:
    give = GRADIENTS[name]
    variables, step = stepping(strategy, how, gradient_accumulation_steps=times)
    sums = [
        dense(a, shape) + dense(b, shape)
        for a, b, shape in zip(give[0](), give[1](), SHAPES, strict=True)
    ]
    active = [any(give[k]()[i] is not None for k in range(2)) for i in range(len(SHAPES))]
    reference = ReferenceSNGM([np.ones(shape) for shape in SHAPES])
    for _ in range(2):
        for _ in range(times or 1):
            step(give)
        reference.step(sums, 0.1)
    for variable, weight, moves in zip(variables, reference.w, active, strict=True):
        assert moves or (weight == 1.0).all()
        for part in strategy.experimental_local_results(variable.value):
            np.testing.assert_allclose(part, weight, rtol=1e-5, err_msg=f"{name}, {how}, {times}")


def check_one_tensor_of_all(strategy: tf.distribute.Strategy, how: Any) -> None:
    """Each replica gives the same object, which is made outside of them."""
    variables, step = stepping(strategy, how)
    constant = tf.constant(SHARED)
    give = lambda: [constant, None, None]  # noqa: E731
    step([give, give])
    moved = 0.1 * SHARED / np.linalg.norm(SHARED)
    for part in strategy.experimental_local_results(variables[0].value):
        np.testing.assert_allclose(part, 1.0 - moved, rtol=1e-5)


def check_refusal(strategy: tf.distribute.Strategy) -> None:
    """Where replicas act for themselves nobody knows what the others have."""
    _, step = stepping(strategy, False)
    with pytest.raises(ValueError, match="All replicas must have gradients for the same var"):
        step(GRADIENTS["other variables"])


def main() -> None:
    strategy = make_strategy(2)
    for name in GRADIENTS:
        for how in MODES.values():
            for times in (None, 2):
                check(strategy, name, how, times)
    for how in MODES.values():
        check_one_tensor_of_all(strategy, how)
    forbid_merge_call()
    check_refusal(strategy)


if __name__ == "__main__":
    main()
