"""Estimates the gradient noise scale from the norms of small and large batches.

S. McCandlish, J. Kaplan, D. Amodei et al., "An empirical model of large-batch training",
https://arxiv.org/abs/1812.06162, appendix A.1.
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_sngm.update_rule import Tensor, filled


def noise_moments(small: Tensor, large: Tensor, count: int, samples: float) -> list[Tensor]:
    """Unbiased estimates of tr(Sigma) and norm(G)^2 from one batch.

    G is the expected gradient, Sigma the covariance of the gradient of one sample
    (McCandlish et al., https://arxiv.org/abs/1812.06162, appendix A.1).

    Args:
        small: mean of the squared norms of the gradients of small batches.
        large: squared norm of the mean of these gradients.
        count: how many small batches there are, at least 2.
        samples: how many samples there are in each.
    """
    between = (small - large) * count / (count - 1)
    return [samples * between, large - between / count]


def noise_averages(
    momentum: float,
    moments: Tensor,
    noise_scale: Tensor,
    estimates: Sequence[Tensor],
    is_taken: Tensor,
) -> tuple[Tensor, Tensor]:
    """The averages of `noise_moments` and of 1 after an update, and their quotient.

    The quotient is the largest float where the second average is not positive: a number
    that is finite, so that tools which look for others find only faults.

    Args:
        momentum: weight of the past.
        moments: vector, the averages before it.
        noise_scale: the quotient before it.
        estimates: what `noise_moments` has made of the update.
        taken: whether it was; else it does not count, nor does one whose estimates are
            not finite.
    """
    new = ops.stack([*estimates, ops.ones_like(estimates[0])])
    counts = ops.logical_and(is_taken, ops.all(ops.isfinite(new)))
    moved = ops.where(counts, momentum * moments + (1.0 - momentum) * new, moments)
    positive = moved[1] > 0
    largest = filled(float(np.finfo(np.float32).max), moved[0])
    quotient = moved[0] / ops.where(positive, moved[1], ops.ones_like(moved[1]))
    quotient = ops.where(ops.logical_and(positive, quotient < largest), quotient, largest)
    return moved, ops.where(counts, quotient, noise_scale)
