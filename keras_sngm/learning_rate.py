"""A learning rate for SNGM that costs no training."""

import math

CONSTANT = 0.7
EXPONENT = -0.25


def typical_learning_rate(updates_per_epoch: float) -> float:
    r"""Return a learning rate to begin with: `0.7 * updates_per_epoch ** -0.25`.

    Constant and exponent are rounded from a fit to the best learning rates of SNGM in the
    large-batch study of this repository, whose networks have up to 270,000 parameters. How far it
    is from the best rate of each task, and what that costs, is in `docs/learning_rate.md`. The
    rate is meant for training in which it decays to zero, with `momentum=0.9`.

    Args:
        updates_per_epoch: Number of updates in an epoch, the number of training samples divided by
            the batch size: that of all replicas and micro-batches of an update together. At
            a batch as large as the data it is 1.

    Returns:
        The learning rate of the first update, a length in weight space.

    Raises:
        ValueError: if `updates_per_epoch` is not a positive finite number.

    Example:

    >>> from keras_sngm import typical_learning_rate
    >>> round(typical_learning_rate(updates_per_epoch=16), 3)
    0.35
    """
    if (
        isinstance(updates_per_epoch, bool)
        or not isinstance(updates_per_epoch, (int, float))
        or not 0.0 < updates_per_epoch < math.inf
    ):
        raise ValueError(
            "`updates_per_epoch` must be a positive finite number. "
            f"Received: updates_per_epoch={updates_per_epoch}"
        )
    return CONSTANT * updates_per_epoch**EXPONENT
