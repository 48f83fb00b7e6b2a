"""The suggestion of a learning rate for a compiled model and its data."""

import math
import warnings
from typing import Any

import keras

from keras_sngm.backend import BackendTrials
from keras_sngm.checks import check_count
from keras_sngm.learning_rate import typical_learning_rate
from keras_sngm.sngm import SNGM
from keras_sngm.suggestion import search
from keras_sngm.suggestion.batches import Source, unchanged_generators
from keras_sngm.suggestion.doubts import (
    FULL_LENGTH,
    doubts_of_length,
    doubts_of_model,
    doubts_of_search,
)
from keras_sngm.suggestion.probe import GROUP, EndLosses
from keras_sngm.suggestion.progress import Progress
from keras_sngm.suggestion.result import LearningRateSuggestion


def suggest_learning_rate(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: Any = "auto",
    shuffle: bool = True,
    class_weight: dict[int, float] | None = None,
    sample_weight: Any = None,
    steps_per_epoch: int | None = None,
    start: float | None = None,
    seed: int = 0,
) -> LearningRateSuggestion:
    r"""Suggest a learning rate, by short trainings of the model at some rates.

    Each training has `min(100, all)` updates in which the learning rate decays to zero, from the
    same weights, batch statistics, optimizer state and seeds and on the same batches. The first
    rate is `start`. Rates a factor of two apart follow until the best one has a worse one on
    either side, then its neighbours a factor of the square root of two away; ten at most. The
    best rate is that of the lowest training loss, averaged over the last five updates, where a
    loss that is not finite counts as infinite. As rates that are best for a short training are
    rather large for the whole one, it is divided by the square root of two, unless the next higher
    rate is better than the next lower one.

    All variables and attributes of the model, of its layers and of its optimizers, and the global
    random states, are afterwards as they were before, to the bit, also after an exception or an
    interruption. (Keras variables in plain Python objects that are no layers, and lists that a
    training step changes in place, are not known.) A model that was not built is built. An
    optimizer with a learning-rate schedule keeps it. Use the suggestion with a rate that decays to
    zero:

    ```python
    suggestion = suggest_learning_rate(model, x, y, batch_size=1000, epochs=60)
    schedule = keras.optimizers.schedules.PolynomialDecay(
        suggestion.learning_rate, steps, end_learning_rate=0.0, power=1.1
    )
    model.compile(optimizer=SNGM(schedule), loss=...)
    ```

    All arguments that `fit` has, too, are those that the model is going to be trained with.

    Args:
        model: A compiled model, built or not, under any strategy, distribution and dtype policy
            that it can be trained under by `fit`. Its optimizer may be any Keras optimizer that
            updates all variables of the model.
        x: As for `fit`: arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a PyTorch
            `DataLoader`, but no generator, which can be read once only. The batches of a dataset
            that are trained on are kept in the memory of the host. Random generators of a
            `PyDataset` or a `DataLoader` that are reached by its attributes are set back after
            reading. TensorFlow cannot set back those of a `tf.data.Dataset`: one that reshuffles
            goes on to its next order.
        y: As for `fit`: arrays of targets, if `x` consists of arrays.
        batch_size: As for `fit`. Int or `None`, which is 32, unless `steps_per_epoch` is given.
        epochs: As for `fit`. Int, the length of the training that the rate is for.
        verbose: `"auto"`, 0 or 1. With 0 there is no progress bar. Defaults to `"auto"`, which is
            1.
        shuffle: As for `fit`. Boolean, whether samples of arrays are in random order.
        class_weight: As for `fit`.
        sample_weight: As for `fit`.
        steps_per_epoch: As for `fit`. Int or `None`. Needed if the length of a dataset is unknown
            or infinite.
        start: Float or `None`. The learning rate to try first. With `None` it is
            `typical_learning_rate(updates_per_epoch)` for SNGM, and for other optimizers the
            learning rate that they have now.
        seed: Int. Decides the order of shuffled samples. Defaults to `0`.

    Returns:
        A `LearningRateSuggestion`: `learning_rate`, the `losses` of all rates that were tried,
        `doubts` and `plot()`.

    Raises:
        ValueError: if the model is not compiled with one Keras optimizer for all variables, cannot
            be built, or is not trained by its optimizer; if its training step returns no loss; if
            the data can be read once only or have no known length; if there are fewer than five
            updates in all; or if at no rate the loss is finite.

    Warns:
        UserWarning: for each reason not to trust the suggestion: the best rate is at an edge,
            losses differ by less than their noise, training has fewer than 100 updates, the
            momentum of a `BatchNormalization` is above 0.9, or most parameters are in embeddings.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from keras_sngm import SNGM, suggest_learning_rate
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(optimizer=SNGM(), loss="mse")
    >>> x = np.linspace(-1.0, 1.0, 400).reshape(200, 2)
    >>> y = x.sum(axis=1, keepdims=True)
    >>> suggestion = suggest_learning_rate(model, x, y, batch_size=20, epochs=20, verbose=0)
    >>> 0.0 < suggestion.learning_rate < 10.0
    True
    """
    check_count("epochs", epochs)
    for name, value in {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch}.items():
        if value is not None:
            check_count(name, value)
    if start is not None and not 0.0 < start < math.inf:
        raise ValueError(f"`start` must be a positive finite number. Received: start={start}")
    source = Source(x, y, sample_weight, batch_size, steps_per_epoch, shuffle, seed)
    with BackendTrials(model) as trials:
        updates_per_epoch = source.steps_per_epoch / trials.steps(1)
        updates = _updates_of_trial(epochs, updates_per_epoch)
        start = start or _start_for(trials.optimizer, updates_per_epoch)
        with unchanged_generators(x):
            data = source.dataset(trials.steps(updates))
        trials.prepare(_first(data), updates)
        losses = _search(trials, data, class_weight, start, Progress(updates, verbose))
        doubts = [
            *doubts_of_search(losses),
            *doubts_of_length(updates),
            *doubts_of_model(trials.layers(), model.trainable_variables),
        ]
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return _suggestion(losses, start, updates, doubts)


def _search(
    trials: Any, data: Any, class_weight: Any, start: float, progress: Progress
) -> dict[int, list[float]]:
    """Try learning rates, and return for the exponent of each the losses at its end.

    Args:
        trials: trains the model.
        data: the batches of a training.
        class_weight: as for `fit`.
        start: the learning rate of the exponent 0.
        progress: the progress bar.

    Raises:
        ValueError: if the model is not trained by its optimizer.
    """
    losses: dict[int, list[float]] = {}
    while (exponent := search.next_exponent(_last(losses))) is not None:
        progress.expect(search.expected_rates(_last(losses)))
        rate = search.rate_of(exponent, start)
        ends = EndLosses(progress.updates, trials.steps(1), trials.reset_metrics, progress.advance)
        steps = trials.steps(progress.updates)
        trials.train(rate, data, steps_per_epoch=steps, callbacks=[ends], class_weight=class_weight)
        if not trials.has_stepped():
            raise ValueError(
                "`model` must be trained by the optimizer that it is compiled with. "
                f"Received: model.optimizer={trials.optimizer}, which was never called"
            )
        losses[exponent] = trials.mean_over_processes(ends.losses)
        progress.end_trial(len(losses), rate, losses[exponent][-1])
    progress.close()
    return losses


def _suggestion(
    losses: dict[int, list[float]], start: float, updates: int, doubts: list[str]
) -> LearningRateSuggestion:
    """Return the suggestion that follows from the losses of all rates.

    Raises:
        ValueError: if no loss is finite.
    """
    last = _last(losses)
    best = search.best_exponent(last)
    if not math.isfinite(last[best]):
        rates = [search.rate_of(k, start) for k in sorted(losses)]
        raise ValueError(
            f"The training loss is not finite at any learning rate from {rates[0]:.3g} to "
            f"{rates[-1]:.3g}. Pass a `start` that is far from these."
        )
    return LearningRateSuggestion(
        learning_rate=search.suggested_rate(last, start),
        start=start,
        losses={search.rate_of(k, start): last[k] for k in sorted(last)},
        updates=updates,
        doubts=doubts,
    )


def _last(losses: dict[int, list[float]]) -> dict[int, float]:
    """Return for each exponent the last of its losses, by which rates are compared."""
    return {k: values[-1] for k, values in losses.items()}


def _updates_of_trial(epochs: int, updates_per_epoch: float) -> int:
    """Return the number of updates of each trial.

    Raises:
        ValueError: if training has too few updates in all.
    """
    updates = min(FULL_LENGTH, int(epochs * updates_per_epoch))
    if updates < GROUP:
        raise ValueError(
            f"Training must have at least {GROUP} updates in all. "
            f"Received: {updates} in epochs={epochs}"
        )
    return updates


def _start_for(optimizer: keras.optimizers.Optimizer, updates_per_epoch: float) -> float:
    """Return the learning rate to try first with an optimizer.

    Raises:
        ValueError: if the optimizer is not SNGM, and its present learning rate is not positive.
    """
    if isinstance(optimizer, SNGM):
        return typical_learning_rate(updates_per_epoch)
    present = optimizer.learning_rate
    is_variable = isinstance(present, keras.Variable)
    rate = float(present.numpy() if is_variable else keras.ops.convert_to_numpy(present))
    if not 0.0 < rate < math.inf:
        raise ValueError(
            "`start` must be given where the optimizer's learning rate is not positive. "
            f"Received: start=None, model.optimizer.learning_rate={rate}"
        )
    return rate


def _first(data: Any) -> Any:
    """Return the first batch of a dataset."""
    return data[0] if isinstance(data, keras.utils.PyDataset) else next(iter(data))
