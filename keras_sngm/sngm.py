"""SNGM: stochastic normalized gradient descent with momentum.

The arguments, their documentation and their checks are in one file, as in Keras' optimizers.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras

from keras_sngm.backend import BackendOptimizer
from keras_sngm.update_rule import Rule
from keras_sngm.weight_decay import Exclusions


@keras.saving.register_keras_serializable(package="keras_sngm")
class SNGM(BackendOptimizer):
    r"""Stochastic normalized gradient descent with momentum, for large batches.

    Update rule for all trainable variables `w` together, with mini-batch
    gradient `g` and momentum `u`, which starts at zero:

    ```python
    u = momentum * u + g / norm(g)
    w = w - learning_rate * u
    ```

    `norm(g)` is one Euclidean norm over every variable, not one per variable (but
    see `blockwise`).
    When `nesterov=True`, the second line becomes:

    ```python
    w = w - learning_rate * (momentum * u + g / norm(g))
    ```

    Since the gradient enters with length 1, the learning rate is a *length in
    weight space*: without weight decay no step moves the weights further than
    `learning_rate / (1 - momentum)`, and multiplying the loss by a positive
    constant changes nothing. Learning rates of momentum SGD do not carry over.

    A gradient of zero adds nothing to the momentum, which goes on by itself.
    A gradient with elements that are not finite, on any replica, skips the step: weights,
    momentum and moving averages stay as they are and `skipped_steps` goes up by
    one; `iterations`, and with it a learning rate schedule, goes on. All others are
    normalized, whatever their magnitude. On TensorFlow and JAX elements below 1.2e-38, the
    least normal float32, count as zeros where those do not compute with them.

    On PyTorch with CUDA a step may overwrite the gradients that it is given, and one whose
    norm, times a loss scale above 1, is above the largest float32, 3.4e38, is skipped.

    Under a `tf.distribute` strategy the gradients of all replicas are added up
    before anything else is done with them, so that N replicas on shards of a
    batch train like one on the whole batch. Create the optimizer in the scope of
    the strategy, which may be `OneDeviceStrategy`, `MirroredStrategy` or
    `MultiWorkerMirroredStrategy`. On JAX the same holds of `keras.distribution`, on PyTorch
    of gradients that `DistributedDataParallel` has averaged.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule`
            instance, or a callable that takes no arguments and returns the
            actual value to use. It is applied after the momentum, so that a
            schedule acts on the whole step. `keras_sngm.typical_learning_rate` has a
            formula for the first rate of a schedule that decays to zero, which SNGM is best
            used with. Defaults to `0.2`, a rate for training without a schedule.
        momentum: Float in the range [0, 1). With `0.0` no momentum is kept.
            Defaults to `0.9`.
        nesterov: Boolean. Whether to apply Nesterov momentum. Defaults to
            `False`.
        weight_decay: Float or `None`. If set, weight decay is applied.
        decoupled_weight_decay: Boolean. If `True`, the weights are multiplied
            by `1 - learning_rate * weight_decay` before each update, as Keras'
            own optimizers do. If `False`, `weight_decay * w` is added to the
            gradient before it is clipped and normalized, as if the loss had the
            term `weight_decay / 2 * norm(w) ** 2`. Defaults to `True`.
        clipnorm: Float. If set, the gradient of each variable is individually
            clipped so that its norm is no higher than this value, before the
            global norm is taken.
        clipvalue: Float. If set, each element of the gradient is clipped to be
            no higher than this value in magnitude, before the global norm is
            taken. Infinite elements are not clipped, they skip the step.
        global_clipnorm: Float. If set, the whole gradient is clipped so that
            its norm is no higher than this value. The normalization that
            follows undoes this, so only `gradient_norm` shows it.
        use_ema: Boolean, defaults to `False`. If `True`, an exponential moving
            average of the weights is kept.
        ema_momentum: Float, defaults to `0.99`. Only used if `use_ema=True`:
            `average = ema_momentum * average + (1 - ema_momentum) * w`.
        ema_overwrite_frequency: Int or `None`, defaults to `None`. Only used if
            `use_ema=True`. Every `ema_overwrite_frequency` updates the weights
            are overwritten by their average. If `None`, this happens only at
            the end of `fit()`, or when you call
            `optimizer.finalize_variable_values()`.
        loss_scale_factor: Float or `None`. If set, the loss is multiplied by it
            before gradients are computed, and the gradients by its inverse.
        gradient_accumulation_steps: Int of at least 2, or `None`. If set,
            variables are updated once every that many steps, with the mean of
            the gradients since the last update: the weights are those of one
            batch of all their samples. Replicas communicate once per update.
            A variable takes part in an update if it has a gradient in any of these steps.
            In functions that are compiled the last of them decides: give zeros there.
            `iterations` counts updates; a learning rate schedule counts steps,
            as in Keras, and is read at the first step of each update.
        jit_compile: `True`, `False` or `"auto"`. Whether the update is compiled
            with XLA, all variables in one program, under a distribution strategy
            and in eager loops, too. `"auto"` does so where XLA is supported and
            pays: on CPUs float32 and float64 variables of up to 300,000 elements
            (16,384 with `use_ema`) are left to TensorFlow's kernel for momentum,
            which is as quick there and needs no compilation; with coupled weight
            decay or `clipvalue` larger ones, too. Without effect on JAX, where the
            update is always compiled, and on PyTorch, where it consists of fused
            kernels. Defaults to `"auto"`.
        noise_scale_batch_size: Int or `None`. If set, the gradient noise scale is
            estimated, see `gradient_noise_scale`, from how the gradients of the small
            batches of an update differ: those of its micro-batches and, on TensorFlow,
            of its replicas, of which there must be two or more. The value is the number
            of samples in a batch as `fit` gets it, all replicas together. Takes a pass
            over each of these gradients.
        noise_scale_momentum: Float in the range [0, 1), defaults to `0.99`. Only used if
            `noise_scale_batch_size` is set. Numerator and denominator of the noise scale
            are each averaged over updates: `average = noise_scale_momentum * average +
            (1 - noise_scale_momentum) * estimate`.
        blockwise: Boolean. If `True`, each variable's gradient is divided by its own
            norm instead, so that each moves by up to `learning_rate / (1 - momentum)`:
            the block normalization that the paper compares with. That undoes
            `clipnorm`, too. Defaults to `False`.
        name: String or `None`. The name of the optimizer, which the paths of its variables
            begin with. With `None` the first one is called `sngm`, the next `sngm_1`, and
            so on, as Keras' own are. Defaults to `None`.

    Attributes:
        gradient_norm: Variable, float32 scalar: the norm that the last gradient
            was divided by (unless `blockwise`), that is of the gradient summed over
            replicas, after weight decay (if coupled) and clipping. Infinite above 3.4e38.
        gradient_norms: Variable, float32 vector: the same per trainable
            variable, in the order the optimizer was built with; 0 where a
            variable had no gradient. Exists once the optimizer is built.
        skipped_steps: Variable, integer scalar: how many steps were skipped.
        gradient_noise_scale: Variable, float32 scalar, in samples, or `None` without
            `noise_scale_batch_size`: `tr(S) / norm(G) ** 2` with the expected gradient
            `G` of the loss and the covariance `S` of the gradient of one sample (McCandlish
            et al., 2018, B_simple). Batches much smaller than this are mostly noise, much
            larger ones waste samples, as far as the theory reaches. Numerator and
            denominator are estimated without bias and averaged before one is divided by
            the other. 0 before the first update, and the largest float32, 3.4e38, as long
            as the average of the denominator is not positive. Updates whose squares a float32
            cannot hold do not count. Checkpointed with its averages.

    Raises:
        ValueError: if an argument is out of its range or unknown, if more than
            one of `clipnorm`, `clipvalue` and `global_clipnorm` is set, or under
            a strategy that is not supported.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sngm import SNGM
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=SNGM(learning_rate=0.1), loss="mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    >>> int(model.optimizer.skipped_steps)
    0

    Reference:

    - [Zhao, Shi, Xie, Li, 2024](https://arxiv.org/abs/2007.13985), Science
      China Information Sciences 67(11):212101.
    - [McCandlish, Kaplan, Amodei, OpenAI Dota Team, 2018](
      https://arxiv.org/abs/1812.06162), for the noise scale.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule | Callable = 0.2,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float | None = None,
        decoupled_weight_decay: bool = True,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        jit_compile: bool | str = "auto",
        noise_scale_batch_size: int | None = None,
        noise_scale_momentum: float = 0.99,
        blockwise: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(momentum, float) or not 0.0 <= momentum < 1.0:
            raise ValueError(
                f"`momentum` must be a float in the range [0, 1). Received: momentum={momentum}"
            )
        if isinstance(learning_rate, float) and not 0.0 <= learning_rate < math.inf:
            raise ValueError(
                "`learning_rate` must be finite and not negative. "
                f"Received: learning_rate={learning_rate}"
            )
        _check_number("weight_decay", weight_decay, zero_allowed=True)
        _check_number("clipnorm", clipnorm)
        _check_number("clipvalue", clipvalue)
        _check_number("global_clipnorm", global_clipnorm)
        _check_number("loss_scale_factor", loss_scale_factor)
        if gradient_accumulation_steps is not None and (
            not isinstance(gradient_accumulation_steps, int) or gradient_accumulation_steps < 2
        ):
            raise ValueError(
                "`gradient_accumulation_steps` must be an integer >= 2 or None. "
                f"Received: gradient_accumulation_steps={gradient_accumulation_steps}"
            )
        if jit_compile not in (True, False, "auto"):
            raise ValueError(
                f'`jit_compile` must be True, False or "auto". Received: jit_compile={jit_compile}'
            )
        if noise_scale_batch_size is not None and (
            isinstance(noise_scale_batch_size, bool)
            or not isinstance(noise_scale_batch_size, int)
            or noise_scale_batch_size < 1
        ):
            raise ValueError(
                "`noise_scale_batch_size` must be an integer >= 1 or None. "
                f"Received: noise_scale_batch_size={noise_scale_batch_size}"
            )
        if not isinstance(noise_scale_momentum, float) or not 0.0 <= noise_scale_momentum < 1.0:
            raise ValueError(
                "`noise_scale_momentum` must be a float in the range [0, 1). "
                f"Received: noise_scale_momentum={noise_scale_momentum}"
            )
        super().__init__(
            learning_rate=learning_rate,
            name=name,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **kwargs,
        )
        self.momentum = momentum
        self.nesterov = nesterov
        self.decoupled_weight_decay = decoupled_weight_decay
        self.jit_compile = jit_compile
        self.noise_scale_batch_size = noise_scale_batch_size
        self.noise_scale_momentum = noise_scale_momentum
        self.blockwise = blockwise
        self._weight_decay_exclusions = Exclusions()
        self.gradient_norm = self.add_variable(
            (), dtype="float32", aggregation="only_first_replica", name="gradient_norm"
        )
        self.skipped_steps = self.add_variable(
            (), dtype="int", aggregation="only_first_replica", name="skipped_steps"
        )
        self.gradient_noise_scale = self.noise_moments = None
        if noise_scale_batch_size is not None:
            self.gradient_noise_scale = self.add_variable(
                (), dtype="float32", aggregation="only_first_replica", name="gradient_noise_scale"
            )
            self.noise_moments = self.add_variable(
                (3,), dtype="float32", aggregation="only_first_replica", name="noise_moments"
            )

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Create the optimizer's variables.

        Args:
            variables: list of the model's trainable variables.

        Raises:
            ValueError: if a variable was created under another strategy than
                the optimizer, or is complex.
        """
        if self.built:
            return
        for variable in variables:
            if "complex" in keras.backend.standardize_dtype(variable.dtype):
                raise ValueError(
                    "`SNGM` trains real variables. "
                    f"Received: variable '{variable.path}' of dtype={variable.dtype}"
                )
        super().build(variables)
        self._weight_decay_exclusions.warn_of_idle(variables)
        self._weight_decay_exclusions = self._weight_decay_exclusions.located_in(variables)
        self.momentums = []
        if self.momentum != 0.0:
            self.momentums = self.add_optimizer_variables(variables, "momentum")
        self.gradient_norms = self.add_variable(
            (len(variables),),
            dtype="float32",
            aggregation="only_first_replica",
            name="gradient_norms",
        )
        if self.use_ema:
            self.averaged_updates = self.add_variable(
                (), dtype="int", aggregation="only_first_replica", name="averaged_updates"
            )

    def exclude_from_weight_decay(
        self,
        var_list: Iterable[keras.Variable] | None = None,
        var_names: Iterable[str] | None = None,
    ) -> None:
        """Exclude variables from weight decay. Call it before `build`.

        The exclusions are saved with the optimizer. A second call replaces
        those of the first.

        Args:
            var_list: A list of variables to exclude.
            var_names: A list of strings. A variable is excluded if one of them,
                taken as a regular expression, is found in its path, such as
                `encoder/dense/kernel`. For example, `var_names=["bias"]` excludes all
                bias variables and `var_names=["encoder"]` all of that layer. What fits
                nothing is warned of when the optimizer is built.

        Raises:
            ValueError: if the optimizer is already built.
        """
        if self.built:
            raise ValueError(
                "`exclude_from_weight_decay()` can only be configured before "
                "the optimizer is built."
            )
        self._weight_decay_exclusions = Exclusions(var_list or (), var_names or ())

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, and the exclusions from weight decay."""
        config = super().get_config()
        config.update(
            {
                "momentum": self.momentum,
                "nesterov": self.nesterov,
                "decoupled_weight_decay": self.decoupled_weight_decay,
                "jit_compile": self.jit_compile,
                "noise_scale_batch_size": self.noise_scale_batch_size,
                "noise_scale_momentum": self.noise_scale_momentum,
                "blockwise": self.blockwise,
            }
        )
        if self._weight_decay_exclusions:
            config["weight_decay_exclusions"] = self._weight_decay_exclusions.get_config()
        return config

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "SNGM":
        """Create an optimizer from what `get_config` has returned."""
        config = dict(config)
        exclusions = config.pop("weight_decay_exclusions", {})
        optimizer = super().from_config(config, custom_objects=custom_objects)
        optimizer._weight_decay_exclusions = Exclusions(**exclusions)
        return optimizer

    def _rule(self) -> Rule:
        """Return the hyper-parameters of the next step.

        Raises:
            ValueError: if `momentum` was 0 when the optimizer was built, and no longer is.
        """
        if self.momentum != 0.0 and not self.momentums:
            raise ValueError(
                "This optimizer was built with `momentum=0.0` and keeps none. "
                f"Create a new one. Received: momentum={self.momentum}"
            )
        return Rule(
            momentum=self.momentum,
            nesterov=self.nesterov,
            blockwise=self.blockwise,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=self.decoupled_weight_decay,
            clipnorm=self.clipnorm,
            clipvalue=self.clipvalue,
            global_clipnorm=self.global_clipnorm,
            ema_momentum=self.ema_momentum,
        )

    def _decays(self, variables: Sequence[keras.Variable]) -> tuple[bool, ...]:
        """Return for each of the variables whether weight decay applies to it."""
        return self._weight_decay_exclusions.decays(variables)


def _check_number(name: str, value: Any, zero_allowed: bool = False) -> None:
    """Raise a `ValueError` unless `value` is `None` or a finite positive number."""
    if value is None:
        return
    is_number = isinstance(value, numbers.Real) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero_allowed):
        wanted = "not negative" if zero_allowed else "positive"
        raise ValueError(f"`{name}` must be a finite number, {wanted}. Received: {name}={value}")
