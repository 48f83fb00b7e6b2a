"""The parts of a compiled model: its optimizers, what it holds, and what is not built yet."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_sngm.backend.common.watch import updating_optimizers


def only_optimizer(model: keras.Model) -> Any:
    """Return the one optimizer that updates the variables of a model.

    Raises:
        ValueError: if the model has no Keras optimizer, or several.
    """
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "`model` must be compiled with a Keras optimizer. "
            f"Received: model.optimizer={optimizer}"
        )
    optimizers = [] if hasattr(optimizer, "optimizers") else updating_optimizers(optimizer)
    if len(optimizers) != 1:
        raise ValueError(
            "`model` must be compiled with one optimizer for all variables. "
            f"Received: model.optimizer={optimizer}"
        )
    return optimizers[0]


def other_optimizers(
    model: keras.Model, layers: Sequence[keras.layers.Layer]
) -> list[keras.optimizers.Optimizer]:
    """Return the optimizers that a model and its layers hold, besides the one of the model.

    Args:
        model: a compiled model.
        layers: all layers inside of it.

    Raises:
        ValueError: if there are any, and one of all is not built, so that it has no state to save.
    """
    found = [
        one for one in held_by([model, *layers]) if isinstance(one, keras.optimizers.Optimizer)
    ]
    inside = [model.optimizer]
    while getattr(inside[-1], "inner_optimizer", None) is not None:
        inside.append(inside[-1].inner_optimizer)
    others = [one for one in found if all(one is not other for other in inside)]
    # Which variables each of several optimizers updates is known to the training step alone.
    for optimizer in [model.optimizer, *others] if others else ():
        if not optimizer.built:
            raise ValueError(
                "A model with several optimizers must have built them: call "
                "`optimizer.build(variables)` with the variables that each updates. "
                f"Received: {optimizer.name}={optimizer}, not built"
            )
    return others


def held_by(holders: Sequence[Any]) -> Iterator[Any]:
    """Yield all values of the attributes of some objects, those inside of containers, too."""
    waiting = [value for holder in holders for value in vars(holder).values()]
    known: set[int] = set()
    while waiting:
        value = waiting.pop()
        if id(value) in known:
            continue
        known.add(id(value))
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        else:
            yield value


def build(model: keras.Model, batch: Any) -> None:
    """Build a model, its loss, its metrics and its optimizer, unless that is done.

    What is left unbuilt Keras would build in the first training, which would then not be like the
    others.

    Args:
        model: a compiled model.
        batch: a batch of training data.

    Raises:
        ValueError: if a layer cannot be built.
    """
    parts = [*model._flatten_layers(), model._compile_loss, model._compile_metrics]
    if not all(part.built for part in parts if part is not None):
        try:
            model._symbolic_build(data_batch=batch)
        except Exception as error:
            # A model with a training step of its own may have no `call` to be built by.
            if not all(layer.built for layer in model._flatten_layers(include_self=False)):
                raise ValueError(
                    "`model` must be built, or must be of a kind that Keras can build from data. "
                    f"Call it on a batch first. Received: model={model}"
                ) from error
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
