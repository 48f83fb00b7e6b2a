"""Training runs of a search, one after another with the same compiled model."""

import functools
import math
import time

import keras
import numpy as np
import tensorflow as tf

from keras_sngm import GradientNormLogger
from study import methods, tasks
from study.config import Search
from study.results import Run, Wanted
from study.search import learning_rate

EVALUATION_BATCH = 1_000


_latest: list["Trainer"] = []
"""The trainer that `trainer_for` has made last, if any."""


def trainer_for(search: Search) -> "Trainer":
    """Return a trainer of a search: the last one made if it is for this search, else a new one."""
    if not _latest or _latest[0].search != search:
        _latest.clear()
        keras.backend.clear_session()
        _latest.append(Trainer(search))
    return _latest[0]


class Trainer:
    """A trainer of the model of a search, for any number of runs from scratch.

    The training step is traced once. Weights and optimizer are reset before each run.

    Raises:
        ValueError: if there are fewer training samples than a batch has.
    """

    def __init__(self, search: Search) -> None:
        setting = search.setting
        self.search = search
        self.task = tasks.load(setting.data)
        self.steps_per_epoch = len(self.task.train.x) // search.batch_size
        if not self.steps_per_epoch:
            raise ValueError(
                f"There must be at least one batch. Received: batch_size={search.batch_size} for "
                f"{len(self.task.train.x)} training samples of '{setting.name}'"
            )
        self.steps = setting.epochs * self.steps_per_epoch
        self.schedule = methods.schedule(search.method, self.steps)
        self.model = tasks.build(setting.model, self.task)
        optimizer = methods.METHODS[search.method](self.schedule, setting.weight_decay)
        optimizer.build(self.model.trainable_variables)
        self.fresh_state = [(variable, variable.numpy()) for variable in optimizer.variables]
        self.model.compile(
            optimizer, self.task.loss, steps_per_execution=self.steps_per_epoch, jit_compile=False
        )
        self.logger = GradientNormLogger()
        self.evaluate = tf.function(functools.partial(self.model, training=False))

    def run(self, wanted: Wanted) -> Run:
        """Train from scratch with a learning rate and a seed, and evaluate the model."""
        self._set_back(wanted.seed)
        self.schedule.peak.assign(learning_rate(wanted.exponent))
        watch = Watch(self, every_epoch=wanted.final)
        begin = time.perf_counter()
        history = self.model.fit(
            self._batches(wanted.seed),
            epochs=self.search.setting.epochs,
            steps_per_epoch=self.steps_per_epoch,
            callbacks=[watch, *([self.logger] if wanted.final else [])],
            shuffle=False,
            verbose=0,
        ).history
        seconds = time.perf_counter() - begin
        test, test_loss = self.scores(self.task.test) if wanted.final else (None, None)
        return Run(
            setting=self.search.setting.name,
            fingerprint=self.search.setting.fingerprint,
            method=self.search.method,
            batch_size=self.search.batch_size,
            exponent=wanted.exponent,
            seed=wanted.seed,
            final=wanted.final,
            epochs=self.search.setting.epochs,
            steps=self.steps,
            seconds=round(seconds, 2),
            validation=watch.validation,
            test=test,
            test_loss=test_loss,
            train_loss=_short(history["loss"]),
            grad_norm=_short(history.get("grad_norm", [])),
        )

    def _set_back(self, seed: int) -> None:
        """Reset the optimizer, and the weights to initial values that depend on the seed."""
        keras.utils.set_random_seed(seed)
        fresh = tasks.build(self.search.setting.model, self.task)
        self.model.set_weights(fresh.get_weights())
        for variable, value in self.fresh_state:
            variable.assign(value)
        self.model.stop_training = False

    def _batches(self, seed: int) -> tf.data.Dataset:
        """Return the batches of all epochs; each epoch has another order of samples.

        All batches have the same size, because a smaller one would weigh as much in SNGM.
        """
        x, y = (tf.constant(array) for array in self.task.train)
        size, batch_size = len(self.task.train.x), self.search.batch_size

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            order = tf.random.experimental.stateless_shuffle(tf.range(size), [seed, number])
            order = order[: self.steps_per_epoch * batch_size]
            return tf.data.Dataset.from_tensor_slices(tf.reshape(order, [-1, batch_size]))

        epochs = tf.data.Dataset.range(self.search.setting.epochs, output_type=tf.int32)
        batches = epochs.flat_map(epoch).map(lambda i: (tf.gather(x, i), tf.gather(y, i)))
        # Autotuning starts threads, and now and then TensorFlow waits for seconds to end them.
        options = tf.data.Options()
        options.autotune.enabled = False
        return batches.with_options(options)

    def scores(self, data: tasks.Samples) -> tuple[float, float]:
        """Return the score and the loss of the model, in its present state, on samples."""
        batches = range(0, len(data.x), EVALUATION_BATCH)
        outputs = np.concatenate(
            [self.evaluate(tf.constant(data.x[i : i + EVALUATION_BATCH])) for i in batches]
        )
        if not np.isfinite(outputs).all():
            return self.task.worst_score, math.inf
        loss = float(keras.ops.mean(self.task.loss(data.y, outputs)))
        return tuple(_short([self.task.score(data.y, outputs), loss]))


class Watch(keras.callbacks.Callback):
    """Callback that keeps validation scores, and stops training once the loss is not finite.

    Args:
        trainer: the trainer of the model.
        every_epoch: whether to compute a score after each epoch, or only after the last one.
    """

    def __init__(self, trainer: Trainer, every_epoch: bool) -> None:
        super().__init__()
        self.trainer = trainer
        self.every_epoch = every_epoch
        self.validation: list[float] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        failed = not math.isfinite(logs["loss"])
        self.model.stop_training = failed
        if self.every_epoch or failed or epoch + 1 == self.params["epochs"]:
            self.validation.append(self.trainer.scores(self.trainer.task.validation)[0])


def _short(values: list[float]) -> list[float]:
    """Round values to five significant digits."""
    return [float(f"{value:.5g}") for value in values]
