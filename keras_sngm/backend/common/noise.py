"""The gradient noise scale of an optimizer, from how the small batches of an update differ."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_sngm.noise_scale import noise_averages, noise_moments
from keras_sngm.update_rule import Tensor


class NoiseMeter(NamedTuple):
    """Settings and arithmetic of the gradient noise scale of one optimizer.

    That is tr(Sigma) / norm(G)^2, with the expected gradient G of the loss and the covariance Sigma
    of the gradient of one sample.

    Attributes:
        batch_size: number of samples in one call of the optimizer, all replicas together.
        momentum: weight of the past in the averages.
        replicas: number of replicas.
        micro_batches: number of calls of the optimizer that make up an update.
    """

    batch_size: int
    momentum: float
    replicas: int
    micro_batches: int

    def check(self) -> None:
        """Raise a `ValueError` if an update has only one small batch, and so nothing to compare."""
        if self.replicas * self.micro_batches < 2:
            raise ValueError(
                "`noise_scale_batch_size` needs several batches in each update, to compare them: "
                "set `gradient_accumulation_steps`, or on TensorFlow train on several replicas, "
                "or leave it out. "
                f"Received: noise_scale_batch_size={self.batch_size} without micro-batches, "
                "on 1 replica"
            )

    def estimates(self, total: Tensor, large: Tensor) -> list[Tensor]:
        """Estimate tr(Sigma) and norm(G)^2, without bias, from one update.

        G is the expected gradient of the loss, Sigma the covariance of the gradient of one sample.

        Args:
            total: scalar, the sum of the squares of the gradients of all replicas in all calls.
                Keras has divided their losses by the number of replicas.
            large: scalar, the squared norm of the gradient of the update.

        Returns:
            Two scalars, the estimates of tr(Sigma) and of norm(G)^2.
        """
        count = self.replicas * self.micro_batches
        small = total * self.replicas**2 / count
        return noise_moments(small, large, count, self.batch_size / self.replicas)

    def update(
        self, moments: Any, noise_scale: Any, estimates: Sequence[Tensor], is_taken: Tensor
    ) -> None:
        """Move the averages of tr(Sigma) and norm(G)^2 by one update, and divide them.

        Args:
            moments: variable, averages of tr(Sigma), of norm(G)^2 and of 1, all beginning
                at 0.
            noise_scale: variable, the quotient of the first two; the largest float32 while
                the second is not positive.
            estimates: tr(Sigma) and norm(G)^2, estimated from this update.
            is_taken: boolean scalar, `False` if the update was skipped. It then does not count,
                nor does it if an estimate is not finite.
        """
        moved, quotient = noise_averages(
            self.momentum,
            ops.convert_to_tensor(moments),
            ops.convert_to_tensor(noise_scale),
            estimates,
            is_taken,
        )
        moments.assign(moved)
        noise_scale.assign(quotient)
