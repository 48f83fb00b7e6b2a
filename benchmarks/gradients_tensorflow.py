"""Random gradients that TensorFlow cannot see through."""

import math
from collections.abc import Sequence

import tensorflow as tf

from shapes import Shape


class Gradients:
    """Random gradients for all contestants, who read them and leave them as they are.

    In a training function gradients are computed. A tensor from outside is no
    substitute if it is small: TensorFlow makes it a constant, whose norm could
    be computed beforehand. So small gradients are rows of a larger tensor.
    """

    LARGEST_CONSTANT = 128

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
        """To be called where they are used: in the function, if there is one."""
        rows = {shape: iter(tf.unstack(stacked)) for shape, stacked in self._rows.items()}
        return [
            self._large[i] if i in self._large else next(rows[shape])
            for i, shape in enumerate(self.shapes)
        ]


def _random(shape: Shape, seed: int) -> tf.Tensor:
    return tf.random.stateless_normal(shape, seed=(0, seed))
