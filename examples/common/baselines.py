"""Optimizers to compare SNGM with: optimizers of Keras with coupled weight decay, and LARS.

The weight decay of Keras' optimizers is decoupled, and Keras has no LARS.
"""

from typing import Any

import keras
from keras import ops


class CoupledDecay:
    """Mixin that gives a Keras optimizer coupled weight decay, on TensorFlow only.

    Args:
        coupled_weight_decay: `coupled_weight_decay * w` is added to the gradient of each
            variable `w` before the optimizer receives it.
        *args: positional arguments of the optimizer.
        **kwargs: keyword arguments of the optimizer.
    """

    def __init__(self, *args, coupled_weight_decay=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.coupled_weight_decay = coupled_weight_decay

    def apply(self, grads, trainable_variables=None):
        # Without decay nothing is added, so that sparse gradients stay sparse.
        if self.coupled_weight_decay:
            # The study's report imports this module, but runs without TensorFlow.
            import tensorflow as tf

            # The gradients of replicas are summed, so each replica adds its share of the decay.
            replicas = tf.distribute.get_replica_context().num_replicas_in_sync
            share = self.coupled_weight_decay / replicas
            grads = [g + share * v for g, v in zip(grads, trainable_variables, strict=True)]
        super().apply(grads, trainable_variables)


class MomentumSGD(CoupledDecay, keras.optimizers.SGD):
    """Momentum SGD with coupled weight decay."""


class Lamb(CoupledDecay, keras.optimizers.Lamb):
    """LAMB with coupled weight decay, https://arxiv.org/abs/1904.00962."""


@keras.saving.register_keras_serializable(package="examples")
class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling, for large batches.

    The step of each variable `w`, with gradient `g` and velocity `v`, which is zero at
    first:

    ```python
    g = g + weight_decay * w
    ratio = trust_coefficient * norm(w) / (norm(g) + epsilon)
    v = momentum * v + learning_rate * ratio * g
    w = w - v
    ```

    Where `norm(w)` or `norm(g)` is zero, as for biases at the start, `ratio` is 1.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule`
            instance, or a callable that takes no arguments and returns the actual
            value to use. Defaults to `0.1`.
        momentum: Float in the range [0, 1). Defaults to `0.9`.
        nesterov: Boolean. Whether to apply Nesterov momentum. Defaults to `False`.
        weight_decay: Float or `None`. If set, `weight_decay * w` is added to the gradient,
            as above, so that it affects the ratio.
        trust_coefficient: Float. How far a variable may move in one step at a learning
            rate of 1, in proportion to its norm. Defaults to `0.001`.
        epsilon: Float, added to the norm of the gradient. Defaults to `0.0`.
        name: String. The name of the optimizer. Defaults to `"lars"`.
        **kwargs: keyword arguments of every Keras optimizer.

    Raises:
        ValueError: if an argument is out of its range or unknown.

    Reference:

    - [You, Gitman, Ginsburg, 2017](https://arxiv.org/abs/1708.03888)
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float | None = None,
        trust_coefficient: float = 0.001,
        epsilon: float = 0.0,
        name: str = "lars",
        **kwargs: Any,
    ) -> None:
        if not isinstance(momentum, float) or not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"`momentum` must be a float in the range [0, 1). Received: momentum={momentum}"
            )
        if not trust_coefficient > 0.0:
            raise ValueError(
                "`trust_coefficient` must be positive. "
                f"Received: trust_coefficient={trust_coefficient}"
            )
        for argument, value in {"weight_decay": weight_decay or 0.0, "epsilon": epsilon}.items():
            if not value >= 0.0:
                raise ValueError(f"`{argument}` must not be negative. Received: {argument}={value}")
        # Keras must not know `weight_decay`, or it would apply decoupled decay as well.
        super().__init__(learning_rate=learning_rate, weight_decay=None, name=name, **kwargs)
        self.momentum = momentum
        self.nesterov = nesterov
        self.coupled_weight_decay = weight_decay
        self.trust_coefficient = trust_coefficient
        self.epsilon = epsilon

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: Any, variable: keras.Variable, learning_rate: Any) -> None:
        velocity = self.momentums[self._get_variable_index(variable)]
        rate, gradient = (ops.cast(x, variable.dtype) for x in (learning_rate, gradient))
        if self.coupled_weight_decay and self._use_weight_decay(variable):
            gradient = gradient + self.coupled_weight_decay * variable
        step = rate * self._trust_ratio(gradient, variable) * gradient
        moved = self.momentum * velocity + step
        self.assign(velocity, moved)
        self.assign_sub(variable, self.momentum * moved + step if self.nesterov else moved)

    def _trust_ratio(self, gradient: Any, variable: keras.Variable) -> Any:
        """Return the trust ratio of a variable: 1 where its norm or its gradient's is zero."""
        of_weight, of_gradient = (ops.sqrt(ops.sum(ops.square(x))) for x in (variable, gradient))
        ratio = self.trust_coefficient * of_weight / (of_gradient + self.epsilon)
        has_none = ops.logical_or(of_weight == 0.0, of_gradient == 0.0)
        return ops.where(has_none, ops.ones_like(ratio), ratio)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "weight_decay": self.coupled_weight_decay,
            "trust_coefficient": self.trust_coefficient,
            "epsilon": self.epsilon,
        }
