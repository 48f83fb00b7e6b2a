"""Checks of where an optimizer can take a step, with errors that say what to do."""

import platform
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.context import context
from tensorflow.python.framework.config import is_op_determinism_enabled
from tensorflow.python.framework.ops import get_default_graph
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.ops.control_flow_v2_func_graphs import CondBranchFuncGraph

from keras_sngm.backend.tensorflow.replicas import native_variable

_SYNCHRONOUS = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
_SUPPORTED = (*_SYNCHRONOUS, tf.distribute.OneDeviceStrategy)


def needs_merge_call(optimizer: str, home: tf.distribute.Strategy) -> bool:
    """Return whether the step must be taken in the cross-replica context, by `merge_call`.

    Args:
        optimizer: name of the optimizer, for messages.
        home: the strategy that the optimizer was created under.

    Raises:
        RuntimeError: outside of a replica context.
        ValueError: where no step can be taken.
    """
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            f"`{optimizer}` must be applied in a replica context, "
            "that is inside a function passed to `strategy.run`."
        )
    if context.strategy is not home:
        raise ValueError(
            f"`{optimizer}` must be created in the scope of the strategy that it is applied under: "
            f"`with strategy.scope(): optimizer = {optimizer}(...)`. "
            f"Received: created under {_name(home)}, applied under {_name(context.strategy)}"
        )
    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        if context.num_replicas_in_sync > 1 and isinstance(
            get_default_graph(), CondBranchFuncGraph
        ):
            raise ValueError(
                f"`{optimizer}` cannot be applied in a condition that every replica decides for "
                "itself: if they disagreed, they would wait for each other for ever. Where "
                "`jit_compile=True` compiles a training step on several devices, "
                f"`LossScaleOptimizer` is such a condition. Set `{optimizer}(loss_scale_factor="
                '...)` in its place, or `model.compile(jit_compile="auto")`.'
            )
        return False
    if context.num_replicas_in_sync > 1 and GraphOrParentsInXlaContext(get_default_graph()):
        raise ValueError(
            "`jit_compile=True` cannot compile a training step on several devices unless all of "
            'them are GPUs. Set `model.compile(jit_compile="auto")` or leave it out, or drop it '
            f"from your own `tf.function`: `{optimizer}` compiles its update by itself. "
            f"Received: jit_compile=True under {_name(context.strategy)}"
        )
    return True


def check_strategy(optimizer: str, strategy: tf.distribute.Strategy) -> None:
    """Raise a `ValueError` under a strategy that the optimizer does not support.

    Args:
        optimizer: name of the optimizer, for the message.
        strategy: the strategy that it is created under.
    """
    if tf.distribute.has_strategy() and not isinstance(strategy, _SUPPORTED):
        raise ValueError(
            f"`{optimizer}` runs without a strategy and under `OneDeviceStrategy`, "
            "`MirroredStrategy` and `MultiWorkerMirroredStrategy` of `tf.distribute`. "
            f"Received: strategy={_name(strategy)}"
        )


def check_variables(
    optimizer: str, strategy: tf.distribute.Strategy, variables: Sequence[Any]
) -> None:
    """Raise a `ValueError` for a variable that was created under another strategy.

    Args:
        optimizer: name of the optimizer, for the message.
        strategy: the strategy that the optimizer was created under.
        variables: the variables that it is built with.
    """
    expected = strategy if isinstance(strategy, _SYNCHRONOUS) else None
    for variable in variables:
        owner = getattr(native_variable(variable), "distribute_strategy", None)
        if owner is not expected:
            raise ValueError(
                f"`{optimizer}` and the variables it is built with must be created in the scope "
                "of the same strategy: `with strategy.scope(): ...`. Received: an optimizer "
                f"created under {_name(strategy)}, the variable '{variable.name}' created under "
                f"{_name(owner)}"
            )


def _name(strategy: tf.distribute.Strategy | None) -> str:
    """Return the name of a strategy's class, "no strategy" if there is none."""
    if strategy is None or type(strategy).__name__ == "_DefaultDistributionStrategy":
        return "no strategy"
    return type(strategy).__name__


def xla_is_supported() -> bool:
    """Return whether XLA can compile a step in this process."""
    # A callback for every operation, as `tf.debugging.enable_check_numerics()` has one, adds
    # operations that XLA cannot compile.
    if is_op_determinism_enabled() or context().op_callbacks:
        return False
    return not (platform.system() == "Darwin" and tf.config.list_physical_devices("GPU"))
