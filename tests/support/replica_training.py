"""Trains a model with every option on N logical CPU devices, and writes the results.

`test_distribution.py` runs this in its own process: two `MirroredStrategy` objects in one
process can disturb each other, and devices must be configured before TensorFlow starts.

    python replica_training.py N OUTPUT [sngm | sgd | sngm-in-replicas] [NAME ...]

N = 0 means no strategy. `sngm-in-replicas` is SNGM without the cross-replica context. TensorFlow
forbids `merge_call` on GPUs only, so that the program patches TensorFlow to forbid it on CPUs.
The names are those of the options to train with, all of them by default.
"""

import pickle
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute.mirrored_run import _MirroredReplicaContext
from tensorflow.python.distribute.mirrored_strategy import MirroredExtended

from keras_sngm import SNGM
from replica_options import (
    BATCH,
    EPOCHS,
    FAULTS,
    OPTIONS,
    STEPS_PER_EPOCH,
    Option,
    Outcome,
    has_bad_sample,
    inner,
)


class CountedReduction(tf.distribute.ReductionToOneDevice):
    """A reduction on one device that counts the reductions of training.

    `calls` is the number of reductions, `sparse_values` the number of reduced slices; the latter
    is counted while TensorFlow traces.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = tf.Variable(0)
        self.sparse_values = 0

    def batch_reduce_implementation(
        self, reduce_op: Any, value_destination_pairs: Any, options: Any
    ) -> Any:
        self.calls.assign_add(1)
        self.sparse_values += sum(
            isinstance(value.values[0], tf.IndexedSlices) for value, _ in value_destination_pairs
        )
        return super().batch_reduce_implementation(reduce_op, value_destination_pairs, options)


class Recorder(keras.callbacks.Callback):
    """Callback that keeps the gradient norm of each step and watches batches with a bad sample.

    `changed` says whether such a batch has changed weights, momentums or moving averages.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        super().__init__()
        self.strategy = strategy
        self.norms: list[float] = []
        self.changed = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.before = self._bytes() if has_bad_sample(batch) else []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.norms.append(float(inner(self.model.optimizer).gradient_norm.numpy()))
        if has_bad_sample(batch):
            self.changed |= self._bytes() != self.before

    def _bytes(self) -> list[bytes]:
        """Return the bytes of weights, momentums and moving averages on all replicas."""
        optimizer = inner(self.model.optimizer)
        if not optimizer.built:
            return []
        averages = optimizer._model_variables_moving_average if optimizer.use_ema else []
        kept = [*self.model.weights, *optimizer.momentums, *averages]
        return [part.numpy().tobytes() for v in kept for part in components(self.strategy, v)]


def components(strategy: tf.distribute.Strategy, variable: keras.Variable) -> tuple:
    """Return the component of a variable on each replica."""
    return strategy.experimental_local_results(variable.value)


def make_strategy(replicas: int) -> tf.distribute.Strategy:
    """Split the CPU into a device per replica; return a `MirroredStrategy` over the devices.

    With four replicas the strategy counts its reductions. Without replicas it is the default
    strategy.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * max(replicas, 1)
    )
    if not replicas:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=CountedReduction() if replicas == 4 else None,
    )


def fit(strategy: tf.distribute.Strategy, option: Option, optimizer: type) -> Outcome:
    """Train a model with an option and an optimizer class under a strategy."""
    if optimizer is SNGM and strategy.num_replicas_in_sync == 4:
        # To compile four XLA programs for each option would take minutes.
        option = option._replace(arguments={**option.arguments, "jit_compile": False})
    with strategy.scope():
        model = option.model(optimizer)
    recorder = Recorder(strategy) if optimizer is SNGM else keras.callbacks.Callback()
    # All epochs share one iterator, because TensorFlow waits for seconds to delete one.
    batches = tf.data.Dataset.from_tensor_slices(option.data()).batch(BATCH).repeat()
    counted = getattr(strategy.extended, "_cross_device_ops", None)
    counts = isinstance(counted, CountedReduction)
    reductions, sparse = (int(counted.calls), counted.sparse_values) if counts else (0, 0)
    model.fit(
        batches,
        epochs=EPOCHS,
        steps_per_epoch=STEPS_PER_EPOCH,
        verbose=0,
        callbacks=[*(make() for make in option.callbacks), recorder],
    )
    weights = [v.numpy() for v in model.weights]
    if optimizer is not SNGM:
        return Outcome(weights=weights)
    sngm = inner(model.optimizer)
    averages = sngm._model_variables_moving_average if sngm.use_ema else []
    parts = [components(strategy, v) for v in [*model.weights, *sngm.momentums, *averages]]
    return Outcome(
        weights=weights,
        state=[v.numpy() for v in [*sngm.momentums, *averages]],
        norms=recorder.norms,
        skipped_steps=int(sngm.skipped_steps.numpy()),
        changed_by_bad_batches=recorder.changed,
        replicas=len(parts[0]),
        replicas_agree=all(
            np.array_equal(part.numpy(), same[0].numpy()) for same in parts for part in same
        ),
        reductions=int(counted.calls) - reductions if counts else 0,
        sparse_reductions=counted.sparse_values - sparse if counts else 0,
    )


def outcome(strategy: tf.distribute.Strategy, option: Option, optimizer: type) -> Outcome:
    """Train with an option; if Keras' SGD fails, return the error."""
    try:
        return fit(strategy, option, optimizer)
    except Exception as error:  # Keras' SGD fails in many ways.
        if optimizer is SNGM:
            raise
        return Outcome(error=type(error).__name__)


def traced_step(strategy: tf.distribute.Strategy) -> Any:
    """Return the graph definition of a training step with `SNGM(jit_compile=True)`."""
    option = Option({"jit_compile": True})
    with strategy.scope():
        model = option.model(SNGM)
        model.optimizer.build(model.trainable_variables)
    x, y = (array[:BATCH] for array in option.data())
    step = tf.function(lambda data: strategy.run(model.train_step, args=(data,)))
    return step.get_concrete_function((x, y)).graph.as_graph_def()


def calls_of_xla_programs(definition: Any) -> list[str]:
    """Return the devices on which a graph calls XLA programs, one for each call.

    Args:
        definition: the graph definition of a training step.
    """
    compiled = {
        function.signature.name
        for function in definition.library.function
        if function.attr["_XlaMustCompile"].b
    }
    bodies = {f.signature.name: f.node_def for f in definition.library.function}

    def calls(nodes, device):
        """Yield the device of each call of an XLA program in nodes that run on `device`."""
        for node in nodes:
            callee = node.attr["f"].func.name
            where = node.device or device
            if callee in compiled:
                yield where
            elif callee in bodies:
                yield from calls(bodies[callee], where)

    return sorted(calls(definition.node, ""))


def collective_operations(definition: Any) -> list[str]:
    """Return the types of a graph's operations by which devices send each other data.

    Args:
        definition: the graph definition of a training step.
    """
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    return [node.op for node in nodes if node.op.startswith("Collective")]


def error_of(strategy: tf.distribute.Strategy, option: Option) -> str:
    """Return the message of the `ValueError` that training raises, or "" if it succeeds."""
    try:
        fit(strategy, option, SNGM)
    except ValueError as error:
        return str(error)
    return ""


def forbid_merge_call() -> None:
    """Patch `MirroredStrategy` to forbid the cross-replica context on CPUs, as on GPUs."""

    def refuse(self: Any, *args: Any) -> None:
        raise RuntimeError("merge_call was called")

    MirroredExtended._use_merge_call = lambda self: False
    _MirroredReplicaContext._merge_call = refuse


def main(replicas: int, output: str, how: str = "sngm", *names: str) -> None:
    """Train with options, and write the results to a pickle file."""
    strategy = make_strategy(replicas)
    options = {n: option for n, option in {**OPTIONS, **FAULTS}.items() if n in names or not names}
    if how == "sngm-in-replicas":
        forbid_merge_call()
        options = {name: option for name, option in options.items() if option.runs_in_replicas}
    optimizer = keras.optimizers.SGD if how == "sgd" else SNGM
    results: dict[str, Any] = {
        name: outcome(strategy, option, optimizer) for name, option in options.items()
    }
    if optimizer is SNGM:
        step = traced_step(strategy)
        results["collectives"] = collective_operations(step)
    if how == "sngm":
        results["xla_calls"] = calls_of_xla_programs(step)
        results["jit_error"] = error_of(strategy, Option(compile={"jit_compile": True}))
    if how == "sngm-in-replicas":
        results["loss_scale_error"] = error_of(strategy, Option(loss_scale=True))
    with open(output, "wb") as file:
        pickle.dump(results, file)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
