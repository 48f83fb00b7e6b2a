"""The order in which an XLA program on CPUs goes through memory.

There XLA updates a variable in two loops, one for the momentum and one for the
weight, which reads the new momentum. Left to itself it computes all momenta first,
and the early ones have left the caches before they are needed again. So variables
are updated in chunks, few at a time.
"""

import itertools
from collections.abc import Sequence

import tensorflow as tf

# The least number of elements in a chunk, and the number of chunks that may be computed at a
# time. Measured on two cores, see benchmarks/step_time.py.
_CHUNK_SIZE = 1_000_000
_CHUNKS_AT_A_TIME = 2


def chunks(sizes: Sequence[int]) -> list[slice]:
    """Cut a list of variables into slices of about `_CHUNK_SIZE` elements, to update each at once.

    Args:
        sizes: the number of elements of each variable.
    """
    ends, total = [0], 0
    for end, size in enumerate(sizes, start=1):
        total += size
        if total >= _CHUNK_SIZE or end == len(sizes):
            ends.append(end)
            total = 0
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def delayed_until(coefficient: tf.Tensor, done: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return a coefficient that XLA cannot compute before earlier chunks are done.

    A chunk is a group of variables that are updated together. The value of the coefficient is not
    changed. The chunk that multiplies by it is thereby delayed until all but the last
    `_CHUNKS_AT_A_TIME - 1` of the earlier ones are done.

    Args:
        coefficient: a scalar.
        done: one new weight of each earlier chunk, in their order.
    """
    if len(done) < _CHUNKS_AT_A_TIME:
        return coefficient
    # XLA removes control dependencies and optimization barriers before it schedules. It does
    # not notice that no number is both below and above zero.
    element = tf.reshape(done[-_CHUNKS_AT_A_TIME], [-1])[0]
    impossible = tf.logical_and(element < 0, element > 0)
    return tf.where(impossible, tf.zeros_like(coefficient), coefficient)
