"""Trains one model on N logical CPU devices and writes what came out.

Run by `test_distribution.py`: two MirroredStrategy objects in one process can
get in each other's way, and devices must be configured before TensorFlow starts.

    python replica_training.py N OUTPUT.npz
"""

import sys

import keras
import numpy as np
import tensorflow as tf

from keras_sngm import SNGM, GradientNormLogger

FEATURES, SAMPLES, BATCH = 12, 96, 24


class RecordNorms(keras.callbacks.Callback):
    """Keeps what GradientNormLogger puts into the batch logs."""

    def __init__(self):
        super().__init__()
        self.norms = []

    def on_train_batch_end(self, batch, logs=None):
        self.norms.append(float(logs["grad_norm"]))


def build_model():
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )


def problem():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((SAMPLES, FEATURES)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True))


def calls_of_xla_programs(strategy, model):
    """Devices on which a traced training step calls an XLA program, one per call."""
    x, y = problem()
    step = tf.function(lambda data: strategy.run(model.train_step, args=(data,)))
    definition = step.get_concrete_function((x[:BATCH], y[:BATCH])).graph.as_graph_def()
    compiled = {
        function.signature.name
        for function in definition.library.function
        if function.attr["_XlaMustCompile"].b
    }
    bodies = {f.signature.name: f.node_def for f in definition.library.function}

    def calls(nodes, device):
        for node in nodes:
            callee = node.attr["f"].func.name
            where = node.device or device
            if callee in compiled:
                yield where
            elif callee in bodies:
                yield from calls(bodies[callee], where)

    return sorted(calls(definition.node, ""))


def main(replicas, output):
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * max(replicas, 1)
    )
    strategy = tf.distribute.get_strategy()
    if replicas:
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = build_model()
        schedule = keras.optimizers.schedules.CosineDecay(0.1, 16)
        model.compile(optimizer=SNGM(schedule, jit_compile=True), loss="mse")
    recorder = RecordNorms()
    x, y = problem()
    # GradientNormLogger comes first: it fills the batch logs.
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=4,
        shuffle=False,
        verbose=0,
        callbacks=[GradientNormLogger(), recorder],
    )
    state = [*model.trainable_variables, *model.optimizer.variables]
    components = [strategy.experimental_local_results(v.value) for v in state]
    np.savez(
        output,
        norms=recorder.norms,
        replicas_agree=all(
            np.array_equal(part.numpy(), parts[0].numpy()) for parts in components for part in parts
        ),
        replicas=len(components[0]),
        xla_calls=calls_of_xla_programs(strategy, model),
        **{f"state_{i}": v.numpy() for i, v in enumerate(state)},
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
