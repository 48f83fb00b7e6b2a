"""Random gradients that TensorFlow cannot treat as constants of a graph."""

import math
from collections.abc import Sequence

import tensorflow as tf

from shapes import Shape


class Gradients:
    """Random gradients that all contestants read and none writes to.

    Gradients of a training function are computed within it. A tensor from outside cannot
    stand in for a small gradient: TensorFlow makes small tensors constants of the graph, and
    could compute their norm when it compiles. So small gradients are rows of a larger tensor.

    Args:
        shapes: the shapes of the weights.
    """

    LARGEST_CONSTANT = 128
    """Number of elements up to which a gradient is made a row of a larger tensor."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self.shapes = list(shapes)
        self._large: dict[int, tf.Tensor] = {}
        self._rows: dict[Shape, tf.Tensor] = {}
        for i, shape in enumerate(self.shapes):
            if math.prod(shape) > self.LARGEST_CONSTANT:
                self._large[i] = _random(shape, seed=i)
            elif shape not in self._rows:
                count = max(self.shapes.count(shape), self.LARGEST_CONSTANT + 1)
                self._rows[shape] = _random((count, *shape), seed=i)

    def tensors(self) -> list[tf.Tensor]:
        """Return the gradients as tensors.

        Call this inside the `tf.function` that uses the tensors, if there is one.
        """
        rows = {shape: iter(tf.unstack(stacked)) for shape, stacked in self._rows.items()}
        return [
            self._large[i] if i in self._large else next(rows[shape])
            for i, shape in enumerate(self.shapes)
        ]


def _random(shape: Shape, seed: int) -> tf.Tensor:
    return tf.random.stateless_normal(shape, seed=(0, seed))
