"""The gradient noise scale, from how the small batches of an update differ."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from keras_sngm.noise_scale import noise_averages, noise_moments
from keras_sngm.update_rule import Tensor


class NoiseMeter(NamedTuple):
    """How to estimate it.

    Attributes:
        batch_size: samples in one call of the optimizer, all replicas together.
        momentum: weight of the past in the averages.
        replicas: how many there are.
        times: how many calls make up an update.
    """

    batch_size: int
    momentum: float
    replicas: int
    micro_batches: int

    def check(self) -> None:
        """Refuse a single small batch, which does not differ from anything."""
        if self.replicas * self.micro_batches < 2:
            raise ValueError(
                "`noise_scale_batch_size` needs several batches in each update, to compare them: "
                "set `gradient_accumulation_steps`, or on TensorFlow train on several replicas, "
                "or leave it out. "
                f"Received: noise_scale_batch_size={self.batch_size} without micro-batches, "
                "on 1 replica"
            )

    def estimates(self, total: Tensor, large: Tensor) -> list[Tensor]:
        """Of tr(Sigma) and norm(G)^2.

        Args:
            total: the sum of the squares of the gradients that all replicas had in all
                calls. Keras has divided their losses by the number of replicas.
            large: the squared norm of the gradient of the update.
        """
        count = self.replicas * self.micro_batches
        small = total * self.replicas**2 / count
        return noise_moments(small, large, count, self.batch_size / self.replicas)

    def update(
        self, moments: Any, noise_scale: Any, estimates: Sequence[Tensor], is_taken: Tensor
    ) -> None:
        """Move the averages of numerator and denominator, and divide them.

        Args:
            moments: variable, averages of tr(Sigma), of norm(G)^2 and of 1, all beginning
                at 0.
            noise_scale: variable, the quotient of the first two; the largest float32 while
                the second is not positive.
            estimates: of tr(Sigma) and norm(G)^2 in this update.
            taken: whether the update was; else it does not count. Nor does it if a
                square overflowed.
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
