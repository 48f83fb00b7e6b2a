"""Reasons not to trust a suggested learning rate."""

import math
from collections.abc import Mapping, Sequence

import keras

from keras_sngm.suggestion.probe import are_alike
from keras_sngm.suggestion.search import best_exponent, is_bracketed

FULL_LENGTH = 100
"""Number of updates of a trial, unless training has fewer in all."""

FAST_STATISTICS = 0.9
"""Largest momentum of batch statistics that keep up with the weights in a short training."""


def doubts_of_search(losses: Mapping[int, Sequence[float]]) -> list[str]:
    """Return what is doubtful of the losses that were found.

    Args:
        losses: for each exponent that was tried the losses at the end of training.
    """
    last = {k: values[-1] for k, values in losses.items()}
    best = best_exponent(last)
    if not is_bracketed(last):
        return [
            "The best learning rate is at an edge of those that were tried. "
            "Try again with another `start`."
        ]
    near = [k for k in (best - 2, best + 2) if k in losses]
    if near and all(are_alike(losses[best], losses[k]) for k in near):
        return ["Learning rates a factor of 2 apart differ by less than the noise of their losses."]
    return []


def doubts_of_length(updates: int) -> list[str]:
    """Return what is doubtful of the length of training.

    Args:
        updates: the number of updates of each trial.
    """
    if updates >= FULL_LENGTH:
        return []
    return [
        f"Training has {updates} updates in all, which is less than {FULL_LENGTH}. If it has more, "
        "pass `epochs`."
    ]


def doubts_of_model(
    layers: Sequence[keras.layers.Layer], variables: Sequence[keras.Variable]
) -> list[str]:
    """Return what is doubtful of the layers of a model.

    Args:
        layers: all layers.
        variables: the trainable variables of the model.
    """
    doubts = []
    slow = [
        layer.name
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.momentum > FAST_STATISTICS
    ]
    if slow:
        doubts.append(
            f"The batch statistics of {_shortened(slow)} lag behind the weights, which the "
            f"training loss does not show. Set `BatchNormalization(momentum={FAST_STATISTICS})`."
        )
    tables = [
        variable
        for layer in layers
        if isinstance(layer, keras.layers.Embedding)
        for variable in layer.trainable_variables
    ]
    if 2 * _parameters(tables) > _parameters(variables):
        doubts.append(
            "Most parameters are in embeddings, where the training loss says little of the rate."
        )
    return doubts


def _parameters(variables: Sequence[keras.Variable]) -> int:
    """Return the number of parameters in variables."""
    return sum(math.prod(variable.shape) for variable in variables)


def _shortened(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many there are besides."""
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
