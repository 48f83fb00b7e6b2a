"""Gradients of models, and training steps written out by hand, as users of each backend write them.

`loss_of(y, prediction)` is the loss; the mean squared error unless it is given.
"""

import keras


def mean_squared_error(y, prediction):
    return keras.ops.mean((prediction - y) ** 2)


def gradients_of(model, x, y, loss_of=mean_squared_error):
    """One tensor for each of the model's trainable variables."""
    return loss_and_gradients(model, x, y, loss_of)[1]


def loss_and_gradients(model, x, y, loss_of=mean_squared_error):
    return {
        "tensorflow": _by_a_tape,
        "jax": _by_transformation,
        "torch": _by_backward,
    }[keras.backend.backend()](model, x, y, loss_of)


def _by_a_tape(model, x, y, loss_of):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    return loss, tape.gradient(loss, model.trainable_variables)


def _by_transformation(model, x, y, loss_of):
    weights = [v.value for v in model.trainable_variables]
    (loss, _), gradients = _stateless(model, loss_of)(weights, _others(model), x, y)
    return loss, gradients


def _by_backward(model, x, y, loss_of):
    model.zero_grad()
    loss = loss_of(keras.ops.convert_to_tensor(y), model(x, training=True))
    loss.backward()
    return loss.detach(), [v.value.grad for v in model.trainable_variables]


def _others(model):
    return [v.value for v in model.non_trainable_variables]


def _stateless(model, loss_of):
    """A function that returns loss and values of the other variables, and gradients."""
    import jax

    def loss_and_others(weights, others, x, y):
        prediction, others = model.stateless_call(weights, others, x, training=True)
        return loss_of(y, prediction), others

    return jax.value_and_grad(loss_and_others, has_aux=True)


class CustomModel(keras.Model):
    """With a training step of its own.

    If it makes `several` updates there is one for each column of the targets.
    """

    several = False

    def train_step(self, *arguments):
        if keras.backend.backend() == "jax":
            return self._stateless_step(*arguments)
        return self._step(*arguments)

    def _step(self, data):
        for part in self._parts(*data):
            loss, gradients = loss_and_gradients(self, *part, self._loss)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}

    def _stateless_step(self, state, data):
        weights, others, own, metrics = state
        for part in self._parts(*data):
            (loss, others), gradients = _stateless(self, self._loss)(weights, others, *part)
            weights, own = self.optimizer.stateless_apply(own, gradients, weights)
        return {"loss": loss}, (weights, others, own, metrics)

    def _parts(self, x, y):
        return [(x, y[:, i : i + 1]) for i in range(y.shape[1])] if self.several else [(x, y)]

    def _loss(self, y, prediction):
        return self.compute_loss(y=y, y_pred=prediction)


def custom_step(model, optimizer, in_graph=False):
    """A function that takes a step with inputs `x` and targets `y`."""

    def step(x, y):
        gradients = gradients_of(model, x, y)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    if not in_graph:
        return step
    return {"tensorflow": _in_a_function, "jax": _in_a_jit}[keras.backend.backend()](
        step, model, optimizer
    )


def _in_a_function(step, model, optimizer):
    import tensorflow as tf

    return tf.function(step)


def _in_a_jit(step, model, optimizer):
    import jax

    @jax.jit
    def stateless_step(weights, others, own, x, y):
        (_, others), gradients = _stateless(model, mean_squared_error)(weights, others, x, y)
        weights, own = optimizer.stateless_apply(own, gradients, weights)
        return [*weights, *others, *own]

    def stateful_step(x, y):
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
        values = stateless_step(*([v.value for v in group] for group in groups), x, y)
        for variable, value in zip([v for group in groups for v in group], values):
            variable.assign(value)

    return stateful_step
