"""The order in which XLA goes through memory.

On CPUs XLA updates a variable in two loops, one for the momentum and one for the
weight, which reads the new momentum. Left to itself it computes all momenta first,
and the early ones have left the caches before they are needed again. So variables
are updated in portions, few at a time.
"""

import itertools
from collections.abc import Sequence

import tensorflow as tf

# In elements, and how many portions may be under way together. Measured on two
# cores, see benchmarks/step_time.py.
_PORTION = 1_000_000
_AT_ONCE = 2


def chunks(sizes: Sequence[int]) -> list[slice]:
    """Cuts a row of variables of these sizes as soon as a portion is large enough."""
    ends, total = [0], 0
    for end, size in enumerate(sizes, start=1):
        total += size
        if total >= _PORTION or end == len(sizes):
            ends.append(end)
            total = 0
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def delayed_until(coefficient: tf.Tensor, done: Sequence[tf.Tensor]) -> tf.Tensor:
    """The same coefficient, which XLA cannot know before an earlier portion is done.

    Args:
        coefficient: a scalar.
        done: a result of each earlier portion, in their order.
    """
    if len(done) < _AT_ONCE:
        return coefficient
    # Control dependencies and optimization barriers are gone when XLA schedules.
    # That no number is on both sides of zero it does not find out.
    element = tf.reshape(done[-_AT_ONCE], [-1])[0]
    impossible = tf.logical_and(element < 0, element > 0)
    return tf.where(impossible, tf.zeros_like(coefficient), coefficient)
