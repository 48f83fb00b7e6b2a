r"""Trains one network with SNGM on several machines, and resumes after one of them fails.

The training loop is written out: Keras' `fit` cannot train under
`MultiWorkerMirroredStrategy`, whatever the optimizer
(https://github.com/keras-team/keras/issues/20585).

Start the program once per worker, with the same arguments and a TF_CONFIG that
names all workers and the index of this one. Two workers on one machine:

    W='"cluster": {"worker": ["localhost:23456", "localhost:23457"]}'
    TF_CONFIG="{$W, \"task\": {\"type\": \"worker\", \"index\": 0}}" \
        python examples/multi_worker.py &
    TF_CONFIG="{$W, \"task\": {\"type\": \"worker\", \"index\": 1}}" \
        python examples/multi_worker.py

Without TF_CONFIG there is one worker. All workers together train on the same
batches as one worker alone, so their number changes only the rounding of the result.

When a worker dies, the others end with an `UnavailableError` within seconds.
Then start all workers again with the same arguments: they resume from the last
checkpoint in `--output`, with the same result as without the interruption. When
training is complete the checkpoints are removed.
"""

import argparse
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence

import keras
import tensorflow as tf
from tqdm import tqdm

from common import data, models
from common.arguments import parsed_on, with_defaults
from keras_sngm import SNGM

LEARNING_RATE = 0.5
WEIGHT_DECAY = 1e-4
DECAY_POWER = 1.1
SEED = 0

Batch = tuple[tf.Tensor, tf.Tensor]


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Return whether this worker is the chief, which reports and whose files are kept."""
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().jobs
    if not jobs:
        return True
    return resolver.task_type == "chief" or ("chief" not in jobs and resolver.task_id == 0)


def compiled_model(task: data.Task, steps: int) -> keras.Model:
    """Return a compiled model whose optimizer is built, so that a checkpoint has all variables.

    Args:
        task: the data to train on.
        steps: the number of steps of the whole training.
    """
    schedule = keras.optimizers.schedules.PolynomialDecay(
        LEARNING_RATE, steps, end_learning_rate=0.0, power=DECAY_POWER
    )
    model = models.for_input(task.input_shape, task.classes)
    model.compile(
        optimizer=SNGM(schedule, weight_decay=WEIGHT_DECAY, decoupled_weight_decay=False),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.optimizer.build(model.trainable_variables)
    return model


def batches(
    strategy: tf.distribute.Strategy,
    train: tf.data.Dataset,
    batch_size: int,
    epochs: int,
    done: int,
) -> Iterable[Batch]:
    """Return this worker's shard of each batch after the first `done` batches.

    Args:
        strategy: the strategy over all workers.
        train: all training samples.
        batch_size: the number of samples in a batch of all workers together.
        epochs: the number of epochs of the whole training.
        done: the number of batches to leave out.
    """
    size = int(train.cardinality())

    def for_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # The seed gives every worker, in every run of the job, the same order of all
        # samples. So the shards of the workers are disjoint.
        epoch = train.shuffle(size, seed=SEED).take(size - size % batch_size)
        remaining = epoch.repeat(epochs).skip(done * batch_size)
        own = remaining.shard(context.num_input_pipelines, context.input_pipeline_id)
        return own.batch(context.get_per_replica_batch_size(batch_size), drop_remainder=True)

    return strategy.distribute_datasets_from_function(for_worker)


def train_step(
    strategy: tf.distribute.Strategy, model: keras.Model, batch_size: int
) -> Callable[[Batch], None]:
    """Return a compiled function that trains on one batch, on all replicas."""

    def on_replica(x: tf.Tensor, y: tf.Tensor) -> None:
        weights = model.trainable_variables
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                y, model(x, training=True), from_logits=True
            )
            # SNGM sums the gradients of replicas, so each divides by the size of the whole batch.
            loss = tf.reduce_sum(losses) / batch_size
        model.optimizer.apply(tape.gradient(loss, weights), weights)

    @tf.function
    def on_all_replicas(batch: Batch) -> None:
        strategy.run(on_replica, args=batch)

    return on_all_replicas


def train(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    task: data.Task,
    steps: int,
    arguments: argparse.Namespace,
    folder: pathlib.Path,
) -> None:
    """Train the model, from the chief's last checkpoint on if there is one.

    Args:
        strategy: the strategy over all workers.
        model: a compiled model whose optimizer is built.
        task: the data to train on.
        steps: the number of steps of the whole training.
        arguments: the command line.
        folder: the folder that this worker writes checkpoints to.
    """
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    manager = tf.train.CheckpointManager(checkpoint, folder / "checkpoints", max_to_keep=1)
    last = tf.train.latest_checkpoint(arguments.output / "checkpoints")
    if last:
        checkpoint.restore(last).assert_consumed()
    done = int(model.optimizer.iterations.numpy())
    if done:
        print(f"Resumed at step {done}", flush=True)

    remaining = batches(strategy, task.train, arguments.batch_size, arguments.epochs, done)
    step = train_step(strategy, model, arguments.batch_size)
    with tqdm(total=steps, initial=done, unit="step", disable=not is_chief(strategy)) as bar:
        for number, batch in enumerate(remaining, start=done + 1):
            step(batch)
            bar.update()
            if number % arguments.checkpoint_every == 0:
                manager.save(checkpoint_number=number)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little data, two epochs")
    parser.add_argument(
        "--batch-size", type=int, help="of all workers together, default 1000 (quick: 100)"
    )
    parser.add_argument("--epochs", type=int, help="default 60 (quick: 2)")
    parser.add_argument("--checkpoint-every", type=int, default=20, metavar="STEPS")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("results/multi_worker"),
        help="a folder that all workers can read",
    )
    return with_defaults(
        parsed_on("tensorflow", parser, argv),
        usual={"batch_size": 1000, "epochs": 60},
        quick={"batch_size": 100, "epochs": 2},
    )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    # The strategy comes first: once TensorFlow is in use, it cannot join other workers.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    task = data.load("mnist1d", arguments.quick)
    # `load` seeds NumPy when it generates the data, so the seed must be set after it.
    keras.utils.set_random_seed(SEED)
    steps = arguments.epochs * (int(task.train.cardinality()) // arguments.batch_size)
    with strategy.scope():
        model = compiled_model(task, steps)

    # All workers must take part in saving, but one alone may write a file.
    with tempfile.TemporaryDirectory() as discarded:
        folder = arguments.output if is_chief(strategy) else pathlib.Path(discarded)
        folder.mkdir(parents=True, exist_ok=True)
        train(strategy, model, task, steps, arguments, folder)
        model.save(folder / "model.keras")
    if is_chief(strategy):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        # The chief evaluates outside the strategy, so that it does not need the other workers.
        trained = keras.saving.load_model(folder / "model.keras")
        _, accuracy = trained.evaluate(task.test.batch(1_000), verbose=0)
        print(f"Test accuracy {100 * accuracy:.1f} %\nWrote {folder / 'model.keras'}")


if __name__ == "__main__":
    main()
