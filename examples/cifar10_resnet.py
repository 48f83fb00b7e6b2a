"""Trains a ResNet on CIFAR-10 with SNGM at batch 4,096, on all GPUs of this machine.

The networks, the dataset and the batch size are those of the paper
(https://arxiv.org/abs/2007.13985). The learning rate is not tuned, as tuning needs GPUs.

    python examples/cifar10_resnet.py
    python examples/cifar10_resnet.py --depth 56 --accumulate 4 --precision mixed_bfloat16
    python examples/cifar10_resnet.py --learning-rate 0.5

A batch is split among the GPUs. If memory is short, `--accumulate` splits it further into
micro-batches. Neither changes what is learned, except for the statistics of batch
normalization. After an interruption the same command resumes from the last epoch.
Gradient norms are written to `<output>/norms.csv` and to TensorBoard:

    tensorboard --logdir <output>/logs
"""

import argparse
import pathlib
from collections.abc import Sequence

import keras
import tensorflow as tf

from common import data, models
from common.arguments import parsed_on
from keras_sngm import SNGM, GradientNormLogger

WEIGHT_DECAY = 1e-4
DECAY_POWER = 1.1
PADDING = 4
# float16 needs a loss scale. SNGM divides gradients by it, so that it does not change training.
LOSS_SCALE = 1024.0


def augmented(image: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Shift an image by up to 4 pixels each way at random, and mirror it with probability 1/2."""
    padded = tf.pad(image, [[PADDING, PADDING], [PADDING, PADDING], [0, 0]])
    cropped = tf.image.random_crop(padded, tf.shape(image))
    return tf.image.random_flip_left_right(cropped), label


def training_batches(task: data.Task, size: int) -> tf.data.Dataset:
    """Return shuffled and augmented batches of `size` samples.

    The rest of an epoch is dropped: a smaller batch would weigh as much as the others.
    """
    train = task.train.cache().shuffle(int(task.train.cardinality()))
    train = train.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return train.batch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def compiled_model(
    arguments: argparse.Namespace, task: data.Task, micro_batches: int
) -> keras.Model:
    """Return the model, compiled with an SNGM whose learning rate decays to zero.

    Args:
        arguments: the command line.
        task: the data to train on.
        micro_batches: the number of micro-batches of the whole training.
    """
    rate = keras.optimizers.schedules.PolynomialDecay(
        arguments.learning_rate, micro_batches, end_learning_rate=0.0, power=DECAY_POWER
    )
    is_float16 = arguments.precision == "mixed_float16"
    keras.config.set_dtype_policy(arguments.precision)
    try:
        model = models.resnet(task.input_shape, task.classes, arguments.depth)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(
        optimizer=SNGM(
            rate,
            weight_decay=WEIGHT_DECAY,
            decoupled_weight_decay=False,
            gradient_accumulation_steps=arguments.accumulate if arguments.accumulate > 1 else None,
            loss_scale_factor=LOSS_SCALE if is_float16 else None,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        auto_scale_loss=False,
    )
    return model


def train(arguments: argparse.Namespace) -> float:
    """Train and save the model, and return its accuracy on test data."""
    keras.utils.set_random_seed(arguments.seed)
    task = data.load(arguments.dataset, arguments.quick)
    batches = training_batches(task, arguments.batch_size // arguments.accumulate)
    # An epoch must not end inside an accumulation cycle, which the next epoch would complete.
    updates = int(task.train.cardinality()) // arguments.batch_size
    steps = updates * arguments.accumulate
    with tf.distribute.MirroredStrategy().scope():
        model = compiled_model(arguments, task, arguments.epochs * steps)
    model.fit(
        batches.repeat(),
        epochs=arguments.epochs,
        steps_per_epoch=steps,
        validation_data=evaluation_batches(task.validation),
        callbacks=[
            GradientNormLogger(
                log_dir=arguments.output / "logs",
                filename=arguments.output / "norms.csv",
                append=True,
            ),
            keras.callbacks.BackupAndRestore(arguments.output / "backup"),
        ],
        verbose=arguments.verbose,
    )
    model.save(arguments.output / "model.keras")
    _, accuracy = model.evaluate(evaluation_batches(task.test), verbose=0)
    return accuracy


def evaluation_batches(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.batch(1_000).cache()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="cifar10", help="any of images in tensorflow-datasets")
    parser.add_argument("--depth", type=int, default=20, help="20, 32, 44, 56 or 110")
    parser.add_argument("--batch-size", type=int, default=4096, help="of an update")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a batch")
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--precision",
        default="float32",
        choices=["float32", "mixed_float16", "mixed_bfloat16"],
    )
    parser.add_argument("--quick", action="store_true", help="a hundredth of the data")
    parser.add_argument("--verbose", default="auto", choices=["auto", "0", "1", "2"])
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("results/cifar10_resnet")
    )
    arguments = parsed_on("tensorflow", parser, argv)
    if arguments.accumulate < 1 or arguments.batch_size % arguments.accumulate:
        parser.error(
            "`--batch-size` must be a multiple of `--accumulate`. Received: "
            f"--batch-size {arguments.batch_size} --accumulate {arguments.accumulate}"
        )
    arguments.verbose = arguments.verbose if arguments.verbose == "auto" else int(arguments.verbose)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    accuracy = train(arguments)
    print(f"\nTest accuracy {100 * accuracy:.2f} %. Wrote {arguments.output}")


if __name__ == "__main__":
    main()
