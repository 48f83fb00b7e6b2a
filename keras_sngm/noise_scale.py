"""Estimates of the gradient noise scale from the norms of small and large batches.

S. McCandlish, J. Kaplan, D. Amodei et al., "An empirical model of large-batch training",
https://arxiv.org/abs/1812.06162, appendix A.1.
"""

from collections.abc import Sequence

import numpy as np
from keras import ops

from keras_sngm.update_rule import Tensor, filled


def noise_moments(small: Tensor, large: Tensor, count: int, samples: float) -> list[Tensor]:
    """Estimate tr(Sigma) and norm(G)^2 from one batch, both without bias.

    G is the expected gradient, Sigma the covariance of the gradient of one sample
    (McCandlish et al., https://arxiv.org/abs/1812.06162, appendix A.1).

    Args:
        small: scalar, mean of the squared norms of the gradients of small batches.
        large: scalar, squared norm of the mean of these gradients.
        count: number of small batches, at least 2.
        samples: number of samples in each small batch.
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
    """Move the averages behind the gradient noise scale by one update, and divide them anew.

    Args:
        momentum: weight of the past in the averages.
        moments: vector, averages of tr(Sigma), of norm(G)^2 and of 1 before the update.
        noise_scale: scalar, the quotient of the first two before the update.
        estimates: tr(Sigma) and norm(G)^2, estimated from this update.
        is_taken: boolean scalar, `False` if the update was skipped. It then does not count,
            nor does an update with an estimate that is not finite.

    Returns:
        The new averages and the new quotient. The quotient is the largest float32 while the
        average of norm(G)^2 is not positive, so that tools which look for numbers that are
        not finite find only faults.
    """
    new = ops.stack([*estimates, ops.ones_like(estimates[0])])
    counts = ops.logical_and(is_taken, ops.all(ops.isfinite(new)))
    moved = ops.where(counts, momentum * moments + (1.0 - momentum) * new, moments)
    positive = moved[1] > 0
    largest = filled(float(np.finfo(np.float32).max), moved[0])
    quotient = moved[0] / ops.where(positive, moved[1], ops.ones_like(moved[1]))
    quotient = ops.where(ops.logical_and(positive, quotient < largest), quotient, largest)
    return moved, ops.where(counts, quotient, noise_scale)
