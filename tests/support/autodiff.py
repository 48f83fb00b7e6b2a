"""Gradients of models and custom training steps, as users of each backend write them.

The argument `loss_of` is a function of targets and predictions that returns the loss.
"""

import keras


def mean_squared_error(y, prediction):
    return keras.ops.mean((prediction - y) ** 2)


def gradients_of(model, x, y, loss_of=mean_squared_error):
    """Return the gradients of the loss, a tensor for each trainable variable of the model."""
    return loss_and_gradients(model, x, y, loss_of)[1]


def loss_and_gradients(model, x, y, loss_of=mean_squared_error):
    """Return the loss and its gradients, computed by the backend's automatic differentiation."""
    return {
        "tensorflow": _by_a_tape,
        "jax": _by_transformation,
        "torch": _by_backward,
    }[keras.backend.backend()](model, x, y, loss_of)


def _by_a_tape(model, x, y, loss_of):
    """Compute loss and gradients with a `tf.GradientTape`."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    return loss, tape.gradient(loss, model.trainable_variables)


def _by_transformation(model, x, y, loss_of):
    """Compute loss and gradients with `jax.value_and_grad`."""
    weights = [v.value for v in model.trainable_variables]
    (loss, _), gradients = _stateless(model, loss_of)(weights, _others(model), x, y)
    return loss, gradients


def _by_backward(model, x, y, loss_of):
    """Compute loss and gradients with PyTorch's `backward`."""
    model.zero_grad()
    loss = loss_of(keras.ops.convert_to_tensor(y), model(x, training=True))
    loss.backward()
    return loss.detach(), [v.value.grad for v in model.trainable_variables]


def _others(model):
    """Return the values of the non-trainable variables."""
    return [v.value for v in model.non_trainable_variables]


def _stateless(model, loss_of):
    """Return a JAX function that computes loss and gradients of the model.

    It takes the values of trainable and of non-trainable variables, inputs and targets, and
    returns ((loss, new values of the non-trainable variables), gradients).
    """
    import jax

    def loss_and_others(weights, others, x, y):
        prediction, others = model.stateless_call(weights, others, x, training=True)
        return loss_of(y, prediction), others

    return jax.value_and_grad(loss_and_others, has_aux=True)


class CustomModel(keras.Model):
    """A model with a custom `train_step`.

    If `several` is true a training step makes one update for each column of the targets.
    """

    several = False

    def train_step(self, *arguments):
        if keras.backend.backend() == "jax":
            return self._stateless_step(*arguments)
        return self._step(*arguments)

    def _step(self, data):
        """Make the updates of a training step on TensorFlow or PyTorch."""
        for part in self._parts(*data):
            loss, gradients = loss_and_gradients(self, *part, self._loss)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        return {"loss": loss}

    def _stateless_step(self, state, data):
        """Make the updates of a training step on JAX; return the logs and the new state."""
        weights, others, own, metrics = state
        for part in self._parts(*data):
            (loss, others), gradients = _stateless(self, self._loss)(weights, others, *part)
            weights, own = self.optimizer.stateless_apply(own, gradients, weights)
        return {"loss": loss}, (weights, others, own, metrics)

    def _parts(self, x, y):
        """Return the inputs and targets of each update of a training step."""
        return [(x, y[:, i : i + 1]) for i in range(y.shape[1])] if self.several else [(x, y)]

    def _loss(self, y, prediction):
        return self.compute_loss(y=y, y_pred=prediction)


def custom_step(model, optimizer, in_graph=False):
    """Return a function of inputs and targets that trains the model for one step.

    With `in_graph` the function is compiled by `tf.function` or `jax.jit`.
    """

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
    """Return a function that takes the step within `jax.jit` and assigns the new values."""
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
